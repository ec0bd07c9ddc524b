# SPDX-License-Identifier: Apache-2.0
"""A piece of work for a model, and the events that come of it: between a handler and a worker."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from ..runtime.parts import Reply
from .errors import Refusal
from .served_model import ServedModel


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token of an answer, or one that could have been there."""

    raw: bytes  # what it adds to the text; nothing for a control token
    logprob: float  # natural, under the model
    name: str = ""  # of a control token
    top: tuple[TokenLogprob, ...] = ()  # the most probable ones in its place, in falling order

    @property
    def token(self) -> str:
        """What a client is told that it is."""
        return self.name or self.raw.decode("utf-8", "replace")

    @property
    def finite(self) -> float:
        """`logprob` as JSON can have it, which has no infinity: the reference's lowest."""
        return max(self.logprob, -9999.0)


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of an answer while it is written."""

    text: str
    kind: Literal["answer", "reasoning"] = "answer"
    logprobs: tuple[TokenLogprob, ...] = field(default=())  # of tokens that have come since the last


@dataclass(frozen=True, slots=True)
class Done:
    """The whole answer."""

    reply: Reply
    logprobs: tuple[TokenLogprob, ...] = field(default=())  # of tokens that no piece has brought
    audio_s: float = 0.0  # of clips in the request
    busy_s: float = 0.0  # that the worker had with it


@dataclass(frozen=True, slots=True)
class Failed:
    """There is no answer, or no more of one."""

    refusal: Refusal


Event = Piece | Done | Failed


class Job:
    """One piece of work on its way: made by a handler, done by a worker, taken apart by the handler."""

    def __init__(
        self,
        group: str,
        work: Callable[[ServedModel, Job], None],
        *,
        answer_s: float,
        wake: Callable[[], None],
    ) -> None:
        """
        Args:
            group: jobs of one group use one adapter.
            work: called once, in a worker's thread: it asks the model, and hands events to the job.
            answer_s: seconds after which the worker ends it.
            wake: called in any thread when there are events for a handler that has found none, or the last.
        """
        self.group, self._work, self._wake = group, work, wake
        self._answer_s = answer_s
        self._deadline = float("inf")
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._ended = False
        self._awaited = True  # the handler has found nothing
        self.cancelled = False
        self.started = False

    @property
    def expired(self) -> bool:
        """Whether the model has had its time."""
        return time.monotonic() > self._deadline

    def should_stop(self) -> bool:
        """Whether the worker is to end it at the next token."""
        return self.cancelled or self.expired

    def run(self, model: ServedModel) -> None:
        """Do the work. For the worker."""
        self.started = True
        self._deadline = time.monotonic() + self._answer_s
        self._work(model, self)

    def put(self, event: Event) -> None:
        """Hand over an event. For the worker."""
        with self._lock:
            self._events.append(event)
            wake, self._awaited = self._awaited, False
        if wake:
            self._wake()

    def end(self) -> None:
        """No more events. Safe to call twice."""
        with self._lock:
            wake, self._ended = not self._ended, True
        if wake:
            self._wake()

    def take(self) -> tuple[list[Event], bool]:
        """The events since the last call, and whether they are the last. For the handler."""
        with self._lock:
            found, self._events = self._events, []
            self._awaited = not found
            return found, self._ended
