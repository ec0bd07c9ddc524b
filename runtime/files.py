# SPDX-License-Identifier: Apache-2.0
"""Text files in and out, with one-line errors: UTF-8, size-capped, and written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import IO

from .errors import InputError, OutputError
from .spec import MANIFEST

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NAME_BYTES = 200  # of a name in that of its temporary: file systems take 255


def read_text(path: Path, *, max_bytes: int) -> str:
    """A UTF-8 text file.

    Raises:
        InputError: missing, not a regular file, larger than `max_bytes`, or not UTF-8.
    """
    check_file(path)
    try:
        if path.stat().st_size > max_bytes:
            raise InputError(f"{path}: has {path.stat().st_size} bytes, expected at most {max_bytes}")
        return decode_text(path.read_bytes(), str(path))
    except OSError as exc:
        raise InputError(f"{path}: cannot be read: {exc.strerror}") from None


def check_file(path: Path) -> None:
    """Refuse what is not a regular file, before it is opened: a pipe would wait for ever.

    Raises:
        InputError: no such file, another kind of file, or no name that the system takes.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as exc:
        raise InputError(f"{str(path)[:100]!r}: cannot be opened: {reason_of(exc)}") from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: is not a regular file")


def reason_of(exc: OSError | ValueError) -> str:
    """Why the system refused, in its own words."""
    return (exc.strerror or str(exc)) if isinstance(exc, OSError) else str(exc)


def decode_text(raw: bytes, where: str) -> str:
    """Bytes as UTF-8 text, without a byte order mark.

    Raises:
        InputError: not UTF-8; says at which byte.
    """
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise InputError(
            f"{where}: is not UTF-8 text: byte 0x{raw[exc.start]:02x} at offset {exc.start}"
        ) from None


def is_unicode(text: str) -> bool:
    """Whether it is text: not half a surrogate pair, as JSON's escapes and bytes in arguments make one."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def check_unicode(what: str, text: str) -> None:
    """Arguments that are no UTF-8, and JSON's escapes, can put half a surrogate pair into a string.

    Raises:
        InputError: half of one, and where.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as exc:
        code = ord(text[exc.start])
        raise InputError(
            f"{what}: has U+{code:04X} at character {exc.start}: half a surrogate pair, which is no text"
        ) from None


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all.

    Raises:
        OutputError: it cannot be written; nothing is left behind.
    """
    try:
        raw = text.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair
        raise OutputError(f"{str(path)[:200]!r}: cannot be written: the text is not Unicode") from None
    write_bytes(path, raw)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: a temporary sibling, then a rename.

    Raises:
        OutputError: it cannot be written; nothing is left behind.
    """
    temporary = None
    try:
        file, temporary = open_beside(path)
        with file:
            file.write(data)
            put_in_place(file, temporary, path)
    except BaseException as exc:  # Ctrl-C too leaves nothing behind
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(exc, (OSError, ValueError)):  # ValueError: NUL in a name
            raise OutputError(f"{str(path)[:200]!r}: cannot be written: {reason_of(exc)}") from None
        raise


def open_beside(path: Path) -> tuple[IO[bytes], Path]:
    """A new file that is to become `path`, and its name; only its owner can read it.

    It is locked until it is closed, so it is closed after it was renamed. What killed processes left of
    earlier ones is removed first. Windows has no such locks: leavings stay there.

    Raises:
        OSError, ValueError: it cannot be made.
    """
    start = os.fsencode(path.name)[:_NAME_BYTES]
    prefix = f".{os.fsdecode(start)}.partial-"
    _remove_dead(path.parent, prefix)
    for _ in range(100):
        handle, name = tempfile.mkstemp(prefix=prefix, dir=path.parent)
        if fcntl is None or _lock(handle, name):
            return os.fdopen(handle, "wb"), Path(name)
        os.close(handle)
    raise OSError(errno.EAGAIN, "temporary files vanish as soon as they are made")


def put_in_place(file: IO[bytes], temporary: Path, path: Path) -> None:
    """Let what `open_beside` gave be `path`, once it is on the disk, and close it.

    Raises:
        OSError: it cannot be written.
    """
    file.flush()
    os.fsync(file.fileno())
    temporary.chmod(0o666 & ~_umask())
    if sys.platform == "win32":  # there, one that is open cannot be renamed
        file.close()
    temporary.replace(path)
    file.close()


def _remove_dead(folder: Path, prefix: str) -> None:
    if fcntl is None:
        return
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if entry.name.startswith(prefix) and entry.is_file(follow_symlinks=False):
                _remove_if_dead(entry.path)


def _remove_if_dead(name: str) -> None:
    with contextlib.suppress(OSError):
        handle = os.open(name, os.O_RDWR | os.O_NOFOLLOW)
        try:
            if _lock(handle, name):
                Path(name).unlink()
        finally:
            os.close(handle)


def _lock(handle: int, name: str) -> bool:
    """Whether this is now the only process that has the file of that name."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # somebody looks whether its maker is dead
        return False
    except OSError:  # a file system without locks
        return True
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), Path(name).stat())
    return False


def check_writable(path: Path) -> None:
    """Refuse, before work that takes long, an output that could not be written after it.

    Raises:
        OutputError: it is a folder, or the folder that it is to be in is not there or not to be written to.
    """
    if path.is_dir():
        reason = "it is a folder"
    elif not path.parent.is_dir():
        reason = f"there is no folder {str(path.parent)[:200]}"
    elif not os.access(path.parent, os.W_OK):
        reason = f"{str(path.parent)[:200]} is not to be written to"
    else:
        return
    raise OutputError(f"{str(path)[:200]!r}: cannot be written: {reason}")


def check_not_read(path: Path, data: Path) -> None:
    """Refuse an output that would replace what it is made from.

    Raises:
        InputError: both are one file.
    """
    same = False
    with contextlib.suppress(OSError, ValueError):  # one is not there, or has no name: others say that
        same = path.samefile(data)
    if same:
        raise InputError(f"{str(path)[:200]!r}: is the data that is read, expected another file to write")


def check_not_model(folder: Path) -> None:
    """Refuse to write among the files of a model directory: only `convert --overwrite` replaces those.

    Raises:
        OutputError: there is a manifest in it.
    """
    if os.path.lexists(folder / MANIFEST):
        raise OutputError(f"{str(folder)[:200]!r}: is a model directory, expected another folder to write to")


def make_folder(path: Path) -> None:
    """Make a folder and its parents, if they are not there.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as exc:
        raise OutputError(f"{str(path)[:200]!r}: cannot be made a folder: {reason_of(exc)}") from None


def _umask() -> int:
    """The process's umask; reading it means setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
