# SPDX-License-Identifier: Apache-2.0
"""The thread that computes for several slots: it joins what they wait for into passes.

One pass takes what goes through the same adapter with the same RoPE table, at most 512 rows of it. Whoever
has waited longest decides whose turn it is. Short pieces, the steps of answers that are being written, come
before pieces of long prompts; beside steps, prompts go in smaller pieces.

What is asked on other threads comes in through queues that need no lock of ours, so an interrupt leaves none
locked. A sequence is cut back when it is next written: until then, what was taken back does no harm.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import KernelError, one_line
from .ggml_model import ABORT, BATCH, Aborted, Calls, GgmlContext, GgmlModel, Rows, Run, check_finite
from .parts import Float32
from .spec import RopeTable

_STEP = 16  # rows: so few are a step of an answer, with its draft, and not a prompt
_BESIDE = 128  # rows of prompts in a pass with steps: who writes waits for no more
_PATIENCE, _PATIENCE_S = 0.5, 0.02  # a pass waits for those of the last one: so much of its time, and at most


class Lane:
    """The context of one RoPE table, a sequence for each slot. Only the worker touches it."""

    def __init__(self, context: GgmlContext, table: RopeTable, batch: int, n_slots: int) -> None:
        self.context, self.table, self.batch = context, table, batch
        self.members: set[int] = set()  # slots that have their cache here
        self._held = [0] * n_slots  # tokens that each sequence may hold

    def cut(self, sequence: int, length: int) -> None:
        """Drop what may follow the first `length` tokens."""
        if self._held[sequence] > length:
            self.context.cut(sequence, length)
            self._held[sequence] = length

    def expect(self, sequence: int, length: int) -> None:
        """Before something is written: a sequence may hold so many from now on, whatever becomes of it."""
        self._held[sequence] = length


@dataclass(eq=False, slots=True)
class Feed:
    """What a slot waits for. `turn`, `done` and `written` are the worker's."""

    slot: int
    lane: Lane
    adapter: str | None
    rows: Rows
    start: int  # position of the first row
    logits: Float32  # [n, vocab_size], after the last n rows
    turn: int = 0  # the lower, the longer it has waited
    future: Future[Float32] = field(default_factory=Future)
    done: int = 0  # rows
    written: int = 0  # rows of logits

    @property
    def group(self) -> tuple[object, ...]:
        """Equal for rows that can go through one pass; llama.cpp takes ids or embeddings, not both."""
        return self.lane.table, self.adapter, self.rows.dtype.kind

    @property
    def left(self) -> int:
        """Rows that have not been read yet."""
        return len(self.rows) - self.done

    def run(self, n: int) -> tuple[Run, int]:
        """The next `n` rows, and how many of their logits are wanted: the last row's are computed anyway."""
        stop = self.done + n
        wanted = max(0, stop - (len(self.rows) - len(self.logits)) - self.written)
        return Run(self.slot, self.start + self.done, n, max(wanted, 1)), wanted


