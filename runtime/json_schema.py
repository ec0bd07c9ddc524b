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
_VALUES = ("const", "enum", "default", "examples")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems")
_MAPS = ("properties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")


def check_references(schema: dict[str, Any]) -> None:
    """Refuse a reference that leads out of the schema, to nothing, or round in a circle without an answer.

    Raises:
        InputError: which one.
    """
    for name in _references(schema):
        seen, waiting = {name}, [name]
        while waiting:
            for other in _stands_for(_target(schema, waiting.pop())):
                if other == name:
                    raise InputError(f"JSON schema: {name[:80]!r} stands for itself")
                if other not in seen:
                    seen.add(other)
                    waiting.append(other)


def _references(schema: Any) -> set[str]:
    """Every "$ref" in it that a string could be; `check` has looked at how deep it is."""
    found: set[str] = set()
    waiting = [schema]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            if isinstance(one.get("$ref"), str):
                found.add(one["$ref"])
            elif "$ref" in one and not isinstance(one["$ref"], dict):
                raise InputError(f"JSON schema: $ref is {str(one['$ref'])[:40]!r}, expected '#/…'")
            waiting += [value for key, value in one.items() if key not in _VALUES]
        elif isinstance(one, list):
            waiting += one
    return found


def _target(schema: dict[str, Any], name: str) -> Any:
    """What "#/$defs/x" is."""
    if not name.startswith("#/"):
        raise InputError(f"JSON schema: $ref is {name[:80]!r}, expected '#/…': a place in the schema itself")
    found: Any = schema
    for key in name[2:].split("/"):
        if not isinstance(found, dict) or key not in found:
            raise InputError(f"JSON schema: $ref {name[:80]!r} leads to nothing")
        found = found[key]
    return found


def _stands_for(schema: Any) -> list[str]:
    """The references that have to be followed before the first character is known."""
    if not isinstance(schema, dict):
        return []
    found = [schema["$ref"]] if isinstance(schema.get("$ref"), str) else []
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(key), list):
            for one in schema[key]:
                found += _stands_for(one)
    return found


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
