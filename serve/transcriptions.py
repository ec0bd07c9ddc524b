# SPDX-License-Identifier: Apache-2.0
"""`POST /v1/audio/transcriptions` and `/v1/audio/translations`: a recording's utterances, one job each.

A thread for each recording decodes and cuts it; the worker reads one utterance at a time, and between two of
them whatever else waits. The sound is gone through once before anything is read: a file that is damaged, or
too long, is refused with a status.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from ..runtime import audio
from ..runtime.parts import Float32
from ..runtime.sampler import Sampling
from ..runtime.transcribe import read_utterances
from .body import Lease, read
from .errors import Refusal, refusal_of
from .in_thread import InThread
from .media import seconds_of
from .multipart import Part, boundary_of, parts_of
from .queued_reader import QueuedReader
from .recording import Recording, recording_of
from .services import Services
from .sse import EventStream, event
from .transcript_forms import TranscriptForm, Utterance
from .worker import LEFT, report

_NAME = "file"  # the field: what a client calls its file is not for messages, which may be logged

_log = logging.getLogger("pocketphi.serve.requests")


async def transcriptions(request: Request) -> Response:
    """`POST /v1/audio/transcriptions`."""
    return await _answer(request, translate=False)


async def translations(request: Request) -> Response:
    """`POST /v1/audio/translations`: to English."""
    return await _answer(request, translate=True)


async def _answer(request: Request, *, translate: bool) -> Response:
    services: Services = request.app.state.services
    lease = Lease(services.budget)
    try:
        recording = await _recording(request, lease, translate)
        services.listeners.take()
    except BaseException:
        lease.release()
        raise
    try:
        hearing = Hearing(request, recording, lease)
    except BaseException:
        services.listeners.give_back()
        lease.release()
        raise
    return await (hearing.stream() if recording.stream else hearing.whole())


async def _recording(request: Request, lease: Lease, translate: bool) -> Recording:
    services: Services = request.app.state.services
    boundary = boundary_of(request.headers.get("content-type", ""))
    body = await read(request, services.limits, lease, services.limits.body_bytes)

    def checked() -> Recording:
        parts = parts_of(body, boundary)
        if services.log_requests:
            _log.info("%r", {part.name: _logged(part) for part in parts})
        return recording_of(parts, translate=translate)

    return await run_in_threadpool(checked)


def _logged(part: Part) -> str:
    return f"{len(part.data)} bytes" if part.name == "file" else part.data.decode("utf-8", "replace")


class Hearing:
    """One recording, from its thread to the client. It ends when the client leaves."""

    def __init__(self, request: Request, recording: Recording, lease: Lease) -> None:
        """Begin.

        Args:
            request: whose body has been read.
            recording: what it asks for.
            lease: given back at the end, as is a place among the listeners.

        Raises:
            Refusal: 503, the model is loading.
        """
        self._services: Services = request.app.state.services
        self._recording, self._lease = recording, lease
        self._form = TranscriptForm(recording, self._services.workers.model().tokenizer)
        sampling = Sampling(temperature=recording.temperature)
        self._reader = QueuedReader(self._services, recording.task, {"sampling": sampling})
        self._ends = time.monotonic() + self._services.limits.answer_s  # of going through the sound
        self._seconds = 0.0
        self._closed = False
        self._found = InThread(self._listen, stop=self._reader.cancel, name="pocketphi-recording")
        self._watch = asyncio.create_task(self._until_gone(request))

    async def whole(self) -> Response:
        """The answer in one.

        Raises:
            Refusal: there is none.
            InputError: what the file holds, or what the model cannot do.
        """
        try:
            found = [one async for one in self._found if one is not None]
            self._check_left()
            return self._form.whole(found, self._seconds)
        finally:
            self.close()

    async def stream(self) -> Response:
        """Events, of which the first is there. Raises as `whole`, before there is any."""
        try:
            await anext(self._found, None)  # the sound is good
            first = await anext(self._found, None)
            self._check_left()
        except BaseException:
            self.close()
            raise
        return EventStream(self._events(first), self.close)

    def close(self) -> None:
        """Nobody listens any more: end the reading, and give back what was held. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self._watch.cancel()
            self._found.close()
            self._services.listeners.give_back()
            self._lease.release()

    async def _events(self, first: Utterance | None) -> AsyncGenerator[bytes, None]:
        try:
            if first is not None:
                yield self._written(first)
                async for one in self._found:
                    if one is not None:
                        yield self._written(one)
        except Exception as exc:
            report(exc)
            yield event(refusal_of(exc).body)
        else:
            yield event(self._form.done())

    def _written(self, utterance: Utterance) -> bytes:
        delta = self._form.delta(utterance)
        return b"" if delta is None else event(delta)

    async def _until_gone(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._found.close()

    def _listen(self) -> Iterator[Utterance | None]:
        """None as soon as all of the sound is known to be good, then utterances. In the thread."""
        recording, rules = self._recording, self._recording.rules
        self._reader.check(rules.max_s)
        self._seconds = seconds_of(recording.data, _NAME, self._services.limits.audio_s, self._check_time)
        yield None
        with audio.stream(recording.data, name=_NAME) as sound:
            sound = replace(sound, blocks=self._until_left(sound.blocks))
            for segment, reading in read_utterances(self._reader, sound, rules):
                yield Utterance(segment, reading)

    def _until_left(self, blocks: Iterator[Float32]) -> Iterator[Float32]:
        for block in blocks:
            self._check_left()
            yield block

    def _check_left(self) -> None:
        if self._reader.cancelled:
            raise LEFT.refusal.fresh

    def _check_time(self) -> None:
        self._check_left()
        if time.monotonic() > self._ends:
            raise Refusal(408, "decoding the sound takes too long", code="timeout")
