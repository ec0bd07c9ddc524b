# SPDX-License-Identifier: Apache-2.0
"""Transcripts as text: plain, SubRip, WebVTT, JSON and JSON lines, piece by piece or whole."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal, cast, get_args

from .errors import InputError

TranscriptFormat = Literal["txt", "srt", "vtt", "json", "jsonl"]
TRANSCRIPT_FORMATS: tuple[TranscriptFormat, ...] = get_args(TranscriptFormat)


@dataclass(frozen=True, slots=True)
class Segment:
    """One utterance. Times are the utterance's own, not the words'."""

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


class TranscriptWriter:
    """One transcript in one format: `begin`, `add` each segment and `end` give its text in order.

    All formats but json can be read at any time: what has been given out is a transcript of the segments so
    far. A json transcript is one object, and comes from `end`.
    """

    def __init__(self, file_format: TranscriptFormat) -> None:
        self._format = file_format
        self._n_cues = 0
        self._kept: list[Segment] = []  # of json alone

    def begin(self) -> str:
        """What stands before the first segment."""
        return "WEBVTT\n" if self._format == "vtt" else ""

    def add(self, segment: Segment) -> str:
        """The next segment; nothing where a format has no place for it, as for a cue without words."""
        if self._format == "json":
            self._kept.append(segment)
            return ""
        if self._format == "jsonl":
            return json.dumps(asdict(segment), ensure_ascii=False) + "\n"
        if self._format == "txt":
            return "".join(f"{line}\n" for line in (segment.text, segment.translation) if line)
        if not segment.text:
            return ""
        self._n_cues += 1
        times = f"{_clock(segment.t0, self._format)} --> {_clock(segment.t1, self._format)}"
        cue = f"{times}\n{_cue_text(segment, self._format)}\n"
        if self._format == "vtt":
            return f"\n{cue}"
        return f"{self._n_cues}\n{cue}" if self._n_cues == 1 else f"\n{self._n_cues}\n{cue}"

    def end(self) -> str:
        """What stands after the last segment."""
        if self._format != "json":
            return ""
        text = "\n".join(s.text for s in self._kept)
        whole = {"text": text, "segments": [asdict(s) for s in self._kept]}
        return json.dumps(whole, ensure_ascii=False) + "\n"


def write(segments: Iterable[Segment], file_format: TranscriptFormat) -> str:
    """A whole transcript as text; it ends with a newline unless it is empty."""
    writer = TranscriptWriter(file_format)
    return "".join([writer.begin(), *map(writer.add, segments), writer.end()])


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
