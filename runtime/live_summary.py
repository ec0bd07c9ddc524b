# SPDX-License-Identifier: Apache-2.0
"""What a live session amounts to: how much was heard, how late words came, what reading them took."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .reader import Reading
from .sources import Source


@dataclass(slots=True)
class Delays:
    """Seconds from a moment in the audio to the event that answers it."""

    found: array[float] = field(default_factory=lambda: array("d"))  # hours of it are some hundred kB

    def to_object(self) -> dict[str, float | int | None]:
        """Median and 95th percentile; None where nothing was measured."""
        if not self.found:
            return {"n": 0, "median": None, "p95": None}
        median, p95 = np.percentile(self.found, [50, 95])
        return {"n": len(self.found), "median": round(float(median), 3), "p95": round(float(p95), 3)}

    def __str__(self) -> str:
        of = self.to_object()
        return "-" if of["n"] == 0 else f"{of['median']:.2f} s (p95 {of['p95']:.2f} s)"


class Summary:
    """Counts and delays of one session, true at any time.

    `first_partial`: from the beginning of speech to the first text. `commit`: of each token, from the end of
    the audio in which a reading first had it to the moment it was settled. `final`: from the end of the
    utterance, its tail included, to its final text; what is left of the pause that ends it is part of that.
    """

    def __init__(self, sample_rate: int) -> None:
        self.sample_rate = sample_rate
        self.n_taken = self.n_covered = self.n_speech = 0  # samples: of the source, in events, in utterances
        self.n_overruns = self.n_underruns = 0  # times the device lost input, or gave silence in its place
        self.n_utterances = self.n_partials = self.n_words = 0
        self.n_committed_changes = 0  # events that took back what was committed: none, by construction
        self.n_overruled = 0  # settled tokens that the last reading alone would have read otherwise
        self.n_loops = 0  # readings that went round in circles and were cut
        self.n_readings = self.n_passes = self.draft_n = self.draft_n_accepted = 0
        self.reading_s = self.worst_backlog_s = 0.0
        self.delays = {"first_partial": Delays(), "commit": Delays(), "final": Delays()}

    def take_block(self, n_samples: int, source: Source) -> None:
        """Audio was taken from the source."""
        self.n_taken += n_samples
        self.worst_backlog_s = max(self.worst_backlog_s, source.backlog_s())
        self.n_overruns, self.n_underruns = source.overruns, source.underruns

    def take_reading(self, reading: Reading, seconds: float) -> None:
        """An utterance was read, in part or to its end."""
        self.n_readings += 1
        self.reading_s += seconds
        self.n_passes += reading.n_passes
        self.draft_n += reading.draft_n
        self.draft_n_accepted += reading.draft_n_accepted
        self.n_loops += reading.finish == "loop"

    def take_delays(self, what: str, seconds: Iterable[float]) -> None:
        """Delays of one kind; what comes faster than it was spoken, as from a pipe, has none."""
        self.delays[what].found.extend(max(0.0, s) for s in seconds)

    def take_final(self, n_samples: int, text: str, n_overruled: int) -> None:
        """An utterance is closed."""
        self.n_utterances += 1
        self.n_speech += n_samples
        self.n_words += len(text.split())
        self.n_overruled += n_overruled

    def to_object(self) -> dict[str, Any]:
        """For scripts: seconds, counts, delays."""
        seconds = self.n_taken / self.sample_rate
        return {
            "type": "summary",
            "seconds": round(seconds, 3),
            "speech_seconds": round(self.n_speech / self.sample_rate, 3),
            "utterances": self.n_utterances,
            "words": self.n_words,
            "partials": self.n_partials,
            "committed_word_changes": self.n_committed_changes,
            "overruled_tokens": self.n_overruled,
            "loops_cut": self.n_loops,
            "dropped_samples": self.n_taken - self.n_covered,
            "overruns": self.n_overruns,
            "underruns": self.n_underruns,
            "delays": {what: delays.to_object() for what, delays in self.delays.items()},
            "worst_backlog": round(self.worst_backlog_s, 3),
            "readings": self.n_readings,
            "reading_seconds": round(self.reading_s, 3),
            "real_time_factor": round(self.reading_s / seconds, 4) if seconds else None,
            "passes": self.n_passes,
            "draft_n": self.draft_n,
            "draft_n_accepted": self.draft_n_accepted,
        }

    def lines(self, *, paced: bool = True) -> Sequence[str]:
        """For people. Delays mean nothing where audio did not come at its own pace."""
        seconds = self.n_taken / self.sample_rate
        found = [
            f"{seconds:.1f} s heard, {_count(self.n_utterances, 'utterance')}, {_count(self.n_words, 'word')}"
            + (f", {self.n_overruns} overruns: the device lost input" if self.n_overruns else "")
            + (f", {self.n_underruns} underruns: it gave silence instead" if self.n_underruns else ""),
        ]
        if paced:
            found.append(
                "delay: "
                + ", ".join(f"{what.replace('_', ' ')} {delays}" for what, delays in self.delays.items())
                + f"; worst backlog {self.worst_backlog_s:.1f} s"
            )
        if self.n_readings and seconds:
            found.append(
                f"{self.n_readings} readings in {self.reading_s:.1f} s "
                f"({self.reading_s / seconds:.2f} of real time), "
                f"{self.draft_n_accepted} of {self.draft_n} drafted tokens held"
            )
        return found


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
