# SPDX-License-Identifier: Apache-2.0
"""Text files in and out, with one-line errors: UTF-8, size-capped, and written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from .errors import InputError, OutputError


def read_text(path: Path, *, max_bytes: int) -> str:
    """A UTF-8 text file.

    Raises:
        InputError: missing, not a regular file, larger than `max_bytes`, or not UTF-8.
    """
    try:
        if not path.is_file():
            raise InputError(
                f"{path}: no such file" if not path.exists() else f"{path}: is not a regular file"
            )
        if path.stat().st_size > max_bytes:
            raise InputError(f"{path}: has {path.stat().st_size} bytes, expected at most {max_bytes}")
        return decode_text(path.read_bytes(), str(path))
    except OSError as exc:
        raise InputError(f"{path}: cannot be read: {exc.strerror}") from None


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
        Path(temporary).replace(path)
    except (OSError, UnicodeEncodeError) as exc:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        reason = exc.strerror if isinstance(exc, OSError) else "the text holds a lone surrogate"
        raise OutputError(f"{path}: cannot be written: {reason}") from None
