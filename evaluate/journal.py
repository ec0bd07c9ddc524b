# SPDX-License-Identifier: Apache-2.0
"""The files of an evaluation, which grow while it runs, and can be gone on with after an interrupt.

    items.jsonl.part    the journal: what the job is, then a line for each item done, in the order of work
    items.jsonl         the same without the job, in the order of the data; eval.json and eval.md follow

One process writes them at a time. Each answer is handed to the system before the next one is begun: a killed
process loses none. The final files appear when all is done, each whole; the journal goes last.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

from ..runtime.errors import InputError, OutputError
from ..runtime.files import check_file, is_unicode, read_text, reason_of, write_text
from ..runtime.growing_file import GrowingFile, check_free, not_written
from ..runtime.journal_lines import check_same_job, json_object
from ..runtime.parts import Reply, Timings
from ..runtime.tools import render_calls

FORMAT = "pocketphi evaluation journal"
VERSION = 1
_LINE_MAX_BYTES = 64 << 20  # an answer, its reference and both normalized
_REPORT_MAX_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Took:
    """Where an item's time went; as `parts.Timings`, which has what each means."""

    encode_ms: float
    prompt_n: int
    prompt_ms: float
    predicted_n: int
    predicted_ms: float
    ttft_ms: float


@dataclass(frozen=True, slots=True)
class Answered:
    """What a model said to an item. Tool calls stand in the text as the models write them."""

    id: str
    hypothesis: str
    finish_reason: str
    took: Took
    positions: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # see `item_likelihood`


def answered(item_id: str, reply: Reply) -> Answered:
    """What is kept of a reply."""
    calls = f"<|tool_call|>{render_calls(reply.tool_calls)}<|/tool_call|>" if reply.tool_calls else ""
    return Answered(item_id, reply.text + calls, reply.finish_reason, _took(reply.timings))


def _took(timings: Timings) -> Took:
    return Took(**{one.name: getattr(timings, one.name) for one in fields(Took)})


class Journal:
    """The answers so far, as a context; leaving it without `finish` keeps them."""

    def __init__(
        self, folder: Path, job: Mapping[str, Any], ids: Sequence[str], *, resume: bool = False
    ) -> None:
        """Open the journal; final files of an earlier run stay as they are until `finish`.

        Args:
            folder: exists.
            job: all that must be equal to go on with it, JSON values by name.
            ids: of the items there are.
            resume: go on with the journal that is there; without one, begin.

        Raises:
            InputError: the journal that is there is of another job, or damaged.
            InUseError: another process writes it.
            OutputError: it cannot be written.
        """
        self.done: dict[str, Answered] = {}
        self.resumed = False  # a journal was there
        self.path = folder / "items.jsonl.part"
        self._folder = folder
        head = {"format": FORMAT, "version": VERSION, **job}

        def read(file: BinaryIO) -> int:
            self.done, size = _answers(file, self.path, head, ids)
            return size

        there = resume and os.path.lexists(self.path)
        if there:
            check_file(self.path)
        self._file = GrowingFile(self.path, keep=read if there else None)
        self.resumed = self._file.size > 0
        if not self.resumed:
            self._file.append(_line(head))

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, one: Answered, details: Mapping[str, Any]) -> None:
        """Append an answer, with what people may want to know of it.

        Raises:
            OutputError: it cannot be written: a full disk, for example. The answers before are still there.
        """
        self._file.append(_line(row(one, details)))
        self.done[one.id] = one

    def finish(self, rows: Sequence[Mapping[str, Any]], report: str, markdown: str) -> None:
        """All is done: the final files appear, the journal goes.

        Raises:
            OutputError: one cannot be written; the journal is still there.
        """
        self._file.sync()
        write_text(self._folder / "items.jsonl", "".join(map(_line, rows)))
        write_text(self._folder / "eval.json", report)
        write_text(self._folder / "eval.md", markdown)
        try:
            self.path.unlink()
        except OSError as exc:
            raise not_written(self.path, exc) from None


def row(one: Answered, details: Mapping[str, Any]) -> dict[str, Any]:
    """The line of an item."""
    return {
        "id": one.id,
        **details,
        "hypothesis": one.hypothesis,
        "finish_reason": one.finish_reason,
        **({"positions": dict(one.positions)} if one.positions else {}),
        "timings": asdict(one.took),
    }


