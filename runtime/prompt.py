# SPDX-License-Identifier: Apache-2.0
"""A conversation as the pieces of a prompt: control tokens, and text that can never become one.

Each member's chat template is one function here. None of them is executed: a checkpoint's Jinja text
is only recognised (by the converter), and what it would have written is written here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NoReturn

from .errors import InputError
from .parts import Media, Message
from .spec import ChatFormat
from .tools import render_calls


@dataclass(frozen=True, slots=True)
class Control:
    """One added token of the vocabulary, by its content: "<|user|>"."""

    token: str


@dataclass(frozen=True, slots=True)
class Text:
    """Text as the person wrote it: it never becomes control tokens, whatever it spells."""

    text: str


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a picture or a clip goes: its embedded rows stand here in place of tokens."""

    media: Media


TextPiece = Control | Text
Piece = TextPiece | Slot

_REASONING_IDENTITY = "Your name is Phi, an AI math expert developed by Microsoft."
_PLACEHOLDER = re.compile(r"<\|(image|audio)_\d+\|>")
_NAMES = {"image": "pictures", "audio": "clips"}
_THINK_BLOCK = re.compile(r"\s*<think>.*?(?:</think>\s*|\Z)", re.DOTALL)  # a block cut short has no end


def render(
    messages: Sequence[Message],
    chat_format: ChatFormat,
    *,
    tools: str | None = None,
    tool_result_token: str = "<|tool|>",
    answer: bool = True,
) -> list[Piece]:
    """The prompt of a conversation, as the model's own chat template writes it.

    Args:
        messages: at least one, in order.
        chat_format: which member's template.
        tools: JSON from `tools.parse_tools`, put into the first system turn. Without a system message
            an empty one is made for them: the template alone would drop them without a word.
        tool_result_token: opens the turn of a tool's result, from `Bundle.tool_result_token`.
        answer: end with the header of the assistant's turn, so that the model answers. The templates'
            other ending, `<|endoftext|>`, is never written: no more turns can follow it.

    Returns:
        pieces for `Tokenizer.encode`. No format starts with a BOS token.

    Raises:
        InputError: no messages, or something in them that this model has no turn for.

    Source: the `chat_template` of each checkpoint; MODEL.md shows what they write.
    """
    if not messages:
        raise InputError("the conversation has no messages, expected at least one")
    for message in messages:
        if message.tool_calls and message.role != "assistant":
            raise InputError(f"a message of role {message.role!r} holds tool calls, only the assistant's can")
        if message.media and (message.role != "user" or chat_format != "phi4-mini"):
            raise InputError("pictures and clips belong into a user message to Phi-4-multimodal")
    if chat_format == "phi4":
        return _render_phi4(messages, tools, answer)
    if chat_format == "phi3.5":
        return _render_phi35(messages, tools, answer)
    if tools is not None and all(message.role != "system" for message in messages):
        messages = [Message("system", ""), *messages]
    if chat_format == "phi4-mini-reasoning":
        return _render_mini_reasoning(messages, tools, tool_result_token, answer)
    return _render_mini(messages, tools, tool_result_token, answer)


def _render_mini(
    messages: Sequence[Message], tools: str | None, tool_result_token: str, answer: bool
) -> list[Piece]:
    """Phi-4-mini-instruct and Phi-4-multimodal: `<|role|>content<|end|>`, no white space between."""
    pieces: list[Piece] = []
    for message in messages:
        if message.role == "system":
            pieces += [Control("<|system|>"), Text(message.content), *_tool_list(tools), Control("<|end|>")]
            tools = None
        else:
            pieces += _mini_turn(message, message.content, tool_result_token)
    if answer:
        pieces.append(Control("<|assistant|>"))
    return pieces


def _render_mini_reasoning(
    messages: Sequence[Message], tools: str | None, tool_result_token: str, answer: bool
) -> list[Piece]:
    """Phi-4-mini-reasoning: one system turn, always there, that the user's system messages are added to.

    Earlier `<think>` blocks are left out, as the model was trained to see only the answers.
    """
    pieces: list[Piece] = [Control("<|system|>"), Text(_REASONING_IDENTITY)]
    for message in messages:
        if message.role == "system":
            pieces += [Text(" " + message.content), *_tool_list(tools)]
            tools = None
    pieces.append(Control("<|end|>"))
    for message in messages:
        if message.role == "assistant":
            pieces += _mini_turn(message, without_reasoning(message.content), tool_result_token)
        elif message.role != "system":
            pieces += _mini_turn(message, message.content, tool_result_token)
    if answer:
        pieces.append(Control("<|assistant|>"))
    return pieces


