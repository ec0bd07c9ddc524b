# SPDX-License-Identifier: Apache-2.0
"""`POST /v1/completions`: a prompt in the model's own markup, where `<|user|>` is the control token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..runtime.engine import CompleteOptions
from ..runtime.parts import Reply
from ..runtime.tools import render_calls
from .chat import joined
from .facts import Facts, stamp, timings_object, usage_object
from .generation import CompletionWork
from .jobs import Done, Piece, TokenLogprob
from .limits import Limits
from .schema import CompletionRequest
from .settings import sampling_of, stops_of, tokens_of, top_of
from .tool_grammar import CLOSE, OPEN

_MAX_TOKENS = 16  # the reference's default
_MOST_TOP_LOGPROBS = 5  # the reference's


@dataclass(frozen=True, slots=True)
class Completion:
    """A request that has been checked."""

    work: CompletionWork
    form: CompletionForm
    stream: bool
    group: str = "language"


def prepare(request: CompletionRequest, limits: Limits, facts: Facts) -> Completion:
    """Check a request.

    Raises:
        Refusal: what it asks for cannot be done.
    """
    prompt = request.prompt if isinstance(request.prompt, str) else request.prompt[0]
    options: CompleteOptions = {
        "sampling": sampling_of(request, limits, facts),
        "max_tokens": tokens_of("max_tokens", request.max_tokens) or _MAX_TOKENS,
        "stop": stops_of(request, limits),
        "logprobs": request.logprobs is not None,
        "top_logprobs": top_of("logprobs", request.logprobs, _MOST_TOP_LOGPROBS),
    }
    form = CompletionForm(
        facts,
        echo=prompt if request.echo else "",
        logprobs=request.logprobs,
        usage=bool(request.stream_options and request.stream_options.include_usage),
    )
    return Completion(CompletionWork(prompt, options), form, bool(request.stream))


class CompletionForm:
    """Events as `text_completion` objects."""

    def __init__(self, facts: Facts, *, echo: str, logprobs: int | None, usage: bool) -> None:
        """
        Args:
            facts: of the model.
            echo: text that comes before the answer's.
            logprobs: how many of the most probable tokens are told beside each; None: of no token.
            usage: as for a chat.
        """
        self._id, self._created, self._model = *stamp("cmpl"), facts.name
        self._echo, self._usage = echo, usage
        self._logprobs, self._top = logprobs is not None, bool(logprobs)
        self._given = ""
        self._offset = len(echo)  # of the next token's text

    def opening(self) -> Iterator[dict[str, Any]]:
        """Before the first piece of a stream."""
        if self._echo:
            yield self._chunk(self._echo, ())

    def pieces(self, pieces: Sequence[Piece]) -> Iterator[dict[str, Any]]:
        """Chunks for what has come."""
        for _, text, found in joined(pieces):
            self._given += text
            yield self._chunk(text, found)

    def closing(self, done: Done) -> Iterator[dict[str, Any]]:
        """The rest of a stream."""
        rest = _rest(self._given, done.reply)
        yield self._chunk(rest, done.logprobs, done.reply) | {"timings": timings_object(done.reply)}
        if self._usage:
            yield self._frame([]) | {"usage": usage_object(done.reply)}

    def whole(self, pieces: Sequence[Piece], done: Done) -> dict[str, Any]:
        """The answer in one."""
        text = "".join(piece.text for piece in pieces)
        found = [*(one for piece in pieces for one in piece.logprobs), *done.logprobs]
        choice = self._choice(self._echo + text + _rest(text, done.reply), found, done.reply)
        usage, timings = usage_object(done.reply), timings_object(done.reply)
        return self._frame([choice]) | {"usage": usage, "timings": timings}

    def _chunk(self, text: str, found: Sequence[TokenLogprob], reply: Reply | None = None) -> dict[str, Any]:
        usage = {"usage": None} if self._usage else {}
        return self._frame([self._choice(text, found, reply)]) | usage

    def _choice(self, text: str, found: Sequence[TokenLogprob], reply: Reply | None) -> dict[str, Any]:
        finish = None
        if reply is not None:
            finish = "stop" if reply.finish_reason in ("stop", "tool_calls") else "length"
        logprobs = self._logprobs_object(found) if self._logprobs else None
        return {"text": text, "index": 0, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs_object(self, found: Sequence[TokenLogprob]) -> dict[str, Any]:
        offsets = []
        for one in found:
            offsets.append(self._offset)
            self._offset += len(one.raw.decode("utf-8", "replace"))
        return {
            "tokens": [one.token for one in found],
            "token_logprobs": [one.finite for one in found],
            "top_logprobs": [_top_object(one) for one in found] if self._top else None,
            "text_offset": offsets,
        }

    def _frame(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }


def _top_object(one: TokenLogprob) -> dict[str, float]:
    """By text, the chosen one too: of two that are the same text (halves of characters) the more probable."""
    found: dict[str, float] = {}
    for other in (*one.top, one):
        found.setdefault(other.token, other.finite)
    return found


def _rest(given: str, reply: Reply) -> str:
    """What the events have not brought: a call between tags is no text of theirs, here it is the answer's."""
    if reply.tool_calls:
        tagged = reply.text == given  # else the text itself was the call
        return f"{OPEN}{render_calls(reply.tool_calls)}{CLOSE}" if tagged else ""
    return reply.text[len(given) :] if reply.text.startswith(given) else ""