def unfinished(folder: Path, job: Mapping[str, Any], ids: Sequence[str]) -> int | None:
    """How many answers a journal that is there has; None: beginning anew loses nothing.

    Raises:
        InputError: it is of another job, or damaged.
        InUseError: another process writes it.
        OutputError: the folder takes no files.
    """
    path = folder / "items.jsonl.part"
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{str(folder)[:200]!r}: no file can be made in it")
    for name in ("items.jsonl", "eval.json", "eval.md"):
        if (folder / name).is_dir():
            raise OutputError(f"{str(folder / name)[:200]!r}: cannot be written: is a directory")
    done: dict[str, Answered] = {}

    def read(file: BinaryIO) -> int:
        found, size = _answers(file, path, {"format": FORMAT, "version": VERSION, **job}, ids)
        done.update(found)
        return size

    try:
        check_free(path, read=read)
    except (OSError, ValueError) as exc:
        raise not_written(path, exc) from None
    return len(done) or None


def finished(folder: Path, job: Mapping[str, Any], ids: Sequence[str]) -> dict[str, Answered] | None:
    """All answers of this very job, if it is done and none is under way.

    Raises:
        InputError: what is there is of another job, or damaged; names what differs.
    """
    report, rows = folder / "eval.json", folder / "items.jsonl"
    if os.path.lexists(folder / "items.jsonl.part") or not os.path.lexists(report):
        return None
    found = json_object(read_text(report, max_bytes=_REPORT_MAX_BYTES).encode("utf-8"), str(report))
    if not isinstance(found.get("job"), dict):
        raise InputError(f"{report}: is no report of an evaluation")
    check_same_job(found["job"], job, report)
    check_file(rows)
    try:
        with rows.open("rb") as file:
            answers, _ = _answers(file, rows, None, ids)
    except OSError as exc:
        raise InputError(f"{rows}: cannot be read: {reason_of(exc)}") from None
    if len(answers) != len(ids):
        raise InputError(f"{rows}: has {len(answers)} items, expected {len(ids)}")
    return answers


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


def _answers(
    file: BinaryIO, path: Path, head: Mapping[str, Any] | None, ids: Sequence[str]
) -> tuple[dict[str, Answered], int]:
    """The answers of a journal, and its length in bytes without a last line that was only half written.

    0 bytes: not even its first line is whole. Without a head every line is an answer.

    Raises:
        InputError: it is of another job than `head`, or damaged.
    """
    known, done, size = set(ids), dict[str, Answered](), 0
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise InputError(f"{path}: is not a regular file")
    for number in range(1, len(ids) + 3):
        line = file.readline(_LINE_MAX_BYTES + 1)
        where = f"{path}: line {number}"
        if not line.endswith(b"\n"):
            if len(line) > _LINE_MAX_BYTES:
                raise InputError(f"{where}: is over {_LINE_MAX_BYTES} bytes long")
            return done, size
        size += len(line)
        if number == 1 and head is not None:
            check_same_job(json_object(line, where), head, path)
            continue
        one = _answered(json_object(line, where), where)
        if one.id not in known or one.id in done:
            again = "a second time" if one.id in done else "and no such item in the data"
            raise InputError(f"{where}: has the id {one.id[:40]!r} {again}")
        done[one.id] = one
    raise InputError(f"{path}: has more lines than there are items")


def _answered(found: Mapping[str, Any], where: str) -> Answered:
    """An answer from its line; what can be computed from it again is not read."""
    texts = [found.get(key) for key in ("id", "hypothesis", "finish_reason")]
    if not all(isinstance(text, str) and is_unicode(text) for text in texts):
        raise InputError(f"{where}: id, hypothesis and finish_reason are not all text")
    raw = found.get("timings")
    took: dict[str, Any] = raw if isinstance(raw, dict) else {}
    if set(took) != {one.name for one in fields(Took)}:
        raise InputError(f"{where}: timings has {sorted(took)!s:.100}, expected those of an item")
    for key, value in took.items():
        if type(value) not in (int, float) or not 0 <= value < 1e12:
            raise InputError(f"{where}: {key} is {str(value)[:40]!r}, expected a number from 0")
    positions = _positions(found.get("positions", {}), where)
    return Answered(str(texts[0]), str(texts[1]), str(texts[2]), Took(**took), positions)


def _positions(found: Any, where: str) -> dict[str, tuple[float, ...]]:
    """Columns of numbers, all of one length."""
    columns: list[Any] = list(found.values()) if isinstance(found, dict) else [None]
    for column in columns:
        if not isinstance(column, list) or not column or len(column) != len(columns[0]):
            raise InputError(f"{where}: positions is no table of numbers")
        if not all(type(x) in (int, float) and abs(x) < 1e300 for x in column):
            raise InputError(f"{where}: positions holds what is no finite number")
    return {name: tuple(map(float, column)) for name, column in found.items()}
