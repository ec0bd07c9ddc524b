# SPDX-License-Identifier: Apache-2.0
"""`POST /v1/chat/completions`: requests to arguments of `Model.chat`, events to the reference's objects."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..runtime.engine import ChatOptions
from ..runtime.parts import FinishReason, Media, Message, Reply, Role, ToolCall
from ..runtime.router import route
from ..runtime.tools import render_calls
from .errors import Refusal
from .facts import Facts, stamp, timings_object, usage_object
from .generation import ChatWork, Forced, too_long
from .jobs import Done, Piece, TokenLogprob
from .limits import Limits
from .media import Attachments, Fetch
from .schema import (
    AudioPart,
    ChatRequest,
    Function,
    ImagePart,
    JsonObject,
    JsonSchemaFormat,
    NamedChoice,
    TextPart,
    Turn,
)
from .screen import Screen
from .settings import sampling_of, stops_of, tokens_of, top_of

_MOST_TOP_LOGPROBS = 20  # the reference's
_FINISH = {"stop": "stop", "length": "length", "tool_calls": "tool_calls", "cancelled": "length"}


@dataclass(frozen=True, slots=True)
class Chat:
    """A request that has been checked."""

    group: str  # of the queue
    work: ChatWork
    form: ChatForm
    stream: bool


def prepare(request: ChatRequest, limits: Limits, facts: Facts, fetch: Fetch | None) -> Chat:
    """Check a request, and decode what is in it. It may take a while: not for the event loop.

    Raises:
        Refusal: what it asks for cannot be done.
        InputError: a tool call's arguments, or a picture.
    """
    messages, attached = _conversation(request.messages, limits, facts, fetch)
    if attached.n_tokens > facts.context:
        raise too_long(attached.n_tokens, facts.context)
    functions, forced = _tools(request, limits)
    most = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    options: ChatOptions = {
        "sampling": sampling_of(request, limits, facts, _json_schema(request, functions)),
        "max_tokens": tokens_of("max_completion_tokens", most),
        "stop": stops_of(request, limits),
        "logprobs": bool(request.logprobs),
        "top_logprobs": _top_logprobs(request),
    }
    if functions:
        options["tools"] = [_described(one) for one in functions]
    kinds = {one.kind for message in messages for one in message.media}
    group = route(images="image" in kinds, audio="audio" in kinds).adapter or "language"
    form = ChatForm(
        facts,
        with_tools=bool(functions),
        one_call=request.parallel_tool_calls is False,
        logprobs=bool(request.logprobs),
        usage=bool(request.stream_options and request.stream_options.include_usage),
    )
    return Chat(group, ChatWork(messages, options, limits.audio_s, forced), form, bool(request.stream))


def _conversation(
    turns: Sequence[Turn], limits: Limits, facts: Facts, fetch: Fetch | None
) -> tuple[list[Message], Attachments]:
    if not 0 < len(turns) <= limits.messages:
        what = f"messages: there are {len(turns)}, expected 1 to {limits.messages}"
        raise Refusal(400 if not turns else 422, what, code="invalid_value", param="messages")
    if sum(len(turn.content) for turn in turns if isinstance(turn.content, list)) > limits.parts:
        what = f"over {limits.parts} parts in one request"
        raise Refusal(422, what, code="too_many_parts", param="messages")
    attached = Attachments(limits, facts.max_crops, fetch)
    return [_message(turn, f"messages.{i}", attached) for i, turn in enumerate(turns)], attached


def _message(turn: Turn, where: str, attached: Attachments) -> Message:
    role: Role = "system" if turn.role == "developer" else turn.role
    texts: list[str] = []
    media: list[Media] = []
    if isinstance(turn.content, str):
        texts.append(turn.content)
    for i, part in enumerate(turn.content if isinstance(turn.content, list) else ()):
        place = f"{where}.content.{i}"
        if isinstance(part, TextPart):
            texts.append(part.text)
        elif isinstance(part, (ImagePart, AudioPart)):
            if role != "user":
                what = f"{place}: only a user's message can have pictures and sound"
                raise Refusal(400, what, code="invalid_value", param=place)
            media.append(
                attached.image(part, place) if isinstance(part, ImagePart) else attached.clip(part, place)
            )
        else:
            texts.append(part.refusal)
    if turn.content is None and role != "assistant":
        what = f"{where}.content: is missing"
        raise Refusal(400, what, code="missing_required_parameter", param=f"{where}.content")
    calls = tuple(
        _call(one.function.name, one.function.arguments, f"{where}.tool_calls.{i}")
        for i, one in enumerate(turn.tool_calls or ())
    )
    return Message(role, "".join(texts), calls, tuple(media))


def _call(name: str, arguments: str, where: str) -> ToolCall:
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        what = f"{where}.function.arguments: is not a JSON object in text"
        raise Refusal(400, what, code="invalid_value", param=f"{where}.function.arguments")
    return ToolCall(name, found)


def _tools(request: ChatRequest, limits: Limits) -> tuple[list[Function], Forced | None]:
    """The tools that the model is told of, and those that it has to call."""
    tools, choice = [tool.function for tool in request.tools or ()], request.tool_choice
    if len(tools) > limits.tools:
        what = f"tools: there are {len(tools)}, expected at most {limits.tools}"
        raise Refusal(422, what, code="too_many_tools", param="tools")
    if choice == "none":
        return [], None
    if choice in (None, "auto"):
        return tools, None
    one = request.parallel_tool_calls is False
    wanted = tools
    if isinstance(choice, NamedChoice):
        one, wanted = True, [tool for tool in tools if tool.name == choice.function.name]
    if not wanted:
        what = "tool_choice: asks for a tool that is not in tools"
        raise Refusal(400, what, code="invalid_value", param="tool_choice")
    return tools, Forced(wanted, one)


def _described(tool: Function) -> dict[str, Any]:
    """As the prompt has it: keys in the order that the models were trained with."""
    found: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        found["description"] = tool.description
    if tool.parameters is not None:
        found["parameters"] = tool.parameters
    return found


def _top_logprobs(request: ChatRequest) -> int:
    name = "top_logprobs"
    found = top_of(name, request.top_logprobs, _MOST_TOP_LOGPROBS)
    if found and not request.logprobs:
        raise Refusal(400, f"{name}: needs logprobs to be true", code="invalid_value", param=name)
    return found


def _json_schema(request: ChatRequest, functions: Sequence[Function]) -> str | None:
    asked = request.response_format
    if not isinstance(asked, (JsonObject, JsonSchemaFormat)):
        return None
    if functions:
        what = "response_format: JSON and tools are asked for, expected at most one"
        raise Refusal(400, what, code="invalid_value", param="response_format")
    schema = {"type": "object"} if isinstance(asked, JsonObject) else asked.json_schema.schema_
    return json.dumps(schema, ensure_ascii=False)


class ChatForm:
    """Events as `chat.completion` and `chat.completion.chunk` objects."""

    def __init__(
        self, facts: Facts, *, with_tools: bool, one_call: bool, logprobs: bool, usage: bool
    ) -> None:
        """
        Args:
            facts: of the model.
            with_tools: it was told of some.
            one_call: of several calls the first counts.
            logprobs: they were asked for.
            usage: a stream ends with the numbers of tokens.
        """
        self._id, self._created, self._model = *stamp("chatcmpl"), facts.name
        self._with_tools, self._one_call = with_tools, one_call
        self._logprobs, self._usage = logprobs, usage
        self._screen = Screen(hold_calls=with_tools)

    def opening(self) -> Iterator[dict[str, Any]]:
        """Before the first piece of a stream."""
        yield self._chunk({"role": "assistant", "content": ""})

    def pieces(self, pieces: Sequence[Piece]) -> Iterator[dict[str, Any]]:
        """Chunks for what has come; text of one kind in one of them."""
        for kind, text, found in joined(pieces):
            field = "reasoning_content" if kind == "reasoning" else "content"
            shown = text if kind == "reasoning" else self._screen.push(text)
            if shown or found:
                yield self._chunk({field: shown}, logprobs=found)

    def closing(self, done: Done) -> Iterator[dict[str, Any]]:
        """The rest of a stream."""
        reply = done.reply
        calls, text = self._calls_and_text(reply)
        rest = self._screen.rest(text)
        if rest or done.logprobs:
            yield self._chunk({"content": rest}, logprobs=done.logprobs)
        if calls:
            yield self._chunk({"tool_calls": [{"index": i, **call} for i, call in enumerate(calls)]})
        yield self._chunk({}, finish=self._finish(reply, calls)) | self._extras(reply)
        if self._usage:
            yield self._frame("chat.completion.chunk", []) | {"usage": usage_object(reply)}

    def whole(self, pieces: Sequence[Piece], done: Done) -> dict[str, Any]:
        """The answer in one."""
        reply = done.reply
        calls, text = self._calls_and_text(reply)
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else "")}
        if reply.reasoning:
            message["reasoning_content"] = reply.reasoning
        if calls:
            message["tool_calls"] = calls
        found = [*(one for piece in pieces for one in piece.logprobs), *done.logprobs]
        choice = {
            "index": 0,
            "message": message,
            "logprobs": _logprobs_object(found) if self._logprobs else None,
            "finish_reason": self._finish(reply, calls),
        }
        frame = self._frame("chat.completion", [choice])
        return frame | {"usage": usage_object(reply)} | self._extras(reply)

    def _chunk(
        self, delta: dict[str, Any], *, finish: str | None = None, logprobs: Sequence[TokenLogprob] = ()
    ) -> dict[str, Any]:
        found = _logprobs_object(logprobs) if logprobs else None
        choice = {"index": 0, "delta": delta, "logprobs": found, "finish_reason": finish}
        usage = {"usage": None} if self._usage else {}
        return self._frame("chat.completion.chunk", [choice]) | usage

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _extras(self, reply: Reply) -> dict[str, Any]:
        return {"timings": timings_object(reply)}

    def _calls_and_text(self, reply: Reply) -> tuple[list[dict[str, Any]], str]:
        """Calls in the reference's form. Of a model that was told of no tools, they are text."""
        if reply.tool_calls and not self._with_tools:
            return [], reply.text + render_calls(reply.tool_calls)
        calls = reply.tool_calls[:1] if self._one_call else reply.tool_calls
        return [_call_object(call) for call in calls], reply.text

    def _finish(self, reply: Reply, calls: Sequence[Any]) -> str:
        reason: FinishReason = reply.finish_reason
        return "stop" if reason == "tool_calls" and not calls else _FINISH[reason]


def joined(pieces: Sequence[Piece]) -> Iterator[tuple[str, str, tuple[TokenLogprob, ...]]]:
    """Neighbours of one kind together: kind, text, and what is known of its tokens."""
    texts: list[str] = []
    found: list[TokenLogprob] = []
    for i, piece in enumerate(pieces):
        texts.append(piece.text)
        found += piece.logprobs
        if i + 1 == len(pieces) or pieces[i + 1].kind != piece.kind:
            yield piece.kind, "".join(texts), tuple(found)
            texts, found = [], []


def _call_object(call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    function = {"name": call.name, "arguments": arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _logprobs_object(found: Sequence[TokenLogprob]) -> dict[str, Any]:
    content = [
        _logprob_object(one) | {"top_logprobs": [_logprob_object(other) for other in one.top]}
        for one in found
    ]
    return {"content": content, "refusal": None}


def _logprob_object(one: TokenLogprob) -> dict[str, Any]:
    return {"token": one.token, "logprob": one.finite, "bytes": list(one.raw)}
