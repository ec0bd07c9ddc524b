# SPDX-License-Identifier: Apache-2.0
"""The lines of a file of items: where each is, what it is called, and in which mode it will run.

A file is read once to know its items, and a line again when its turn comes: memory holds a few hundred bytes
for each item, not the items. Two items of one id end all; whatever else is wrong with a line is that item's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..runtime.errors import InputError
from ..runtime.files import check_file, is_unicode, reason_of
from ..runtime.parts import Mode
from ..runtime.router import route

LINE_MAX_BYTES = 64 << 20  # a clip of half an hour in base64
MAX_ITEMS = 4_000_000
_ID_MAX_CHARS = 200
_BOM = b"\xef\xbb\xbf"
_IMAGE_PARTS, _AUDIO_PARTS = ("image", "image_url"), ("audio", "input_audio")


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the file."""

    id: str  # its own, or "line-3"
    number: int  # from 1
    offset: int  # bytes from the beginning
    n_bytes: int  # with its end
    sha256: bytes  # of the line without white space around it
    mode: Mode  # language where it cannot be known
    in_openai_form: bool


@dataclass(frozen=True, slots=True)
class Task:
    """An item on its way to a model."""

    id: str
    number: int
    text: str  # the line

    @property
    def where(self) -> str:
        """For messages."""
        return f"line {self.number}"

    @property
    def sha256(self) -> bytes:
        """Of the line."""
        return hashlib.sha256(self.text.encode("utf-8")).digest()


class LineFile:
    """A file of items, open; a context."""

    def __init__(self, path: Path, on_read: Callable[[int], None] = lambda n: None) -> None:
        """Read all of it.

        Args:
            path: a regular file: it is read more than once.
            on_read: told how many bytes more were read.

        Raises:
            InputError: it cannot be read, has no items or too many, or two of one id.
        """
        check_file(path)
        self.path = path
        self.folder = path.parent.resolve()
        self.entries: list[Entry] = []
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as exc:
            raise InputError(f"{path}: cannot be read: {reason_of(exc)}") from None
        try:
            self._scan(on_read)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> LineFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def task(self, entry: Entry) -> Task:
        """The item of a line. Not for several threads at once.

        Raises:
            InputError: the line is not a JSON object in UTF-8, or has an id that cannot be used.
            ChangedError: the file is not what it was.
        """
        if entry.n_bytes > LINE_MAX_BYTES:
            raise InputError(f"line {entry.number}: is over {LINE_MAX_BYTES} bytes long")
        try:
            self._file.seek(entry.offset)
            raw = _stripped(self._file.read(entry.n_bytes), entry.offset)
        except OSError as exc:
            raise ChangedError(f"{self.path}: cannot be read: {reason_of(exc)}") from None
        if hashlib.sha256(raw).digest() != entry.sha256:
            raise ChangedError(f"{self.path}: line {entry.number} has changed while it was worked on")
        id_of(object_of(raw, f"line {entry.number}"), entry.number)
        return Task(entry.id, entry.number, raw.decode("utf-8"))

    def _scan(self, on_read: Callable[[int], None]) -> None:
        where_of: dict[str, int] = {}
        number = offset = 0
        try:
            while line := self._file.readline(LINE_MAX_BYTES + 1):
                number += 1
                n_bytes, digest = len(line), hashlib.sha256(_stripped(line, offset))
                found: dict[str, Any] = {}
                if n_bytes > LINE_MAX_BYTES:
                    while not line.endswith(b"\n") and (line := self._file.readline(1 << 20)):
                        n_bytes += len(line)
                        digest.update(line)
                elif line.strip():
                    found = _object_or_nothing(_stripped(line, offset))
                if n_bytes > LINE_MAX_BYTES or _stripped(line, offset):
                    entry = _entry(found, number, offset, n_bytes, digest.digest())
                    before = where_of.setdefault(entry.id, number)
                    if before != number:
                        what = f"line {number}: has the id {entry.id[:40]!r} of line {before}"
                        raise InputError(f"{self.path}: {what}, expected one of its own")
                    if len(self.entries) == MAX_ITEMS:
                        raise InputError(f"{self.path}: has more than {MAX_ITEMS} items")
                    self.entries.append(entry)
                offset += n_bytes
                on_read(n_bytes)
        except OSError as exc:
            raise InputError(f"{self.path}: cannot be read: {reason_of(exc)}") from None
        if not self.entries:
            raise InputError(f"{self.path}: has no items, expected one JSON object a line")


