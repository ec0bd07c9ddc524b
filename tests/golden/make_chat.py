# SPDX-License-Identifier: Apache-2.0
"""Makes chat.json: conversations as the Jinja templates render them and the fast tokenizers read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from .. import tiny
from .cases import HERE

Conversation = list[dict[str, str]]

TOOLS = [
    {
        "name": "get_weather",
        "description": "The weather in a city, e.g. Zürich",
        "parameters": {
            "city": {"description": "the city", "type": "str"},
            "days": {"type": "int", "default": 1},
        },
    },
    {
        "name": "add",
        "description": 'Add "two" numbers',
        "parameters": {"a": {"type": "float"}, "b": {"type": "float"}},
    },
]
CALL = '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}]<|/tool_call|>'


def _turn(role: str, content: str, **more: str) -> dict[str, str]:
    return {"role": role, "content": content, **more}


CONVERSATIONS: dict[str, Conversation] = {
    "user": [_turn("user", "What is the capital of France?")],
    "system": [_turn("system", "You are a helpful assistant."), _turn("user", "Hello there")],
    "turns": [
        _turn("system", "Be brief."),
        _turn("user", "one two three"),
        _turn("assistant", "four five six"),
        _turn("user", "seven?"),
        _turn("assistant", "It's eight; they're nine."),
        _turn("user", "And now?"),
    ],
    "history-ends-with-assistant": [_turn("user", "Hi"), _turn("assistant", "Hello there")],
    "spaces": [
        _turn("system", "  two before, two after  "),
        _turn("user", " one before, one after "),
        _turn("assistant", "\ttab before, tab after\t"),
        _turn("user", "   "),
    ],
    "newlines": [
        _turn("user", "\nfirst\n\nthird line\r\nfourth\n"),
        _turn("assistant", "\n\n```\nx = 1\n```\n"),
        _turn("user", "\n \n"),
    ],
    "empty": [_turn("system", ""), _turn("user", ""), _turn("assistant", ""), _turn("user", "")],
    # What a tokenizer's rstrip swallows is Unicode white space. Python's str.strip() also takes U+001C to
    # U+001F, which are not; both agree that U+200B is not.
    "odd-white-space": [
        _turn("user", "\u00a0no-break"),
        _turn("assistant", "\u3000ideographic\u2003"),
        _turn("user", "\x1funit separator\x1c"),
        _turn("assistant", "\u200bzero width"),
        _turn("user", "\x0b\x0c\x85\u2028all white"),
    ],
    "unicode": [
        _turn("system", "Du antwortest auf Deutsch, bitte höflich."),
        _turn("user", "Ünïcödé: 日本語 العربية हिन्दी 한국어 👩‍👩‍👧‍👦 e\u0301 ﬁ ¿qué?"),
        _turn("assistant", "Straße, naïve, œuvre — “quotes” … 2⁸ = 256"),
        _turn("user", "Κόσμος Привет ⅷ ǅ ʰ"),
    ],
    "code": [
        _turn(
            "user", "def f(x):\n    return {'a': [1, 2, 333333], \"b\": x // 2}  # don't\n\n\tprint(f(1e-5))"
        )
    ],
    "angle-brackets": [
        _turn("user", "a < b | c > d, <tag>, <|, |>, < |user| >"),
        _turn("assistant", "<p>ok</p>"),
    ],
}
TOOL_CONVERSATIONS: dict[str, Conversation] = {
    "tools": [
        _turn("system", "You have some tools.", tools=json.dumps(TOOLS, ensure_ascii=False)),
        _turn("user", "What is the weather in Paris?"),
    ],
    "tools-empty-system": [
        _turn("system", "", tools=json.dumps(TOOLS[1:], ensure_ascii=False)),
        _turn("user", "Add 1 and 2."),
    ],
    "tool-result": [
        _turn("system", "You have some tools.", tools=json.dumps(TOOLS, ensure_ascii=False)),
        _turn("user", "What is the weather in Paris?"),
        _turn("assistant", CALL),
        _turn("tool", '[{"city": "Paris", "sky": "warm, windy", "°C": 21.5}]'),
        _turn("assistant", "It's warm and windy."),
        _turn("user", "Thank you"),
    ],
    "tool-result-white-space": [
        _turn("user", "And London?"),
        _turn("assistant", CALL.replace("Paris", "London")),
        _turn("tool", "\n 14.0 \n"),
    ],
}
REASONING: dict[str, Conversation] = {
    "think-kept": [
        _turn("user", "1 + 1?"),
        _turn("assistant", "<think>\nOne and one.\n</think>\n\nIt is 2."),
        _turn("user", "And 2 + 2?"),
    ],
    "two-systems": [_turn("system", "Be brief."), _turn("user", "Hi"), _turn("system", "Be kind.")],
}


def make_chat(work: Path) -> None:
    """Write chat.json; the tiny members' folders under `work` hold their tokenizers."""
    formats = {
        # format: (folder of tokenizer and template, conversations)
        "phi4-mini": (work / "phi4-mini", CONVERSATIONS | TOOL_CONVERSATIONS),
        "phi4-nano": (tiny.NANO, CONVERSATIONS | TOOL_CONVERSATIONS),
        "phi4-mini-reasoning": (work / "phi4-mini-reasoning", CONVERSATIONS | REASONING),
        "phi4": (work / "phi4-14b", CONVERSATIONS),
        "phi3.5": (work / "phi35-mini", CONVERSATIONS),
    }
    found: dict[str, Any] = {}
    for name, (folder, conversations) in formats.items():
        settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        # The tokenizer.json as it is: transformers' classes for Llama and GPT-2 would rebuild parts of it.
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"), eos_token=settings["eos_token"]
        )
        template = settings["chat_template"]
        found[name] = {
            "tokenizer": "phi4-nano" if folder == tiny.NANO else folder.name,
            "template": template,
            "eos_token": settings["eos_token"],
            "conversations": [_entry(tokenizer, template, *item) for item in conversations.items()],
        }
    text = json.dumps(found, indent=1, ensure_ascii=True)  # escapes keep odd white space visible
    (HERE / "chat.json").write_text(text + "\n", "utf-8")


def _entry(
    tokenizer: PreTrainedTokenizerFast, template: str, name: str, messages: Conversation
) -> dict[str, Any]:
    """With the generation prompt; an assistant turn at the end is history there, never continued."""
    rendered = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    return {"name": name, "messages": messages, "rendered": rendered, "ids": ids}
