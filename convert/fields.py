# SPDX-License-Identifier: Apache-2.0
"""Checked access to the JSON objects of a checkpoint: a wrong value is one line that names file and field."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ..runtime.errors import CheckpointError

_MISSING = object()


class Fields:
    """One JSON object, `where` it came from, and readers that check what they return.

    Every reader raises CheckpointError when the value is not what its name says. `default` is
    returned for a key that is absent; a key that is present is always checked.
    """

    def __init__(self, raw: object, where: str, path: str = "") -> None:
        self.where, self.path = where, path
        if not isinstance(raw, Mapping):
            what = f"field {path[:-1]!r}" if path else "the file"
            raise CheckpointError(f"{where}: {what} is {_show(raw)}, expected an object")
        self._raw: Mapping[str, Any] = raw

    def error(self, key: str, found: object, want: str) -> CheckpointError:
        """The error for one field; raise it."""
        return CheckpointError(f"{self.where}: field {self.path + key!r} is {_show(found)}, expected {want}")

    def get(self, key: str) -> Any:
        """The raw value, None when absent."""
        return self._raw.get(key)

    def has(self, key: str) -> bool:
        """Whether the key is there with anything but null."""
        return self._raw.get(key) is not None

    def _take(self, key: str, default: object, want: str) -> Any:
        value = self._raw.get(key, default)
        if value is _MISSING:
            raise CheckpointError(f"{self.where}: field {self.path + key!r} is missing, expected {want}")
        return value

    def count(self, key: str, low: int, high: int, default: object = _MISSING) -> int:
        """A whole number from `low` to `high`."""
        want = f"a whole number from {low} to {high}"
        value = self._take(key, default, want)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, value, want)
        return value

    def positive(self, key: str, default: object = _MISSING) -> float:
        """A finite number above zero."""
        value = self._take(key, default, "a number above 0")
        if not _is_positive(value):
            raise self.error(key, value, "a finite number above 0")
        return float(value)

    def flag(self, key: str, default: object = _MISSING) -> bool:
        """True or false."""
        value = self._take(key, default, "true or false")
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value

    def text(self, key: str, default: object = _MISSING) -> str:
        """A string."""
        value = self._take(key, default, "a string")
        if not isinstance(value, str):
            raise self.error(key, value, "a string")
        return value

    def positives(self, key: str, length: int) -> tuple[float, ...]:
        """A list of `length` finite numbers above zero."""
        want = f"a list of {length} finite numbers above 0"
        value = self._take(key, _MISSING, want)
        if not isinstance(value, list):
            raise self.error(key, value, want)
        if len(value) != length:
            raise self.error(key, f"a list of {len(value)}", want)
        for i, one in enumerate(value):
            if not _is_positive(one):
                raise self.error(f"{key}[{i}]", one, "a finite number above 0")
        return tuple(float(one) for one in value)

    def only(self, key: str, *allowed: object) -> None:
        """Refuse a value other than those this converter knows how to honour; absent and null pass."""
        value = self._raw.get(key)
        if value is not None and not any(type(value) is type(a) and value == a for a in allowed):
            raise self.error(key, value, " or ".join(_show(a) for a in allowed))

    def absent(self, keys: Iterable[str]) -> None:
        """Refuse keys whose meaning would be lost in the conversion."""
        for key in keys:
            if self.has(key):
                raise self.error(key, self._raw[key], "no such field: it is not supported")

    def fields(self, key: str) -> Fields:
        """A nested object."""
        return Fields(self._raw.get(key), self.where, f"{self.path}{key}.")


def _is_positive(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    # An int beyond float's range cannot be compared with math.isfinite.
    return 0 < value < 3.4e38 and math.isfinite(value)


def _show(value: object) -> str:
    """A value in at most 60 characters, on one line."""
    text = value if isinstance(value, str) and value.startswith("a list of ") else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "…"
