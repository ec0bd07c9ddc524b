# SPDX-License-Identifier: Apache-2.0
"""Messages as callers give them: `Message`, or dicts in the shape that chat APIs share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np

from .errors import InputError
from .parts import Media, MediaKind, Message, Role

Turn = Message | Mapping[str, Any]


def parse(turns: Sequence[Turn]) -> list[Message]:
    """Check a conversation.

    A dict has "role" and "content"; the content is text, or a list of parts:
    `{"type": "text", "text": …}`, `{"type": "image", "image": …}`, `{"type": "audio", "audio": …}`. An image
    is a path, a file's bytes, or uint8 [h, w, 3] RGB; audio is a path, a file's bytes, or
    (float32 [n], rate). Media come before the text, as the model was trained.

    Raises:
        InputError: no message, or one that cannot be used.
    """
    if not turns:
        raise InputError("there is no message to answer")
    return [turn if isinstance(turn, Message) else _message(turn) for turn in turns]


def _message(raw: Mapping[str, Any]) -> Message:
    role, content = raw.get("role"), raw.get("content")
    if role not in get_args(Role):
        raise InputError(f"message role is {str(role)[:40]!r}, expected one of {', '.join(get_args(Role))}")
    if isinstance(content, str):
        return Message(cast(Role, role), content)
    if not isinstance(content, list):
        raise InputError(f"message content is {type(content).__name__}, expected text or a list of parts")
    texts: list[str] = []
    media: list[Media] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in get_args(MediaKind):
            media.append(_media(cast(MediaKind, kind), part.get(kind)))
        else:
            raise InputError(f"message part of type {str(kind)[:40]!r}, expected text, image or audio")
    return Message(cast(Role, role), "".join(texts), media=tuple(media))


def _media(kind: MediaKind, source: Any) -> Media:
    if isinstance(source, (str, Path)):
        return Media(kind, Path(source))
    if isinstance(source, bytes):
        return Media(kind, source)
    if kind == "image" and isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or source.size == 0:
            raise InputError(f"image is {source.dtype} {list(source.shape)}, expected uint8 [h, w, 3]")
        return Media(kind, source)
    if (
        kind == "audio"
        and isinstance(source, tuple)
        and len(source) == 2
        and isinstance(source[0], np.ndarray)
    ):
        return Media(kind, (source[0], int(source[1])))
    raise InputError(f"{kind} is {type(source).__name__}, expected a path, a file's bytes, or an array")
