# SPDX-License-Identifier: Apache-2.0
"""Readings through the queue, and iterators in threads, without a server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pocketphi.runtime import audio
from pocketphi.runtime import bundle as bundles
from pocketphi.runtime.engine import Model
from pocketphi.runtime.errors import InputError
from pocketphi.runtime.growing_speech import GrowingSpeech
from pocketphi.runtime.reader import Reader
from pocketphi.runtime.speech_task import Task
from pocketphi.serve.errors import Refusal
from pocketphi.serve.facts import facts_of
from pocketphi.serve.in_thread import InThread
from pocketphi.serve.jobs import Job
from pocketphi.serve.limits import Budget, Limits, Places
from pocketphi.serve.metrics import Metrics
from pocketphi.serve.queued_reader import QueuedReader
from pocketphi.serve.scheduler import Scheduler
from pocketphi.serve.served_model import ServedModel
from pocketphi.serve.services import Services
from pocketphi.serve.worker import LEFT, STOPPING, Workers

from .recordings import CLIP
from .served import LONG_S


def services_of(nano: Path, **limits: Any) -> Services:
    """A server's parts, without a server."""
    found = Limits(queue=1, **limits)
    listeners = Places(found.listeners)
    scheduler: Scheduler[Job] = Scheduler(found.queue)
    workers = Workers(
        lambda _: ServedModel(nano, kv_type="f32", n_threads=1),
        scheduler,
        expecting=lambda: listeners.taken > 0,
    )
    facts = facts_of(bundles.load(nano), n_ctx=0, max_crops=1)
    return Services(facts, found, Budget(1 << 20), scheduler, workers, Metrics(), listeners)


def started(services: Services) -> Services:
    services.workers.start()
    return ready(services)


def ready(services: Services) -> Services:
    pause = threading.Event()
    for _ in range(int(LONG_S * 100)):
        if services.workers.state != "loading":
            return services
        pause.wait(0.01)
    raise AssertionError(services.workers.failure)


@pytest.fixture
def services(nano: Path) -> Iterator[Services]:
    found = started(services_of(nano))
    yield found
    found.workers.abandon()
    assert found.workers.join(LONG_S)


def clip() -> GrowingSpeech:
    found = audio.load(CLIP)
    speech = GrowingSpeech(found.sample_rate)
    speech.set_window(found.samples)
    return speech


def occupied(services: Services) -> tuple[Job, threading.Event]:
    """A job at work until the event is set, and another behind it: the queue is full."""
    begun, over = threading.Event(), threading.Event()

    def work(_: ServedModel, job: Job) -> None:
        begun.set()
        assert over.wait(LONG_S)

    jobs = [Job("language", work, answer_s=LONG_S, wake=lambda: None) for _ in range(2)]
    services.workers.submit(jobs[0])
    assert begun.wait(LONG_S)
    services.workers.submit(jobs[1])
    return jobs[0], over


def test_a_reading(services: Services, alone: Model) -> None:
    """What a `Reader` gives, drafts and all; each sample is counted once."""
    queued, direct = QueuedReader(services, Task(), {}), Reader(alone, Task(), {})
    queued.check(30.0)
    speech, whole = clip(), audio.load(CLIP)
    first = queued.read(speech)
    assert (first.text, first.token_ids) == (direct.read(clip()).text, direct.read(clip()).token_ids)
    again = queued.read(speech, draft=first.token_ids, n_forced=2)
    assert again.token_ids == first.token_ids and again.draft_n == len(first.token_ids)
    assert queued.text_of(first.token_ids) == first.text == direct.text_of(first.token_ids)
    assert [queued.starts_word(i) for i in first.token_ids] == [
        direct.starts_word(i) for i in first.token_ids
    ]
    text = services.metrics.text()
    assert f"pocketphi_audio_seconds_total {whole.seconds:.3f}" in text
    assert 'pocketphi_answers_total{mode="speech"} 2' in text
    assert f"pocketphi_completion_tokens_total {2 * len(first.token_ids)}" in text
    assert f"pocketphi_prompt_tokens_total {first.prompt_tokens + again.prompt_tokens}" in text


def test_a_full_queue_takes_readings(services: Services) -> None:
    _, over = occupied(services)
    with pytest.raises(Refusal) as caught:
        services.workers.submit(Job("language", lambda *_: None, answer_s=1.0, wake=lambda: None))
    assert caught.value.status == 429
    found: list[str] = []
    thread = threading.Thread(
        target=lambda: found.append(QueuedReader(services, Task(), {}).read(clip()).text)
    )
    thread.start()
    while services.workers.n_waiting < 2:
        thread.join(0.01)
    over.set()
    thread.join(LONG_S)
    assert found == ["Send a message to Grace."]


