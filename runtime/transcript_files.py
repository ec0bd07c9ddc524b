# SPDX-License-Identifier: Apache-2.0
"""Transcripts as files that grow while the audio is read, and can be gone on with after an interrupt.

    talk.srt.part       every segment so far; renamed to talk.srt, which it replaces, when all is done
    talk.part.jsonl     the journal: what the job is, then a line for each segment; removed when all is done

Each segment is handed to the system before the next one is read: a killed process loses none. A power cut
may lose the last ones, since nothing waits for the disk before the end.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import Any

from .errors import InputError, OutputError
from .files import check_file, reason_of, write_text
from .transcript import TRANSCRIPT_FORMATS, Segment, TranscriptFormat, TranscriptWriter, write

JOURNAL_FORMAT = "pocketphi transcript journal"
JOURNAL_VERSION = 1
_JOURNAL_MAX_BYTES = 64 << 20  # a day of fast speech is under 5 MB
_LINE_MAX_BYTES = 1 << 20
_MOST_S = 1e9  # of a time in a journal; 30 years
_SEGMENT_KEYS = {"t0", "t1", "text", "translation"}


class TranscriptFiles:
    """The growing transcripts of one recording, as a context; leaving it without `finish` keeps the parts."""

    def __init__(
        self,
        folder: Path,
        stem: str,
        formats: Sequence[TranscriptFormat],
        *,
        journal: Mapping[str, Any] | None,
        resume: bool = False,
    ) -> None:
        """Open the parts; final files of an earlier run stay as they are until `finish`.

        Args:
            folder: exists.
            stem: "talk" for talk.srt.
            formats: of json the part is the journal.
            journal: what the job is, JSON values by name, all that must be equal to go on with it; None for
                what cannot be gone on with.
            resume: go on with the journal that is there; without one, begin.

        Raises:
            InputError: the journal that is there is of another job, or damaged.
            OutputError: a part cannot be written.
        """
        self.segments: list[Segment] = []  # done so far; at first, those of the journal
        self.resumed = False  # a journal was there
        self._folder, self._stem, self._formats = folder, stem, tuple(formats)
        self._journal_path = folder / f"{stem}.part.jsonl"
        self._parts: dict[TranscriptFormat, tuple[_Part, TranscriptWriter]] = {}
        self._journal: _Part | None = None
        try:
            self._open(journal, resume)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> TranscriptFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def done_until_s(self) -> float:
        """Where the last segment ends."""
        return self.segments[-1].t1 if self.segments else 0.0

    @property
    def parts(self) -> tuple[Path, ...]:
        """What holds the segments so far, for people to read."""
        return tuple(part.path for part, _ in self._parts.values()) or (self._journal_path,)

    def add(self, segment: Segment) -> None:
        """Append one segment to every part.

        Raises:
            OutputError: one cannot be written: a full disk, for example. It still holds the segments before.
        """
        if self._journal is not None:
            self._journal.append(_line(asdict(segment)))
        self.segments.append(segment)
        for part, writer in self._parts.values():
            part.append(writer.add(segment))

    def finish(self) -> None:
        """All segments are there: the final files appear, the journal goes.

        Raises:
            OutputError: one cannot be written; the parts are still there.
        """
        for part, writer in self._parts.values():
            part.append(writer.end())
            part.sync()
        self.close()
        if "json" in self._formats:
            write_text(self._final("json"), write(self.segments, "json"))
        for file_format, (part, _) in self._parts.items():
            part.rename(self._final(file_format))
        stale = [f"{one}.part" for one in TRANSCRIPT_FORMATS if self.resumed and one not in self._formats]
        for path in (*(self._folder / f"{self._stem}.{ending}" for ending in stale), self._journal_path):
            try:
                path.unlink(missing_ok=True)
            except OSError as exc:
                raise _not_written(path, exc) from None

    def close(self) -> None:
        """Let go of the files. Safe to call twice."""
        for part, _ in self._parts.values():
            part.close()
        if self._journal is not None:
            self._journal.close()

    def _final(self, file_format: TranscriptFormat) -> Path:
        return self._folder / f"{self._stem}.{file_format}"

    def _open(self, journal: Mapping[str, Any] | None, resume: bool) -> None:
        head = {"format": JOURNAL_FORMAT, "version": JOURNAL_VERSION, **(journal or {})}
        found = _read_journal(self._journal_path, head) if resume else None
        if found is not None:
            self.resumed, (self.segments, size) = True, found
            self._journal = _Part(self._journal_path, keep=size)
        elif journal is not None or "json" in self._formats:
            self._journal = _Part(self._journal_path)
            self._journal.append(_line(head))
        for file_format in self._formats:
            if file_format == "json":
                continue
            part, writer = (
                _Part(self._folder / f"{self._stem}.{file_format}.part"),
                TranscriptWriter(file_format),
            )
            self._parts[file_format] = part, writer
            part.append("".join([writer.begin(), *map(writer.add, self.segments)]))


class _Part:
    """A file that only grows; what was appended is with the system when `append` returns."""

    def __init__(self, path: Path, *, keep: int | None = None) -> None:
        """`keep`: go on after this many bytes of what is there; None: a new file."""
        self.path = path
        self._file: FileIO
        self._run(lambda: self._new() if keep is None else self._old(keep))

    def _new(self) -> None:
        self.path.unlink(missing_ok=True)  # not followed if it is a link, not waited for if it is a pipe
        self._file = FileIO(self.path, "xb")
        self._size = 0

    def _old(self, keep: int) -> None:
        self._file = FileIO(self.path, "r+b")
        self._file.truncate(keep)
        self._file.seek(keep)
        self._size = keep

    def append(self, text: str) -> None:
        """Write all of it, or leave the file as it was."""
        self._run(lambda: self._write(text.encode("utf-8")))

    def sync(self) -> None:
        """Wait for the disk."""
        self._run(lambda: os.fsync(self._file.fileno()))

    def close(self) -> None:
        """Safe to call twice."""
        self._file.close()

    def rename(self, path: Path) -> None:
        """Put it where `path` is; both are in one folder."""
        try:
            self.path.replace(path)
        except OSError as exc:
            raise _not_written(path, exc) from None

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(self._size)  # half a cue is none
            self._file.seek(self._size)
            raise
        self._size += len(data)

    def _run(self, step: Callable[[], object]) -> None:
        try:
            step()
        except (OSError, ValueError) as exc:
            raise _not_written(self.path, exc) from None


def _not_written(path: Path, exc: OSError | ValueError) -> OutputError:
    reason = "the text is not Unicode" if isinstance(exc, UnicodeEncodeError) else reason_of(exc)
    return OutputError(f"{str(path)[:200]!r}: cannot be written: {reason}")


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


def _read_journal(path: Path, head: Mapping[str, Any]) -> tuple[list[Segment], int] | None:
    """The segments of a journal, and its length in bytes without a last line that was only half written.

    None: there is no journal, or its first line is not whole.

    Raises:
        InputError: it is of another job than `head`, or damaged.
    """
    if not os.path.lexists(path):
        return None
    check_file(path)
    try:
        with path.open("rb") as file:
            raw = file.read(_JOURNAL_MAX_BYTES + 1)
    except OSError as exc:
        raise InputError(f"{path}: cannot be read: {exc.strerror}") from None
    if len(raw) > _JOURNAL_MAX_BYTES:
        raise InputError(f"{path}: is over {_JOURNAL_MAX_BYTES} bytes long: no journal of ours")
    size = raw.rfind(b"\n") + 1
    if size == 0:
        return None
    first, *rest = raw[: size - 1].split(b"\n")
    _check_head(_object(first, f"{path}: line 1"), head, path)
    segments: list[Segment] = []
    end = 0.0
    for i, line in enumerate(rest, 2):
        segment = _segment(_object(line, f"{path}: line {i}"), end, f"{path}: line {i}")
        segments.append(segment)
        end = segment.t1
    return segments, size


def _object(line: bytes, where: str) -> dict[str, Any]:
    """One line of a journal."""
    if len(line) > _LINE_MAX_BYTES:
        raise InputError(f"{where}: is over {_LINE_MAX_BYTES} bytes long")
    try:
        found = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):  # ValueError: not UTF-8, not JSON, a number of thousands of digits
        raise InputError(f"{where}: is not JSON, expected one object a line") from None
    if not isinstance(found, dict):
        raise InputError(f"{where}: is a JSON {type(found).__name__}, expected an object")
    return found


def _check_head(found: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    """Whether a journal is of this job; names the first thing that differs."""
    plain = json.loads(json.dumps(wanted))  # tuples become lists, as they are in the file
    for key in [*plain, *(k for k in found if k not in plain)]:
        if key not in found or key not in plain or found[key] != plain[key]:
            was, now = (_brief(of[key]) if key in of else "not given" for of in (found, plain))
            raise InputError(f"{path}: is of another job: {key[:40]!r} is {was}, expected {now}")


def _brief(value: object) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 200 else text[:200] + "…"


def _segment(found: Mapping[str, Any], earliest: float, where: str) -> Segment:
    """A segment from its line; no earlier than the one before it ended."""
    if set(found) != _SEGMENT_KEYS:
        raise InputError(f"{where}: has {sorted(found)!s:.100}, expected {sorted(_SEGMENT_KEYS)}")
    times = []
    for key in ("t0", "t1"):
        value = found[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not earliest <= value <= _MOST_S:
            shown = f"{value:g}" if isinstance(value, float) else f"{str(value)[:40]!r}"
            raise InputError(f"{where}: {key} is {shown}, expected seconds, from {earliest:g} on")
        times.append(float(value))
        earliest = value
    texts = (found["text"], "" if found["translation"] is None else found["translation"])
    if not all(isinstance(text, str) and _is_unicode(text) for text in texts):
        raise InputError(f"{where}: text and translation are not both text")
    return Segment(times[0], times[1], found["text"], found["translation"])


def _is_unicode(text: str) -> bool:
    """Half a surrogate pair is JSON, and no text."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def source_of(path: Path) -> dict[str, Any]:
    """What a journal knows a recording by: its name, its length in bytes, and the SHA-256 of all of it.

    Raises:
        InputError: it cannot be read.
    """
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
                size += len(piece)
    except (OSError, ValueError) as exc:
        raise InputError(f"{path}: cannot be read: {reason_of(exc)}") from None
    return {"source": path.name, "bytes": size, "sha256": digest.hexdigest()}


def is_finished(folder: Path, stem: str, formats: Sequence[TranscriptFormat], source: Path) -> bool:
    """Whether all final files are there, newer than the recording, and no job is under way."""
    try:
        since = source.stat().st_mtime_ns
        return not (folder / f"{stem}.part.jsonl").exists() and all(
            (folder / f"{stem}.{one}").stat().st_mtime_ns >= since for one in formats
        )
    except (OSError, ValueError):
        return False