def _mini_turn(message: Message, content: str, tool_result_token: str) -> list[Piece]:
    opening = tool_result_token if message.role == "tool" else f"<|{message.role}|>"
    pieces: list[Piece] = [Control(opening), *_content(content, message.media)]
    if message.tool_calls:
        # The template has no rendering for calls: they go back exactly as the model writes them.
        calls = Text(render_calls(message.tool_calls))
        pieces += [Control("<|tool_call|>"), calls, Control("<|/tool_call|>")]
    return [*pieces, Control("<|end|>")]


def _content(text: str, media: Sequence[Media]) -> list[Piece]:
    """Text with its media in place: at the placeholders, if it has any, otherwise in front."""
    if not media:
        return [Text(text)]
    places = list(_PLACEHOLDER.finditer(text))
    if not places:
        return [*(Slot(m) for m in media), Text(text)]
    pieces: list[Piece] = []
    waiting = {kind: [m for m in media if m.kind == kind] for kind in ("image", "audio")}
    start = 0
    for place in places:
        kind = place.group(1)
        if not waiting[kind]:
            raise InputError(f"the text has more <|{kind}_n|> places than there are {_NAMES[kind]}")
        pieces += [Text(text[start : place.start()]), Slot(waiting[kind].pop(0))]
        start = place.end()
    for kind, left in waiting.items():
        if left:
            raise InputError(f"{len(left)} {_NAMES[kind]} have no <|{kind}_n|> place in the text")
    return [*pieces, Text(text[start:])]


def _tool_list(tools: str | None) -> list[Piece]:
    return [] if tools is None else [Control("<|tool|>"), Text(tools), Control("<|/tool|>")]


def _render_phi4(messages: Sequence[Message], tools: str | None, answer: bool) -> list[Piece]:
    """Phi-4 14B: `<|im_start|>role<|im_sep|>content<|im_end|>`; it was not trained on tools."""
    if tools is not None:
        _refuse("Phi-4 14B", "tools")
    pieces: list[Piece] = []
    for message in messages:
        if message.role == "tool" or message.tool_calls:
            _refuse("Phi-4 14B", "tool calls and their results")
        pieces += [Control("<|im_start|>"), Text(message.role), Control("<|im_sep|>"), Text(message.content)]
        pieces.append(Control("<|im_end|>"))
    if answer:
        pieces += [Control("<|im_start|>"), Text("assistant"), Control("<|im_sep|>")]
    return pieces


def _render_phi35(messages: Sequence[Message], tools: str | None, answer: bool) -> list[Piece]:
    r"""Phi-3.5-mini: `<|role|>\ncontent<|end|>\n`; an empty system message makes no turn.

    The line ends are in the template, and the tokenizer swallows those after its control tokens again.
    """
    if tools is not None:
        _refuse("Phi-3.5-mini", "tools")
    pieces: list[Piece] = []
    for message in messages:
        if message.role == "tool" or message.tool_calls:
            _refuse("Phi-3.5-mini", "tool calls and their results")
        if message.role != "system" or message.content:
            pieces += [
                Control(f"<|{message.role}|>"),
                Text("\n" + message.content),
                Control("<|end|>"),
                Text("\n"),
            ]
    if answer:
        pieces += [Control("<|assistant|>"), Text("\n")]
    return pieces


def _refuse(model: str, what: str) -> NoReturn:
    raise InputError(f"{model} has no {what} in its prompt format: use a Phi-4-mini model for them")


def without_reasoning(content: str) -> str:
    """An assistant's turn without the `<think>…</think>` block it opens with, if it does."""
    block = _THINK_BLOCK.match(content)
    return content[block.end() :] if block else content


def parse_raw(text: str, control_tokens: Collection[str], media: Sequence[Media] = ()) -> list[Piece]:
    """A prompt written with its markup: every control token's string in it *is* that token.

    Where tokens overlap, the leftmost wins, then the longest, as in Hugging Face's tokenizers. Media go
    to their `<|image_n|>` and `<|audio_n|>` places. For prompts from the person at the keyboard only; a
    conversation goes through `render`.

    Raises:
        InputError: places and media do not match.
    """
    if not media and (place := _PLACEHOLDER.search(text)):
        kind = _NAMES[place.group(1)]
        raise InputError(f"the text has a {place.group()[:40]} place, but no {kind} were given")
    found: list[Piece] = []
    for piece in _content(text, media):
        found += _markup(piece.text, control_tokens) if isinstance(piece, Text) else [piece]
    return found


def _markup(text: str, control_tokens: Collection[str]) -> list[TextPiece]:
    if not control_tokens:
        return [Text(text)] if text else []
    markup = re.compile("|".join(re.escape(t) for t in sorted(control_tokens, key=len, reverse=True)))
    pieces: list[TextPiece] = []
    start = 0
    for match in markup.finditer(text):
        if match.start() > start:
            pieces.append(Text(text[start : match.start()]))
        pieces.append(Control(match.group()))
        start = match.end()
    if start < len(text):
        pieces.append(Text(text[start:]))
    return pieces
