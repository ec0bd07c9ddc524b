# SPDX-License-Identifier: Apache-2.0
"""What a model is asked and what it should have said: a jsonl file of items, each checked before any is used.

One JSON object a line: `id` and `reference`, and the question as `prompt`, written in the model's own markup
with its media in `images` and `audio`, or as `messages` in the form that `Model.chat` takes, with `tools` if
there are any. `task` groups items in the report. Other keys are ignored. Media are files in the jsonl file's
folder or below.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, NoReturn

from ..runtime.errors import InputError
from ..runtime.files import check_file, decode_text, is_unicode, reason_of
from ..runtime.messages import parse
from ..runtime.parts import Media, MediaKind, Message, Mode
from ..runtime.router import route
from ..runtime.tools import parse_tools

LINE_MAX_BYTES = 4 << 20  # a prompt that fills the longest context is under 1 MiB
FILE_MAX_BYTES = 256 << 20
MAX_ITEMS = 100_000
MAX_MEDIA = 64  # of an item: as many as frames of a video; a context holds fewer
_ID_MAX_CHARS = 200
_REFERENCE_MAX_CHARS = 1 << 18  # hours of speech; metrics keep several values for each
_PLACE = re.compile(r"<\|(image|audio)_\d+\|>")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Item:
    """One question with its answer."""

    id: str
    where: str  # "FILE: line 3: item 'asr-002'", for messages about it
    task: str  # "" without one
    mode: Mode
    reference: str
    prompt: str | None  # in the model's markup; None: it has messages
    media: tuple[Media, ...] = ()  # of the prompt
    messages: tuple[Message, ...] = ()
    tools: str | None = None  # JSON, checked


@dataclass(frozen=True, slots=True)
class ItemFile:
    """The items of a file, in its order, and what the file is known by."""

    name: str
    n_bytes: int
    sha256: str  # of all of it, hex
    items: tuple[Item, ...]


def read_items(path: Path, *, limit: int | None = None) -> ItemFile:
    """Read and check a file of items.

    Args:
        path: a jsonl file. Empty lines are no items.
        limit: use the first so many; what follows is not looked at.

    Raises:
        InputError: it cannot be used; names the file, the line, what was found and what was wanted.
    """
    check_file(path)
    folder = _real(path.parent)
    digest, size = hashlib.sha256(), 0
    items: dict[str, Item] = {}
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(LINE_MAX_BYTES + 1):
                number += 1
                size += len(line)
                _check_sizes(f"{path}: line {number}", path, len(line), size)
                digest.update(line)
                line = line.removeprefix(_BOM) if number == 1 else line
                if line.strip() and (limit is None or len(items) < limit):
                    _add(items, _Line(path, number, folder).item(line))
    except OSError as exc:
        raise InputError(f"{path}: cannot be read: {reason_of(exc)}") from None
    if not items:
        raise InputError(f"{path}: has no items, expected one JSON object a line")
    return ItemFile(path.name, size, digest.hexdigest(), tuple(items.values()))


def _check_sizes(where: str, path: Path, line_bytes: int, file_bytes: int) -> None:
    if line_bytes > LINE_MAX_BYTES:
        raise InputError(f"{where}: is over {LINE_MAX_BYTES} bytes long")
    if file_bytes > FILE_MAX_BYTES:
        raise InputError(f"{path}: has over {FILE_MAX_BYTES} bytes")


def _add(items: dict[str, Item], item: Item) -> None:
    if item.id in items:
        raise InputError(f"{item.where}: has the id of an item before it, expected one of its own")
    if len(items) == MAX_ITEMS:
        raise InputError(f"{item.where}: is one more than {MAX_ITEMS} items")
    items[item.id] = item


def _real(path: Path) -> Path:
    try:
        return path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as exc:  # RuntimeError: links in a circle, before Python 3.13
        raise InputError(f"{str(path)[:100]!r}: cannot be opened: {str(exc)[:100]}") from None


class _Line:
    """A line of the file on its way to an item; an error names the line."""

    def __init__(self, path: Path, number: int, folder: Path) -> None:
        self._where = f"{path}: line {number}"
        self._beside, self._folder = path.parent, folder

    def item(self, line: bytes) -> Item:
        raw = self._object(line)
        name = self._text(raw, "id")
        if not name.strip() or not name.isprintable() or len(name) > _ID_MAX_CHARS:
            self._fail(f"id is {name[:40]!r}, expected 1 to {_ID_MAX_CHARS} characters that can be printed")
        self._where = f"{self._where}: item {name!r}"
        task = self._text(raw, "task", "")
        if not task.isprintable() or len(task) > _ID_MAX_CHARS:
            self._fail(
                f"task is {task[:40]!r}, expected at most {_ID_MAX_CHARS} characters that can be printed"
            )
        reference = self._text(raw, "reference")
        if len(reference) > _REFERENCE_MAX_CHARS:
            self._fail(f"reference has {len(reference)} characters, expected at most {_REFERENCE_MAX_CHARS}")
        if ("prompt" in raw) == ("messages" in raw):
            self._fail(f"has {'both' if 'prompt' in raw else 'no'} prompt and messages, expected one of them")
        prompt, media, messages, tools = (
            (*self._prompt(raw), (), None) if "prompt" in raw else (None, (), *self._conversation(raw))
        )
        kinds = {one.kind for one in (*media, *(one for turn in messages for one in turn.media))}
        mode = route(images="image" in kinds, audio="audio" in kinds).mode
        return Item(name, self._where, task, mode, reference, prompt, media, messages, tools)

    def _object(self, line: bytes) -> dict[str, Any]:
        text = decode_text(line, self._where)
        try:
            found = json.loads(text, parse_constant=lambda name: self._fail(f"{name} is not JSON"))
        except (ValueError, RecursionError):  # ValueError: not JSON, or a number of thousands of digits
            self._fail(f"is {text.strip()[:40]!r}, expected a JSON object")
        if not isinstance(found, dict):
            self._fail(f"is a JSON {type(found).__name__}, expected an object")
        return found

    def _text(self, raw: Mapping[str, Any], key: str, default: str | None = None) -> str:
        value = raw.get(key, default)
        if not isinstance(value, str):
            found = type(value).__name__ if key in raw else "missing"
            self._fail(f"{key} is {found}, expected text")
        if not is_unicode(value):
            self._fail(f"{key} has half a surrogate pair, expected Unicode text")
        return value

    def _prompt(self, raw: Mapping[str, Any]) -> tuple[str, tuple[Media, ...]]:
        """The prompt and its media, as many of each kind as it has places for."""
        prompt = self._text(raw, "prompt")
        if not prompt.strip():
            self._fail("prompt is empty")
        if raw.get("tools") is not None:
            self._fail("has prompt and tools: a prompt has its tools in its markup")
        files: dict[MediaKind, list[str]] = {
            "image": self._paths(raw, "images"),
            "audio": self._paths(raw, "audio"),
        }
        self._check_media(sum(map(len, files.values())))
        places = [place.group(1) for place in _PLACE.finditer(prompt)]
        for kind, paths in files.items():
            if places and places.count(kind) != len(paths):  # without any, media come first
                self._fail(
                    f"prompt has {places.count(kind)} <|{kind}_n|>, expected {len(paths)}, one for each file"
                )
        return prompt, tuple(
            Media(kind, self._medium(name)) for kind, names in files.items() for name in names
        )

    def _paths(self, raw: Mapping[str, Any], key: str) -> list[str]:
        value = raw.get(key)
        names = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            self._fail(f"{key} is not a path or a list of paths")
        return names

    def _conversation(self, raw: Mapping[str, Any]) -> tuple[tuple[Message, ...], str | None]:
        """Messages with the paths of their media in the file's folder, and the tools that may be called."""
        if raw.get("images") is not None or raw.get("audio") is not None:
            self._fail("has messages beside images or audio: media of messages are parts of their content")
        turns, tools = raw["messages"], raw.get("tools")
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            self._fail("messages is not a list of objects")
        contents = [turn.get("content") for turn in turns]
        self._check_media(
            sum(_is_medium(part) for content in contents if isinstance(content, list) for part in content)
        )
        try:
            json.dumps(turns, ensure_ascii=False).encode("utf-8")
            messages = parse([{**turn, "content": self._content(turn.get("content"))} for turn in turns])
            if tools is not None:
                tools = parse_tools(
                    tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False)
                )
        except UnicodeEncodeError:
            self._fail("messages has half a surrogate pair, expected Unicode text")
        except InputError as exc:
            text = str(exc)
            raise InputError(text if text.startswith(self._where) else f"{self._where}: {text}") from None
        return tuple(messages), tools

    def _content(self, content: Any) -> Any:
        if not isinstance(content, list):
            return content
        return [self._part(part) for part in content]

    def _part(self, part: Any) -> Any:
        return {**part, part["type"]: self._medium(part[part["type"]])} if _is_medium(part) else part

    def _check_media(self, n: int) -> None:
        """Before any of them is looked for."""
        if n > MAX_MEDIA:
            self._fail(f"has {n} images and clips, expected at most {MAX_MEDIA}")

    def _medium(self, name: str) -> Path:
        """A file in the folder of the jsonl file, or below."""
        pure = PureWindowsPath(name)  # knows both kinds of slashes, and drives
        if not name or pure.anchor or ".." in pure.parts:
            self._fail(f"medium is {name[:100]!r}, expected a path inside the file's folder, relative to it")
        path = self._beside / name
        try:
            check_file(path)
            real = _real(path)
        except InputError as exc:
            self._fail(str(exc))
        if not real.is_relative_to(self._folder):
            self._fail(f"{path}: leads out of the file's folder, expected a file in it")
        if not os.access(real, os.R_OK):
            self._fail(f"{path}: cannot be read, expected a picture or a clip")
        return path

    def _fail(self, what: str) -> NoReturn:
        raise InputError(f"{self._where}: {what}")


