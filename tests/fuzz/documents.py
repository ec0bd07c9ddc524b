# SPDX-License-Identifier: Apache-2.0
"""JSON documents out of bytes: a good one with a few things changed, so that a reader gets past its parser.

The first byte chooses: an even one means that the rest is the document as it is, an odd one that the rest
says what to change in a document given. Every change is a walk down the tree and a deed at its end.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

_DEEP, _HUGE, _TWICE = "@deep@", "@huge@", "@twice@"  # what `json.dumps` could not write
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 255, 65536, 2**31 - 1, 2**31, 2**32, 2**53),
    *(2**63, 2**64, -(2**63), 10**40),
    *(0.0, -0.0, 0.5, 1e-320, 1e38, 1e39, 1e308, math.inf, -math.inf, math.nan),
    *("", "a", "\0", "\n", "\x1b[2J", "\ud800", "é" * 300, "../x", "/etc/passwd", "C:\\x", "a" * 5000),
    *([], {}, [[]], [None], [0] * 2000, ["a"] * 3, {"a": 1}, {"": ""}, {"type": "object"}, {"$ref": "#"}),
    *(_DEEP, _HUGE, _TWICE),
)  # fmt: skip
_MOST_CHANGES = 6


class Source:
    """Numbers out of bytes; zeros when they are used up."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def below(self, n: int) -> int:
        """0 to n - 1."""
        size = 1 if n <= 256 else 3
        piece = self._data[self._at : self._at + size]
        self._at += size
        return int.from_bytes(piece, "little") % n

    @property
    def rest(self) -> bytes:
        """What is left."""
        return self._data[self._at :]


def document(data: bytes, base: Any) -> bytes:
    """The JSON text that `data` stands for."""
    if not data or data[0] % 2 == 0:
        return data[1:]
    return text(changed(base, Source(data[1:])))


def text(value: Any) -> bytes:
    """JSON, with NaN, half surrogate pairs and what else a strict writer refuses."""
    written = json.dumps(value)
    for mark, wild in (
        (_DEEP, "[" * 5000 + "]" * 5000),
        (_HUGE, "9" * 5000),
        (_TWICE, '{"a": 1, "a": 2}'),
    ):
        written = written.replace(f'"{mark}"', wild)
    return written.encode("ascii")


def changed(base: Any, source: Source) -> Any:
    """A copy with up to six changes."""
    top = [copy.deepcopy(base)]
    for _ in range(1 + source.below(_MOST_CHANGES)):
        _change(top, source)
    return top[0]


def _change(top: list[Any], source: Source) -> None:
    parent, key, value = top, 0, top[0]
    while isinstance(value, (dict, list)) and value and source.below(8):
        parent, key = value, _choose(value, source)  # type: ignore[assignment]
        value = parent[key]
    deeds: tuple[Callable[[], Any], ...] = (
        lambda: copy.deepcopy(_VALUES[source.below(len(_VALUES))]),
        lambda: copy.deepcopy(_VALUES[source.below(len(_VALUES))]),
        lambda: _near(value, source),
        lambda: [value, copy.deepcopy(value)],
        lambda: copy.deepcopy(_anywhere(top[0], source)),
    )
    deed = source.below(len(deeds) + 2)
    if deed < len(deeds):
        parent[key] = deeds[deed]()
    elif deed == len(deeds) and parent is not top:
        del parent[key]
    elif isinstance(parent, dict):  # another name for it
        name = _VALUES[source.below(len(_VALUES))]
        parent[name if isinstance(name, str) else f"{key}x"] = copy.deepcopy(value)
    elif parent is not top:
        parent.insert(source.below(len(parent) + 1), copy.deepcopy(value))


def _choose(value: dict[str, Any] | list[Any], source: Source) -> Any:
    if isinstance(value, dict):
        return list(value)[source.below(len(value))]
    return source.below(len(value))


def _near(value: Any, source: Source) -> Any:
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        some = (
            value + 1,
            value - 1,
            -value,
            value * 2,
            value // 2 if math.isfinite(value) else 0,
            float(value),
            str(value),
        )
        return some[source.below(len(some))]
    if isinstance(value, str):
        some_text = (
            value[:-1],
            value + value,
            value.upper(),
            value + "\0",
            value + "\n",
            " " + value,
            value[1:],
        )
        return some_text[source.below(len(some_text))]
    return len(value)


def _anywhere(value: Any, source: Source) -> Any:
    while isinstance(value, (dict, list)) and value and source.below(4):
        value = value[_choose(value, source)]
    return value
