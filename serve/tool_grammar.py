# SPDX-License-Identifier: Apache-2.0
"""A grammar in which the answer can only be calls of given tools: tool_choice "required", or by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..runtime.errors import InputError
from ..runtime.sampler_ggml import schema_to_grammar
from .schema import Function

OPEN, CLOSE = "<|tool_call|>", "<|/tool_call|>"  # control tokens of the Phi-4-mini family
_MOST_CALLS = 16
_ANY = {"type": "object"}
_CARD_TYPES = {  # of the model card's form, which names Python's
    "int": "integer",
    "float": "number",
    "str": "string",
    "bool": "boolean",
    "list": "array",
    "dict": "object",
}


def calls_grammar(tools: Sequence[Function], *, one: bool, tagged: bool) -> str:
    """GBNF for one call, or for one to sixteen.

    Args:
        tools: that may be called, at least one.
        one: exactly one call.
        tagged: the vocabulary has control tokens around calls.

    Returns:
        a grammar in which arguments match the tool's parameters; where those cannot become a grammar and the
        tool is not `strict`, any object.

    Raises:
        InputError: parameters of a strict tool that cannot become a grammar.
    """
    schemas = [_arguments(tool) for tool in tools]
    definitions = {
        f"tool{i}": {
            "type": "object",
            "properties": {"name": {"const": tool.name}, "arguments": _moved(schema, f"tool{i}")},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for i, (tool, schema) in enumerate(zip(tools, schemas, strict=True))
    }
    whole = {
        "type": "array",
        "items": {"anyOf": [{"$ref": f"#/$defs/{name}"} for name in definitions]},
        "minItems": 1,
        "maxItems": 1 if one else _MOST_CALLS,
        "$defs": definitions,
    }
    grammar = schema_to_grammar(json.dumps(whole))
    if not tagged:
        return grammar
    lines = grammar.splitlines()
    renamed = ["calls" + line.removeprefix("root") if line.startswith("root ::=") else line for line in lines]
    return "\n".join([f"root ::= {OPEN} calls {CLOSE}", *renamed])


def _arguments(tool: Function) -> dict[str, Any]:
    """The JSON schema of a tool's arguments."""
    schema = _schema(tool.parameters or {})
    try:
        schema_to_grammar(json.dumps(schema))
    except InputError as exc:
        if tool.strict:
            raise InputError(f"tools: {tool.name[:60]!r}: {exc}") from None
        return dict(_ANY)
    return schema


def _schema(parameters: dict[str, Any]) -> dict[str, Any]:
    """Parameters are a JSON schema of an object, or the card's `{argument: {"type", "description"}}`."""
    if isinstance(parameters.get("type"), str) or "$ref" in parameters or not parameters:
        return {**_ANY, **parameters}
    described = {
        name: {"type": _CARD_TYPES.get(kind, kind)} if isinstance(kind := _kind(value), str) else {}
        for name, value in parameters.items()
    }
    return {"type": "object", "properties": described, "required": list(described)}


def _kind(value: object) -> object:
    return value.get("type") if isinstance(value, dict) else None


def _moved(schema: Any, name: str) -> Any:
    """A schema whose references are into itself, for its place among the definitions."""
    if isinstance(schema, list):
        return [_moved(one, name) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: f"#/$defs/{name}/properties/arguments{value[1:]}"
        if key == "$ref" and isinstance(value, str) and value.startswith("#/")
        else _moved(value, name)
        for key, value in schema.items()
    }
