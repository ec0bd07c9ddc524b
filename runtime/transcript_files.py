# SPDX-License-Identifier: Apache-2.0
"""Transcripts as files that grow while the audio is read, and can be gone on with after an interrupt.

    talk.srt.part       every segment so far; renamed to talk.srt, which it replaces, when all is done
    talk.part.jsonl     the journal: what the job is, then a line for each segment; removed when all is done
    .talk.done          the record: what the job was that is done, and in which formats

One process writes them at a time. Each segment is handed to the system before the next one is read: a killed
process loses none. A power cut may lose the last ones, since nothing waits for the disk before the end.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .errors import InputError, OutputError
from .files import check_file, is_unicode, read_text, reason_of, write_text
from .growing_file import GrowingFile, check_free, not_written
from .journal_lines import check_same_job, json_object
from .transcript import TRANSCRIPT_FORMATS, Segment, TranscriptFormat, TranscriptWriter, write

JOURNAL_FORMAT = "pocketphi transcript journal"
JOURNAL_VERSION = 1
RECORD_FORMAT = "pocketphi transcript record"
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
            InUseError: another process writes them.
            OutputError: a part cannot be written.
        """
        self.segments: list[Segment] = []  # done so far; at first, those of the journal
        self.resumed = False  # a journal was there
        self._folder, self._stem, self._formats = folder, stem, tuple(formats)
        self._journal_path = folder / f"{stem}.part.jsonl"
        self._parts: dict[TranscriptFormat, tuple[GrowingFile, TranscriptWriter]] = {}
        self._journal: GrowingFile | None = None
        self._head = journal
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
        if "json" in self._formats:
            write_text(self._final("json"), write(self.segments, "json"))
        for file_format, (part, _) in self._parts.items():
            part.rename(self._final(file_format))
        gone = [
            self._folder / f"{self._stem}.{one}.part"
            for one in TRANSCRIPT_FORMATS
            if self.resumed and one not in self._formats
        ]
        if self._journal is not None:  # one of somebody else's stays
            if self._head is not None:
                self._record(self._head)
            self._journal.close()
            gone.append(self._journal_path)
        for path in gone:
            try:
                path.unlink(missing_ok=True)
            except OSError as exc:
                raise not_written(path, exc) from None

    def close(self) -> None:
        """Let go of the files. Safe to call twice."""
        for part, _ in self._parts.values():
            part.close()
        if self._journal is not None:
            self._journal.close()

    def _final(self, file_format: TranscriptFormat) -> Path:
        return self._folder / f"{self._stem}.{file_format}"

    def _record(self, job: Mapping[str, Any]) -> None:
        """Write down what is done, after what was done before of the same job."""
        try:
            done = _recorded(self._folder, self._stem, job)
        except InputError:  # of another job, or not ours: its files are not of this job
            done = set()
        formats = sorted(done | set(self._formats))
        text = _line({"format": RECORD_FORMAT, "version": JOURNAL_VERSION, "formats": formats, **job})
        write_text(_record_path(self._folder, self._stem), text)

    def _open(self, journal: Mapping[str, Any] | None, resume: bool) -> None:
        head = _head(journal)
        found = _read_journal(self._journal_path, head) if resume else None
        if found is not None:
            self.resumed, (self.segments, size) = True, found
            self._journal = GrowingFile(self._journal_path, keep=size)
        elif journal is not None or "json" in self._formats:
            self._journal = GrowingFile(self._journal_path)
            self._journal.append(_line(head))
        for file_format in self._formats:
            if file_format == "json":
                continue
            part = GrowingFile(self._folder / f"{self._stem}.{file_format}.part")
            writer = TranscriptWriter(file_format)
            self._parts[file_format] = part, writer
            part.append("".join([writer.begin(), *map(writer.add, self.segments)]))


def _head(job: Mapping[str, Any] | None) -> dict[str, Any]:
    """The first line of a journal."""
    return {"format": JOURNAL_FORMAT, "version": JOURNAL_VERSION, **(job or {})}


def _record_path(folder: Path, stem: str) -> Path:
    return folder / f".{stem}.done"


def _recorded(folder: Path, stem: str, job: Mapping[str, Any]) -> set[str]:
    """The formats in which this very job is done.

    Raises:
        InputError: another job is done, or the record is not ours.
    """
    path = _record_path(folder, stem)
    if not os.path.lexists(path):
        return set()
    found = _object(read_text(path, max_bytes=_LINE_MAX_BYTES).encode("utf-8"), str(path))
    formats = found.pop("formats", None)
    check_same_job(found, {"format": RECORD_FORMAT, "version": JOURNAL_VERSION, **job}, path)
    return {one for one in formats if isinstance(one, str)} if isinstance(formats, list) else set()


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
    check_same_job(_object(first, f"{path}: line 1"), head, path)
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
    return json_object(line, where)


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
    if not all(isinstance(text, str) and is_unicode(text) for text in texts):
        raise InputError(f"{where}: text and translation are not both text")
    return Segment(times[0], times[1], found["text"], found["translation"])


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


def is_finished(folder: Path, stem: str, formats: Sequence[TranscriptFormat], job: Mapping[str, Any]) -> bool:
    """Whether this very job is done: all final files are there, and none is under way.

    Raises:
        InputError: the final files are there, and of another job; names the first thing that differs.
    """
    try:
        if os.path.lexists(folder / f"{stem}.part.jsonl"):
            return False
        if not all((folder / f"{stem}.{one}").is_file() for one in formats):
            return False
    except (OSError, ValueError):
        return False
    return set(formats) <= _recorded(folder, stem, job)


def interrupted_s(folder: Path, stem: str, job: Mapping[str, Any]) -> float | None:
    """Up to where a journal that is there has come; None: beginning anew loses nothing.

    Raises:
        InputError: it is of another job than `job`, or damaged.
        InUseError: another process writes it.
        OutputError: it can be read and not written.
    """
    path = folder / f"{stem}.part.jsonl"
    try:
        check_free(path)
    except (OSError, ValueError) as exc:
        raise not_written(path, exc) from None
    found = _read_journal(path, _head(job)) if path.is_file() else None
    return found[0][-1].t1 if found is not None and found[0] else None


def check_places(folder: Path, stem: str, formats: Sequence[TranscriptFormat]) -> None:
    """Find out before any work that transcripts cannot be written.

    Raises:
        InUseError: another process writes them.
        OutputError: the folder takes no files, or one of them is a folder.
    """
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{str(folder)[:200]!r}: no file can be made in it")
    for one in formats:
        final = folder / f"{stem}.{one}"
        if final.is_dir():
            raise OutputError(f"{str(final)[:200]!r}: cannot be written: is a directory")
        part = folder / (f"{stem}.part.jsonl" if one == "json" else f"{stem}.{one}.part")
        try:
            check_free(part)
        except (OSError, ValueError) as exc:
            raise not_written(part, exc) from None
