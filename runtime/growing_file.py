# SPDX-License-Identifier: Apache-2.0
"""A file that only grows, that one process writes at a time, and that holds all it was given or says so.

The lock is the system's: it goes when the process does, however that ends. Windows needs none, since it lets
nobody remove a file that is open.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from io import BufferedRandom, FileIO
from pathlib import Path
from typing import BinaryIO

from .errors import InUseError, OutputError
from .files import reason_of

Reader = Callable[[BinaryIO], int]


class GrowingFile:
    """What was appended is with the system when `append` returns."""

    def __init__(self, path: Path, *, keep: int | Reader | None = None) -> None:
        """Open and lock it.

        Args:
            path: what is there and no folder is replaced: not followed if it is a link, not waited for if it
                is a pipe.
            keep: go on after this many bytes of what is there, or as many as a function says that reads it
                while nobody else can write it; None: a new file.

        Raises:
            InUseError: another process writes it.
            OutputError: it cannot be written.
        """
        self.path = path
        self._file: FileIO
        self.size = 0  # bytes
        self._run(lambda: self._new() if keep is None else self._old(keep))

    def append(self, data: str | bytes) -> None:
        """Write all of it, text as UTF-8, or leave the file as it was.

        Raises:
            OutputError: it cannot be written.
        """
        self._run(lambda: self._write(data.encode("utf-8") if isinstance(data, str) else data))

    def rewrite(self, head: bytes) -> None:
        """Replace its first bytes.

        Raises:
            OutputError: it cannot be written.
        """

        def write() -> None:
            self._file.seek(0)
            self._file.write(head)
            self._file.seek(self.size)

        self._run(write)

    def sync(self) -> None:
        """Wait for the disk.

        Raises:
            OutputError: it could not be written.
        """
        self._run(lambda: os.fsync(self._file.fileno()))

    def close(self) -> None:
        """Let others have it. Safe to call twice."""
        self._file.close()

    def rename(self, path: Path) -> None:
        """Put it where `path` is, and close it; both are in one folder.

        Raises:
            OutputError: something there cannot be replaced.
        """
        if sys.platform == "win32":  # elsewhere nobody else has it before it is there
            self.close()
        try:
            self.path.replace(path)
        except OSError as exc:
            raise not_written(path, exc) from None
        finally:
            self.close()

    def _new(self) -> None:
        check_free(self.path, remove=True)
        try:
            self._file = FileIO(self.path, "xb")
        except FileExistsError:  # made since
            raise _in_use(self.path) from None
        self._hold(lambda: 0)

    def _old(self, keep: int | Reader) -> None:
        self._file = FileIO(self.path, "r+b")
        self._hold(lambda: _read_by(self._file, keep) if callable(keep) else keep)
        self._file.truncate(self.size)
        self._file.seek(self.size)

    def _hold(self, size: Callable[[], int]) -> None:
        try:
            _lock(self._file, self.path)
            self.size = size()
        except BaseException:
            self._file.close()
            raise

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(self.size)  # half a cue is none
            self._file.seek(self.size)
            raise
        self.size += len(data)

    def _run(self, step: Callable[[], object]) -> None:
        try:
            step()
        except (OSError, ValueError) as exc:  # ValueError: a zero byte in the path
            raise not_written(self.path, exc) from None


def check_free(path: Path, *, remove: bool = False, read: Reader | None = None) -> None:
    """Whether nobody writes it; what is there is read, or removed, if that is asked for.

    Raises:
        InUseError: another process writes it.
        OSError, ValueError: it cannot be opened or removed.
    """
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(kind):
        if remove:
            path.unlink()
        return
    with FileIO(path, "r+b", opener=_not_following) as file:
        _lock(file, path)
        if read is not None:
            _read_by(file, read)
        if remove and sys.platform != "win32":
            path.unlink(missing_ok=True)
    if remove and sys.platform == "win32":  # there, one that is open cannot be removed
        path.unlink(missing_ok=True)


def _read_by(file: FileIO, read: Reader) -> int:
    """What a reader says, who gets it from its beginning and does not close it."""
    buffered = BufferedRandom(file)
    try:
        return read(buffered)
    finally:
        buffered.detach()


def not_written(path: Path, exc: OSError | ValueError) -> OutputError:
    """One line about a file that the system does not let us write."""
    reason = "the text is not Unicode" if isinstance(exc, UnicodeEncodeError) else reason_of(exc)
    return OutputError(f"{str(path)[:200]!r}: cannot be written: {reason}")


def _not_following(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def _lock(file: FileIO, path: Path) -> None:
    """Be the only one who writes the file that has this name now."""
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(path) from None
    except OSError:  # a file system without locks
        return
    try:
        same = os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        same = False
    if not same:  # whoever had it has put another in its place
        raise _in_use(path)


def _in_use(path: Path) -> InUseError:
    return InUseError(f"{str(path)[:200]!r}: is being written by another process")
