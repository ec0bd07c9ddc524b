# SPDX-License-Identifier: Apache-2.0
"""The decoder on llama.cpp's C API (llama-cpp-python): one model, one sequence, adapters by name.

A sequence that needs the other RoPE table, or more room, gets another context on the same loaded weights:
`ggml_model` says why. Which table a sequence needs is the session's to say.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

from .decoder_input import check_n_logits
from .errors import KernelError
from .ggml_model import (
    ABORT,
    BATCH,
    KV_BYTES,
    KV_TYPES,
    Calls,
    GgmlContext,
    GgmlModel,
    GgmlOptions,
    Run,
    check_finite,
)
from .gguf_check import AdapterFile
from .parts import Float32, Span
from .spec import RopeTable, TextSpec

__all__ = ["KV_BYTES", "KV_TYPES", "GgmlDecoder", "GgmlOptions"]


class GgmlDecoder:
    """See `decoder.Decoder`."""

    def __init__(
        self,
        model_path: Path,
        spec: TextSpec,
        adapters: Mapping[str, AdapterFile],
        options: GgmlOptions,
        *,
        foreign: bool = False,
    ) -> None:
        """Load the weights. Arguments and errors are those of `GgmlModel`."""
        self._context: GgmlContext | None = None
        self._options = options
        self._table: RopeTable = "short"
        self._length = self._capacity = 0
        # C code cannot be interrupted by a Python signal, so it runs on a thread of its own while the
        # caller waits and may ask it to stop.
        self._abort: set[int] = set()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="pocketphi-decoder")
        self._pending: Future[Any] | None = None
        calls = Calls(self._call, self._abort)
        self._model = GgmlModel(model_path, spec, adapters, options, calls, foreign=foreign)
        self.vocab: Any = self._model.vocab  # llama_vocab *, for grammars

    @property
    def spec(self) -> TextSpec:
        """The decoder's shape."""
        return self._model.spec

    @property
    def adapters(self) -> Collection[str]:
        """Names that `open` accepts beside None."""
        return self._model.adapters

    @property
    def adapter(self) -> str | None:
        """The adapter of the open cache."""
        return None if self._context is None else self._context.adapter

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
        return self._model.resident_adapters

    def open(self, *, table: RopeTable, capacity: int, adapter: str | None) -> None:
        """See `decoder.Decoder.open`."""
        self._model.check_adapter(adapter)
        self._new_context(table, self._size(table, capacity, 0)).set_adapter(adapter, 0)

    def grow(self, capacity: int) -> None:
        """See `decoder.Decoder.grow`."""
        if capacity <= self._capacity:
            return
        length, adapter = self._length, self.adapter
        size = self._size(self._table, capacity, length)  # nothing is copied for what is refused
        state = self._saved()
        self._new_context(self._table, size).set_adapter(adapter, 0)
        self._restore(state, length)

    def feed(self, span: Span) -> Float32:
        """See `decoder.Decoder.feed`."""
        last: Float32 = self.feed_each(span, 1)[0]
        return last

    def feed_each(self, span: Span, n: int) -> Float32:
        """See `decoder.Decoder.feed_each`."""
        rows, before = self._model.checked(span, self._length, self._capacity), self._length
        check_n_logits(n, len(rows))
        context = self._opened()
        logits = np.empty((n, self.spec.vocab_size), np.float32)
        done = 0
        try:
            with self._options.observer or contextlib.nullcontext():
                for start in range(0, len(rows), BATCH):
                    part = rows[start : start + BATCH]
                    wanted = max(0, start + len(part) - (len(rows) - n) - done)
                    found = context.decode(part, [Run(0, self._length, len(part), max(wanted, 1))])
                    self._length += len(part)
                    if wanted:
                        logits[done : done + wanted] = check_finite(found)
                        done += wanted
        except BaseException:
            self.rewind(before)
            raise
        return logits

    def rewind(self, length: int) -> None:
        """See `decoder.Decoder.rewind`."""
        self._opened().cut(0, length)
        self._length = min(self._length, length)

    def save_state(self) -> bytes:
        """See `decoder.Decoder.save_state`."""
        return bytes(self._saved())

    def load_state(self, state: bytes, length: int) -> None:
        """See `decoder.Decoder.load_state`."""
        self._restore((ctypes.c_uint8 * len(state)).from_buffer_copy(state), length)

    def _saved(self) -> Any:
        return self._opened().saved(0)

    def _restore(self, state: Any, length: int) -> None:
        self._length = 0
        self._opened().restore(0, state, length)
        self._length = length

    def close(self) -> None:
        """See `decoder.Decoder.close`."""
        self._settle()
        if self._context is not None:
            self._context.close()
            self._context = None
        self._model.close()
        self._worker.shutdown()

    def _opened(self) -> GgmlContext:
        if self._context is None:
            raise KernelError("no cache is open")
        return self._context

    def _size(self, table: RopeTable, capacity: int, copied: int) -> int:
        """How many tokens llama.cpp makes room for, if there is the memory for it."""
        size = self._model.room(table, capacity)
        if self._options.before_cache is not None:
            self._options.before_cache(self._capacity, size, copied)
        return size

    def _new_context(self, table: RopeTable, size: int) -> GgmlContext:
        """Replace the context with an empty one of `size` tokens."""
        if self._context is not None:
            self._context.close()
            self._context = None
        self._length = self._capacity = 0
        self._context = GgmlContext(self._model, size)
        self._table, self._capacity = table, size
        return self._context

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run C code on the worker thread, where no Python signal handler can cut into its callbacks.

        An interrupt asks a decode to stop, and goes on when the C code has returned.
        """
        self._settle()
        self._pending = self._worker.submit(function, *arguments)
        try:
            return self._pending.result()
        except BaseException:
            self._settle()
            raise

    def _settle(self) -> None:
        """Stop C code that still runs and wait for it; more interrupts change nothing.

        Called again before the next call, in case one came between two of these lines.
        """
        while self._pending is not None and not self._pending.done():
            with contextlib.suppress(KeyboardInterrupt):
                self._abort.add(ABORT)
                wait([self._pending])
        self._abort.clear()
