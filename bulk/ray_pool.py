# SPDX-License-Identifier: Apache-2.0
"""The items of a file answered by a Ray cluster: Ray Data over a pool of actors, one model in each.

An actor keeps the model in a process of its own, as a local run does: what kills that, perhaps an item's
doing, does not kill the actor, and the item is tried once more and then failed. An actor or a machine that is
lost is Ray's to replace, and what it had not given back is done again elsewhere. The model directory has to
be at the same path on every machine, and the same by its hashes; so do the files that items name.

Without an address a cluster of this machine alone is made for the run: on loopback, behind a token of its
own, without dashboard and usage statistics. Ray reads its environment when it is first imported, so it is
imported here and nowhere else.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import secrets
import shutil
import signal
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ..runtime.errors import InputError, KernelError, MemoryShortError, PocketPhiError, native, one_line
from .lines import ChangedError, Entry, LineFile, Task
from .performer import ItemSettings, ModelSettings, to_object
from .process import DiedError, WorkerProcess, error_of
from .records import Outcome, digest_of, failed

_TRIES = 2  # of an item in whose time the process dies, and of loading the model
_WAVE_CHARS = 64 << 20  # of items that are in the cluster at a time
_BLOCKS = 64  # for each actor, so that outcomes come as they are ready
_BLOCK_ITEMS = 32  # at most: what is done again when an actor is lost
_STORE_BYTES = 256 << 20  # of the cluster of this machine alone; Ray wants 75 MB at least


@dataclass(frozen=True, slots=True)
class RayOptions:
    """Which cluster, and what of it."""

    address: str | None = None  # HOST:PORT of the head, or "auto"; None: one of this machine, for the run
    n_workers: int | None = None  # None: as many as the cluster has cores and memory for
    n_threads: int = 1  # of each
    n_bytes: int = 0  # of memory that each takes


class RayPool:
    """Answers items in a cluster; a context. Leaving it lets go of the cluster."""

    def __init__(
        self, file: LineFile, model: ModelSettings, items: ItemSettings, options: RayOptions
    ) -> None:
        self._file, self._model, self._items, self._options = file, model, items, options
        self._ray: ModuleType | None = None
        self._folder: str | None = None
        self._n = options.n_workers or 1

    def __enter__(self) -> RayPool:
        """
        Raises:
            InputError: Ray is not installed, or no such cluster answers.
            MemoryShortError: no machine of the cluster has room for a worker.
        """
        self._ray = _imported(local=self._options.address is None)
        handler = signal.getsignal(signal.SIGTERM)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Ray's, of its own settings
                self._connect(self._ray)
        except BaseException:
            self.__exit__()
            raise
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)  # Ray puts its own in its place
        return self

    def __exit__(self, *_: object) -> None:
        if self._ray is not None:
            self._ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def address(self) -> str:
        """Where the cluster's head is."""
        assert self._ray is not None, "entered"
        return str(self._ray.get_runtime_context().gcs_address)

    def taken(self) -> None:
        """Nothing to be told: what is done waits in the cluster."""

    def run(self, entries: Sequence[Entry]) -> Iterator[tuple[Entry, Outcome]]:
        """Answer them; outcomes come as blocks of items are ready.

        Raises:
            PocketPhiError: no item can be answered, the file changed, or the cluster failed.
        """
        wave: dict[str, tuple[Entry, Task]] = {}
        n_chars = 0
        for entry in entries:
            try:
                task = self._file.task(entry)
            except ChangedError:
                raise
            except InputError as exc:
                yield entry, failed(entry.id, "input", str(exc), digest_of(entry.sha256, ()))
                continue
            if wave and n_chars + len(task.text) > _WAVE_CHARS:
                yield from self._wave(wave)
                wave, n_chars = {}, 0
            wave[entry.id] = entry, task
            n_chars += len(task.text)
        if wave:
            yield from self._wave(wave)

    def _wave(self, wave: Mapping[str, tuple[Entry, Task]]) -> Iterator[tuple[Entry, Outcome]]:
        """One pass of Ray Data."""
        left = dict(wave)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for row in self._rows([task for _, task in wave.values()]):
                    found = json.loads(row["outcome"])
                    if "error" in found:
                        raise error_of(found["error"])
                    if row["id"] in left:  # of a block that was done again only what is new
                        yield left.pop(row["id"])[0], Outcome(**found)
        except PocketPhiError:
            raise
        except Exception as exc:  # Ray's, of many kinds
            raise KernelError(f"ray: {type(exc).__name__}: {one_line(exc)}") from None
        if left:
            raise KernelError(f"ray: gave nothing back for {len(left)} items")

    def _rows(self, tasks: Sequence[Task]) -> Iterator[dict[str, Any]]:
        from ray import data

        n_actors = min(self._n, len(tasks))
        n_items = max(1, min(_BLOCK_ITEMS, len(tasks) // (n_actors * _BLOCKS)))
        rows = [{"id": task.id, "number": task.number, "text": task.text} for task in tasks]
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        dataset = data.from_items(rows, override_num_blocks=-(-len(rows) // n_items)).map_batches(
            Answerer,
            fn_constructor_args=(self._model, self._items),
            batch_size=1,
            compute=data.ActorPoolStrategy(size=n_actors),
            num_cpus=self._options.n_threads if self._options.address is not None else 1,
            memory=self._options.n_bytes or None,
        )
        yield from dataset.iter_rows()

    def _connect(self, ray: ModuleType) -> None:
        quiet = {"log_to_driver": False, "logging_level": logging.CRITICAL, "configure_logging": True}
        try:
            if self._options.address is None:
                self._folder = tempfile.mkdtemp(prefix="pocketphi-")
                ray.init(
                    address="local",
                    num_cpus=self._n,
                    include_dashboard=False,
                    object_store_memory=_STORE_BYTES,
                    _temp_dir=self._folder,
                    **quiet,
                )
            else:
                ray.init(address=self._options.address, **quiet)
        except Exception as exc:
            where = self._options.address or "this machine"
            raise InputError(f"ray: {where[:100]}: no cluster: {one_line(exc)}") from None
        if self._options.address is not None:  # Ray would wait for what it lacks, for ever
            room = self._room(ray)
            self._n = min(self._options.n_workers or room, room)
        from ray import data

        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False

    def _room(self, ray: ModuleType) -> int:
        """How many actors the machines of the cluster have cores and memory for.

        Raises:
            MemoryShortError: none.
        """
        n, one = 0, self._options
        for node in ray.nodes():
            has = node["Resources"] if node["Alive"] else {}
            by_memory = has.get("memory", 0.0) // one.n_bytes if one.n_bytes else has.get("CPU", 0.0)
            n += int(min(has.get("CPU", 0.0) // one.n_threads, by_memory))
        if n == 0:
            raise MemoryShortError(
                f"ray: no machine has {one.n_threads} cores and {one.n_bytes} bytes of memory for a worker"
            )
        return n


class Answerer:
    """What an actor runs: a process with the model, and another when that one dies."""

    def __init__(self, model: ModelSettings, items: ItemSettings) -> None:
        self._model, self._items = model, items
        self._process: WorkerProcess | None = None

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[str]]:
        """Answer a batch: columns id, number and text; gives id and the outcome as JSON."""
        outcomes: list[str] = []
        for name, number, text in zip(batch["id"], batch["number"], batch["text"], strict=True):
            try:
                found = to_object(self._answer(Task(str(name), int(number), str(text))))
            except PocketPhiError as exc:
                message = f"{platform.node()}: {exc}"
                found = {"error": {"class": type(exc).__name__, "message": message}}
            outcomes.append(json.dumps(found))
        return {"id": list(map(str, batch["id"])), "outcome": outcomes}

    def _answer(self, task: Task) -> Outcome:
        reason = ""
        for _ in range(_TRIES):
            process = self._process = self._process or self._started()
            try:
                return process.ask(task)
            except DiedError as exc:
                process.close()
                self._process, reason = None, str(exc)
        message = f"{task.where}: {reason}, {_TRIES} times"
        return failed(task.id, "worker", message, digest_of(task.sha256, ()))

    def _started(self) -> WorkerProcess:
        """
        Raises:
            PocketPhiError: the model cannot be loaded.
        """
        reason = ""
        for _ in range(_TRIES):
            process = WorkerProcess(self._model, self._items)
            try:
                process.wait_ready()
                return process
            except DiedError as exc:
                process.close()
                reason = str(exc)
            except BaseException:
                process.close()
                raise
        raise MemoryShortError(f"{reason} while it loaded the model; fewer --workers take less memory")

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            if self._process is not None:
                self._process.close()


def _imported(*, local: bool) -> ModuleType:
    """Ray, told what it reads from the environment before it is.

    Raises:
        InputError: it is not installed.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if local:  # its name for: all on loopback, as on a desktop
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # or it would write one into the home
    try:
        with native("ray"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ray
            import ray.data
    except KernelError as exc:
        raise InputError(f"{exc}: pip install 'pocketphi[ray]'") from None
    return ray  # type: ignore[no-any-return,unused-ignore]
