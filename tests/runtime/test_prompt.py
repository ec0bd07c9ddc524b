# SPDX-License-Identifier: Apache-2.0
"""Prompts against what transformers makes of the same conversations: golden/chat.json, text and ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest

from pocketphi.runtime.errors import InputError
from pocketphi.runtime.parts import Message, ToolCall
from pocketphi.runtime.prompt import Control, Piece, Text, parse_raw, render, without_reasoning
from pocketphi.runtime.spec import ChatFormat
from pocketphi.runtime.tokenizer import Tokenizer
from pocketphi.runtime.tools import parse_calls

from .. import tiny, tiny_tokenizers
from ..tiny import GOLDEN, NANO

CHAT: dict[str, Any] = json.loads((GOLDEN / "chat.json").read_text("utf-8"))
CASES = [
    (name, one["name"])
    for name, entry in CHAT.items()
    for one in entry["conversations"]
    if one["name"] != "think-kept"  # the template keeps what we drop: a test of its own below
]
FORMAT: dict[str, ChatFormat] = {"phi4-nano": "phi4-mini"}  # the others are named as their format
VOCAB_SIZE = 4096  # at least that of each test vocabulary
MINI_FORMATS: tuple[ChatFormat, ...] = ("phi4-mini", "phi4-mini-reasoning")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    made = {}
    for name, raw in (
        ("phi4", tiny_tokenizers.phi4_tokenizer()),
        ("phi3.5", tiny_tokenizers.phi35_tokenizer()),
    ):
        path = folder / f"{name}.json"
        path.write_text(json.dumps(raw), "utf-8")
        made[name] = Tokenizer(path, VOCAB_SIZE)
    mini = Tokenizer(NANO / "tokenizer.json", VOCAB_SIZE)
    return made | dict.fromkeys(("phi4-mini", "phi4-nano", "phi4-mini-reasoning"), mini)


def conversation(name: str, case: str) -> tuple[list[Message], str | None, dict[str, Any]]:
    """A golden conversation as messages, its tools, and the golden entry."""
    entry = next(one for one in CHAT[name]["conversations"] if one["name"] == case)
    messages, tools = [], None
    for turn in entry["messages"]:
        tools = turn.get("tools", tools)
        calls = (parse_calls(turn["content"]) or ()) if turn["role"] == "assistant" else ()
        messages.append(Message(turn["role"], "" if calls else turn["content"], calls))
    return messages, tools, entry


def plain(pieces: list[Piece]) -> str:
    return "".join(piece.token if isinstance(piece, Control) else piece.text for piece in pieces)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_golden(name: str, case: str, tokenizers: dict[str, Tokenizer]) -> None:
    messages, tools, want = conversation(name, case)
    token = "<|tool_response|>" if name == "phi4-nano" else "<|tool|>"

    pieces = render(messages, FORMAT.get(name, name), tools=tools, tool_result_token=token)  # type: ignore[arg-type]

    assert plain(pieces) == want["rendered"]
    assert tokenizers[name].encode(pieces).tolist() == want["ids"]


def test_every_format_has_golden_conversations() -> None:
    assert set(CHAT) == {"phi4-mini", "phi4-nano", "phi4-mini-reasoning", "phi4", "phi3.5"}
    assert all(len(entry["conversations"]) >= 11 for entry in CHAT.values())


def test_the_reasoning_of_earlier_turns_is_dropped() -> None:
    messages, _, want = conversation("phi4-mini-reasoning", "think-kept")
    block = "<think>\nOne and one.\n</think>\n\n"
    assert block in want["rendered"]
    assert plain(render(messages, "phi4-mini-reasoning")) == want["rendered"].replace(block, "")
    assert "<think>" in plain(render(messages, "phi4-mini"))  # only that model's business


@pytest.mark.parametrize(
    ("content", "want"),
    [
        ("<think>a</think>b", "b"),
        ("\n<think>\na\n</think>\n\nb\n", "b\n"),
        ("<think>cut short", ""),
        ("<think></think>", ""),
        ("b <think>a</think>", "b <think>a</think>"),
        ("<think>a</think><think>b</think>", "<think>b</think>"),
        ("  b", "  b"),
        ("", ""),
    ],
)
def test_without_reasoning(content: str, want: str) -> None:
    assert without_reasoning(content) == want


@pytest.mark.parametrize("chat_format", MINI_FORMATS)
@pytest.mark.parametrize("system", [None, "", "Be kind."])
def test_tools_need_no_system_message(chat_format: ChatFormat, system: str | None) -> None:
    """What the template gives for an empty system message; without one it would drop the tools."""
    tools = '[{"name": "f"}]'
    messages = [Message("user", "Hi")]
    plain_messages: list[dict[str, str]] = [
        {"role": "system", "content": system or "", "tools": tools},
        {"role": "user", "content": "Hi"},
    ]
    template = jinja2.Environment().from_string(CHAT[chat_format]["template"])
    want = template.render(messages=plain_messages, add_generation_prompt=True)
    if system is not None:
        messages.insert(0, Message("system", system))
    assert plain(render(messages, chat_format, tools=tools)) == want
    assert tools in want


def test_tools_go_into_the_first_system_turn_only() -> None:
    messages = [Message("system", "a"), Message("user", "b"), Message("system", "c")]
    text = plain(render(messages, "phi4-mini", tools="[T]"))
    want = "<|system|>a<|tool|>[T]<|/tool|><|end|><|user|>b<|end|><|system|>c<|end|><|assistant|>"
    assert text == want
    text = plain(render(messages, "phi4-mini-reasoning", tools="[T]"))
    assert text.count("[T]") == 1 and "Microsoft. a<|tool|>[T]<|/tool|> c<|end|>" in text


def test_tool_calls_in_history_are_what_the_model_wrote() -> None:
    calls = (ToolCall("f", {"x": 1, "city": "Zürich"}), ToolCall("g", {}))
    pieces = render([Message("user", "q"), Message("assistant", "", calls)], "phi4-mini", answer=False)
    want = '[{"name": "f", "arguments": {"x": 1, "city": "Zürich"}}, {"name": "g", "arguments": {}}]'
    tail = [Control("<|tool_call|>"), Text(want), Control("<|/tool_call|>"), Control("<|end|>")]
    assert pieces[-4:] == tail


@pytest.mark.parametrize("chat_format", ["phi4-mini", "phi4-mini-reasoning", "phi4", "phi3.5"])
def test_markup_in_a_message_stays_text(chat_format: ChatFormat, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[chat_format]
    spelt = "".join(tokenizer.control_tokens)

    def control_ids(content: str) -> list[int]:
        messages = [Message("system", content), Message("user", content), Message("assistant", content)]
        known = set(tokenizer.control_tokens.values())
        return [i for i in tokenizer.encode(render(messages, chat_format)).tolist() if i in known]

    assert control_ids(spelt) == control_ids("x")


def test_without_an_answer_a_history_is_the_start_of_the_next_prompt() -> None:
    for chat_format in ("phi4-mini", "phi4-mini-reasoning", "phi4", "phi3.5"):
        history = [Message("user", "a"), Message("assistant", "b")]
        shorter = render(history, chat_format, answer=False)  # type: ignore[arg-type]
        longer = render([*history, Message("user", "c")], chat_format)  # type: ignore[arg-type]
        assert longer[: len(shorter)] == shorter
        assert "<|endoftext|>" not in plain(shorter)


@pytest.mark.parametrize(
    ("chat_format", "messages", "tools", "reason"),
    [
        ("phi4-mini", [], None, "no messages"),
        ("phi4", [Message("user", "a")], "[]", "Phi-4 14B has no tools"),
        ("phi4", [Message("tool", "a")], None, "Phi-4 14B has no tool calls"),
        ("phi4", [Message("assistant", "", (ToolCall("f", {}),))], None, "Phi-4 14B has no tool calls"),
        ("phi3.5", [Message("user", "a")], "[]", "Phi-3.5-mini has no tools"),
        ("phi3.5", [Message("tool", "a")], None, "Phi-3.5-mini has no tool calls"),
        ("phi4-mini", [Message("user", "a", (ToolCall("f", {}),))], None, "role 'user' holds tool calls"),
    ],
)
def test_refused(chat_format: ChatFormat, messages: list[Message], tools: str | None, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        render(messages, chat_format, tools=tools)
    assert "\n" not in str(caught.value)


def test_parse_raw() -> None:
    tokens = ["<|a|>", "<|a|>b", "[x]"]
    assert parse_raw("1<|a|>2[x]", tokens) == [Text("1"), Control("<|a|>"), Text("2"), Control("[x]")]
    assert parse_raw("<|a|>bc", tokens) == [Control("<|a|>b"), Text("c")]  # the longest
    assert parse_raw("<|a|", tokens) == [Text("<|a|")]
    assert parse_raw("", tokens) == [] == parse_raw("", [])
    assert parse_raw("<|a|>", []) == [Text("<|a|>")]


def test_parse_raw_gives_the_ids_of_the_reference(tokenizers: dict[str, Tokenizer]) -> None:
    for name, entry in CHAT.items():
        tokenizer = tokenizers[name]
        for one in entry["conversations"]:
            ids = tokenizer.encode(parse_raw(one["rendered"], tokenizer.control_tokens))
            assert ids.tolist() == one["ids"], (name, one["name"])


def test_nano_is_read_as_when_its_reference_outputs_were_made() -> None:
    """The prompts of phi4-nano's tool evaluation, rebuilt from their parts."""
    lines = (Path(tiny.NANO.parent) / "eval" / "tools.jsonl").read_text("utf-8").splitlines()
    for line in lines:
        prompt = json.loads(line)["prompt"]
        system, rest = prompt.removeprefix("<|system|>").split("<|tool|>")
        tools, rest = rest.split("<|/tool|><|end|><|user|>")
        question = rest.removesuffix("<|end|><|assistant|>")
        messages = [Message("system", system), Message("user", question)]
        assert plain(render(messages, "phi4-mini", tools=tools)) == prompt
    assert len(lines) > 5