class ChangedError(InputError):
    """The file of items changed under the run: nothing that is known of it holds."""


def object_of(raw: bytes, where: str) -> dict[str, Any]:
    """A line as a JSON object.

    Raises:
        InputError: it is none; says where.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as exc:
        what = f"byte 0x{raw[exc.start]:02x} at offset {exc.start}"
        raise InputError(f"{where}: is not UTF-8 text: {what}") from None
    try:
        found = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):  # ValueError: not JSON, or a number of thousands of digits
        raise InputError(f"{where}: is {text[:40]!r}, expected a JSON object") from None
    if not isinstance(found, dict):
        raise InputError(f"{where}: is a JSON {type(found).__name__}, expected an object")
    return found


def id_of(found: dict[str, Any], number: int) -> str:
    """What an item is called: `custom_id` in OpenAI's form, else `id`, else after its line.

    Raises:
        InputError: it cannot be used as an id.
    """
    key = "custom_id" if is_openai(found) else "id"
    name = found.get(key)
    if name is None:
        return f"line-{number}"
    if not isinstance(name, str):
        raise InputError(f"line {number}: {key} is {type(name).__name__}, expected text")
    if not name.strip() or not name.isprintable() or len(name) > _ID_MAX_CHARS or not is_unicode(name):
        raise InputError(
            f"line {number}: {key} is {name[:40]!r}, "
            f"expected 1 to {_ID_MAX_CHARS} characters that can be printed"
        )
    return name


def is_openai(found: dict[str, Any]) -> bool:
    """Whether an item is in the form of OpenAI's batch files."""
    return "body" in found and "custom_id" in found


def _refuse(name: str) -> None:
    raise ValueError(name)


def _stripped(line: bytes, offset: int) -> bytes:
    return (line.removeprefix(_BOM) if offset == 0 else line).strip()


def _object_or_nothing(raw: bytes) -> dict[str, Any]:
    try:
        return object_of(raw, "")
    except InputError:
        return {}


def _entry(found: dict[str, Any], number: int, offset: int, n_bytes: int, sha256: bytes) -> Entry:
    try:
        name = id_of(found, number)
    except InputError:
        name = f"line-{number}"
    return Entry(name, number, offset, n_bytes, sha256, _mode(found), is_openai(found))


def _mode(found: dict[str, Any]) -> Mode:
    """By the kinds of media alone: that is all that order needs."""
    inner = found["body"] if is_openai(found) else found
    if not isinstance(inner, dict):
        return "language"
    turns = inner.get("messages")
    kinds = {
        part.get("type")
        for turn in (turns if isinstance(turns, list) else [])
        if isinstance(turn, dict) and isinstance(turn.get("content"), list)
        for part in turn["content"]
        if isinstance(part, dict) and isinstance(part.get("type"), str)
    }
    audio = not kinds.isdisjoint(_AUDIO_PARTS) or ("audio" in inner and turns is None)
    return route(images=not kinds.isdisjoint(_IMAGE_PARTS), audio=audio).mode


def in_order_of_modes(entries: list[Entry]) -> list[Entry]:
    """By mode, so that every adapter is switched to once; within a mode in the given order."""
    order: tuple[Mode, ...] = ("language", "vision", "vision_speech", "speech")  # the middle two share one
    return sorted(entries, key=lambda entry: order.index(entry.mode))
