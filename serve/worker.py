# SPDX-License-Identifier: Apache-2.0
"""The threads that have a model each, and the queue before them.

Work goes to the first worker that is idle: llama.cpp joins the rows of neighbouring sequences only. What runs
at the same time is of one adapter, as far as the queue has such: what is not, takes passes of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Literal

from .errors import Refusal, refusal_of
from .jobs import Failed, Job
from .scheduler import Scheduler
from .served_model import ServedModel, Stopped

_log = logging.getLogger(__name__)

State = Literal["loading", "ready", "stopping"]

_LOOK_S = 0.05  # between two looks whether a worker that is to stop is still needed

LEFT = Failed(Refusal(499, "the client has left", code="client_closed_request"))
LOADING = Failed(Refusal(503, "the model is loading: try again", code="loading_model", retry_after=1))
STOPPING = Failed(Refusal(503, "the server is stopping", code="server_stopping"))


class Workers:
    """Models at work. Every method may be called from any thread."""

    def __init__(
        self,
        open_model: Callable[[int], ServedModel],
        scheduler: Scheduler[Job],
        *,
        n: int = 1,
        failed: Callable[[], None] = lambda: None,
        expecting: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            open_model: called with each worker's number, from 0, in its thread, which then has it.
            scheduler: nobody else may use it.
            n: workers.
            failed: called in a worker's thread when its model could not be opened; `failure` says why.
            expecting: whether admitted jobs may still come: workers that are told to stop stay for them.
        """
        self._open, self._scheduler, self._failed = open_model, scheduler, failed
        self._expecting = expecting
        self._lock = threading.Lock()
        self._turns = [threading.Condition(self._lock) for _ in range(n)]  # of each worker
        self._idle: set[int] = set()
        self._running: list[Job | None] = [None] * n
        self._models: list[ServedModel | None] = [None] * n
        self._group: str | None = None  # of the job that was given out last
        self._ready = self._n_gone = 0
        self._stopping = self._abandoned = False
        self.failure: BaseException | None = None
        self.n_cancelled = {"waiting": 0, "running": 0}
        self.n_switches = 0  # jobs of another group than those beside or before them
        self._threads = [
            threading.Thread(target=self._serve, args=(i,), name=f"pocketphi-worker-{i}", daemon=True)
            for i in range(n)
        ]

    @property
    def state(self) -> State:
        """Ready when every worker has its model."""
        if self._stopping:
            return "stopping"
        return "ready" if self._ready == len(self._threads) else "loading"

    @property
    def n_waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._scheduler)

    @property
    def n_running(self) -> int:
        """Jobs at work."""
        return sum(job is not None for job in self._running)

    def start(self) -> None:
        """Begin to load."""
        for thread in self._threads:
            thread.start()

    def model(self) -> ServedModel:
        """Any of them, for what needs no worker: its tokenizer, and what is known of it.

        Raises:
            Refusal: 503, the model is loading.
        """
        found = next((model for model in self._models if model is not None), None)
        if found is None or self.state == "loading":  # no job is taken before all have theirs
            raise LOADING.refusal.fresh
        return found

    def submit(self, job: Job, *, admitted: bool = False) -> None:
        """Queue a job; its events end with Done or Failed.

        Args:
            job: not queued yet.
            admitted: part of a recording or a session that has one of the `Places`: the queue is never too
                full for it, and a server that stops still takes it within the grace.

        Raises:
            Refusal: 429, the queue is full; 503, the model is loading or the server stops.
        """
        with self._lock:
            if self.state == "loading":
                raise LOADING.refusal.fresh
            if self._abandoned or (self._stopping and not (admitted and not self._n_gone)):
                raise STOPPING.refusal.fresh
            self._scheduler.add(job, job.group, admitted=admitted)
            self._give()

    def cancel(self, job: Job) -> None:
        """Nobody waits for it: out of the queue, or ended at the model's next token."""
        with self._lock:
            if job.cancelled:
                return
            job.cancelled = True
            if self._scheduler.discard(job):
                self.n_cancelled["waiting"] += 1
            elif job in self._running:
                self.n_cancelled["running"] += 1
                self._interrupt(self._running.index(job))
                return  # its worker ends it
        job.end()

    def stop(self) -> None:
        """Take no more jobs. Those that are there go on."""
        with self._lock:
            self._stopping = True
            for turn in self._turns:
                turn.notify()

    def abandon(self) -> None:
        """End every job, waiting or running, with a Failed."""
        self.stop()
        with self._lock:
            self._abandoned = True
            for turn in self._turns:
                turn.notify()
            waiting = self._scheduler.empty()
            for number, job in enumerate(self._running):
                if job is not None:
                    job.cancelled = True
                    self._interrupt(number)
        for job in waiting:
            job.put(STOPPING)
            job.end()

    def join(self, timeout_s: float) -> bool:
        """Wait for the threads to end after `stop`; False when one still works."""
        ends = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(ends - time.monotonic(), 0.0))
        return not any(thread.is_alive() for thread in self._threads)

    def _serve(self, number: int) -> None:
        try:
            model = self._open(number)
        except BaseException as exc:
            self.failure = exc
            self._failed()
            return
        with model:
            with self._lock:
                self._models[number] = model
                self._ready += 1
            while (job := self._next(number)) is not None:
                self._run(number, model, job)
                del job  # and the pictures in it

    def _next(self, number: int) -> Job | None:
        """Wait for a job; None when there will be none."""
        with self._lock:
            self._idle.add(number)
            self._give()
            while (job := self._running[number]) is None and not self._done():
                self._turns[number].wait(_LOOK_S if self._stopping else None)
            self._idle.discard(number)
            self._n_gone += job is None
            return job

    def _done(self) -> bool:
        return self._abandoned or (self._stopping and not self._expecting())

    def _give(self) -> None:
        """Work for the idle, the first ones first. With the lock."""
        while self._idle:
            beside = Counter(job.group for job in self._running if job is not None)
            wanted = beside.most_common(1)[0][0] if beside else self._group
            found = self._scheduler.take(wanted)
            if found is None:
                return
            number = min(self._idle)
            self._idle.remove(number)
            self._running[number], self._group = found
            self.n_switches += wanted is not None and found[1] != wanted
            self._turns[number].notify()

    def _interrupt(self, number: int) -> None:
        """Its job is to end. With the lock: so the worker has no other yet."""
        model = self._models[number]
        if model is not None:
            model.cancel()

    def _run(self, number: int, model: ServedModel, job: Job) -> None:
        started = time.monotonic()
        model.should_stop = job.should_stop
        try:
            job.run(model)
        except Stopped:
            job.put(STOPPING if self._stopping else LEFT)
        except BaseException as exc:  # whatever it is: one answer failed, the worker goes on
            report(exc)
            job.put(Failed(refusal_of(exc)))
        finally:
            model.should_stop = _never
            with self._lock:
                self._running[number] = None
                self._scheduler.took(time.monotonic() - started)
            job.end()


def _never() -> bool:
    return False


def report(error: BaseException) -> None:
    """Log bugs and native failures, by place and kind alone: what they say may quote a request."""
    if refusal_of(error).status < 500:
        return
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f"{trace.tb_frame.f_globals.get('__name__')}:{trace.tb_lineno}" if trace is not None else "?"
    _log.error("a request failed: %s in %s", type(error).__name__, place)
