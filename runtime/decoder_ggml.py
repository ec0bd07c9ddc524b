# SPDX-License-Identifier: Apache-2.0
"""The decoder on llama.cpp's C API (llama-cpp-python): one model, one sequence, adapters by name.

llama.cpp chooses the LongRoPE table from the *allocated* context: more than `original_context` tokens
means long. So the short table gets a context of at most that size and the long one a larger context,
on the same loaded weights. Which one a sequence needs is the session's to say.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from . import ggml_plugin
from .errors import BundleError, InputError, KernelError
from .ggml_log import ENGINE_LOG
from .ggml_observer import MatmulObserver
from .gguf_check import AdapterFile, read_adapter, read_model
from .parts import EmbedSpan, Float32, Span
from .spec import RopeTable, TextSpec
from .threads import default_threads

_CELLS = 256  # llama.cpp rounds a context's size up to a multiple of this
_BATCH = 512  # tokens in one forward pass; llama.cpp's default
_ABORT = 1  # what the abort callback looks for

KV_TYPES: Mapping[str, int] = {"f32": 0, "f16": 1, "q8_0": 8, "q4_0": 2}
"""KV cache types by name, with their ggml_type."""

KV_BYTES = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}  # of one value


@dataclass(frozen=True, slots=True)
class GgmlOptions:
    """How to run: only `kv_type` changes what is computed. InputError: out of range, or not in this build."""

    n_threads: int | None = None  # None: the physical cores this process may use
    n_gpu_layers: int = 0  # -1: all; needs a build with a GPU backend
    kv_type: str = "f16"
    observer: MatmulObserver | None = None  # of what is fed
    # Told for how many tokens there is a cache, will be one, and how many are copied; may refuse.
    before_cache: Callable[[int, int, int], None] | None = None

    def __post_init__(self) -> None:
        if self.kv_type not in KV_TYPES:
            raise InputError(f"KV type is {self.kv_type!r}, expected one of {', '.join(KV_TYPES)}")
        if self.n_threads is not None and not 1 <= self.n_threads <= 512:
            raise InputError(f"threads is {self.n_threads}, expected 1 to 512")
        if self.n_gpu_layers != 0 and not llama_cpp.llama_supports_gpu_offload():
            raise InputError(
                f"GPU layers is {self.n_gpu_layers}, but this build of llama-cpp-python has no GPU backend"
            )


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
        """Load the weights; contexts and adapters come when they are first needed.

        Args:
            model_path: the backbone GGUF.
            spec: what the bundle says the model is; checked against the file.
            adapters: by name; each file is checked when it is first needed.
            options: threads, GPU layers and the KV type.
            foreign: the files are not from a model directory, `spec` is what the backbone says itself.

        Raises:
            BundleError: the file is no model, or not the one that `spec` describes.
        """
        self._model: Any = None
        self._context: Any = None
        self._spec, self._options, self._foreign = spec, options, foreign
        self._files = dict(adapters)
        self._header = read_model(model_path, None if foreign else spec)
        self._loras: dict[str, Any] = {}
        self._adapter: str | None = None
        self._table: RopeTable = "short"
        self._length = self._capacity = 0
        # C code cannot be interrupted by a Python signal, so it runs on a thread of its own while the
        # caller waits and may ask it to stop. A set's own method as callback runs no Python bytecode.
        self._abort: set[int] = set()
        self._abort_callback = llama_cpp.ggml_abort_callback(self._abort.__contains__)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="pocketphi-decoder")
        self._pending: Future[Any] | None = None
        self._rows: Any = None  # what the pending call reads
        self._call(ggml_plugin.load)
        llama_cpp.llama_backend_init()
        self._model = self._load(model_path)
        self.vocab: Any = llama_cpp.llama_model_get_vocab(self._model)  # llama_vocab *, for grammars

    @property
    def spec(self) -> TextSpec:
        """The decoder's shape."""
        return self._spec

    @property
    def adapters(self) -> Collection[str]:
        """Names that `open` accepts beside None."""
        return self._files.keys()

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
        return tuple(self._loras)

    def open(self, *, table: RopeTable, capacity: int, adapter: str | None) -> None:
        """See `decoder.Decoder.open`."""
        if adapter is not None and adapter not in self._files:
            known = ", ".join(self._files) or "none"
            raise InputError(f"adapter {adapter!r} is not in this model (it has: {known})")
        self._new_context(table, self._size(table, capacity, 0))
        if adapter is not None:
            self._load_adapter(adapter)
        self._set_adapter(adapter)

    def grow(self, capacity: int) -> None:
        """See `decoder.Decoder.grow`."""
        if capacity <= self._capacity:
            return
        length, adapter = self._length, self._adapter
        size = self._size(self._table, capacity, length)  # nothing is copied for what is refused
        state = self._saved()
        self._new_context(self._table, size)
        self._set_adapter(adapter)
        self._restore(state, length)

    def feed(self, span: Span) -> Float32:
        """See `decoder.Decoder.feed`."""
        last: Float32 = self.feed_each(span, 1)[0]
        return last

    def feed_each(self, span: Span, n: int) -> Float32:
        """See `decoder.Decoder.feed_each`."""
        rows, before = self._checked(span), self._length
        if not 1 <= n <= len(rows):
            raise KernelError(f"logits of {n} rows are asked for, expected 1 to {len(rows)}")
        logits = np.empty((n, self._spec.vocab_size), np.float32)
        done = 0
        try:
            with self._options.observer or contextlib.nullcontext():
                for start in range(0, len(rows), _BATCH):
                    part = rows[start : start + _BATCH]
                    wanted = max(0, start + len(part) - (len(rows) - n) - done)
                    self._decode(part, max(wanted, 1))
                    if wanted:
                        logits[done : done + wanted] = self._logits(wanted)
                        done += wanted
        except BaseException:
            self.rewind(before)
            raise
        return logits

    def rewind(self, length: int) -> None:
        """See `decoder.Decoder.rewind`."""
        memory = llama_cpp.llama_get_memory(self._context)
        if length == 0:
            self._call(llama_cpp.llama_memory_clear, memory, False)
        elif not self._call(llama_cpp.llama_memory_seq_rm, memory, 0, length, -1):
            raise KernelError(f"llama.cpp could not rewind the cache to {length} tokens")
        self._length = min(self._length, length)

    def save_state(self) -> bytes:
        """See `decoder.Decoder.save_state`."""
        return bytes(self._saved())

    def load_state(self, state: bytes, length: int) -> None:
        """See `decoder.Decoder.load_state`."""
        self._restore((ctypes.c_uint8 * len(state)).from_buffer_copy(state), length)

    def _saved(self) -> Any:
        """The cache's tokens, in one copy: uint8 [n]."""
        size = llama_cpp.llama_state_seq_get_size(self._context, 0)
        buffer = (ctypes.c_uint8 * size)()
        written = self._call(llama_cpp.llama_state_seq_get_data, self._context, buffer, size, 0)
        if written == 0:
            raise KernelError("llama.cpp could not save the cache")
        return (ctypes.c_uint8 * written).from_buffer(buffer)

    def _restore(self, state: Any, length: int) -> None:
        self.rewind(0)
        done = self._call(llama_cpp.llama_state_seq_set_data, self._context, state, len(state), 0)
        memory = llama_cpp.llama_get_memory(self._context)
        if done == 0 or llama_cpp.llama_memory_seq_pos_max(memory, 0) != length - 1:
            self.rewind(0)
            raise KernelError(f"llama.cpp refused a saved cache of {length} tokens")
        self._length = length

    def close(self) -> None:
        """See `decoder.Decoder.close`."""
        if self._model is not None:
            self._settle()
        if self._context is not None:
            llama_cpp.llama_free(self._context)
            self._context = None
        if self._model is not None:
            llama_cpp.llama_model_free(self._model)  # frees its adapters too
            self._model = None
            self._loras.clear()
            self._worker.shutdown()

    def _load(self, path: Path) -> Any:
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = self._options.n_gpu_layers
        ENGINE_LOG.forget()
        model = self._call(llama_cpp.llama_model_load_from_file, os.fsencode(path), params)
        if not model:
            raise BundleError(f"{path}: llama.cpp cannot load it: {ENGINE_LOG.reason}")
        return model

    def _size(self, table: RopeTable, capacity: int, copied: int) -> int:
        """How many tokens llama.cpp makes room for, if there is the memory for it."""
        rope = self._spec.rope
        size = -(-max(capacity, 1) // _CELLS) * _CELLS
        if rope.is_long_rope and table == "long":
            size = max(size, -(-(rope.original_context + 1) // _CELLS) * _CELLS)
        elif rope.is_long_rope and size > rope.original_context:
            raise KernelError(
                f"llama.cpp cannot hold {capacity} tokens with the short RoPE table: it rounds up to {size}, "
                f"more than the {rope.original_context} the table serves"
            )
        if self._options.before_cache is not None:
            self._options.before_cache(self._capacity, size, copied)
        return size

    def _new_context(self, table: RopeTable, size: int) -> None:
        """Replace the context with an empty one of `size` tokens."""
        if self._context is not None:
            llama_cpp.llama_free(self._context)
            self._context = None
        self._length = self._capacity = 0
        ENGINE_LOG.forget()
        self._context = self._call(llama_cpp.llama_init_from_model, self._model, self._context_params(size))
        if not self._context:
            gib = size * self._spec.kv_values_per_token * KV_BYTES[self._options.kv_type] / 2**30
            raise KernelError(
                f"llama.cpp could not make a context of {size} tokens (its cache takes {gib:.1f} GiB): "
                f"{ENGINE_LOG.reason}"
            )
        llama_cpp.llama_set_abort_callback(self._context, self._abort_callback, ctypes.c_void_p(_ABORT))
        self._table, self._capacity, self._adapter = table, size, None

    def _context_params(self, size: int) -> Any:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = size, min(_BATCH, size), min(_BATCH, size)
        params.n_seq_max = 1
        params.n_threads = params.n_threads_batch = self._options.n_threads or default_threads()
        params.type_k = params.type_v = KV_TYPES[self._options.kv_type]
        # llama.cpp reads a quantized V with flash attention only, and its flash attention casts a float32
        # K and V to float16: on phi4-nano that costs 2e-3 in the logits where the plain path is off by 9e-6.
        # Left alone, llama.cpp would turn it off because our plug-in is no layer's device.
        if self._options.kv_type == "f32":
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        elif self._options.kv_type.startswith("q") or self._options.n_gpu_layers == 0:
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        if self._options.observer is not None:
            params.cb_eval = self._options.observer.callback
        params.no_perf = True
        return params

    def _load_adapter(self, name: str) -> None:
        """Load an adapter once, and show that it changes the logits: one that does nothing is an error."""
        if name in self._loras:
            return
        path = self._files[name].path
        read_adapter(self._files[name], None if self._foreign else name, self._header)
        ENGINE_LOG.forget()
        lora = self._call(llama_cpp.llama_adapter_lora_init, self._model, os.fsencode(path))
        if not lora:
            raise BundleError(f"{path}: llama.cpp cannot load this adapter: {ENGINE_LOG.reason}")
        self._loras[name] = lora
        logits = []
        for adapter in (None, name):
            self._set_adapter(adapter)
            self._decode(np.zeros(1, np.int32), 1)
            logits.append(self._logits(1).copy())
            self.rewind(0)
        if np.array_equal(logits[0], logits[1]):
            del self._loras[name]
            raise KernelError(f"{path}: the {name} adapter was loaded but does not change the logits")

    def _set_adapter(self, name: str | None) -> None:
        wanted = [] if name is None else [self._loras[name]]
        loras: Any = (llama_cpp.llama_adapter_lora_p_ctypes * len(wanted))(*wanted)
        scales = (ctypes.c_float * len(wanted))(*[1.0] * len(wanted))
        if llama_cpp.llama_set_adapters_lora(self._context, loras, len(wanted), scales) != 0:
            raise KernelError(f"llama.cpp could not set adapter {name or 'none'}")
        self._adapter = name

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
                self._abort.add(_ABORT)
                wait([self._pending])
        self._abort.clear()

    def _checked(self, span: Span) -> Any:
        """A span as `_decode` takes it: int32 [n] ids or float32 [n, d_model] embeddings."""
        n = len(span)
        if n == 0 or self._length + n > self._capacity:
            raise KernelError(f"{n} tokens after {self._length} do not fit a cache of {self._capacity}")
        if isinstance(span, EmbedSpan):
            if span.rows.shape[1:] != (self._spec.d_model,):
                raise KernelError(
                    f"embeddings have shape {list(span.rows.shape)}, expected [n, {self._spec.d_model}]"
                )
            return np.ascontiguousarray(span.rows, np.float32)
        ids = np.ascontiguousarray(span.ids, np.int32)
        if ids.min() < 0 or ids.max() >= self._spec.vocab_size:
            raise InputError(f"token ids must be from 0 to {self._spec.vocab_size - 1}")
        return ids

    def _logits(self, n: int) -> Float32:
        """The logits that the last pass kept, float32 [n, vocab_size]: the next pass overwrites them."""
        rows: Any = llama_cpp.llama_get_logits(self._context)
        found: Float32 = np.ctypeslib.as_array(rows, (n, self._spec.vocab_size))
        if not np.isfinite(found).all():
            raise KernelError("llama.cpp gave logits that are not finite: weights or adapter are damaged")
        return found

    def _decode(self, rows: Any, n_logits: int) -> None:
        """One forward pass: int32 [n] ids or float32 [n, d_model] embeddings, n <= _BATCH.

        The logits of the last `n_logits` rows are kept.
        """
        kept = np.zeros(len(rows), np.int8)
        kept[-n_logits:] = 1
        self._rows = rows, kept
        batch = llama_cpp.llama_batch(n_tokens=len(rows))
        # Positions and the sequence are what NULL pointers mean; so is "logits of the last token only".
        if rows.dtype == np.int32:
            batch.token = rows.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token))
        else:
            batch.embd = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        if n_logits > 1:
            flags: Any = kept.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
            batch.logits = flags
        ENGINE_LOG.forget()
        status = self._call(llama_cpp.llama_decode, self._context, batch)
        if status != 0:
            raise KernelError(
                f"llama.cpp could not decode {len(rows)} tokens: status {status}, {ENGINE_LOG.reason}"
            )
        self._length += len(rows)
