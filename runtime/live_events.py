# SPDX-License-Identifier: Apache-2.0
"""What live transcription reports: each event with its times, and how to write it as one line of JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class LiveEvent:
    """One event. Finals and silences follow each other without a gap: together they are all of the audio.

    A final never reopens. Within an utterance `committed` only grows, and is how its final text begins.
    """

    type: Literal["partial", "final", "silence"]
    utterance_id: int | None  # counts from 1; None: silence
    text: str  # of a partial: `committed`, and what may still change
    t0: float  # seconds from the beginning of the audio
    t1: float  # of a partial: how far it has been read
    committed: str = ""  # of a partial; of a final it is all of `text`
    translation: str | None = None  # of a final, when transcript and translation are asked for together
    delay: float = 0.0  # seconds from the moment when `t1` was spoken to this event
    backlog: float = 0.0  # seconds of audio that wait to be looked at

    def to_object(self) -> dict[str, Any]:
        """The keys that a script reads; times to the millisecond."""
        found: dict[str, Any] = {
            "type": self.type,
            "utterance_id": self.utterance_id,
            "text": self.text,
            "t0": round(self.t0, 3),
            "t1": round(self.t1, 3),
        }
        if self.type == "silence":
            return found
        if self.type == "partial":
            found["committed"] = self.committed
        if self.translation is not None:
            found["translation"] = self.translation
        return found | {"delay": round(self.delay, 3), "backlog": round(self.backlog, 3)}