@pytest.mark.parametrize("end", ["cancel", "abandon"])
def test_a_reading_that_waits_is_ended(services: Services, end: str) -> None:
    _, over = occupied(services)
    reader, caught = QueuedReader(services, Task(), {}), []

    def read() -> None:
        try:
            reader.read(clip())
        except Refusal as exc:
            caught.append((exc.status, exc.code))

    thread = threading.Thread(target=read)
    thread.start()
    while services.workers.n_waiting < 2:
        thread.join(0.01)
    if end == "cancel":
        reader.cancel()
        reader.cancel()
    else:
        services.workers.abandon()
    thread.join(LONG_S)
    assert caught == [(499, "client_closed_request") if end == "cancel" else (503, "server_stopping")]
    over.set()
    read()
    assert len(caught) == 2 and caught[1][0] in (499, 503)
    assert LEFT.refusal.__traceback__ is STOPPING.refusal.__traceback__ is None  # or they would grow for ever


def test_refusals(nano: Path) -> None:
    """Loading, no time, input that cannot be, and a server that stops."""
    services = services_of(nano, answer_s=0.0)
    with pytest.raises(Refusal) as caught:
        QueuedReader(services, Task(), {})
    assert (caught.value.status, caught.value.code) == (503, "loading_model")
    reader = QueuedReader(started(services), Task(words="word " * 10_000), {})
    with pytest.raises(InputError, match="context"):
        reader.check(30.0)
    reader = QueuedReader(services, Task(), {})
    with pytest.raises(Refusal) as caught:
        reader.read(clip())
    assert (caught.value.status, caught.value.code) == (408, "timeout")
    services.listeners.take()
    services.workers.stop()
    with pytest.raises(Refusal) as caught:  # it is asked for within the grace, and has no time as before
        reader.read(clip())
    assert caught.value.status == 408
    services.listeners.give_back()
    assert services.workers.join(LONG_S)  # nobody is expected any more
    services.listeners.take()
    with pytest.raises(Refusal) as caught:  # who comes now comes too late
        reader.read(clip())
    assert (caught.value.status, caught.value.code) == (503, "server_stopping")


def test_one_model_of_two_is_there(nano: Path) -> None:
    """No place, no thread, no session: no worker would take its readings yet."""
    scheduler: Scheduler[Job] = Scheduler(1)
    first, second = threading.Event(), threading.Event()

    def opened(number: int) -> ServedModel:
        assert (first, second)[number].wait(LONG_S)
        return ServedModel(nano, kv_type="f32", n_threads=1)

    workers = Workers(opened, scheduler, n=2)
    services = replace(services_of(nano), scheduler=scheduler, workers=workers)
    workers.start()
    first.set()
    for _ in range(int(LONG_S * 100)):
        if workers._models[0] is not None:
            break
        second.wait(0.01)
    with pytest.raises(Refusal) as caught:
        QueuedReader(services, Task(), {})
    assert caught.value.code == "loading_model"
    second.set()
    QueuedReader(ready(services), Task(), {})
    workers.abandon()
    assert workers.join(LONG_S)


def test_short_speech(services: Services) -> None:
    """An error of a reading is the reader's, and the next reading is whole."""
    reader, speech = QueuedReader(services, Task(), {}), GrowingSpeech(16000)
    speech.set_window(audio.load(CLIP).samples[:100])
    with pytest.raises(Refusal) as caught:
        reader.read(speech)
    assert (caught.value.status, caught.value.code) == (422, "invalid_media")
    assert reader.read(clip()).text == "Send a message to Grace."


def test_places() -> None:
    places = Places(2)
    places.take()
    places.take()
    with pytest.raises(Refusal) as caught:
        places.take()
    assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "5"})
    places.give_back()
    places.take()
    assert places.taken == 2


def test_in_thread() -> None:
    """In order, and what is raised comes behind what was given."""
    stopped: list[int] = []

    def items() -> Iterator[int]:
        yield from range(1000)
        raise InputError("over")

    async def run() -> None:
        found = InThread(items, stop=lambda: stopped.append(1), name="items")
        got = []
        with pytest.raises(InputError, match="over"):
            async for one in found:
                got.append(one)
        assert got == list(range(1000))
        assert [one async for one in found] == []
        found.close()
        found.close()

    asyncio.run(run())
    assert stopped == [1]


def test_in_thread_closed_early() -> None:
    """The iterator is given up on, whether it waits for room or for something that `stop` ends."""
    ended = threading.Event()

    def endless() -> Iterator[int]:
        try:
            n = 0
            while True:
                yield (n := n + 1)
        finally:
            ended.set()

    def stuck() -> Iterator[int]:
        yield 1
        assert go_on.wait(LONG_S)

    go_on = threading.Event()

    async def run() -> None:
        many = InThread(endless, stop=lambda: None, name="endless")
        assert await anext(many) == 1
        many.close()
        assert await asyncio.to_thread(ended.wait, LONG_S)
        one = InThread(stuck, stop=go_on.set, name="stuck")
        assert await anext(one) == 1
        one.close()
        with pytest.raises(StopAsyncIteration):
            await anext(one)

    asyncio.run(run())
