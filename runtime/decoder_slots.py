# SPDX-License-Identifier: Apache-2.0
"""Several decoders on one loaded model, whose rows are computed together: continuous batching.

Each slot is a `decoder.Decoder` for a thread of its own, with a sequence of its own; `slot_worker` joins what
they are given to read.

A slot that is alone computes what a `GgmlDecoder` computes, bit for bit, whatever the others hold. Rows that
are computed together differ from that by rounding: in another order of summing, and, with a cache that is not
f32, because llama.cpp's own attention runs where a pass has several sequences: our plug-in's takes one.
Measured on phi4-nano's logits, 300 tokens and 40 steps of four slots: 2e-5 with F32 and an f32 cache; 0.15
with an f16 cache, where stock kernels alone give 0.04.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .decoder_input import check_n_logits
from .errors import InputError, KernelError
from .ggml_model import CELLS, GgmlModel, GgmlOptions
from .gguf_check import AdapterFile
from .parts import Float32, Span
from .slot_worker import Feed, Lane, SlotWorker
from .spec import RopeTable, TextSpec

MAX_SLOTS = 64


class SlotPool:
    """A model and its slots. Its methods may be called on any thread."""

    def __init__(
        self, model_path: Path, spec: TextSpec, adapters: Mapping[str, AdapterFile], options: GgmlOptions, *,
        n_slots: int, capacity: int, foreign: bool = False,
    ) -> None:  # fmt: skip
        """Load the weights. Caches are made when a slot first needs one, for all slots at once.

        Args:
            model_path: as for `GgmlModel`, and so are the next three.
            spec: what the bundle says the model is.
            adapters: by name.
            options: threads, GPU layers and the KV type.
            n_slots: 1 to MAX_SLOTS.
            capacity: tokens that each slot has room for, at least; memory is taken for all of them. A
                sequence with the short RoPE table has at most what that serves.
            foreign: as for `GgmlModel`.

        Raises:
            InputError: a number out of range.
            BundleError: the file is no model, or not the one that `spec` describes.
        """
        if not 1 <= n_slots <= MAX_SLOTS:
            raise InputError(f"slots is {n_slots}, expected 1 to {MAX_SLOTS}")
        if not 1 <= capacity <= spec.context_length:
            raise InputError(f"a slot's context is {capacity} tokens, expected 1 to {spec.context_length}")
        self._worker = SlotWorker(
            lambda calls: GgmlModel(model_path, spec, adapters, options, calls, foreign=foreign), n_slots
        )
        self._slots = tuple(Slot(self._worker, i, capacity) for i in range(n_slots))

    def __len__(self) -> int:
        """How many slots there are."""
        return len(self._slots)

    def slot(self, i: int) -> Slot:
        """Slot 0 to len - 1. Use the lowest: llama.cpp joins the rows of neighbours only."""
        return self._slots[i]

    @property
    def passes(self) -> tuple[int, int]:
        """How many forward passes there have been, and of how many rows in all."""
        return self._worker.passes, self._worker.rows

    def close(self) -> None:
        """Stop what runs and give back memory; a slot that waits gets a KernelError. Safe to call twice."""
        self._worker.close()


class Slot:
    """See `decoder.Decoder`. For one thread at a time; `cancel` is for others."""

    def __init__(self, worker: SlotWorker, number: int, capacity: int) -> None:
        """Slots come from `SlotPool.slot`."""
        self._worker, self._number, self._most = worker, number, capacity
        self.vocab: Any = worker.model.vocab  # llama_vocab *, for grammars
        self._lane: Lane | None = None
        self._adapter: str | None = None
        self._table: RopeTable = "short"
        self._length = self._capacity = 0
        self._pending: Feed | None = None

    @property
    def spec(self) -> TextSpec:
        """The decoder's shape."""
        return self._worker.model.spec

    @property
    def adapters(self) -> Collection[str]:
        """Names that `open` accepts beside None."""
        return self._worker.model.adapters

    @property
    def adapter(self) -> str | None:
        """The adapter of the open cache."""
        return self._adapter

    @property
    def table(self) -> RopeTable:
        """The RoPE table of the open cache."""
        return self._table

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._length

    @property
    def capacity(self) -> int:
        """Tokens the cache has room for."""
        return self._capacity

    @property
    def resident_adapters(self) -> tuple[str, ...]:
        """Adapters whose weights are in memory."""
        return self._worker.model.resident_adapters

    def open(self, *, table: RopeTable, capacity: int, adapter: str | None) -> None:
        """See `decoder.Decoder.open`; `capacity` is what every slot has."""
        self._worker.model.check_adapter(adapter)
        room = self._room(table, capacity)
        self.cancel()
        self._lane, self._length, self._capacity = None, 0, 0
        lane = self._worker.call(self._worker.enter, self._number, table, room, adapter)
        self._lane, self._table, self._adapter, self._capacity = lane, table, adapter, room

    def grow(self, capacity: int) -> None:
        """See `decoder.Decoder.grow`. InputError: more than a slot has."""
        self._opened()
        self._room(self._table, capacity)

    def feed(self, span: Span) -> Float32:
        """See `decoder.Decoder.feed`."""
        last: Float32 = self.feed_each(span, 1)[0]
        return last

    def feed_each(self, span: Span, n: int) -> Float32:
        """See `decoder.Decoder.feed_each`.

        Raises:
            concurrent.futures.CancelledError: by `cancel`. As after every exception, nothing was appended.
        """
        lane = self._opened()
        rows = self._worker.model.checked(span, self._length, self._capacity)
        check_n_logits(n, len(rows))
        logits = np.empty((n, self.spec.vocab_size), np.float32)
        self._pending = Feed(self._number, lane, self._adapter, rows, self._length, logits)
        try:
            found = self._worker.read(self._pending)
        finally:
            self._pending = None
        self._length += len(rows)
        return found

    def cancel(self) -> None:
        """End the `feed` that another thread is in, if there is one; what comes later is not touched."""
        pending = self._pending
        if pending is not None:
            self._worker.take_back(pending)

    def rewind(self, length: int) -> None:
        """See `decoder.Decoder.rewind`."""
        self._opened()
        self._length = min(self._length, length)

    def save_state(self) -> bytes:
        """See `decoder.Decoder.save_state`."""
        state: bytes = self._worker.call(self._worker.save, self._opened(), self._number, self._length)
        return state

    def load_state(self, state: bytes, length: int) -> None:
        """See `decoder.Decoder.load_state`."""
        lane, self._length = self._opened(), 0
        copy = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        self._worker.call(self._worker.load, lane, self._number, copy, length)
        self._length = length

    def close(self) -> None:
        """Give back the cache, with its memory where no other slot needs it. The slot can be opened again."""
        self.cancel()
        self._lane, self._length, self._capacity = None, 0, 0
        with contextlib.suppress(KernelError):  # the pool has been closed
            self._worker.call(self._worker.leave, self._number)

    def _opened(self) -> Lane:
        if self._lane is None:
            raise KernelError("no cache is open")
        return self._lane

    def _room(self, table: RopeTable, capacity: int) -> int:
        """How many tokens a slot has room for with this table, if those asked for are not more."""
        model, rope, most = self._worker.model, self.spec.rope, self._most
        model.room(table, capacity)  # is it too much for the table?
        if table == "short" and rope.is_long_rope:
            most = min(most, rope.original_context // CELLS * CELLS)
        room = model.room(table, most)
        if capacity > room:
            raise InputError(f"{capacity} tokens are asked for, a slot has room for {room}")
        return room
