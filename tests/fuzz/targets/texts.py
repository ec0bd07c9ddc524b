# SPDX-License-Identifier: Apache-2.0
"""Text from people and programs: JSON schemas, tools, tool calls, saved chats, prompts with markup."""

from __future__ import annotations

import functools
import json
from typing import Any

from pocketphi.runtime import prompt, tools
from pocketphi.runtime.errors import InputError
from pocketphi.runtime.parts import Media, Message
from pocketphi.runtime.repl import read_chat
from pocketphi.runtime.sampler_ggml import schema_to_grammar
from pocketphi.runtime.spec import CHAT_FORMATS

from ..documents import document
from ..target import SEEDS, Target, attempt, file_with, promise

_CONTROL = ("<|user|>", "<|end|>", "<|assistant|>", "<|image|>", "<|tool|>", "<|end|")


@functools.cache
def _base(name: str) -> Any:
    return json.loads((SEEDS / "documents" / name).read_text("utf-8"))


def _text(data: bytes) -> str:
    """As Python hands over what a terminal gave it: any byte, half surrogate pairs for what is not UTF-8."""
    return data.decode("utf-8", "surrogateescape")


def schema(data: bytes) -> None:
    """A grammar or a refusal."""
    grammar = attempt(lambda: schema_to_grammar(_text(document(data, _base("schema.json")))), InputError)
    promise(grammar is None or "root" in grammar, "a grammar without a root")


def tool_list(data: bytes) -> None:
    """What is accepted is accepted again, unchanged."""
    made = attempt(lambda: tools.parse_tools(_text(document(data, _base("tools.json")))), InputError)
    if made is not None:
        made.encode("utf-8")
        promise("\n" not in made and tools.parse_tools(made) == made, "another list the second time")


def calls(data: bytes) -> None:
    """An answer of a model is never an error; calls in it can be written again."""
    text = _text(document(data, {"name": "f", "arguments": {"a": 1, "b": [None, "x"]}}))
    for whole in (text, f"<|tool_call|>[{text}]<|/tool_call|>", f"functools[{text}]"):
        found = tools.parse_calls(whole)
        promise(
            not found or tools.parse_calls(tools.render_calls(found)) == found, "other calls the second time"
        )


def chat(data: bytes) -> None:
    """A saved chat becomes a prompt in every format, or is refused."""
    path = file_with(document(data, _base("chat.json")), "chat.json")
    found = attempt(lambda: read_chat(path), InputError)
    if found is None:
        return
    system, turns = found
    head = [] if system is None else [Message("system", system)]
    for chat_format in CHAT_FORMATS:
        attempt(lambda chat_format=chat_format: prompt.render([*head, *turns], chat_format), InputError)  # type: ignore[misc]


def raw_prompt(data: bytes) -> None:
    """Markup and text put together again are the prompt; each medium has one place."""
    media = [Media(kind, b"") for kind in ("image", "audio", "image")][: data[0] % 4 if data else 0]  # type: ignore[arg-type]
    text = _text(data[1:])
    pieces = attempt(lambda: prompt.parse_raw(text, _CONTROL, media), InputError)
    if pieces is None:
        return
    slots = [piece.media for piece in pieces if isinstance(piece, prompt.Slot)]
    promise(len(slots) == len(media) and all(any(s is m for s in slots) for m in media), "a medium is lost")
    written = "".join(
        piece.text if isinstance(piece, prompt.Text) else piece.token
        for piece in pieces
        if not isinstance(piece, prompt.Slot)
    )
    promise(bool(media) or written == text, "another prompt than was written")
    promise(all(p.token in _CONTROL for p in pieces if isinstance(p, prompt.Control)), "a token that is none")


TARGETS = (
    Target("schema", schema, runs=2500),
    Target("tools", tool_list, runs=4000),
    Target("calls", calls, runs=3000, seeds="tools"),
    Target("chat", chat, runs=3000),
    Target("raw-prompt", raw_prompt, runs=5000),
)
