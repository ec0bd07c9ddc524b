# SPDX-License-Identifier: Apache-2.0
"""Typed access to the fields of a JSON object, with the field's name in every error."""

from __future__ import annotations

import math
from collections.abc import KeysView
from pathlib import PurePosixPath
from typing import Any, cast

from .errors import BundleError


class Fields:
    """Typed access to a JSON object; a wrong type is a BundleError that names the field."""

    def __init__(self, raw: object, where: str) -> None:
        if not isinstance(raw, dict):
            raise BundleError(f"{where}: expected an object")
        self._raw: dict[str, Any] = raw
        self.where = where

    def _get(self, key: str, kind: type | tuple[type, ...], want: str) -> Any:
        value = self._raw.get(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise BundleError(f"{self.where}: field {key!r} is {str(value)[:60]!r}, expected {want}")
        return value

    def text(self, key: str) -> str:
        value = cast(str, self._get(key, str, "a string"))
        if not value.isprintable():
            raise BundleError(f"{self.where}: field {key!r} holds control characters")
        return value

    def text_or_none(self, key: str) -> str | None:
        return None if self._raw.get(key) is None else self.text(key)

    def count(self, key: str) -> int:
        value = cast(int, self._get(key, int, "a whole number"))
        if not 0 <= value < 1 << 53:
            raise BundleError(f"{self.where}: field {key!r} is {value}, expected a number from 0")
        return value

    def number(self, key: str) -> float:
        """A finite number above 0: every one in a manifest is."""
        value = self._get(key, (int, float), "a number")
        try:
            found = float(value)
        except OverflowError:
            found = math.inf
        if not 0 < found < math.inf:
            raise BundleError(f"{self.where}: field {key!r} is {str(value)[:60]}, expected a number above 0")
        return found

    def flag(self, key: str) -> bool:
        return cast(bool, self._get(key, bool, "true or false"))

    def array(self, key: str) -> list[Any]:
        return cast("list[Any]", self._get(key, list, "a list"))

    def numbers_or_none(self, key: str) -> tuple[float, ...] | None:
        if self._raw.get(key) is None:
            return None
        values = self.array(key)
        if not all(isinstance(v, (int, float)) and 0 < v < 1e30 for v in values):
            raise BundleError(f"{self.where}: field {key!r} holds something that is not a number above 0")
        return tuple(float(v) for v in values)

    def fields(self, key: str) -> Fields:
        return Fields(self._raw.get(key), f"{self.where}: {key}")

    def has(self, key: str) -> bool:
        """Whether there is such a field, and it is not null."""
        return self._raw.get(key) is not None

    def keys(self) -> KeysView[str]:
        return self._raw.keys()

    def items(self) -> list[tuple[str, Any]]:
        return list(self._raw.items())

    def one_of(self, key: str, allowed: tuple[str, ...]) -> str:
        value = self.text(key)
        if value not in allowed:
            raise BundleError(
                f"{self.where}: field {key!r} is {value!r}, expected one of {', '.join(allowed)}"
            )
        return value

    def file(self, key: str) -> str:
        """A path within the directory."""
        value = self.text(key)
        pure = PurePosixPath(value)
        strange = any(c in value for c in "\\:") or not value or len(value) > 255
        if strange or pure.is_absolute() or ".." in pure.parts:
            raise BundleError(
                f"{self.where}: field {key!r} is {value[:60]!r}, expected a path inside the directory"
            )
        return value

    def file_or_none(self, key: str) -> str | None:
        return self.file(key) if self.has(key) else None
