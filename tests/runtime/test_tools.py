# SPDX-License-Identifier: Apache-2.0
"""Tool descriptions in, tool calls out: the forms that are understood, and what is not a call."""

from __future__ import annotations

import json

import pytest

from pocketphi.runtime.errors import InputError
from pocketphi.runtime.parts import ToolCall
from pocketphi.runtime.tools import parse_calls, parse_tools, render_calls

from ..tiny import NANO

WEATHER = {
    "name": "get_weather",
    "description": "The weather in a city, e.g. Zürich",
    "parameters": {"city": {"description": "the city", "type": "str", "default": "London"}},
}
CALL = ToolCall("f", {"x": 1, "y": ["a", None, True], "z": {"ü": 1.5}})
CALL_JSON = '{"name": "f", "arguments": {"x": 1, "y": ["a", null, true], "z": {"ü": 1.5}}}'


def test_tools_keep_the_model_cards_form() -> None:
    """A space after comma and colon, keys in their order, ü as itself."""
    want = (
        '[{"name": "get_weather", "description": "The weather in a city, e.g. Zürich", '
        '"parameters": {"city": {"description": "the city", "type": "str", "default": "London"}}}]'
    )
    assert parse_tools(json.dumps([WEATHER], indent=4)) == want
    assert parse_tools(want) == want
    nested = [{"type": "function", "function": WEATHER}]
    assert parse_tools(json.dumps(nested)) == want
    assert parse_tools('[{"name": "f"}]') == '[{"name": "f"}]'


def test_tools_of_phi4_nanos_evaluation_come_out_as_they_are() -> None:
    lines = (NANO.parent / "eval" / "tools.jsonl").read_text("utf-8").splitlines()
    for line in lines:
        tools = json.loads(line)["prompt"].split("<|tool|>")[1].split("<|/tool|>")[0]
        assert parse_tools(tools) == tools
    assert lines


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("nonsense", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[{}", "not JSON"),
        ('[{"name": "f", "parameters": {"x": NaN}}]', "NaN is not a JSON number"),
        ("{}", "expected a JSON list"),
        ("[]", "at least one tool"),
        ("null", "expected a JSON list"),
        ('["f"]', "entry 1 is 'f'"),
        ('[{"name": "f"}, {"description": "d"}]', "entry 2 has a NoneType as its name"),
        ('[{"name": " "}]', "expected text"),
        ('[{"name": 3}]', "expected text"),
        ('[{"name": "f", "description": 3}]', "description is not text"),
        ('[{"name": "f", "parameters": []}]', "parameters are not an object"),
        ('[{"type": "function", "function": "f"}]', "entry 1"),
        ('[{"name": "f"}, {"name": "f"}]', "two tools named 'f'"),
        ('[{"name": "\\ud800"}]', "surrogate"),
        ("[1" + "0" * 5000 + "]", "not JSON"),
        (" " * (1 << 20) + "[]", "characters"),
    ],
)
def test_tools_refused(text: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        parse_tools(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    "text",
    [
        f"<|tool_call|>[{CALL_JSON}]<|/tool_call|>",
        f"<|tool_call|>{CALL_JSON}<|/tool_call|>",
        f"Let me see. <|tool_call|>\n[{CALL_JSON}]\n<|/tool_call|>\n",
        f"<|tool_call|>[{CALL_JSON}]",  # the end of the tokens came first
        f"functools[{CALL_JSON}]",
        f" functools [{CALL_JSON}]\n",
        f"[{CALL_JSON}]",
        f"\n{CALL_JSON}\n",
        CALL_JSON.replace("arguments", "parameters"),
        json.dumps({"name": "f", "arguments": json.dumps(CALL.arguments)}),
        json.dumps([{"type": "function", "function": {"name": "f", "arguments": CALL.arguments}}]),
    ],
)
def test_calls(text: str) -> None:
    assert parse_calls(text) == (CALL,)


def test_several_calls() -> None:
    g = ToolCall("g", {})
    assert parse_calls(f'[{CALL_JSON}, {{"name": "g", "arguments": {{}}}}]') == (CALL, g)
    tagged = f'<|tool_call|>{CALL_JSON}<|/tool_call|> <|tool_call|>{{"name": "g"}}<|/tool_call|>'
    assert parse_calls(tagged) == (CALL, g)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Paris.",
        "functools",
        "functools are fun",
        "[1, 2, 3]",
        "[]",
        "{}",
        '{"name": "Bob"}',  # an answer in JSON that has a name
        '{"name": "Bob", "arguments": 3}',
        '{"name": "Bob", "arguments": "none"}',
        '{"name": 3, "arguments": {}}',
        f"Here it is: {CALL_JSON}",
        f"[{CALL_JSON}, 3]",
        f"[{CALL_JSON}",
        "<|tool_call|>nonsense<|/tool_call|>",
        f"<|tool_call|>{CALL_JSON}<|/tool_call|><|tool_call|>oops<|/tool_call|>",
        "<|tool_call|><|/tool_call|>",
        '{"name": "f", "arguments": {"x": Infinity}}',
        '{"name": "f", "arguments": {"x": 1e999}}',
        '{"name": "f", "arguments": {"x": "\\ud800"}}',
        '{"name": "\\ud800", "arguments": {}}',
        "[" * 100_000,
        '{"name": "f", "arguments": ' + '{"x": ' * 50_000,
    ],
)
def test_not_a_call(text: str) -> None:
    assert parse_calls(text) is None


def test_calls_come_back_as_they_were() -> None:
    calls = (CALL, ToolCall("g", {}))
    assert render_calls(calls) == f'[{CALL_JSON}, {{"name": "g", "arguments": {{}}}}]'
    assert parse_calls(f"<|tool_call|>{render_calls(calls)}<|/tool_call|>") == calls


@pytest.mark.parametrize("value", [{1, 2}, float("nan"), b"x"])
def test_arguments_that_are_no_json(value: object) -> None:
    with pytest.raises(InputError, match="arguments of a tool call are not JSON"):
        render_calls([ToolCall("f", {"x": value})])
