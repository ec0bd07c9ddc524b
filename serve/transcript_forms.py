# SPDX-License-Identifier: Apache-2.0
"""A recording's utterances as OpenAI's reference answers them: JSON of two kinds, text, subtitles, events."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response

from ..runtime.reader import Reading
from ..runtime.tokenizer import Tokenizer
from ..runtime.transcript import Segment, TranscriptFormat, write
from .answers import json_response
from .recording import AnswerFormat, Recording

_TEXTS: dict[AnswerFormat, tuple[TranscriptFormat, str]] = {  # how they are written, and what they are
    "text": ("txt", "text/plain"),
    "srt": ("srt", "text/plain"),
    "vtt": ("vtt", "text/vtt"),
}
_FRAMES_PER_S = 100  # in which Whisper's `seek` counts
_UNKNOWN = "und"  # ISO 639-2: a language that nobody has named


@dataclass(frozen=True, slots=True)
class Utterance:
    """One utterance, read."""

    segment: Segment
    reading: Reading


def joined(texts: Sequence[str]) -> str:
    """The text of several utterances."""
    return " ".join(text for text in texts if text)


class TranscriptForm:
    """The answer to one request. Utterances without words are no part of it."""

    def __init__(self, recording: Recording, tokenizer: Tokenizer) -> None:
        self._recording, self._tokenizer = recording, tokenizer
        self._said: list[Utterance] = []

    def delta(self, utterance: Utterance) -> dict[str, Any] | None:
        """The event of an utterance; None of one without words. All deltas joined are the text."""
        text = utterance.reading.text
        if not text:
            return None
        found = {"type": "transcript.text.delta", "delta": f" {text}" if self._said else text}
        self._said.append(utterance)
        return found | self._logprobs([utterance])

    def done(self) -> dict[str, Any]:
        """The last event, after all deltas."""
        readings = [one.reading for one in self._said]
        n_in, n_out = sum(r.prompt_tokens for r in readings), sum(len(r.token_ids) for r in readings)
        return {
            "type": "transcript.text.done",
            "text": self._text(),
            **self._logprobs(self._said),
            "usage": {
                "type": "tokens",
                "input_tokens": n_in,
                "output_tokens": n_out,
                "total_tokens": n_in + n_out,
            },
        }

    def whole(self, utterances: Sequence[Utterance], seconds: float) -> Response:
        """The answer in one.

        Args:
            utterances: all of them.
            seconds: that the recording lasts.
        """
        self._said = [one for one in utterances if one.reading.text]
        wanted = self._recording.answer_format
        if wanted in _TEXTS:
            kind, media_type = _TEXTS[wanted]
            return Response(write([one.segment for one in self._said], kind), media_type=media_type)
        usage = {"usage": {"type": "duration", "seconds": round(seconds, 3)}}
        if wanted == "json":
            return json_response({"text": self._text()} | self._logprobs(self._said) | usage)
        translated = self._recording.task.translate is not None
        found = {
            "task": "translate" if translated else "transcribe",
            "language": "english" if translated else self._recording.language or _UNKNOWN,
            "duration": round(seconds, 3),
            "text": self._text(),
            "segments": [self._segment(i, one) for i, one in enumerate(self._said)],
        }
        return json_response(found | usage)

    def _text(self) -> str:
        return joined([one.reading.text for one in self._said])

    def _segment(self, number: int, one: Utterance) -> dict[str, Any]:
        """Whisper's fields. An utterance is read alone, so it begins where its window does."""
        raw, values = one.reading.text.encode("utf-8"), one.reading.logprobs
        return {
            "id": number,
            "seek": round(one.segment.t0 * _FRAMES_PER_S),
            "start": round(one.segment.t0, 3),
            "end": round(one.segment.t1, 3),
            "text": one.reading.text,
            "tokens": list(one.reading.token_ids),
            "temperature": self._recording.temperature,
            "avg_logprob": sum(map(_finite, values)) / len(values) if values else 0.0,
            "compression_ratio": len(raw) / len(zlib.compress(raw)),
            "no_speech_prob": 0.0,  # what the detector takes for no speech is no segment
        }

    def _logprobs(self, utterances: Sequence[Utterance]) -> dict[str, Any]:
        """Of all tokens, where they were asked for."""
        if not self._recording.logprobs:
            return {}
        found = []
        for one in utterances:
            for token, value in zip(one.reading.token_ids, one.reading.logprobs, strict=True):
                raw = self._tokenizer.token_bytes(token)
                text = raw.decode("utf-8", "replace")
                found.append({"token": text, "logprob": _finite(value), "bytes": list(raw)})
        return {"logprobs": found}


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # JSON has no infinity