class SlotWorker:
    """A model, its contexts, and what waits. Public methods are for other threads."""

    def __init__(self, load: Callable[[Calls], GgmlModel], n_slots: int) -> None:
        """`load`: is called on the worker, and gives the model. Its errors are raised here."""
        self.passes = self.rows = 0  # that have been computed: how well slots share
        self._n_slots, self._closed = n_slots, False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pocketphi-decoder")
        self._incoming: queue.SimpleQueue[Feed] = queue.SimpleQueue()
        self._running: tuple[Feed, ...] = ()
        self._abort: set[int] = set()
        # All below is the worker's.
        self._turns = itertools.count()
        self._waiting: list[Feed] = []
        self._coming: dict[int, tuple[object, ...]] = {}  # slots of the last pass, which will go on
        self._patience_s = 0.0
        self._lanes: dict[RopeTable, Lane] = {}
        calls = Calls(lambda function, *arguments: function(*arguments), self._abort)
        try:
            self.model = self._thread.submit(load, calls).result()
        except BaseException:
            self._thread.shutdown(wait=False)
            raise

    def close(self) -> None:
        """Stop what runs and give back memory; a slot that waits gets a KernelError. Safe to call twice."""
        self._closed = True
        self._abort.add(ABORT)
        with contextlib.suppress(RuntimeError):  # it is shut down already
            self._thread.submit(self._free)
        self._thread.shutdown()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Have the worker call a function that can be called again, and wait for it.

        What an interrupt leaves waiting is not called, or changes only what its slot will begin anew.
        """
        try:
            asked = self._thread.submit(self._serve, function, *arguments)
        except RuntimeError:
            raise _closed() from None
        try:
            return asked.result()
        except BaseException:
            asked.cancel()
            raise

    def read(self, feed: Feed) -> Float32:
        """Wait for the worker to read it; what ends the wait otherwise, takes it back."""
        try:
            self._incoming.put(feed)
            try:
                self._thread.submit(self._pump)
            except RuntimeError:
                raise _closed() from None
            return feed.future.result()
        except BaseException:
            self.take_back(feed)
            raise

    def take_back(self, feed: Feed) -> None:
        """Take a feed back. A pass that nobody wants any more is stopped; a stop too many is done again."""
        feed.future.cancel()
        running = self._running
        if feed in running and all(one.future.cancelled() for one in running) and running is self._running:
            self._abort.add(ABORT)

    # What `call` may be asked for:

    def enter(self, slot: int, table: RopeTable, room: int, adapter: str | None) -> Lane:
        """Give a slot an empty sequence where its table is."""
        self.leave(slot)
        lane = self._lanes.get(table)
        if lane is None:
            if self.model.options.before_cache is not None:
                self.model.options.before_cache(0, room * self._n_slots, 0)
            context = GgmlContext(self.model, room, self._n_slots)
            lane = self._lanes[table] = Lane(context, table, min(BATCH, room * self._n_slots), self._n_slots)
        lane.members.add(slot)
        lane.cut(slot, 0)
        if adapter is not None and adapter not in self.model.resident_adapters:
            try:
                lane.context.set_adapter(adapter, slot)
            except KernelError:
                self.leave(slot)
                raise
        return lane

    def leave(self, slot: int) -> None:
        """Free the sequence that a slot has, and its context with the last of them."""
        for lane in [lane for lane in self._lanes.values() if slot in lane.members]:
            lane.members.remove(slot)
            if lane.members:
                lane.cut(slot, 0)
            else:
                del self._lanes[lane.table]
                lane.context.close()

    def save(self, lane: Lane, slot: int, length: int) -> bytes:
        """What `Slot.save_state` gives."""
        self._check(lane)
        lane.cut(slot, length)
        return bytes(lane.context.saved(slot))

    def load(self, lane: Lane, slot: int, state: Any, length: int) -> None:
        """What `Slot.load_state` does; `state` is an array of bytes."""
        self._check(lane)
        lane.expect(slot, length)
        lane.context.restore(slot, state, length)

    # The worker's own:

    def _serve(self, function: Callable[..., Any], *arguments: Any) -> Any:
        while True:
            self._abort.clear()
            if self._closed:
                raise _closed()
            with contextlib.suppress(Aborted):  # meant for a pass that had just ended
                return function(*arguments)

    def _pump(self) -> None:
        """One pass, of what waits. Nothing may come of it that leaves a slot waiting for ever."""
        try:
            self._collect()
            if self._waiting:
                self._pass(self._chosen())
            if self._waiting:
                self._thread.submit(self._pump)
        except Exception as exc:
            error = (
                exc if isinstance(exc, KernelError) else KernelError(f"the decoder failed: {one_line(exc)}")
            )
            if self._closed:
                error = _closed()
            for feed in self._waiting:
                _settle(feed, error)
            self._waiting = []

    def _collect(self) -> None:
        """Take what has come, and wait a little for those who were in the last pass: together is faster."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._take(self._incoming.get_nowait())
        self._drop()
        if not self._waiting:
            return
        group, until = self._next().group, time.perf_counter() + self._patience_s
        with contextlib.suppress(queue.Empty):
            while group in self._coming.values() and (left := until - time.perf_counter()) > 0:
                self._take(self._incoming.get(timeout=left))
        self._coming = {slot: other for slot, other in self._coming.items() if other != group}
        self._drop()

    def _drop(self) -> None:
        """Forget what has been taken back. After the last `_take`: a slot that came again did that before."""
        if self._closed:
            raise _closed()
        self._waiting = [feed for feed in self._waiting if not feed.future.cancelled()]
        for feed in [feed for feed in self._waiting if not self._is_open(feed.lane)]:
            self._end(feed, _not_open())

    def _check(self, lane: Lane) -> None:
        if not self._is_open(lane):
            raise _not_open()

    def _is_open(self, lane: Lane) -> bool:
        """Whether the context is still there: a slot may be closed by one thread while another uses it."""
        return self._lanes.get(lane.table) is lane

    def _take(self, feed: Feed) -> None:
        feed.turn = next(self._turns)
        self._waiting.append(feed)
        self._coming.pop(feed.slot, None)

    def _next(self) -> Feed:
        return min(self._waiting, key=lambda feed: feed.turn)

    def _chosen(self) -> list[tuple[Feed, int]]:
        """Whose rows the next pass takes, and how many, in the order of their sequences."""
        first = self._next()
        group = sorted((f for f in self._waiting if f.group == first.group), key=lambda feed: feed.turn)
        chosen, room = [], first.lane.batch
        for feed in (feed for feed in group if feed.left <= _STEP):
            if feed.left <= room:
                chosen.append((feed, feed.left))
                room -= feed.left
        room = min(room, _BESIDE) if chosen else room
        for feed in (feed for feed in group if feed.left > _STEP):
            if room > 0:
                chosen.append((feed, min(feed.left, room)))
                room -= chosen[-1][1]
        return sorted(chosen, key=lambda one: one[0].slot)

    def _pass(self, chosen: list[tuple[Feed, int]]) -> None:
        lane, adapter = chosen[0][0].lane, chosen[0][0].adapter
        self._running = tuple(feed for feed, _ in chosen)
        self._abort.clear()
        if self._closed:
            raise _closed()
        began = time.perf_counter()
        try:
            lane.context.set_adapter(adapter, chosen[0][0].slot)
            for feed, n in chosen:
                lane.cut(feed.slot, feed.start + feed.done)
                lane.expect(feed.slot, feed.start + feed.done + n)
            rows: Rows = np.concatenate([feed.rows[feed.done : feed.done + n] for feed, n in chosen])
            with self.model.options.observer or contextlib.nullcontext():
                logits = lane.context.decode(rows, [feed.run(n)[0] for feed, n in chosen])
        except Aborted:
            return  # what has not been taken back is read again
        except Exception as exc:
            for feed in self._running:
                self._end(feed, exc)
            return
        finally:
            self._running = ()
        self._patience_s = min(_PATIENCE * (time.perf_counter() - began), _PATIENCE_S)
        self.passes, self.rows = self.passes + 1, self.rows + len(rows)
        self._hand_out(chosen, logits)

    def _hand_out(self, chosen: list[tuple[Feed, int]], logits: Float32) -> None:
        at = 0
        for feed, n in chosen:
            run, wanted = feed.run(n)
            found = logits[at : at + run.n_logits]
            at += run.n_logits
            feed.done, feed.turn = feed.done + n, next(self._turns)
            try:
                if wanted:
                    feed.logits[feed.written : feed.written + wanted] = check_finite(found)
                    feed.written += wanted
            except KernelError as exc:
                self._end(feed, exc)
                continue
            if feed.left == 0:
                self._end(feed, None)

    def _end(self, feed: Feed, error: Exception | None) -> None:
        self._waiting.remove(feed)
        if error is None:
            self._coming[feed.slot] = feed.group
        _settle(feed, error)

    def _free(self) -> None:
        for lane in self._lanes.values():
            lane.context.close()
        self._lanes.clear()
        self.model.close()


def _settle(feed: Feed, error: Exception | None) -> None:
    """Give the one who waits what it waits for, unless it has been taken back."""
    if feed.future.set_running_or_notify_cancel():
        if error is not None:
            feed.future.set_exception(error)
        else:
            feed.future.set_result(feed.logits)


def _not_open() -> KernelError:
    return KernelError("no cache is open")


def _closed() -> KernelError:
    return KernelError("the model has been closed")