def _is_medium(part: Any) -> bool:
    kind = part.get("type") if isinstance(part, dict) else None
    return kind in ("image", "audio") and isinstance(part.get(kind), str)


def media_sha256(items: Sequence[Item], on_item: Callable[[], None] = lambda: None) -> str:
    """What the media of items are known by: a SHA-256, hex, of name, size and SHA-256 of each file in order.

    Args:
        items: whose media are files.
        on_item: called after each.

    Raises:
        InputError: one cannot be read; names the item.
    """
    known: dict[Path, str] = {}
    whole = hashlib.sha256()
    for item in items:
        for one in (*item.media, *(one for turn in item.messages for one in turn.media)):
            if not isinstance(one.source, Path):
                continue
            if one.source not in known:
                known[one.source] = _file_sha256(one.source, item.where)
            whole.update(json.dumps([one.source.name, known[one.source]]).encode("utf-8"))
        on_item()
    return whole.hexdigest()


def _file_sha256(path: Path, where: str) -> str:
    digest, size = hashlib.sha256(), 0
    try:
        check_file(path)
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                size += len(block)
    except InputError as exc:
        raise InputError(f"{where}: {exc}") from None
    except OSError as exc:
        raise InputError(f"{where}: {path}: cannot be read: {reason_of(exc)}") from None
    return f"{size}:{digest.hexdigest()}"


def in_order_of_modes(items: Sequence[Item]) -> list[Item]:
    """Items by mode, so that every adapter is switched to once; within a mode in the given order."""
    order: tuple[Mode, ...] = (
        "language",
        "vision",
        "vision_speech",
        "speech",
    )  # the middle two share an adapter
    return sorted(items, key=lambda item: order.index(item.mode))
