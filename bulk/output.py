# SPDX-License-Identifier: Apache-2.0
"""The output of a run: it grows line by line, and can be gone on with after any end.

    OUT.jsonl       a line for each item that is done, in the order in which they were done
    OUT.jsonl.job   of which model and with which settings: written before the first line

One process writes them at a time. Each line is handed to the system in one piece before the next: a killed
process loses none, and half a line at the end is cut off when the run goes on. A power cut may lose the last
ones, since nothing waits for the disk before the end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..runtime.errors import InputError
from ..runtime.files import check_file, open_beside, put_in_place, read_text, write_text
from ..runtime.growing_file import GrowingFile, not_written
from ..runtime.journal_lines import check_same_job, json_object
from .lines import MAX_ITEMS
from .records import Outcome, outcome_of

FORMAT = "pocketphi batch"
VERSION = 1
_LINE_MAX_BYTES = 64 << 20
_JOB_MAX_BYTES = 1 << 20


class Output:
    """The lines so far, as a context; leaving it keeps them."""

    def __init__(
        self,
        path: Path,
        job: Mapping[str, Any],
        *,
        restart: bool = False,
        retry_failed: bool = False,
    ) -> None:
        """Open it, or go on with what is there.

        Args:
            path: in a folder that exists.
            job: all that must be equal to go on, JSON values by name.
            restart: begin anew, whatever is there.
            retry_failed: take out the lines of items that failed, so that these are done again.

        Raises:
            InputError: what is there is of another job, damaged, or no output of a run.
            InUseError: another process writes it.
            OutputError: it cannot be written.
        """
        self.path, self.job_path = path, path.with_name(f"{path.name}.job")
        self.done: dict[str, tuple[bool, str]] = {}  # id -> whether it is an answer, and the item's digest
        head = {"format": FORMAT, "version": VERSION, **job}

        def read(file: BinaryIO) -> int:
            return self._read(file, head)

        there = not restart and os.path.lexists(path)
        if there:
            check_file(path)
        self._file = GrowingFile(path, keep=read if there else None)
        try:
            if there and retry_failed and not all(ok for ok, _ in self.done.values()):
                self._drop_failed()
                self._file.close()
                self._file = GrowingFile(path, keep=read)
            self.n_before = len(self.done)
            if self._file.size == 0:  # nothing is there that another job could be of
                write_text(self.job_path, json.dumps(head, ensure_ascii=False, indent=1) + "\n")
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, name: str, outcome: Outcome) -> None:
        """Append what came of an item.

        Raises:
            OutputError: it cannot be written: a full disk, for example. The lines before are still there.
        """
        assert name not in self.done
        self._file.append(outcome.line)
        self.done[name] = outcome.ok, outcome.record["item_sha256"]

    def sync(self) -> None:
        """Wait for the disk.

        Raises:
            OutputError: it could not be written.
        """
        self._file.sync()

    def check(self, digests: Callable[[str], str | None]) -> None:
        """Whether what is done is of the items that there are.

        Args:
            digests: an item's digest by its id; None: there is no such item.

        Raises:
            InputError: an item is missing or has changed; names it.
        """
        for name, (_, digest) in self.done.items():
            found = digests(name)
            if found != digest:
                gone, changed = (
                    "is not in the input any more",
                    "or a file of it has changed since it was done",
                )
                what = gone if found is None else changed
                raise InputError(f"{self.path}: item {name[:40]!r} {what}; --restart begins anew")

    def _read(self, file: BinaryIO, head: Mapping[str, Any]) -> int:
        """What is done, and the length in bytes of it without half a line at the end."""
        self.done.clear()
        size = 0
        for number in range(1, MAX_ITEMS + 2):
            line = file.readline(_LINE_MAX_BYTES + 1)
            where = f"{self.path}: line {number}"
            if not line.endswith(b"\n"):
                if len(line) > _LINE_MAX_BYTES:
                    raise InputError(f"{where}: is over {_LINE_MAX_BYTES} bytes long")
                return size
            if number == 1:
                self._check_job(head)
            found = outcome_of(json_object(line, where))
            if found is None:
                raise InputError(f"{where}: is no item's; --restart begins anew")
            if found[0] in self.done:
                raise InputError(f"{where}: has the id {found[0][:40]!r} a second time")
            self.done[found[0]] = found[1:]
            size += len(line)
        raise InputError(f"{self.path}: has more than {MAX_ITEMS} lines")

    def _check_job(self, head: Mapping[str, Any]) -> None:
        if not os.path.lexists(self.job_path):
            raise InputError(
                f"{self.path}: is there without {self.job_path.name}: not a run to go on with; "
                "--restart replaces it"
            )
        raw = read_text(self.job_path, max_bytes=_JOB_MAX_BYTES).encode("utf-8")
        try:
            check_same_job(json_object(raw, str(self.job_path)), head, self.job_path)
        except InputError as exc:
            raise InputError(f"{exc}; --restart begins anew") from None

    def _drop_failed(self) -> None:
        """Put a file without the failed items' lines in the place of this one."""
        try:
            with self.path.open("rb") as old:
                file, temporary = open_beside(self.path)
                try:
                    with file:
                        left = self._file.size
                        while left > 0 and (line := old.readline()):
                            left -= len(line)
                            found = outcome_of(json_object(line, str(self.path)))
                            if found is not None and found[1]:
                                file.write(line)
                        put_in_place(file, temporary, self.path)
                except BaseException:
                    temporary.unlink(missing_ok=True)
                    raise
        except OSError as exc:
            raise not_written(self.path, exc) from None
