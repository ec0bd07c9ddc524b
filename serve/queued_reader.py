# SPDX-License-Identifier: Apache-2.0
"""Readings of recordings and live sessions: each is a job of its own, in the queue with all others."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from ..runtime.engine import CompleteOptions
from ..runtime.growing_speech import GrowingSpeech
from ..runtime.reader import Reader, Reading
from ..runtime.router import route
from ..runtime.speech_task import Task
from .errors import Refusal
from .jobs import Failed, Job
from .served_model import ServedModel, Stopped
from .services import Services
from .worker import LEFT

_GROUP = route(images=False, audio=True).adapter or "language"


class QueuedReader:
    """`Reader` for a thread that has no model; see `reader.ReadsSpeech`. One thread reads, any may cancel.

    Whoever makes it has taken one of `Services.listeners`, and gives it back when nothing is read any more.
    """

    def __init__(self, services: Services, task: Task, options: CompleteOptions) -> None:
        """
        Args:
            services: of the server.
            task, options: as for `Reader`.

        Raises:
            Refusal: 503, the model is loading.
        """
        self._services, self._task, self._options = services, task, options
        self._any = Reader(services.workers.model(), task, options)  # for what needs no forward pass
        self._lock = threading.Lock()
        self._job: Job | None = None
        self._cancelled = False
        self._counted: GrowingSpeech | None = None  # the utterance that the latest reading was of,
        self._n_counted = 0  # and how many samples of it have been read

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` has been called."""
        return self._cancelled

    def cancel(self) -> None:
        """End the reading that waits or runs, at the next token, and every later one. From any thread."""
        with self._lock:
            self._cancelled = True
            if self._job is not None:
                self._services.workers.cancel(self._job)

    def check(self, longest_s: float) -> None:
        """See `Reader.check`."""
        self._any.check(longest_s)

    def text_of(self, token_ids: Sequence[int]) -> str:
        """See `Reader.text_of`."""
        return self._any.text_of(token_ids)

    def starts_word(self, token_id: int) -> bool:
        """See `Reader.starts_word`."""
        return self._any.starts_word(token_id)

    def read(
        self, speech: GrowingSpeech, *, draft: Sequence[int] = (), n_forced: int = 0, final: bool = True
    ) -> Reading:
        """See `Reader.read`; it waits in the queue first.

        Raises:
            Refusal: 499, cancelled; 503, the server stops; 408, it took too long; others, as for any request.
        """
        work = _Work(self._task, self._options, speech, draft, n_forced, final)
        ended = threading.Event()
        job = Job(_GROUP, work, answer_s=self._services.limits.answer_s, wake=ended.set)
        with self._lock:
            if self._cancelled:
                raise LEFT.refusal.fresh
            self._services.workers.submit(job, admitted=True)
            self._job = job
        try:
            self._wait(job, ended)
        finally:
            with self._lock:
                self._job = None
        if work.reading is None:  # it was cancelled before it began
            raise LEFT.refusal.fresh
        self._services.metrics.heard(work.reading, audio_s=self._new_s(speech), busy_s=work.busy_s)
        return work.reading

    def _wait(self, job: Job, ended: threading.Event) -> None:
        while True:
            events, last = job.take()
            for event in events:
                if isinstance(event, Failed):
                    raise event.refusal.fresh
            if last:
                return
            if not events:
                ended.wait()
                ended.clear()

    def _new_s(self, speech: GrowingSpeech) -> float:
        """Seconds of the utterance that no reading before has had."""
        if self._counted is not speech:
            self._counted, self._n_counted = speech, 0
        new = max(len(speech.window) - self._n_counted, 0)
        self._n_counted += new
        return new / speech.sample_rate


class _Work:
    """One reading, in a worker's thread."""

    def __init__(
        self,
        task: Task,
        options: CompleteOptions,
        speech: GrowingSpeech,
        draft: Sequence[int],
        n_forced: int,
        final: bool,
    ) -> None:
        self._task, self._options, self._speech = task, options, speech
        self._draft, self._n_forced, self._final = draft, n_forced, final
        self.reading: Reading | None = None
        self.busy_s = 0.0

    def __call__(self, model: ServedModel, job: Job) -> None:
        """Do it."""
        started = time.monotonic()
        reader = Reader(model, self._task, self._options)
        try:
            self.reading = reader.read(
                self._speech, draft=self._draft, n_forced=self._n_forced, final=self._final
            )
        except Stopped:
            if job.cancelled:
                raise
            raise Refusal(408, "the model had no time left to finish a reading", code="timeout") from None
        self.busy_s = time.monotonic() - started
