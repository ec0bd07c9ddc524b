# SPDX-License-Identifier: Apache-2.0
"""Transcripts as files: plain text, SubRip, WebVTT and JSON, from segments with times."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, cast, get_args

from .errors import InputError

TranscriptFormat = Literal["txt", "srt", "vtt", "json"]
TRANSCRIPT_FORMATS: tuple[TranscriptFormat, ...] = get_args(TranscriptFormat)


@dataclass(frozen=True, slots=True)
class Segment:
    """One pass over the audio. Times are the pass's own, not the words'."""

    t0: float  # seconds from the beginning of the clip
    t1: float
    text: str
    translation: str | None = None  # when transcript and translation were asked for together


def parse_formats(text: str, *, to_files: bool) -> tuple[TranscriptFormat, ...]:
    """Formats from a list with commas.

    Raises:
        InputError: an unknown one, or several for one stream.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in TRANSCRIPT_FORMATS:
            raise InputError(f"format {name[:40]!r} is not known, expected {', '.join(TRANSCRIPT_FORMATS)}")
    if len(names) > 1 and not to_files:
        raise InputError(f"{len(names)} formats for standard output, expected one (or a folder with -o)")
    return cast("tuple[TranscriptFormat, ...]", names)


def write(segments: Sequence[Segment], file_format: TranscriptFormat) -> str:
    """A whole transcript as text; it ends with a newline unless it is empty."""
    if file_format == "json":
        text = "\n".join(s.text for s in segments)
        return (
            json.dumps({"text": text, "segments": [asdict(s) for s in segments]}, ensure_ascii=False) + "\n"
        )
    if file_format == "txt":
        return "".join(f"{line}\n" for s in segments for line in (s.text, s.translation) if line)
    spoken = [s for s in segments if s.text]
    cues = [
        f"{_clock(s.t0, file_format)} --> {_clock(s.t1, file_format)}\n{_cue_text(s, file_format)}\n"
        for s in spoken
    ]
    if file_format == "vtt":
        return "WEBVTT\n" + "".join(f"\n{cue}" for cue in cues)
    return "\n".join(f"{i}\n{cue}" for i, cue in enumerate(cues, 1))


def _cue_text(segment: Segment, file_format: TranscriptFormat) -> str:
    """A cue ends at an empty line, and WebVTT reads markup: neither may come from the words."""
    lines = [*segment.text.splitlines(), *(segment.translation or "").splitlines()]
    text = "\n".join(line for line in lines if line.strip())
    if file_format == "vtt":
        return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return text.replace("-->", "→")


def _clock(seconds: float, file_format: TranscriptFormat) -> str:
    """00:00:00,000 for SubRip, 00:00:00.000 for WebVTT."""
    ms = round(seconds * 1000)
    mark = "," if file_format == "srt" else "."
    return f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02}{mark}{ms % 1000:03}"
