# SPDX-License-Identifier: Apache-2.0
"""What a form of `/v1/audio/…` asks for: fields as OpenAI's reference has them, checked.

Unknown fields are ignored. What would change the answer and cannot be done is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from ..runtime.errors import InputError
from ..runtime.segments import SegmentRules
from ..runtime.speech_task import Task
from .errors import Refusal
from .multipart import Part, only

AnswerFormat = Literal["json", "text", "srt", "vtt", "verbose_json"]

_FORMATS: tuple[AnswerFormat, ...] = get_args(AnswerFormat)
_STREAMED: tuple[AnswerFormat, ...] = ("json", "text")
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}")
_MOST_TEXT = 1 << 16  # bytes of a field that is no file
_CHUNKING = "chunking_strategy"


@dataclass(frozen=True, slots=True)
class Recording:
    """A request that has been checked, but for the sound itself."""

    data: bytes  # the file
    task: Task
    rules: SegmentRules
    answer_format: AnswerFormat
    stream: bool
    temperature: float
    language: str | None  # as the client says; nothing depends on it
    logprobs: bool


class _Vad(BaseModel):
    """How to cut: `{"type": "server_vad", …}`. What is not set is as live and `transcribe` have it."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    type: Literal["server_vad"]
    prefix_padding_ms: int | None = None
    silence_duration_ms: int | None = None
    threshold: float | None = None  # read, without effect: our detector has no such number


def recording_of(parts: Sequence[Part], *, translate: bool) -> Recording:
    """Check a form.

    Args:
        parts: of the form.
        translate: to English, rather than to what is spoken.

    Raises:
        Refusal: 400, what it asks for cannot be done, or a field is missing or there twice.
    """
    fields = _Fields(parts)
    file = only(parts, "file")
    if file is None:
        raise Refusal(400, "file: is missing", code="missing_required_parameter", param="file")
    for name in ("known_speaker_names", "known_speaker_references"):
        if fields.several(name):
            raise _unsupported(name, "is not supported: speakers are not told apart")
    answer_format, stream = _format(fields), fields.flag("stream")
    if stream and answer_format not in _STREAMED:
        raise _unsupported("stream", f"is for the formats {' and '.join(_STREAMED)}")
    included = fields.several("include")
    if any(one != "logprobs" for one in included):
        raise _unsupported("include", "only logprobs is supported")
    if included and answer_format != "json":
        raise _unsupported("include", "logprobs are for the format json")
    for one in fields.several("timestamp_granularities"):
        if one != "segment":
            raise _unsupported("timestamp_granularities", "only segment is supported")
    words = [text for text in (fields.one("prompt"), *fields.several("keywords")) if text and text.strip()]
    return Recording(
        data=file.data,
        task=Task(translate="English" if translate else None, words=", ".join(words) or None),
        rules=_rules(fields),
        answer_format=answer_format,
        stream=stream,
        temperature=_temperature(fields),
        language=_language(fields),
        logprobs=bool(included),
    )


class _Fields:
    """The parts of a form that are text."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = [part for part in parts if part.name != "file"]
        for part in self._parts:
            if len(part.data) > _MOST_TEXT:
                raise _invalid(part.name, f"has {len(part.data):,} bytes, expected at most {_MOST_TEXT:,}")

    def one(self, name: str) -> str | None:
        """A field's text; None without one, as with an empty one."""
        part = only(self._parts, name)
        return (part.text or None) if part is not None else None

    def several(self, name: str) -> list[str]:
        """A field that may be there more than once, with brackets behind its name or without."""
        return [part.text for part in self._parts if part.name in (name, f"{name}[]")]

    def inside(self, name: str) -> dict[str, str]:
        """An object's fields, each a part `name[key]`."""
        start = f"{name}["
        names = dict.fromkeys(p.name for p in self._parts if p.name.startswith(start) and p.name[-1] == "]")
        return {found[len(start) : -1]: self.one(found) or "" for found in names}

    def flag(self, name: str) -> bool:
        """A field that is true or false; false without one."""
        text = self.one(name)
        if text is not None and text.lower() not in _BOOLEANS:
            raise _invalid(name, "expected true or false")
        return text is not None and _BOOLEANS[text.lower()]


def _format(fields: _Fields) -> AnswerFormat:
    found = fields.one("response_format") or "json"
    if found == "diarized_json":
        raise _unsupported("response_format", "diarized_json is not supported: speakers are not told apart")
    if found not in _FORMATS:
        raise _invalid("response_format", f"expected one of {', '.join(_FORMATS)}")
    return found


def _temperature(fields: _Fields) -> float:
    try:
        found = float(fields.one("temperature") or 0)
    except ValueError:
        found = math.nan
    if not 0 <= found <= 1:  # false for NaN too
        raise _invalid("temperature", "expected a number from 0 to 1")
    return found


def _language(fields: _Fields) -> str | None:
    found = fields.one("language")
    if found is not None and not _LANGUAGE.fullmatch(found):
        raise _invalid("language", "expected a code of ISO 639, such as en")
    return None if found is None else found.lower()


def _rules(fields: _Fields) -> SegmentRules:
    text, inside = fields.one(_CHUNKING), fields.inside(_CHUNKING)
    if text in (None, "auto") and not inside:
        return SegmentRules()
    try:
        raw: Any = inside if text is None else from_json(text, allow_inf_nan=False)
        vad = _Vad.model_validate(raw)
    except (ValueError, ValidationError):
        what = "expected auto, or server_vad with prefix_padding_ms and silence_duration_ms"
        raise _invalid(_CHUNKING, what) from None
    given = {"pre_roll_s": vad.prefix_padding_ms, "pause_s": vad.silence_duration_ms}
    try:
        return SegmentRules(**{name: ms / 1000 for name, ms in given.items() if ms is not None})
    except InputError as exc:
        raise _invalid(_CHUNKING, str(exc)) from None


def _invalid(name: str, what: str) -> Refusal:
    return Refusal(400, f"{name}: {what}", code="invalid_value", param=name)


def _unsupported(name: str, what: str) -> Refusal:
    return Refusal(400, f"{name}: {what}", code="unsupported_value", param=name)
