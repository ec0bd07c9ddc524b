# SPDX-License-Identifier: Apache-2.0
"""Which JSON schemas can become a grammar: its maker drops what it does not know, so we refuse it first."""

from __future__ import annotations

from typing import Any

from .errors import InputError

_MAX_DEPTH = 64
_MAX_COUNT = 1024  # of characters or items: a grammar spells every repetition out

_KNOWN = frozenset(
    {"$ref", "$defs", "definitions", "$schema", "$id", "$comment", "title", "description"}
    | {"default", "examples"}
    | {"type", "enum", "const", "format", "pattern", "minLength", "maxLength", "anyOf", "oneOf", "allOf"}
    | {"properties", "required", "additionalProperties", "items", "prefixItems", "minItems", "maxItems"}
)  # fmt: skip
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems")
_MAPS = ("properties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")


def check(schema: Any, depth: int = 0) -> None:
    """Refuse a schema that a grammar could not hold an answer to.

    Raises:
        InputError: a keyword that is not supported, a repetition count out of range, or too deep.
    """
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise InputError(f"JSON schema: {str(schema)[:40]!r} stands where a schema is expected")
    if depth > _MAX_DEPTH:
        raise InputError(f"JSON schema: nested deeper than {_MAX_DEPTH}")
    for key, value in schema.items():
        if key not in _KNOWN:
            raise InputError(
                f"JSON schema: keyword {key[:40]!r} is not supported, the answer could ignore it"
            )
        if key in _COUNTS and not (type(value) is int and 0 <= value <= _MAX_COUNT):
            raise InputError(f"JSON schema: {key} is {str(value)[:40]}, expected 0 to {_MAX_COUNT}")
        if key in _MAPS and isinstance(value, dict):
            for one in value.values():
                check(one, depth + 1)
        if key in _LISTS and isinstance(value, list):
            for one in value:
                check(one, depth + 1)
        if key == "items" or (key == "additionalProperties" and not isinstance(value, bool)):
            check(value, depth + 1)
