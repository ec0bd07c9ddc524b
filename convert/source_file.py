# SPDX-License-Identifier: Apache-2.0
"""Reads files that nobody vouches for: regular files only, sizes capped, JSON strict, every error one line.

Shared by the readers of a checkpoint. Nothing here maps memory: a page of a mapped file counts as
resident once touched, and a file that shrinks under a mapping kills the process.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from ..runtime.errors import CheckpointError

_SHOWN_CHARS = 80  # of a name in a message
_SHOWN_ITEMS = 8  # of a list in a message
_MAX_JSON_VALUES = 4_000_000  # a 200,064-token tokenizer.json has 1.5 million; bounds memory to about 1 GB
_MAX_NUMBER_CHARS = 64  # int() takes quadratic time
_LFS_POINTER = b"version https://git-lfs."
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def quoted(value: object) -> str:
    """A value out of a file as it may stand in a message: one line, at most about 80 characters a name."""
    if isinstance(value, str):
        if len(value) > _SHOWN_CHARS:
            value = f"{value[: _SHOWN_CHARS - 20]}…{value[-19:]}"
        return repr(value)  # escapes whatever is not printable, line ends and lone surrogates included
    if isinstance(value, dict):
        return f"an object of {len(value)} keys"
    if isinstance(value, list):
        if len(value) > _SHOWN_ITEMS or any(isinstance(item, (list, dict)) for item in value):
            return f"a list of {len(value)}"
        return f"[{', '.join(map(quoted, value))}]"
    return str(value)  # a number (its digits are capped), a boolean, None


def shown(path: Path | str) -> str:
    """A path as it may stand in a message: in full, with what is not printable escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path))


class SourceFile:
    """One regular file, opened once, read-only. Reads may come from any thread.

    Raises:
        CheckpointError: from every method, when the file cannot be read or is not what it was when
            it was opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            # Asked first: opening a FIFO would wait for a writer, opening a device may act on it.
            if not stat.S_ISREG(path.stat().st_mode):
                self._refuse_kind(path.stat().st_mode)
            flags = os.O_RDONLY
            for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY", "O_NOINHERIT"):  # each where it exists
                flags |= getattr(os, name, 0)
            self._fd = os.open(path, flags)
        except (OSError, ValueError) as exc:  # ValueError: a NUL in the path
            raise CheckpointError(f"{shown(path)}: cannot be opened: {reason(exc)}") from None
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):  # replaced between the two calls
            os.close(self._fd)
            self._refuse_kind(status.st_mode)
        self.size = status.st_size

    def _refuse_kind(self, mode: int) -> NoReturn:
        kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise CheckpointError(f"{shown(self.path)}: is {kind}, expected a regular file")

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` (writable bytes) with the file's bytes from `offset` on; fewer are an error."""
        done = 0
        try:
            while done < len(buffer):
                count = self._read_some(buffer[done:], offset + done)
                if count == 0:
                    raise CheckpointError(
                        f"{shown(self.path)}: ends at byte {offset + done}, expected {self.size} bytes: "
                        "the file has become shorter"
                    )
                done += count
        except OSError as exc:
            raise CheckpointError(f"{shown(self.path)}: cannot be read: {reason(exc)}") from None

    def _read_some(self, buffer: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._fd, [buffer], offset)
        with self._lock:  # Windows: the position is shared, so seeking and reading are one step
            os.lseek(self._fd, offset, os.SEEK_SET)
            piece = os.read(self._fd, min(len(buffer), 1 << 20))
        buffer[: len(piece)] = piece
        return len(piece)

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` on. The caller has checked `count` against a cap."""
        buffer = bytearray(count)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def close(self) -> None:
        """Give the descriptor back. No read may be under way. Safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> SourceFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """A whole file of at most `max_bytes`.

    Raises:
        CheckpointError: missing, not a regular file, larger, unreadable, or a Git LFS pointer.
    """
    with SourceFile(path) as file:
        if file.size > max_bytes:
            raise CheckpointError(f"{shown(path)}: has {file.size} bytes, expected at most {max_bytes}")
        raw = file.read(0, file.size)
    refuse_lfs_pointer(raw, path)
    return raw


def read_text(path: Path, max_bytes: int) -> str:
    """A whole UTF-8 file of at most `max_bytes`; errors as `read_bytes`, and for other encodings."""
    raw = read_bytes(path, max_bytes)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise CheckpointError(f"{shown(path)}: is not UTF-8 at byte {exc.start}") from None


def read_json_object(path: Path, max_bytes: int) -> dict[str, Any]:
    """A JSON file that holds one object; errors as `read_bytes` and `parse_json_object`."""
    return parse_json_object(read_bytes(path, max_bytes), shown(path))


def refuse_lfs_pointer(raw: bytes, path: Path) -> None:
    """Raise CheckpointError when `raw` is the stand-in that Git leaves without its LFS extension."""
    if raw.startswith(_LFS_POINTER):
        raise CheckpointError(
            f"{shown(path)}: is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"
        )


def parse_json_object(raw: bytes, where: str) -> dict[str, Any]:
    """Parse bytes as one JSON object: strict UTF-8, no key twice, finite numbers, whole characters.

    Args:
        raw: the bytes. The caller has capped their number; the number of values is capped here.
        where: opens the message of an error.

    Raises:
        CheckpointError: anything else.
    """
    if sum(map(raw.count, (b",", b"[", b"{"))) > _MAX_JSON_VALUES:
        raise CheckpointError(f"{where}: has more than {_MAX_JSON_VALUES} JSON values")
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=_finite,
        )
        if _SURROGATE_ESCAPE.search(raw):
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # fails on half of a surrogate pair
    except UnicodeDecodeError as exc:
        raise CheckpointError(f"{where}: is not UTF-8 at byte {exc.start}") from None
    except UnicodeEncodeError:
        raise CheckpointError(f"{where}: has a string with half of a surrogate pair") from None
    except RecursionError:
        raise CheckpointError(f"{where}: is JSON nested too deeply") from None
    except ValueError as exc:
        raise CheckpointError(f"{where}: is not valid JSON: {exc}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: is a JSON {_kind(value)}, expected an object")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {quoted(twice)} stands twice in one object")
    return made


def _whole(text: str) -> int:
    if len(text) > _MAX_NUMBER_CHARS:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {quoted(text)} is not finite")
    return value


def _kind(value: object) -> str:
    if value is None:
        return "null"
    return {list: "array", str: "string", bool: "boolean"}.get(type(value), "number")


def reason(exc: OSError | ValueError) -> str:
    """What the system said, without the path: the message names it already."""
    text = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
    return " ".join(text.split())[:200]
