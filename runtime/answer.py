# SPDX-License-Identifier: Apache-2.0
"""One answer while it is made: an iterator of text events, and the whole reply at any point."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from .continuation import NO_DRAFT, Continuation, Passes
from .parts import FinishReason, Float32, Int32, Mode, Reply, Span, TextEvent, Timings, ToolCall, Usage
from .sampler import Sampler, most_probable
from .session import Session
from .stream import TextStream
from .tokenizer import Tokenizer
from .tools import parse_calls

_ROOM = 256  # tokens of cache made ready for an answer of unstated length


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of the model, ready to be read."""

    spans: Sequence[Span]
    mode: Mode
    adapter: str | None
    max_tokens: int | None  # None: as many as the context holds
    stop_ids: frozenset[int]
    with_tools: bool  # tools were offered, so an answer in any of the call forms is a call
    encode_ms: float = 0.0  # what pictures and clips took before
    draft: Int32 = field(default_factory=lambda: NO_DRAFT)  # int32 [n], what the answer may be
    n_forced: int = 0  # so many tokens of the draft are the answer's first, whatever the model would say
    logprobs: bool = False  # keep how probable each token was
    top_logprobs: int = 0  # and so many of the most probable ones in its place


class Answer(Iterator[TextEvent]):
    """Iterate to generate; `reply` is what there is so far, complete after the last event.

    A `<|tool_call|>…<|/tool_call|>` span is not text: it appears in `reply.tool_calls` alone.
    Leaving early is fine: call `close`, or start the next answer.
    """

    def __init__(
        self,
        request: Request,
        session: Session,
        sampler: Sampler,
        stream: TextStream,
        tokenizer: Tokenizer,
        *,
        load_ms: float,
        notes: list[str],
        resident: Callable[[], tuple[str, ...]],
    ) -> None:
        """
        Args:
            request: the prompt and its limits.
            session: where the prompt is read and continued.
            sampler: chooses tokens; closed with the answer.
            stream: turns ids into text.
            tokenizer: knows the tool call tags, where the vocabulary has them.
            load_ms: how long the model took to load, for the timings.
            notes: what the session has to say; filled while the answer is made.
            resident: what the model holds in memory by now.
        """
        self._request, self._session, self._sampler, self._stream = request, session, sampler, stream
        self._tokenizer, self._load_ms, self._notes, self._resident = tokenizer, load_ms, notes, resident
        self._open_tag = tokenizer.control_tokens.get("<|tool_call|>")
        self._close_tag = tokenizer.control_tokens.get("<|/tool_call|>")
        self._ids: list[int] = []
        self._call_ids: list[int] = []  # what stood in tool call tags, the tags included
        self._logprobs: list[float] = []
        self._top: list[tuple[tuple[int, float], ...]] = []
        self._n_overruled = 0
        self._passes = Passes()
        self._finish: FinishReason = "cancelled"
        self._prompt_tokens = sum(len(s) for s in request.spans)
        self._cached = 0
        self._started = time.perf_counter()
        self._prompt_ms = self._first_ms = 0.0
        self._events = self._generate()

    def __next__(self) -> TextEvent:
        return next(self._events)

    def close(self) -> None:
        """Stop here. What was generated stays in `reply`."""
        self._events.close()
        self._sampler.close()

    @property
    def token_ids(self) -> Sequence[int]:
        """The ids so far, the stop token included; grows with the answer."""
        return self._ids

    @property
    def reply(self) -> Reply:
        """The answer as far as it has come."""
        text = self._stream.text
        calls: tuple[ToolCall, ...] = ()
        if self._call_ids:
            tagged = self._tokenizer.decode(self._call_ids)
            calls = parse_calls(tagged) or ()
            text += "" if calls else tagged  # not JSON after all: the caller should see it
        elif self._request.with_tools and (calls := parse_calls(text) or ()):
            text = ""  # the whole answer was the call
        return Reply(
            text=text,
            reasoning=self._stream.reasoning,
            tool_calls=calls,
            token_ids=tuple(self._ids),
            mode=self._request.mode,
            adapter=self._request.adapter,
            finish_reason="tool_calls" if calls and self._finish == "stop" else self._finish,
            usage=Usage(self._prompt_tokens, len(self._ids), self._cached),
            timings=Timings(
                load_ms=self._load_ms,
                encode_ms=self._request.encode_ms,
                prompt_n=self._prompt_tokens - self._cached,
                prompt_ms=self._prompt_ms,
                predicted_n=max(0, len(self._ids) - 1),  # the first token came with the prompt
                predicted_ms=self._passes.ms,
                ttft_ms=self._request.encode_ms + self._first_ms,
                n_passes=self._passes.n,
                draft_n=self._passes.draft_n,
                draft_n_accepted=self._passes.draft_n_accepted,
            ),
            notes=tuple(self._notes),
            resident=self._resident(),
            n_overruled=self._n_overruled,
            logprobs=tuple(self._logprobs),
            top_logprobs=tuple(self._top),
        )

    def _generate(self) -> Generator[TextEvent, None, None]:
        request = self._request
        room = _ROOM if request.max_tokens is None else min(request.max_tokens, _ROOM)
        sequence = Continuation(
            self._session, request.spans, adapter=request.adapter, reserve=room, draft=request.draft
        )
        self._cached, self._passes = sequence.cached, sequence.passes
        self._prompt_ms = self._first_ms = (time.perf_counter() - self._started) * 1e3
        try:
            yield from self._grow(sequence)
        finally:
            sequence.close()
        yield from self._stream.finish()
        self._sampler.close()

    def _grow(self, sequence: Continuation) -> Generator[TextEvent, None, None]:
        request = self._request
        in_call = False
        while True:
            token = self._next(sequence.logits)
            if len(self._ids) == 1:
                self._first_ms = (time.perf_counter() - self._started) * 1e3
            if token in request.stop_ids:
                self._finish = "stop"
                return
            in_call = in_call or token == self._open_tag
            if in_call:
                self._call_ids.append(token)
                in_call = token != self._close_tag
            else:
                yield from self._stream.push(token)
            if self._stream.stopped:
                self._finish = "stop"
                return
            if len(self._ids) == request.max_tokens or sequence.is_full:
                self._finish = "length"
                return
            sequence.advance(token)

    def _next(self, logits: Float32) -> int:
        """Choose the next token, or take the forced one, and remember it."""
        request, n = self._request, len(self._ids)
        logits[self._tokenizer.unassigned_ids] = -np.inf
        if n < request.n_forced:
            token = int(request.draft[n])
            self._n_overruled += int(logits.argmax() != token)
            # A sampler that keeps state learns of the token by having no other choice.
            only = np.full_like(logits, -np.inf)
            only[token] = 0.0
            self._sampler.sample(only)
        else:
            token = self._sampler.sample(logits.copy() if request.logprobs else logits)
        self._ids.append(token)
        if request.logprobs:
            top = most_probable(logits, request.top_logprobs) if request.top_logprobs else []
            own, *others = _logprobs(logits, [token, *top])
            self._logprobs.append(own)
            if top:
                self._top.append(tuple(zip(top, others, strict=True)))
        return token


def _logprobs(logits: Float32, ids: Sequence[int]) -> list[float]:
    """The natural logs of tokens' probabilities; -inf marks logits of ids that cannot be chosen."""
    most = logits.max()
    total = float(np.exp(logits - most).sum(dtype=np.float64))
    return [float(logits[i]) - float(most) - math.log(total) for i in ids]
