# SPDX-License-Identifier: Apache-2.0
"""Tools a model may call: the description that goes into the prompt, and the calls that come out.

The prompt form is the model card's: a JSON list of `{"name", "description", "parameters"}`, with a space
after each comma and colon (Python's `json.dumps`), because that is what the models were trained on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from .errors import InputError
from .parts import ToolCall

_MAX_CHARS = 1 << 20  # a description that fills the whole context is far below this
_TAGGED = re.compile(r"<\|tool_call\|>(.*?)(?:<\|/tool_call\|>|\Z)", re.DOTALL)
_FUNCTOOLS = "functools"


def parse_tools(text: str) -> str:
    """Check a list of tools and give it the form that the prompt takes.

    Args:
        text: a JSON list. Each entry is `{"name", "description", "parameters"}`, or the same inside
            OpenAI's `{"type": "function", "function": {…}}`, which is unwrapped. `parameters` is an
            object (the card's `{argument: {"type", "description"}}` or a JSON schema) and, like
            `description`, may be left out; keys and their order are kept.

    Returns:
        the list as one line of JSON, characters outside ASCII written as themselves.

    Raises:
        InputError: not JSON, not a list of tools, two tools of one name, or more than 1 MiB.
    """
    if len(text) > _MAX_CHARS:
        raise InputError(f"tools: {len(text)} characters, at most {_MAX_CHARS} can be used")
    try:
        raw = _loads(text)
    except (ValueError, RecursionError) as exc:
        raise InputError(f"tools: not JSON: {str(exc)[:120]}") from None
    if not isinstance(raw, list) or not raw:
        raise InputError("tools: expected a JSON list of at least one tool")
    tools = [_check_tool(entry, f"tools: entry {i + 1}") for i, entry in enumerate(raw)]
    names: set[str] = set()
    for tool in tools:
        if tool["name"] in names:
            raise InputError(f"tools: there are two tools named {_show(tool['name'])}")
        names.add(tool["name"])
    return _dumps(tools)


def _check_tool(entry: object, where: str) -> dict[str, Any]:
    if isinstance(entry, dict) and entry.get("type") == "function" and "function" in entry:
        entry = entry["function"]
    if not isinstance(entry, dict):
        raise InputError(f"{where} is {_show(entry)}, expected an object")
    name = entry.get("name")
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"{where} has {_show(name)} as its name, expected text")
    if not isinstance(entry.get("description", ""), str):
        raise InputError(f"{where} ({name[:60]!r}): its description is not text")
    if not isinstance(entry.get("parameters", {}), dict):
        raise InputError(f"{where} ({name[:60]!r}): its parameters are not an object")
    return entry


def parse_calls(text: str) -> tuple[ToolCall, ...] | None:
    """The calls in a whole answer, None when it is no tool call.

    Understood are `<|tool_call|>[…]<|/tool_call|>` (several of them, text around them, and a last one
    left open), `functools[…]`, and an answer that is nothing but such JSON: a list of calls or one call. A
    call is `{"name", "arguments"}` or `{"name", "parameters"}`, the arguments an object or its JSON text.
    Between tags alone may they be missing: JSON with a name in it can be an ordinary answer.
    """
    blocks = _TAGGED.findall(text)
    if blocks:
        found = [_parse_block(block, need_arguments=False) for block in blocks]
        return None if None in found else tuple(call for calls in found if calls for call in calls)
    return _parse_block(text.strip().removeprefix(_FUNCTOOLS), need_arguments=True)


def _parse_block(text: str, *, need_arguments: bool) -> tuple[ToolCall, ...] | None:
    text = text.strip()
    if text[:1] not in ("[", "{") or len(text) > _MAX_CHARS:
        return None
    try:
        raw = _loads(text)
        calls = tuple(
            _parse_call(entry, need_arguments) for entry in (raw if isinstance(raw, list) else [raw])
        )
    except (ValueError, RecursionError):
        return None
    return calls or None


def _parse_call(entry: object, need_arguments: bool) -> ToolCall:
    """One call; ValueError when it is none."""
    if isinstance(entry, dict) and entry.get("type") == "function" and "function" in entry:
        entry = entry["function"]
    if not isinstance(entry, dict):
        raise ValueError("not an object")
    name = entry.get("name")
    arguments = entry.get("arguments", entry.get("parameters", None if need_arguments else {}))
    if isinstance(arguments, str):
        arguments = _loads(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise ValueError("no name or no arguments")
    return ToolCall(name, arguments)


def render_calls(calls: Sequence[ToolCall]) -> str:
    """The JSON that stands between `<|tool_call|>` and `<|/tool_call|>`, as the models write it.

    Raises:
        InputError: arguments that JSON cannot hold.
    """
    try:
        return _dumps([{"name": call.name, "arguments": call.arguments} for call in calls])
    except (TypeError, ValueError, RecursionError) as exc:
        raise InputError(f"the arguments of a tool call are not JSON: {str(exc)[:120]}") from None


def _loads(text: str) -> Any:
    """JSON without NaN or Infinity, and without half a surrogate pair, which `\\ud800` can bring in."""
    value = json.loads(text, parse_constant=_refuse_constant)
    _dumps(value).encode("utf-8")  # UnicodeEncodeError is a ValueError
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)  # 1e999 is read as infinity


def _show(value: object) -> str:
    return repr(value[:60]) if isinstance(value, str) else f"a {type(value).__name__}"
