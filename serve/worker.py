# SPDX-License-Identifier: Apache-2.0
"""The threads that own a model each, and the queue before them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Literal

from .errors import Refusal, refusal_of
from .jobs import Failed, Job
from .scheduler import Scheduler
from .served_model import ServedModel, Stopped

_log = logging.getLogger(__name__)

State = Literal["loading", "ready", "stopping"]

LEFT = Failed(Refusal(499, "the client has left", code="client_closed_request"))
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
    ) -> None:
        """
        Args:
            open_model: called with each worker's number, from 0, in its thread, which then owns the model.
            scheduler: nobody else may use it.
            n: workers.
            failed: called in a worker's thread when its model could not be opened; `failure` says why.
        """
        self._open, self._scheduler, self._failed = open_model, scheduler, failed
        self._changed = threading.Condition()
        self._running: list[Job | None] = [None] * n
        self._ready = 0
        self._stopping = False
        self.failure: BaseException | None = None
        self.n_cancelled = {"waiting": 0, "running": 0}
        self.n_switches = 0  # jobs of another group than the worker's last
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

    def submit(self, job: Job) -> None:
        """Queue a job; its events end with Done or Failed.

        Raises:
            Refusal: 429, the queue is full; 503, the model is loading or the server stops.
        """
        with self._changed:
            if self.state == "loading":
                raise Refusal(503, "the model is loading: try again", code="loading_model", retry_after=1)
            if self.state == "stopping":
                raise STOPPING.refusal
            self._scheduler.add(job, job.group)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for it: out of the queue, or ended at the model's next token."""
        with self._changed:
            if job.cancelled:
                return
            job.cancelled = True
            if self._scheduler.discard(job):
                self.n_cancelled["waiting"] += 1
            elif job in self._running:
                self.n_cancelled["running"] += 1
                return  # its worker ends it
        job.end()

    def stop(self) -> None:
        """Take no more jobs. Those that are there go on."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def abandon(self) -> None:
        """End every job, waiting or running, with a Failed."""
        self.stop()
        with self._changed:
            waiting = self._scheduler.empty()
            for job in self._running:
                if job is not None:
                    job.cancelled = True
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
            with self._changed:
                self._ready += 1
            group: str | None = None
            while (job := self._next(number, group)) is not None:
                group = job.group
                self._run(number, model, job)
                del job  # and the pictures in it

    def _next(self, number: int, group: str | None) -> Job | None:
        """Wait for a job; None when there will be none."""
        with self._changed:
            while True:
                found = self._scheduler.take(group)
                if found is not None:
                    self.n_switches += group is not None and found[1] != group
                    self._running[number] = found[0]
                    return found[0]
                if self._stopping:
                    return None
                self._changed.wait()

    def _run(self, number: int, model: ServedModel, job: Job) -> None:
        started = time.monotonic()
        model.should_stop = job.should_stop
        try:
            job.run(model)
        except Stopped:
            job.put(STOPPING if self._stopping else LEFT)
        except Exception as exc:
            _report(exc)
            job.put(Failed(refusal_of(exc)))
        finally:
            model.should_stop = _never
            with self._changed:
                self._running[number] = None
                self._scheduler.took(time.monotonic() - started)
            job.end()


def _never() -> bool:
    return False


def _report(error: Exception) -> None:
    """Bugs and native failures, by place and kind alone: what they say may quote a request."""
    if refusal_of(error).status < 500:
        return
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f"{trace.tb_frame.f_globals.get('__name__')}:{trace.tb_lineno}" if trace is not None else "?"
    _log.error("a request failed: %s in %s", type(error).__name__, place)
