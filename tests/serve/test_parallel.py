# SPDX-License-Identifier: Apache-2.0
"""Several requests at a time over one set of weights: who works for whom, and how it ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pocketphi.runtime import bundle as bundles
from pocketphi.runtime.decoder_slots import Slot
from pocketphi.serve.jobs import Done, Event, Failed, Job
from pocketphi.serve.models import Models, context_of
from pocketphi.serve.scheduler import Scheduler
from pocketphi.serve.served_model import ServedModel
from pocketphi.serve.worker import LEFT, Workers

from .conftest import Serve
from .served import FRANCE, LONG_S, read_answer
from .test_stopping import PARIS, endless


class Asked:
    """A job, and what comes of it."""

    def __init__(self, work: Callable[[ServedModel, Job], None], group: str = "a") -> None:
        self._woken = threading.Event()
        self.thread = ""  # that did it

        def noted(model: ServedModel, job: Job) -> None:
            self.thread = threading.current_thread().name
            work(model, job)

        self.job = Job(group, noted, answer_s=LONG_S, wake=self._woken.set)

    def events(self) -> list[Event]:
        found: list[Event] = []
        while True:
            events, ended = self.job.take()
            found += events
            if ended:
                return found
            assert self._woken.wait(LONG_S)
            self._woken.clear()


class Held(Asked):
    """A job that goes on until it is let go."""

    def __init__(self, group: str = "a") -> None:
        self.begun, self.go = threading.Event(), threading.Event()

        def work(model: ServedModel, job: Job) -> None:
            self.begun.set()
            assert self.go.wait(LONG_S)

        super().__init__(work, group)

    def began(self) -> str:
        assert self.begun.wait(LONG_S)
        return self.thread

    def end(self) -> None:
        self.go.set()
        assert self.events() == []


def paris(model: ServedModel, job: Job) -> None:
    job.put(Done(model.chat(FRANCE, max_tokens=16)))


def is_paris(events: list[Event]) -> bool:
    return len(events) == 1 and isinstance(events[0], Done) and events[0].reply.text == PARIS


@contextmanager
def working(path: Path, n: int) -> Iterator[Workers]:
    """Workers over a pool, which end as a server's do."""
    models = Models(path, n, n_ctx=512, max_crops=1, options={"kv_type": "f32", "n_threads": 1})
    workers = Workers(models.open, Scheduler(100), n=n)
    workers.start()
    done = threading.Event()
    while workers.state == "loading" and workers.failure is None:
        done.wait(0.01)
    try:
        yield workers
    finally:
        workers.abandon()
        assert workers.join(LONG_S)
        models.close()
    assert workers.failure is None


def test_the_first_idle_worker_gets_it(nano: Path) -> None:
    with working(nano, 3) as workers:
        held = [Held(), Held(), Held()]
        for i, one in enumerate(held):
            workers.submit(one.job)
            assert one.began() == f"pocketphi-worker-{i}"
        for i in (2, 0):
            held[i].end()
        while workers.n_running != 1:
            threading.Event().wait(0.01)
        again = Held()
        workers.submit(again.job)
        assert again.began() == "pocketphi-worker-0"
        for one in (again, held[1]):
            one.end()


def test_what_runs_together_is_of_one_group(nano: Path) -> None:
    """The younger request of the group that is at work goes first; the older one is not forgotten."""
    with working(nano, 2) as workers:
        first, second, other, same = Held("a"), Held("a"), Held("b"), Held("a")
        for one in (first, second, other, same):
            workers.submit(one.job)
        assert (first.began(), second.began()) == ("pocketphi-worker-0", "pocketphi-worker-1")
        second.end()
        assert same.began() == "pocketphi-worker-1"
        assert not other.begun.is_set() and workers.n_switches == 0
        first.end()
        assert other.began() == "pocketphi-worker-0" and workers.n_switches == 1
        for one in (same, other):
            one.end()


@pytest.mark.parametrize("error", [SystemExit("no"), MemoryError(), KeyError("no")])
def test_a_job_that_kills(nano: Path, error: BaseException) -> None:
    """It fails with a 5xx; who was beside it and who comes after it is answered."""

    def die(model: ServedModel, job: Job) -> None:
        raise error

    with working(nano, 2) as workers:
        beside, dead = Held(), Asked(die)
        workers.submit(beside.job)
        beside.began()
        workers.submit(dead.job)
        (failed,) = dead.events()
        assert isinstance(failed, Failed) and failed.refusal.status >= 500
        beside.end()
        after = [Asked(paris) for _ in range(4)]
        for one in after:
            workers.submit(one.job)
        assert all(is_paris(one.events()) for one in after)


def test_who_leaves_does_not_wait_for_a_pass(nano: Path) -> None:
    """The thread that computes is busy with something else: a cancelled job ends all the same."""
    busy, waits = threading.Event(), threading.Event()
    slots: list[Slot] = []

    def work(model: ServedModel, job: Job) -> None:
        model.chat(FRANCE, max_tokens=1)  # so that nothing but a pass is waited for
        assert isinstance(model._decoder, Slot)
        slots.append(model._decoder)
        slots[0]._worker._thread.submit(lambda: waits.wait(LONG_S))
        busy.set()
        paris(model, job)

    with working(nano, 2) as workers:
        asked = Asked(work)
        workers.submit(asked.job)
        assert busy.wait(LONG_S)
        while slots[0]._pending is None:
            threading.Event().wait(0.01)
        try:
            workers.cancel(asked.job)
            events = asked.events()
            assert not waits.is_set() and events == [LEFT]
        finally:
            waits.set()
        after = Asked(paris)
        workers.submit(after.job)
        assert is_paris(after.events())


def test_every_worker_hears_why_there_is_no_model(nano: Path) -> None:
    models = Models(nano, 2, n_ctx=99_999_999, max_crops=1, options={})
    failed = threading.Semaphore(0)
    workers = Workers(models.open, Scheduler(1), n=2, failed=failed.release)
    workers.start()
    assert failed.acquire(timeout=LONG_S) and failed.acquire(timeout=LONG_S)
    assert workers.join(LONG_S) and "context is 99999999 tokens" in str(workers.failure)
    models.close()


def test_context_of_each_conversation(nano: Path) -> None:
    bundle = bundles.load(nano)
    most = bundle.text.context_length
    assert [context_of(bundle, n, 1) for n in (0, 512)] == [0, 512]
    assert [context_of(bundle, n, 4) for n in (0, 512)] == [min(4096, most), 512]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_in_the_middle_of_several(serve: Serve, number: int) -> None:
    server = serve("--parallel", 3, "--grace", 1).ready()
    with ExitStack() as stack:
        running = [stack.enter_context(endless(server)) for _ in range(3)]
        assert server.metric("pocketphi_requests_running") == 3
        assert server.metric("pocketphi_pass_rows_total") > server.metric("pocketphi_passes_total")
        server.process.send_signal(number)
        for one in running:
            seen = read_answer(one)
            assert b"server_stopping" in seen and b"[DONE]" not in seen
    assert server.stop(number) == 0
    assert not any("Traceback" in line or "Error" in line for line in server.log)


def test_who_leaves_does_not_disturb_the_others(serve: Serve) -> None:
    server = serve("--parallel", 3).ready()
    with endless(server) as stays:
        for _ in range(3):
            endless(server).close()
        server.until(lambda: server.metric("pocketphi_cancelled_running_total") == 3)
        assert server.answer() == PARIS
        assert stays.recv(65536)
    server.until(lambda: server.metric("pocketphi_requests_running") == 0)
