# SPDX-License-Identifier: Apache-2.0
"""A handler's side of a job: queue it, watch whether the client is still there, and pass on what comes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from .answers import json_response
from .body import Lease
from .jobs import Done, Event, Failed, Job, Piece
from .served_model import ServedModel
from .services import Services
from .sse import DONE, EventStream, event
from .worker import LEFT

_REST_S = 0.03  # between two writes: the eye sees no more, and a fast model is seldom disturbed
_LONG_REST_S = 0.5  # where nothing is written before the end, which does not wait for it


class Form(Protocol):
    """How a kind of request is answered; see `chat.ChatForm`."""

    def opening(self) -> Iterator[dict[str, Any]]:
        """Before the first piece of a stream."""

    def pieces(self, pieces: Sequence[Piece]) -> Iterator[dict[str, Any]]:
        """For what has come."""

    def closing(self, done: Done) -> Iterator[dict[str, Any]]:
        """The rest of a stream."""

    def whole(self, pieces: Sequence[Piece], done: Done) -> dict[str, Any]:
        """The answer in one."""


class Delivery:
    """One job, from the queue to the client. It ends when the client leaves."""

    def __init__(
        self, request: Request, lease: Lease, group: str, work: Callable[[ServedModel, Job], None]
    ) -> None:
        """Queue it.

        Args:
            request: whose body has been read.
            lease: given back at the end.
            group, work: see `Job`.

        Raises:
            Refusal: 429 and 503, see `Workers.submit`.
        """
        self._services: Services = request.app.state.services
        self._lease, self._started = lease, time.monotonic()
        self._flag = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._job = Job(group, work, answer_s=self._services.limits.answer_s, wake=self._wake)
        self._first = True
        self._services.workers.submit(self._job)
        self._watch = asyncio.create_task(self._until_gone(request))

    async def batches(self, rest_s: float = _REST_S) -> AsyncIterator[list[Event]]:
        """What comes, until all has; so long apart, but for the first and the last."""
        while True:
            events, ended = self._job.take()
            if events:
                self._note(events)
                yield events
            if ended:
                return
            if events:
                self._loop.call_later(rest_s, self._flag.set)
            await self._flag.wait()
            self._flag.clear()

    def close(self) -> None:
        """Nobody reads any more: end the job, and give back what it held. Safe to call twice."""
        self._watch.cancel()
        self._services.workers.cancel(self._job)
        self._lease.release()

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._flag.set)

    async def _until_gone(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._services.workers.cancel(self._job)

    def _note(self, events: Sequence[Event]) -> None:
        metrics = self._services.metrics
        if self._first and not isinstance(events[0], Failed):
            metrics.first_token_s.add(time.monotonic() - self._started)
        self._first = False
        if isinstance(events[-1], Done):  # nothing follows it
            metrics.answered(events[-1])


async def deliver(delivery: Delivery, form: Form, *, stream: bool) -> Response:
    """The answer to a request: whole, or a stream of which the beginning is there.

    Raises:
        Refusal: it failed before the first token.
    """
    if not stream:
        try:
            return json_response(await _whole(delivery, form))
        finally:
            delivery.close()
    batches = delivery.batches()
    try:
        first = await _next(batches)
        if first is None:
            raise LEFT.refusal.fresh
        if isinstance(first[0], Failed):
            raise first[0].refusal.fresh
    except BaseException:
        delivery.close()
        raise
    return EventStream(_stream(form, first, batches), delivery.close)


async def _whole(delivery: Delivery, form: Form) -> dict[str, Any]:
    pieces: list[Piece] = []
    async for batch in delivery.batches(_LONG_REST_S):
        for one in batch:
            if isinstance(one, Failed):
                raise one.refusal.fresh
            if isinstance(one, Done):
                return form.whole(pieces, one)
            pieces.append(one)
    raise LEFT.refusal.fresh


async def _stream(
    form: Form, first: list[Event], batches: AsyncIterator[list[Event]]
) -> AsyncGenerator[bytes, None]:
    yield b"".join(map(event, form.opening())) + _written(form, first)
    async for batch in batches:
        yield _written(form, batch)


def _written(form: Form, batch: Sequence[Event]) -> bytes:
    """A batch as server-sent events."""
    found = [event(one) for one in form.pieces([one for one in batch if isinstance(one, Piece)])]
    for one in batch:
        if isinstance(one, Failed):
            found.append(event(one.refusal.body))
        elif isinstance(one, Done):
            found += [*map(event, form.closing(one)), DONE]
    return b"".join(found)


async def _next(batches: AsyncIterator[list[Event]]) -> list[Event] | None:
    """The next, or None at the end."""
    async for batch in batches:
        return batch
    return None
