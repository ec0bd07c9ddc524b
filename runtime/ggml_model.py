# SPDX-License-Identifier: Apache-2.0
"""A backbone that llama.cpp has loaded: its adapters by name, and contexts of one or several sequences.

llama.cpp chooses the LongRoPE table from the room that a sequence is *allocated*: more than
`original_context` tokens means long. So the short table gets at most that and the long one more, on the
same loaded weights. Sequences of one context have room of their own each, and nothing to do with the others.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from . import ggml_plugin
from .decoder_input import check_adapter, check_threads, checked_rows
from .errors import BundleError, InputError, KernelError
from .ggml_log import ENGINE_LOG
from .ggml_observer import MatmulObserver
from .gguf_check import AdapterFile, read_adapter, read_model
from .parts import Float32, Int32, Span
from .spec import RopeTable, TextSpec
from .threads import default_threads

CELLS = 256  # llama.cpp rounds a sequence's room up to a multiple of this
BATCH = 512  # tokens in one forward pass; llama.cpp's default
ABORT = 1  # what the abort callback looks for

KV_TYPES: Mapping[str, int] = {"f32": 0, "f16": 1, "q8_0": 8, "q4_0": 2}
"""KV cache types by name, with their ggml_type."""

KV_BYTES = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}  # of one value

Rows = Int32 | Float32  # int32 [n] token ids, or float32 [n, d_model] embeddings

_ABORTED = 2  # what llama_decode returns when the abort callback has stopped it


class Aborted(KernelError):
    """A pass was stopped on request."""


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
        check_threads(self.n_threads)
        if self.n_gpu_layers != 0 and not llama_cpp.llama_supports_gpu_offload():
            raise InputError(
                f"GPU layers is {self.n_gpu_layers}, but this build of llama-cpp-python has no GPU backend"
            )


@dataclass(frozen=True, slots=True)
class Calls:
    """How C code that takes long is called: on which thread, and what asks it to stop."""

    run: Callable[..., Any]  # a function with its arguments
    abort: set[int]  # holds ABORT while a pass is to stop


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive rows of one sequence in a pass."""

    sequence: int
    start: int  # position of the first row: the tokens that the sequence holds already
    n: int  # rows, at least 1
    n_logits: int  # of its last rows


