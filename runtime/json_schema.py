# SPDX-License-Identifier: Apache-2.0
"""Which JSON schemas can become a grammar: its maker drops what it does not know, so we refuse it first."""

from __future__ import annotations

import re
from typing import Any

from .errors import InputError

_Schema = dict[str, Any]

_MAX_DEPTH = 64
_MAX_COUNT = 1024  # of characters or items: a grammar spells every repetition out

_NOTES = frozenset(
    {"$defs", "definitions", "$schema", "$id", "$comment", "title", "description", "default", "examples"}
)
_KNOWN = _NOTES | frozenset(
    {"$ref", "type", "enum", "const", "format", "pattern", "minLength", "maxLength"}
    | {"anyOf", "oneOf", "allOf", "properties", "required", "additionalProperties"}
    | {"items", "prefixItems", "minItems", "maxItems"}
)
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
    "array": (list,),
    "object": (dict,),
}
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems")
_MAPS = ("properties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_CHOICES = ("anyOf", "oneOf", "allOf")
_FORMATS = re.compile(r"uuid[1-5]?|date|time|date-time")  # of others the maker, as the standard, keeps a note


def checked(schema: _Schema) -> _Schema:
    """The schema, as the maker of grammars needs it. It is changed in place.

    Each place that a "$ref" leads to becomes a definition of a name of ours: the maker takes one called like
    a rule of its own, "string", for that rule, and makes one whose name it has to change again and again.

    Raises:
        InputError: it says what the maker would leave out, so that an answer could ignore it; a repetition
            is out of range; it is too deep; a reference leads to what is no schema in it, or in a circle.
    """
    found: list[_Schema] = []
    _walk(schema, found)
    places = {id(one) for one in found}
    targets = {id(one): _target(schema, one["$ref"], places) for one in found if "$ref" in one}
    _check_circles(found, targets)
    for one in found:
        if _reads(one) == {"type", "allOf"}:
            _check_all_of(one, targets)
    return _renamed(schema, found, targets)


def _walk(schema: Any, found: list[_Schema], depth: int = 0) -> None:
    """Check each schema in it on its own, and list them, the outer before the inner."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise InputError(f"JSON schema: {str(schema)[:40]!r} stands where a schema is expected")
    if depth > _MAX_DEPTH:
        raise InputError(f"JSON schema: nested deeper than {_MAX_DEPTH}")
    found.append(schema)
    _check_keywords(schema)
    _check_values(schema)
    for key, value in schema.items():
        if key in _MAPS and isinstance(value, dict):
            for one in value.values():
                _walk(one, found, depth + 1)
        if key in _LISTS and isinstance(value, list):
            for one in value:
                _walk(one, found, depth + 1)
        if key == "items" or (key == "additionalProperties" and not isinstance(value, bool)):
            _walk(value, found, depth + 1)


def _check_keywords(schema: _Schema) -> None:
    """Refuse keywords that the maker does not know, or does not look at beside the others."""
    for key, value in schema.items():
        if key not in _KNOWN:
            raise InputError(
                f"JSON schema: keyword {key[:40]!r} is not supported, the answer could ignore it"
            )
        if key in _COUNTS and not (type(value) is int and 0 <= value <= _MAX_COUNT):
            raise InputError(f"JSON schema: {key} is {str(value)[:40]}, expected 0 to {_MAX_COUNT}")
        if key in (*_CHOICES, "enum") and not (isinstance(value, list) and value):
            raise InputError(f"JSON schema: {key} is {str(value)[:40]}, expected a list of at least one")
    for low, high in (("minLength", "maxLength"), ("minItems", "maxItems")):
        if schema.get(low, 0) > schema.get(high, _MAX_COUNT):
            raise InputError(f"JSON schema: {low} is {schema[low]}, {high} {schema[high]}")
    reads = _reads(schema)
    for key, value in schema.items():
        asks = key not in _NOTES and not (value == [] and key == "required")
        asks &= not (value == 0 and key in ("minLength", "minItems"))
        if asks and key not in reads:
            beside = next((k for k in schema if k in reads), "others")
            raise InputError(
                f"JSON schema: keyword {key!r} is not supported beside {beside!r}, the answer could ignore it"
            )


def _reads(schema: _Schema) -> set[str]:
    """The keywords that the maker looks at, in its order: it takes the first of these that applies."""
    kind = schema.get("type")
    for key in ("$ref", "oneOf", "anyOf"):
        if key in schema:
            return {key}
    if isinstance(kind, list):
        return {"type"}
    for key in ("const", "enum"):
        if key in schema:
            return {"type", key}
    if kind in (None, "object"):
        if "properties" in schema or schema.get("additionalProperties", True) is not True:
            return {"type", "properties", "required", "additionalProperties"}
        if "allOf" in schema:
            return {"type", "allOf"}
    if kind in (None, "array"):
        if schema.get("items"):
            return {"type", "items", "minItems", "maxItems"}
        if "prefixItems" in schema:
            return {"type", "prefixItems"}
    if kind in (None, "string"):
        if "pattern" in schema:
            return {"type", "pattern"}
        if isinstance(schema.get("format"), str) and _FORMATS.fullmatch(schema["format"]):
            return {"type", "format"}
    if kind == "string":
        return {"type", "format", "minLength", "maxLength"}
    return {"type", "format", "additionalProperties"} if kind == "object" else {"type", "format"}


def _check_values(schema: _Schema) -> None:
    """Refuse a type that is none, a value of another type, and a required property that is not described."""
    kinds = schema.get("type", list(_TYPES))
    kinds = kinds if isinstance(kinds, list) else [kinds]
    for kind in kinds or [[]]:
        if not isinstance(kind, str) or kind not in _TYPES:
            raise InputError(f"JSON schema: type is {str(kind)[:40]!r}, expected one of {', '.join(_TYPES)}")
    for value in [schema["const"]] if "const" in schema else schema.get("enum", []):
        if not any(_is(value, kind) for kind in kinds):
            raise InputError(f"JSON schema: {str(value)[:40]!r} is not of type {', '.join(kinds)}")
        if _refers(value):  # the maker would write another there
            raise InputError("JSON schema: a value has a '$ref', which is not supported")
    required, described = schema.get("required", []), schema.get("properties", {})
    if not isinstance(required, list) or not isinstance(described, dict):
        raise InputError("JSON schema: expected a list in required and an object in properties")
    for name in required:
        if not isinstance(name, str) or name not in described:
            raise InputError(f"JSON schema: {str(name)[:40]!r} is required, but not in properties")


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[kind])


def _refers(value: Any) -> bool:
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            if "$ref" in one:
                return True
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
    return False


def _target(schema: _Schema, name: Any, places: set[int]) -> _Schema:
    """What "#/$defs/x" is: one of the schemas that have been looked at, whose places are their ids."""
    if not isinstance(name, str) or not name.startswith("#/"):
        raise InputError(
            f"JSON schema: $ref is {str(name)[:80]!r}, expected '#/…': a place in the schema itself"
        )
    found: Any = schema
    for key in name[2:].split("/"):
        if not isinstance(found, dict) or key not in found:
            raise InputError(f"JSON schema: $ref {name[:80]!r} leads to nothing")
        found = found[key]
    if not isinstance(found, dict) or id(found) not in places:
        raise InputError(f"JSON schema: $ref {name[:80]!r} leads to what is no schema")
    return found


def _check_circles(found: list[_Schema], targets: dict[int, _Schema]) -> None:
    """Refuse a schema that is reached from itself before the first character of an answer is known.

    A depth-first search, in which each schema is entered once: `path` holds those that are still open.
    """
    done: set[int] = set()
    for start in found:
        path, open_ = [(start, _stands_for(start, targets))], {id(start)}
        while path and id(path[0][0]) not in done:
            one, further = path[-1]
            if not further:
                open_.discard(id(one))
                done.add(id(one))
                path.pop()
                continue
            other = further.pop()
            if id(other) in open_:  # only a reference leads back
                raise InputError(f"JSON schema: {one['$ref'][:80]!r} stands for itself")
            if id(other) not in done:
                open_.add(id(other))
                path.append((other, _stands_for(other, targets)))


def _stands_for(schema: _Schema, targets: dict[int, _Schema]) -> list[_Schema]:
    """The schemas that its answers begin as."""
    if "$ref" in schema:
        return [targets[id(schema)]]
    return [one for key in _CHOICES for one in schema.get(key, []) if isinstance(one, dict)]


def _check_all_of(schema: _Schema, targets: dict[int, _Schema]) -> None:
    """Refuse members that the maker takes nothing of, or too little: it joins the properties of objects."""
    names: set[str] = set()
    for member in schema["allOf"]:
        one = targets.get(id(member), member) if isinstance(member, dict) else {}
        if (
            one.get("type", "object") != "object"
            or "properties" not in one
            or "properties" not in _reads(one)
        ):
            raise InputError("JSON schema: a member of allOf is not an object with properties: not supported")
        again = names & one["properties"].keys()
        if again:
            raise InputError(
                f"JSON schema: allOf describes property {min(again)[:40]!r} twice: not supported"
            )
        names |= one["properties"].keys()


def _renamed(schema: _Schema, found: list[_Schema], targets: dict[int, _Schema]) -> _Schema:
    """Move each target to "$defs", under a name that no rule of the maker's can have."""
    keys = [key for one in found for key in one.get("properties", {})]
    taken = max((len(run) for key in keys for run in re.findall(r"placee*", key)), default=0)
    prefix = "place" + "e" * max(0, taken - len("place") + 1)
    names: dict[int, str] = {}
    for target in targets.values():
        names.setdefault(id(target), f"{prefix}{len(names)}")
    for one in found:
        if "$ref" in one:
            one["$ref"] = f"#/$defs/{names[id(targets[id(one)])]}"
    moved: _Schema = {}
    for one in found:
        if id(one) in names:
            name = names[id(one)]
            moved[name] = dict(one)
            one.clear()
            one["$ref"] = f"#/$defs/{name}"
    for key in ("definitions", "$defs"):
        schema.pop(key, None)
    if moved:
        schema["$defs"] = moved
    # The maker does not look into "$defs" beside a "$ref": say the same in anyOf.
    if "$ref" in schema:
        schema["anyOf"] = [{"$ref": schema.pop("$ref")}]
    return schema
