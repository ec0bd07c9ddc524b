# SPDX-License-Identifier: Apache-2.0
"""Text files in and out, with one-line errors: UTF-8, size-capped, and written whole or not at all."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from .errors import InputError, OutputError


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


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file: a temporary sibling, then a rename.

    Raises:
        OutputError: it cannot be written; nothing is left behind.
    """
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except (OSError, ValueError) as exc:  # ValueError: NUL in a name, half a surrogate pair in the text
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        reason = "the text is not Unicode" if isinstance(exc, UnicodeEncodeError) else reason_of(exc)
        raise OutputError(f"{str(path)[:200]!r}: cannot be written: {reason}") from None


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