class GgmlModel:
    """The weights, and adapters once they are needed. One thread at a time."""

    def __init__(
        self,
        path: Path,
        spec: TextSpec,
        adapters: Mapping[str, AdapterFile],
        options: GgmlOptions,
        calls: Calls,
        *,
        foreign: bool = False,
    ) -> None:
        """Load the weights; contexts and adapters come when they are first needed.

        Args:
            path: the backbone GGUF.
            spec: what the bundle says the model is; checked against the file.
            adapters: by name; each file is checked when it is first needed.
            options: threads, GPU layers and the KV type.
            calls: how C code is called.
            foreign: the files are not from a model directory, `spec` is what the backbone says itself.

        Raises:
            BundleError: the file is no model, or not the one that `spec` describes.
        """
        self.handle: Any = None
        self.spec, self.options, self.calls, self._foreign = spec, options, calls, foreign
        self._files = dict(adapters)
        self._header = read_model(path, None if foreign else spec)
        self._loras: dict[str, Any] = {}
        # A set's own method as callback runs no Python bytecode, so no signal handler.
        self.abort_callback = llama_cpp.ggml_abort_callback(calls.abort.__contains__)
        calls.run(ggml_plugin.load)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = options.n_gpu_layers
        ENGINE_LOG.forget()
        self.handle = calls.run(llama_cpp.llama_model_load_from_file, os.fsencode(path), params)
        if not self.handle:
            raise BundleError(f"{path}: llama.cpp cannot load it: {ENGINE_LOG.reason}")
        self.vocab: Any = llama_cpp.llama_model_get_vocab(self.handle)  # llama_vocab *, for grammars

    @property
    def adapters(self) -> Collection[str]:
        """Names of the adapters there are."""
        return self._files.keys()

    @property
    def resident_adapters(self) -> tuple[str, ...]:
        """Adapters whose weights are in memory."""
        return tuple(self._loras)

    def check_adapter(self, name: str | None) -> None:
        """InputError: there is no such adapter."""
        check_adapter(name, self._files)

    def room(self, table: RopeTable, capacity: int) -> int:
        """How many tokens llama.cpp makes room for, to have it for `capacity` in a sequence with this table.

        Raises:
            KernelError: more than the short table serves.
        """
        rope = self.spec.rope
        size = -(-max(capacity, 1) // CELLS) * CELLS
        if rope.is_long_rope and table == "long":
            size = max(size, -(-(rope.original_context + 1) // CELLS) * CELLS)
        elif rope.is_long_rope and size > rope.original_context:
            raise KernelError(
                f"llama.cpp cannot hold {capacity} tokens with the short RoPE table: it rounds up to {size}, "
                f"more than the {rope.original_context} the table serves"
            )
        return size

    def checked(self, span: Span, length: int, capacity: int) -> Rows:
        """A span as a pass takes it, when it follows `length` tokens in room for `capacity`.

        Raises:
            KernelError: it does not fit, or has rows of another width.
            InputError: an id that is none.
        """
        return checked_rows(span, self.spec, length=length, capacity=capacity, ids=np.int32)

    def lora(self, name: str, acts: Callable[[Any], bool]) -> Any:
        """An adapter's handle, which is loaded once, and shown to change the logits.

        Args:
            name: of `adapters`.
            acts: whether the logits of a token are others with this adapter.

        Raises:
            BundleError: the file is no adapter of this model.
            KernelError: it does nothing.
        """
        if name in self._loras:
            return self._loras[name]
        path = self._files[name].path
        read_adapter(self._files[name], None if self._foreign else name, self._header)
        ENGINE_LOG.forget()
        lora = self.calls.run(llama_cpp.llama_adapter_lora_init, self.handle, os.fsencode(path))
        if not lora:
            raise BundleError(f"{path}: llama.cpp cannot load this adapter: {ENGINE_LOG.reason}")
        if not acts(lora):
            raise KernelError(f"{path}: the {name} adapter was loaded but does not change the logits")
        self._loras[name] = lora
        return lora

    def close(self) -> None:
        """Free the weights and adapters, after every context. Safe to call twice."""
        if self.handle is not None:
            llama_cpp.llama_model_free(self.handle)
            self.handle = None
            self._loras.clear()


class GgmlContext:
    """Sequences 0 to n - 1 and their KV caches, each with room for `size` tokens of one RoPE table."""

    def __init__(self, model: GgmlModel, size: int, n_sequences: int = 1) -> None:
        """`size`: as `GgmlModel.room` gives it, which makes the table. KernelError: there is no memory."""
        self._model, self._run = model, model.calls.run
        self.adapter: str | None = None  # that the next pass goes through
        self._kept: Any = None  # what the last pass was given: C code reads it
        ENGINE_LOG.forget()
        params = _params(model.options, size, n_sequences)
        self._handle = self._run(llama_cpp.llama_init_from_model, model.handle, params)
        if not self._handle:
            values = size * n_sequences * model.spec.kv_values_per_token
            gib = values * KV_BYTES[model.options.kv_type] / 2**30
            raise KernelError(
                f"llama.cpp could not make a context of {size * n_sequences} tokens (its cache takes "
                f"{gib:.1f} GiB): {ENGINE_LOG.reason}"
            )
        llama_cpp.llama_set_abort_callback(self._handle, model.abort_callback, ctypes.c_void_p(ABORT))
        self._memory = llama_cpp.llama_get_memory(self._handle)
        ids = np.arange(n_sequences, dtype=np.int32)
        self._ids = ids, ids.ctypes.data + ids.itemsize * np.arange(n_sequences, dtype=np.uint64)

    def set_adapter(self, name: str | None, empty: int) -> None:
        """Let the next passes go through an adapter of the model, or none.

        `empty`: a sequence without tokens, to try the adapter on where it has to be loaded.
        """
        self._set(None if name is None else self._model.lora(name, lambda lora: self._acts(lora, empty)))
        self.adapter = name

    def decode(self, rows: Rows, runs: Sequence[Run]) -> Float32:
        """One forward pass.

        Args:
            rows: of all runs, one after another; at most BATCH.
            runs: of different sequences, in the order of these: llama.cpp joins neighbours only.

        Returns:
            float32 [sum of n_logits, vocab_size], in the order of the rows. The next pass overwrites them.

        Raises:
            KernelError: llama.cpp failed.
            Aborted: it was asked to stop. After either a sequence may hold some of its rows.
        """
        batch = self._batch(rows, runs)
        ENGINE_LOG.forget()
        status = self._run(llama_cpp.llama_decode, self._handle, batch)
        if status == _ABORTED:
            raise Aborted("llama.cpp was asked to stop")
        if status != 0:
            raise KernelError(
                f"llama.cpp could not decode {len(rows)} tokens: status {status}, {ENGINE_LOG.reason}"
            )
        n = sum(run.n_logits for run in runs)
        found: Any = llama_cpp.llama_get_logits(self._handle)
        return np.ctypeslib.as_array(found, (n, self._model.spec.vocab_size))

    def cut(self, sequence: int, length: int) -> None:
        """Drop everything of a sequence after its first `length` tokens."""
        if not self._run(llama_cpp.llama_memory_seq_rm, self._memory, sequence, length, -1):
            raise KernelError(f"llama.cpp could not rewind the cache to {length} tokens")

    def saved(self, sequence: int) -> Any:
        """The sequence's tokens, in one copy: uint8 [n]."""
        size = llama_cpp.llama_state_seq_get_size(self._handle, sequence)
        buffer = (ctypes.c_uint8 * size)()
        written = self._run(llama_cpp.llama_state_seq_get_data, self._handle, buffer, size, sequence)
        if written == 0:
            raise KernelError("llama.cpp could not save the cache")
        return (ctypes.c_uint8 * written).from_buffer(buffer)

    def restore(self, sequence: int, state: Any, length: int) -> None:
        """Replace a sequence's tokens with what `saved` gave; KernelError leaves it without any."""
        self.cut(sequence, 0)
        done = self._run(llama_cpp.llama_state_seq_set_data, self._handle, state, len(state), sequence)
        if done == 0 or llama_cpp.llama_memory_seq_pos_max(self._memory, sequence) != length - 1:
            self.cut(sequence, 0)
            raise KernelError(f"llama.cpp refused a saved cache of {length} tokens")

    def close(self) -> None:
        """Give back memory. Safe to call twice."""
        if self._handle is not None:
            llama_cpp.llama_free(self._handle)
            self._handle = None

    def _set(self, lora: Any) -> None:
        wanted = [] if lora is None else [lora]
        loras: Any = (llama_cpp.llama_adapter_lora_p_ctypes * len(wanted))(*wanted)
        scales = (ctypes.c_float * len(wanted))(*[1.0] * len(wanted))
        if llama_cpp.llama_set_adapters_lora(self._handle, loras, len(wanted), scales) != 0:
            raise KernelError("llama.cpp could not set the adapter")

    def _acts(self, lora: Any, empty: int) -> bool:
        logits = []
        try:
            for one in (None, lora):
                self._set(one)
                found = self.decode(np.zeros(1, np.int32), [Run(empty, 0, 1, 1)])
                logits.append(check_finite(found).copy())
                self.cut(empty, 0)
        finally:
            self.adapter = None
            self._set(None)
        return not np.array_equal(logits[0], logits[1])

    def _batch(self, rows: Rows, runs: Sequence[Run]) -> Any:
        positions = np.concatenate([np.arange(run.start, run.start + run.n, dtype=np.int32) for run in runs])
        kept = np.concatenate([np.arange(run.n) >= run.n - run.n_logits for run in runs]).astype(np.int8)
        one_each = np.ones(len(rows), np.int32)
        owners = np.repeat(self._ids[1][[run.sequence for run in runs]], [run.n for run in runs])
        self._kept = rows, positions, kept, one_each, owners
        batch = llama_cpp.llama_batch(n_tokens=len(rows))
        if rows.dtype == np.int32:
            batch.token = _pointer(rows, ctypes.c_int32)
        else:
            batch.embd = _pointer(rows, ctypes.c_float)
        batch.pos, batch.n_seq_id = _pointer(positions, ctypes.c_int32), _pointer(one_each, ctypes.c_int32)
        batch.seq_id = _pointer(owners, ctypes.POINTER(ctypes.c_int32))
        batch.logits = _pointer(kept, ctypes.c_int8)
        return batch


def check_finite(logits: Float32) -> Float32:
    """The logits, if they are numbers."""
    if not np.isfinite(logits).all():
        raise KernelError("llama.cpp gave logits that are not finite: weights or adapter are damaged")
    return logits


def _pointer(array: npt.NDArray[Any], kind: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(kind))


def _params(options: GgmlOptions, size: int, n_sequences: int) -> Any:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_seq_max = size * n_sequences, n_sequences
    params.n_batch = params.n_ubatch = min(BATCH, size * n_sequences)
    params.n_threads = params.n_threads_batch = options.n_threads or default_threads()
    params.type_k = params.type_v = KV_TYPES[options.kv_type]
    # llama.cpp reads a quantized V with flash attention only, and its flash attention casts a float32
    # K and V to float16: on phi4-nano that costs 2e-3 in the logits where the plain path is off by 9e-6.
    # Left alone, llama.cpp would turn it off because our plug-in is no layer's device.
    if options.kv_type == "f32":
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    elif options.kv_type.startswith("q") or options.n_gpu_layers == 0:
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    if options.observer is not None:
        params.cb_eval = options.observer.callback
    params.no_perf = True
    return params
