# SPDX-License-Identifier: Apache-2.0
"""The decoder on ONNX Runtime: one model, one sequence, a KV cache that passes write where it lies.

Each layer's K and V are one buffer, bound both as the graph's past and as its present: GroupQueryAttention
then appends in place. Only what changes from pass to pass is bound anew: rows, mask and logits.

The graph chooses the LongRoPE table by the length of the mask, or by `rope_tokens` where that is more. So a
cache with the long table announces a long sequence from its first pass on, and one with the short table
never has room for more tokens than that table serves.

An adapter's matrices are inputs of the graph. They are bound like the rest: adapters of a RunOptions have
no effect on a run with bound inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import onnx_session
from .decoder_input import check_adapter, check_n_logits, check_threads, checked_rows
from .errors import InputError, KernelError
from .onnx_adapter_check import OnnxAdapter, read_adapter
from .onnx_cache import KvCache
from .onnx_check import check_backbone, decoder_ends, embedding_ends, rope_tables
from .parts import Float32, Span
from .spec import RopeTable, TextSpec
from .threads import default_threads

_CELLS = 256  # tokens; a cache's size is a multiple of this, as llama.cpp's
_BATCH = 512  # tokens in one forward pass
_SCORES = 1 << 26  # float32 numbers, 256 MiB: queries times keys of all heads, which attention holds at once

KV_TYPES = ("f32",)
"""KV cache types by name: GroupQueryAttention's cache is of its queries' type."""


@dataclass(frozen=True, slots=True)
class OnnxOptions:
    """How to run; nothing here changes what is computed. InputError: out of range, or not in this build."""

    provider: str = "cpu"  # one of onnx_session.PROVIDERS
    n_threads: int | None = None  # None: the physical cores this process may use
    kv_type: str = "f32"
    # Told for how many tokens there is a cache, will be one, and how many are copied; may refuse.
    before_cache: Callable[[int, int, int], None] | None = None

    def __post_init__(self) -> None:
        if self.kv_type not in KV_TYPES:
            raise InputError(f"KV type is {self.kv_type[:40]!r}, the ONNX backbone's cache is {KV_TYPES[0]}")
        check_threads(self.n_threads)
        onnx_session.check_provider(self.provider)


class OnnxDecoder:
    """See `decoder.Decoder`."""

    def __init__(
        self,
        decoder_path: Path,
        embedding_path: Path,
        spec: TextSpec,
        adapters: Mapping[str, OnnxAdapter],
        options: OnnxOptions,
    ) -> None:
        """Load the graphs; the cache and adapters come when they are first needed.

        Args:
            decoder_path: embeddings to logits.
            embedding_path: token ids to embeddings.
            spec: what the bundle says the model is; checked against the graphs.
            adapters: by name; each file is checked when it is first needed.
            options: threads and the provider.

        Raises:
            BundleError: a graph is damaged, or not the one that `spec` describes.
            KernelError: ONNX Runtime cannot be loaded, or has too little memory.
        """
        self._spec, self._options, self._files = spec, options, dict(adapters)
        self._path = decoder_path
        self._loras: dict[str, dict[str, Any]] = {}  # OrtValues by the graph's input
        self._adapter: str | None = None
        self._table: RopeTable = "short"
        self._length = 0
        self._cache: KvCache | None = None
        # A run cannot be interrupted by a Python signal, so it has a thread of its own while the caller
        # waits and may ask it to stop.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="pocketphi-decoder")
        self._busy = False  # something may still run there
        self._closed = False
        quants = {a.quant for a in adapters.values()}
        ends = decoder_ends(spec, next(iter(quants), None))
        graph = check_backbone(decoder_path, *ends, rope_tables(spec))
        embedding = check_backbone(embedding_path, *embedding_ends(spec))
        n_threads = options.n_threads or default_threads()
        self._ort = onnx_session.library()
        self._run_options = self._ort.RunOptions()
        try:
            self._decoder = self._call(self._load, decoder_path, graph, n_threads, options.provider)
            self._embedding = self._call(self._load, embedding_path, embedding, 1, "cpu")
        except BaseException:
            self.close()
            raise
        self._binding = self._decoder.io_binding()
        self._n_logits, self._rope_tokens = np.ones(1, np.int64), np.zeros(1, np.int64)
        self._ones = np.ones(0, np.int64)

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
        return 0 if self._cache is None else self._cache.capacity

    @property
    def resident_adapters(self) -> tuple[str, ...]:
        """Adapters whose weights are in memory."""
        return tuple(self._loras)

    def open(self, *, table: RopeTable, capacity: int, adapter: str | None) -> None:
        """See `decoder.Decoder.open`."""
        check_adapter(adapter, self._files)
        self._settle()
        size = self._size(table, capacity, 0)
        self._length, self._table = 0, table
        try:
            if size != self.capacity:
                self._unbind()
                self._cache = None  # before the new one is made
                self._cache = self._new_cache(size)
            if adapter is not None and adapter not in self._loras:
                self._load_adapter(adapter)
            self._bind(adapter)
        except BaseException:
            self._unbind()
            self._cache = None
            raise

    def grow(self, capacity: int) -> None:
        """See `decoder.Decoder.grow`."""
        if self._cache is None or capacity <= self.capacity:
            return
        self._settle()
        size = self._size(self._table, capacity, self._length)  # nothing is copied for what is refused
        self._unbind()
        old, self._cache = self._cache, None
        with self._in_memory(size):
            self._cache = old.grown(size, self._length)
        self._bind(self._adapter)

    def feed(self, span: Span) -> Float32:
        """See `decoder.Decoder.feed`."""
        last: Float32 = self.feed_each(span, 1)[0]
        return last

    def feed_each(self, span: Span, n: int) -> Float32:
        """See `decoder.Decoder.feed_each`."""
        rows, before = self._checked(span), self._length
        check_n_logits(n, len(rows))
        logits = np.empty((n, self._spec.vocab_size), np.float32)
        unwanted: Float32 | None = None  # a pass gives one row at least
        done, step = 0, pass_rows(self._spec, self.capacity)
        try:
            for start in range(0, len(rows), step):
                part = rows[start : start + step]
                wanted = max(0, start + len(part) - (len(rows) - n) - done)
                if wanted:
                    self._decode(part, logits[done : done + wanted])
                    done += wanted
                else:
                    unwanted = np.empty((1, logits.shape[1]), np.float32) if unwanted is None else unwanted
                    self._decode(part, unwanted)
        except BaseException:
            self.rewind(before)
            raise
        return logits

    def rewind(self, length: int) -> None:
        """See `decoder.Decoder.rewind`."""
        self._length = min(self._length, length)

    def save_state(self) -> bytes:
        """See `decoder.Decoder.save_state`."""
        cache = self._opened()
        return b"".join(cache.read(i)[0, :, : self._length].tobytes() for i in range(cache.n))

    def load_state(self, state: bytes, length: int) -> None:
        """See `decoder.Decoder.load_state`."""
        cache = self._opened()
        self._length = 0
        if length > cache.capacity or len(state) != 4 * length * self._spec.kv_values_per_token:
            raise KernelError(f"a saved cache of {len(state)} bytes is refused: {length} tokens need another")
        shape = (1, self._spec.n_kv_heads, length, self._spec.head_dim)
        blocks = np.frombuffer(state, np.float32).reshape(cache.n, *shape)
        for i, block in enumerate(blocks):
            cache.write(i, block)
        self._length = length

    def close(self) -> None:
        """See `decoder.Decoder.close`."""
        if self._closed:
            return
        self._closed = True
        self._settle()
        self._cache = self._decoder = self._embedding = self._binding = None
        self._loras.clear()
        self._worker.shutdown()

    def _load(self, path: Path, graph: bytes, n_threads: int, provider: str) -> Any:
        return onnx_session.load_session(path, graph, n_threads, provider, decoder=True)

    def _opened(self) -> KvCache:
        """The cache, into which nothing writes any more."""
        if self._cache is None:
            raise KernelError("no cache is open")
        self._settle()
        return self._cache

    def _size(self, table: RopeTable, capacity: int, copied: int) -> int:
        """How many tokens to make room for, if there is the memory for it."""
        rope, size = self._spec.rope, -(-max(capacity, 1) // _CELLS) * _CELLS
        most = self._spec.context_length
        if rope.is_long_rope and table == "short":
            most = rope.original_context
        if capacity > most:
            raise KernelError(
                f"{capacity} tokens are more than the {most} that the {table} RoPE table serves"
            )
        size = min(size, most)
        if self._options.before_cache is not None:
            self._options.before_cache(self.capacity, size, copied)
        return size

    def _new_cache(self, size: int) -> KvCache:
        with self._in_memory(size):
            return KvCache(self._ort.OrtValue, self._spec, size, self._options.provider)

    @contextlib.contextmanager
    def _in_memory(self, size: int) -> Any:
        """While buffers of `size` tokens are made."""
        try:
            yield
        except Exception as exc:  # MemoryError, or ONNX Runtime's own of a device
            gib = size * self._spec.kv_values_per_token * 4 / 2**30
            self._length = 0
            raise KernelError(
                f"there is no memory for a cache of {size} tokens, which takes {gib:.1f} GiB: "
                f"{onnx_session.reason(exc)}"
            ) from None

    def _bind(self, adapter: str | None) -> None:
        """Bind what stays the same from pass to pass."""
        binding, cache, value = self._binding, self._opened(), self._ort.OrtValue.ortvalue_from_numpy
        self._unbind()
        for name, buffer in zip(cache.names, cache.buffers, strict=True):
            binding.bind_ortvalue_input(f"past_key_values.{name}", buffer)
            binding.bind_ortvalue_output(f"present.{name}", buffer)
        binding.bind_ortvalue_input("n_logits", value(self._n_logits))
        if self._spec.rope.is_long_rope:
            self._rope_tokens[0] = self._spec.rope.original_context + 1 if self._table == "long" else 0
            binding.bind_ortvalue_input("rope_tokens", value(self._rope_tokens))
        for name, values in self._loras.get(adapter or "", {}).items():
            binding.bind_ortvalue_input(name, values)
        if len(self._ones) != cache.capacity:
            self._ones = np.ones(cache.capacity, np.int64)
        self._adapter = adapter

    def _unbind(self) -> None:
        """Let go of what is bound: it holds the buffers."""
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()

    def _load_adapter(self, name: str) -> None:
        """Load an adapter once, and show that it changes the logits: one that does nothing is an error."""
        file = self._files[name]
        held = read_adapter(file, self._spec)
        value = self._ort.OrtValue.ortvalue_from_numpy
        self._loras[name] = {key: value(values) for key, values in held.items()}
        try:
            logits = []
            for adapter in (None, name):
                self._bind(adapter)
                logits.append(np.empty((1, self._spec.vocab_size), np.float32))
                self._decode(np.zeros(1, np.int64), logits[-1])
                self.rewind(0)
            if np.array_equal(logits[0], logits[1]):
                raise KernelError(
                    f"{file.path}: the {name} adapter was loaded but does not change the logits"
                )
        except BaseException:
            del self._loras[name]
            raise

    def _checked(self, span: Span) -> npt.NDArray[Any]:
        """A span as `_decode` takes it: int64 [n] ids or float32 [n, d_model] embeddings."""
        return checked_rows(span, self._spec, length=self._length, capacity=self.capacity, ids=np.int64)

    def _decode(self, rows: npt.NDArray[Any], logits: Float32) -> None:
        """One forward pass: int64 [n] ids or float32 [n, d_model] embeddings.

        Fills `logits`, float32 [m, vocab_size] in one piece, with those after the last m rows.
        """
        try:
            self._call(self._run, rows, logits)
        except Exception as exc:
            raise KernelError(f"{self._path}: ONNX Runtime failed: {onnx_session.reason(exc)}") from None
        if not np.isfinite(logits).all():
            raise KernelError(
                f"{self._path}: gave logits that are not finite: weights or adapter are damaged"
            )
        self._length += len(rows)

    def _run(self, rows: npt.NDArray[Any], logits: Float32) -> None:
        binding, total = self._binding, self._length + len(rows)
        if rows.dtype == np.int64:
            found = self._embedding.run(None, {"input_ids": rows[None]})[0]
            if found.shape != (1, len(rows), self._spec.d_model):
                raise ValueError(f"{len(rows)} tokens became embeddings of shape {list(found.shape)}")
            rows = found[0]
        for name, array in (("inputs_embeds", rows), ("attention_mask", self._ones[:total])):
            binding.bind_input(name, "cpu", 0, array.dtype.type, (1, *array.shape), array.ctypes.data)
        binding.bind_output("logits", "cpu", 0, np.float32, (1, *logits.shape), logits.ctypes.data)
        self._n_logits[0] = len(logits)
        self._decoder.run_with_iobinding(binding, self._run_options)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run native code on the worker thread. An interrupt asks it to stop, and goes on when it has."""
        self._settle()
        self._busy = True
        try:
            result = self._worker.submit(function, *arguments).result()
        except BaseException:
            self._settle()
            raise
        self._busy = False
        return result

    def _settle(self) -> None:
        """Stop native code that still runs and wait for it; more interrupts change nothing.

        An interrupt may have kept `submit` from returning what runs: so something is sent after it, and
        waited for. Called again before anything beside which it must not run.
        """
        while self._busy:
            with contextlib.suppress(KeyboardInterrupt):
                self._run_options.terminate = True
                with contextlib.suppress(RuntimeError):  # it never got a thread: nothing runs
                    wait([self._worker.submit(int)])
                self._run_options.terminate = False
                self._busy = False


def pass_rows(spec: TextSpec, capacity: int) -> int:
    """Tokens of one forward pass over a cache of `capacity`: fewer where attention would take too much."""
    return max(1, min(_BATCH, _SCORES // (spec.n_heads * max(capacity, 1))))
