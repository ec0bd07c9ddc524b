# SPDX-License-Identifier: Apache-2.0
"""Worker processes that answer a file of items: each as many as it can, none twice but after a death.

A lane is a thread with a process of its own. It takes the next item, sends it, waits, and hands the outcome
over; when the process dies the item goes to the front once more, and the lane gets another process.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence

from ..runtime.errors import InputError, MemoryShortError
from .lines import ChangedError, Entry, LineFile, Task
from .performer import ItemSettings, ModelSettings
from .process import DiedError, WorkerProcess
from .records import Outcome, digest_of, failed

_TRIES = 2  # of an item in whose time the worker dies
_AHEAD = 64  # items for each worker that may be done and not yet taken
_POLL_S = 1.0  # Windows does not interrupt a wait: it has to end by itself

_log = logging.getLogger(__name__)


class Pool:
    """Answers items in several processes; a context. Leaving it ends them at once."""

    def __init__(self, file: LineFile, model: ModelSettings, items: ItemSettings, n_workers: int) -> None:
        self._file, self._model, self._items, self._n = file, model, items, n_workers
        self._lock = threading.Lock()
        self._left: deque[Entry] = deque()
        self._deaths: dict[str, int] = {}  # of workers, by the item that they had
        self._processes: list[WorkerProcess] = []
        self._lanes: list[threading.Thread] = []
        self._n_alive = 0
        self._stopping = False
        self._room = threading.Semaphore(_AHEAD * n_workers)
        self._done: queue.SimpleQueue[tuple[Entry, Outcome] | BaseException] = queue.SimpleQueue()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._stopping = True
            for process in self._processes:
                process.kill()
        self._room.release(max(len(self._lanes), 1))
        for lane in self._lanes:
            lane.join()

    @property
    def pids(self) -> list[int]:
        """Of the processes that run."""
        with self._lock:
            return [process.pid for process in self._processes]

    def taken(self) -> None:
        """One more outcome is where it belongs: another item may be begun."""
        self._room.release()

    def run(self, entries: Sequence[Entry]) -> Iterator[tuple[Entry, Outcome]]:
        """Answer them; outcomes come as they are ready. Call `taken` for each.

        Raises:
            PocketPhiError: no item can be answered, or the file changed.
        """
        self._left = deque(entries)
        self._lanes = [
            threading.Thread(target=self._lane, name=f"pocketphi-batch-{i}", daemon=True)
            for i in range(min(self._n, len(entries)))
        ]
        self._n_alive = len(self._lanes)
        for lane in self._lanes:
            lane.start()
        for _ in entries:
            while True:
                try:
                    found = self._done.get(timeout=_POLL_S)
                except queue.Empty:
                    continue
                break
            if isinstance(found, BaseException):
                raise found
            yield found

    def _lane(self) -> None:
        process: WorkerProcess | None = None
        try:
            while True:
                self._room.acquire()
                entry = self._next()
                if entry is None:
                    return
                task = self._task(entry)
                if task is None:
                    continue
                try:
                    process = process or self._started()
                except DiedError as exc:
                    self._retire(entry, exc)
                    return
                try:
                    outcome = process.ask(task)
                except DiedError as exc:
                    self._end(process)
                    process = None
                    self._mourn(entry, exc)
                    continue
                self._done.put((entry, outcome))
        except BaseException as exc:
            if not self._stopping:
                self._done.put(exc)
        finally:
            if process is not None:
                self._end(process)

    def _next(self) -> Entry | None:
        """What to do next; None: nothing, and the lane counts no more."""
        with self._lock:
            if self._left and not self._stopping:
                return self._left.popleft()
            self._n_alive -= 1
        self._room.release()
        return None

    def _retire(self, entry: Entry, exc: DiedError) -> None:
        """A lane that gets no process leaves its item to the others.

        Raises:
            MemoryShortError: there are none.
        """
        with self._lock:
            self._n_alive -= 1
            if self._stopping:
                return
            if self._n_alive == 0:
                raise MemoryShortError(f"{exc}; fewer --workers take less memory")
            self._left.appendleft(entry)
        self._room.release()
        _log.warning("%s; the other workers go on", exc)

    def _task(self, entry: Entry) -> Task | None:
        """The item; None where its line cannot be used, which is its outcome."""
        try:
            with self._lock:
                return self._file.task(entry)
        except ChangedError:
            raise
        except InputError as exc:
            outcome = failed(entry.id, "input", str(exc), digest_of(entry.sha256, ()))
            self._done.put((entry, outcome))
            return None

    def _started(self) -> WorkerProcess:
        """A process with a model. One that dies while it loads is tried once more.

        Raises:
            DiedError: that one too, or the pool is being closed.
        """
        for attempt in range(_TRIES):
            with self._lock:
                if self._stopping:
                    break
                process = WorkerProcess(self._model, self._items)
                self._processes.append(process)
            try:
                process.wait_ready()
                return process
            except DiedError as exc:
                self._end(process)
                if attempt + 1 == _TRIES:
                    raise DiedError(f"{exc} while it loaded the model") from None
            except BaseException:
                self._end(process)
                raise
        raise DiedError("the pool is being closed")

    def _end(self, process: WorkerProcess) -> None:
        with self._lock:
            if process in self._processes:
                self._processes.remove(process)
        process.close()

    def _mourn(self, entry: Entry, exc: DiedError) -> None:
        """An item whose worker has died is tried once more: it may have been another's fault."""
        deaths = self._deaths[entry.id] = self._deaths.get(entry.id, 0) + 1
        if deaths < _TRIES:
            with self._lock:
                self._left.appendleft(entry)
            self._room.release()
            return
        message = f"line {entry.number}: {exc}, {_TRIES} times"
        outcome = failed(entry.id, "worker", message, digest_of(entry.sha256, ()))
        self._done.put((entry, outcome))
