# SPDX-License-Identifier: Apache-2.0
"""Messages of an item, in OpenAI's form or that of `Model.chat`, as the library takes them.

Media are files, as paths relative to the file of items or absolute, or base64. Addresses of the network are
never fetched.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from ..runtime.errors import InputError
from ..runtime.files import check_file, check_unicode
from ..runtime.parts import Media, MediaKind, Message, Role, ToolCall

MAX_MEDIA = 64  # of an item: as many as frames of a video
_ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}


def messages_of(raw: object, folder: Path) -> tuple[Message, ...]:
    """A conversation.

    Args:
        raw: a list of turns.
        folder: what relative paths of media are relative to.

    Raises:
        InputError: something in it cannot be used, or a file is not there.
    """
    if not isinstance(raw, list) or not raw:
        raise InputError("messages is not a list of at least one object")
    found = tuple(_message(turn, f"messages[{i}]", folder) for i, turn in enumerate(raw))
    n = sum(len(message.media) for message in found)
    if n > MAX_MEDIA:
        raise InputError(f"has {n} pictures and clips, expected at most {MAX_MEDIA}")
    return found


def _message(raw: object, where: str, folder: Path) -> Message:
    if not isinstance(raw, dict):
        raise InputError(f"{where} is a JSON {type(raw).__name__}, expected an object")
    role = raw.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise InputError(f"{where}: role is {str(role)[:40]!r}, expected one of {', '.join(_ROLES)}")
    calls = _calls(raw.get("tool_calls"), where)
    content = raw.get("content")
    if content is None and calls:
        content = ""
    texts: list[str] = []
    media: list[Media] = []
    if isinstance(content, str):
        texts.append(content)
    elif isinstance(content, list):
        for i, part in enumerate(content):
            _part(part, f"{where}.content[{i}]", folder, texts, media)
    else:
        raise InputError(f"{where}: content is {type(content).__name__}, expected text or a list of parts")
    text = "".join(texts)
    check_unicode(f"{where}: content", text)
    return Message(_ROLES[role], text, calls, tuple(media))


def _part(raw: object, where: str, folder: Path, texts: list[str], media: list[Media]) -> None:
    kind = raw.get("type") if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or not isinstance(kind, str):
        raise InputError(f"{where} is no object with a type")
    if kind == "text":
        if not isinstance(raw.get("text"), str):
            raise InputError(f"{where}: text is {type(raw.get('text')).__name__}, expected text")
        texts.append(raw["text"])
    elif kind == "image_url":
        media.append(_image_url(raw.get("image_url"), where, folder))
    elif kind == "input_audio":
        media.append(Media("audio", base64_audio(raw.get("input_audio"), where), where))
    elif kind in ("image", "audio"):
        name = raw.get("path", raw.get(kind))
        media.append(Media(cast(MediaKind, kind), path_of(name, where, folder)))
    else:
        raise InputError(
            f"{where}: type is {kind[:40]!r}, expected text, image_url, input_audio, image or audio"
        )


def _image_url(raw: object, where: str, folder: Path) -> Media:
    """`{"url": …, "detail": …}`, or the address alone."""
    detail = raw.get("detail") if isinstance(raw, dict) else None
    url = raw.get("url") if isinstance(raw, dict) else raw
    if not isinstance(url, str):
        raise InputError(f"{where}: image_url has no url")
    max_crops = 1 if detail == "low" else None
    if url[:5].lower() != "data:":
        return Media("image", path_of(url, where, folder), max_crops=max_crops)
    comma = url.find(",", 0, 256)
    if comma < 0 or not url[:comma].lower().endswith(";base64"):
        raise InputError(f"{where}: a data URI has to be data:TYPE;base64,DATA")
    return Media("image", _bytes(url[comma + 1 :], where), where, max_crops)


def base64_audio(raw: object, where: str) -> bytes:
    """The bytes of `{"data": BASE64, "format": …}`; what they are they say themselves.

    Raises:
        InputError: not such an object.
    """
    data = raw.get("data") if isinstance(raw, dict) else None
    if not isinstance(data, str):
        raise InputError(f"{where}: input_audio has no data, expected base64")
    return _bytes(data, where)


def path_of(name: object, where: str, folder: Path) -> Path:
    """A file that is there.

    Raises:
        InputError: no path, an address of the network, or no regular file.
    """
    if not isinstance(name, str) or not name:
        raise InputError(f"{where}: has {str(name)[:40]!r} as its file, expected a path")
    if "://" in name[:32]:
        raise InputError(f"{where}: {name[:60]!r} is an address, which is not fetched: expected a file")
    path = folder / name
    check_file(path)
    return path


def _bytes(text: str, where: str) -> bytes:
    try:
        found = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):  # ValueError: outside ASCII
        raise InputError(f"{where}: is not base64") from None
    if not found:
        raise InputError(f"{where}: is empty")
    return found


def _calls(raw: object, where: str) -> tuple[ToolCall, ...]:
    """Calls of an assistant's turn: OpenAI's, their arguments as JSON text, or ours, as an object."""
    if raw is None:
        return ()
    found: list[ToolCall] = []
    for one in raw if isinstance(raw, list) else [None]:
        call = one.get("function", one) if isinstance(one, dict) else None
        name = call.get("name") if isinstance(call, dict) else None
        arguments = call.get("arguments") if isinstance(call, dict) else None
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                arguments = None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise InputError(f"{where}: tool_calls is no list of calls with name and arguments")
        found.append(ToolCall(name, arguments))
    return tuple(found)
