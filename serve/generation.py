# SPDX-License-Identifier: Apache-2.0
"""The part of a request that a worker does: an answer of the library as events of a job."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ..runtime.answer import Answer
from ..runtime.engine import ChatOptions, CompleteOptions
from ..runtime.errors import InputError
from ..runtime.parts import Message
from ..runtime.sampler import Sampling
from .errors import Refusal
from .jobs import Done, Job, Piece, TokenLogprob
from .media import heard
from .schema import Function
from .served_model import ServedModel, Stopped
from .tool_grammar import OPEN, calls_grammar

_SNAPSHOT_S = 0.05  # between two looks at the log probabilities: each costs as much as the answer is long
_APART_S = 0.02  # between two pieces of text: an event of each token costs a fast model 2 %


@dataclass(frozen=True, slots=True)
class Forced:
    """The answer has to be calls of these tools."""

    tools: Sequence[Function]
    one: bool


@dataclass(frozen=True, slots=True)
class ChatWork:
    """`Model.chat` for a job."""

    messages: Sequence[Message]
    options: ChatOptions
    audio_s: float  # of all clips, at most
    forced: Forced | None = field(default=None)

    def __call__(self, model: ServedModel, job: Job) -> None:
        """Do it."""
        started = time.monotonic()
        messages, seconds = heard(self.messages, self.audio_s)
        options = self.options
        if self.forced is not None:
            tagged = OPEN in model.tokenizer.control_tokens
            grammar = calls_grammar(self.forced.tools, one=self.forced.one, tagged=tagged)
            sampling = options.get("sampling") or Sampling()
            options = options.copy()
            options["sampling"] = replace(sampling, grammar=grammar)
        wanted = options.get("logprobs", False)
        _run(
            lambda: model.chat(messages, stream=True, **options),
            model, job, wanted=wanted, started=started, seconds=seconds,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class CompletionWork:
    """`Model.complete` for a job."""

    prompt: str
    options: CompleteOptions

    def __call__(self, model: ServedModel, job: Job) -> None:
        """Do it."""
        started = time.monotonic()
        wanted = self.options.get("logprobs", False)
        _run(
            lambda: model.complete(self.prompt, stream=True, **self.options),
            model, job, wanted=wanted, started=started, seconds=0.0,
        )  # fmt: skip


def _run(
    begin: Callable[[], Answer], model: ServedModel, job: Job, *, wanted: bool, started: float, seconds: float
) -> None:
    """Iterate over an answer; what has come of one that took too long is the answer."""
    answer: Answer | None = None
    try:
        answer = begin()
        found = _Logprobs(answer, model, wanted)
        _hand_over(answer, found, job)
    except Stopped:
        if job.cancelled:
            raise
        if answer is None or not answer.token_ids:
            raise Refusal(408, "the model had no time left to begin an answer", code="timeout") from None
    except InputError:
        if answer is not None and answer.reply.usage.prompt_tokens > model.context_limit:
            raise too_long(answer.reply.usage.prompt_tokens, model.context_limit) from None
        raise
    finally:
        if answer is not None:
            answer.close()
    job.put(Done(answer.reply, found.rest(), seconds, time.monotonic() - started))


def _hand_over(answer: Answer, found: _Logprobs, job: Job) -> None:
    """Events as pieces: each as it comes, but of a model that nobody can read along with several in one."""
    texts: list[str] = []
    kind, due = None, 0.0

    def put() -> None:
        if texts and kind is not None:
            job.put(Piece("".join(texts), kind, found.due()))
            texts.clear()

    try:
        for event in answer:
            if event.kind != kind:
                put()
                kind = event.kind
            texts.append(event.text)
            if (now := time.monotonic()) >= due:
                put()
                due = now + _APART_S
    finally:
        put()


def too_long(n: int, most: int) -> Refusal:
    """The prompt has more tokens than the context holds."""
    what = f"the prompt has {n} tokens, the context holds {most}"
    return Refusal(400, what, code="context_length_exceeded", param="messages")


class _Logprobs:
    """Log probabilities of an answer's tokens, as they come; none where none were asked for."""

    def __init__(self, answer: Answer, model: ServedModel, wanted: bool) -> None:
        self._answer, self._tokenizer = answer, model.tokenizer
        self._names = {i: name for name, i in model.tokenizer.control_tokens.items()} if wanted else {}
        self._ends = frozenset(model.bundle.stop_ids)
        self._given = 0
        self._next = time.monotonic() if wanted else float("inf")

    def due(self) -> tuple[TokenLogprob, ...]:
        """Of tokens since the last call, now and then."""
        now = time.monotonic()
        if now < self._next:
            return ()
        self._next = now + _SNAPSHOT_S
        return self.rest()

    def rest(self) -> tuple[TokenLogprob, ...]:
        """Of all tokens that have not been given; the one that ends an answer is none of it."""
        reply = self._answer.reply
        ids, values = reply.token_ids[self._given :], reply.logprobs[self._given :]
        tops = reply.top_logprobs[self._given :] or ((),) * len(values)
        self._given += len(values)
        rows = zip(ids, values, tops, strict=False)  # without logprobs there are only ids
        return tuple(
            self._one(i, value, tuple(self._one(*other) for other in top))
            for i, value, top in rows
            if i not in self._ends
        )

    def _one(self, token_id: int, value: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        raw, name = self._tokenizer.token_bytes(token_id), self._names.get(token_id, "")
        return TokenLogprob(raw, value, name, top)
