# SPDX-License-Identifier: Apache-2.0
"""What a GGUF file says of itself, through ggml's own reader: metadata and tensors, no weights.

`bench` needs it for a bare GGUF, which has no bundle.json beside it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp

from .errors import BundleError, KernelError
from .ggml_log import ENGINE_LOG
from .spec import RopeSpec, TextSpec

ARCHITECTURE = "phi3"

_LIB = llama_cpp.llama_cpp._lib  # ggml's symbols come through libllama's handle; see ggml_plugin

_STRING = 8  # enum gguf_type
_NUMBERS: dict[int, tuple[str, type]] = {
    0: ("u8", ctypes.c_uint8),
    1: ("i8", ctypes.c_int8),
    2: ("u16", ctypes.c_uint16),
    3: ("i16", ctypes.c_int16),
    4: ("u32", ctypes.c_uint32),
    5: ("i32", ctypes.c_int32),
    6: ("f32", ctypes.c_float),
    10: ("u64", ctypes.c_uint64),
    11: ("i64", ctypes.c_int64),
    12: ("f64", ctypes.c_double),
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]  # ggml's order: the row's length first
    n_bytes: int

    @property
    def n_values(self) -> int:
        """How many weights it holds."""
        count = 1
        for n in self.shape:
            count *= n
        return count


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Metadata that is a number or a text, and every tensor."""

    path: Path
    numbers: dict[str, float]
    texts: dict[str, str]
    tensors: tuple[Tensor, ...]

    def number(self, key: str) -> float:
        """A number of the metadata.

        Raises:
            BundleError: there is none of that name.
        """
        if key not in self.numbers:
            raise BundleError(f"{self.path}: has no number {key!r}")
        return self.numbers[key]

    def tensor(self, name: str) -> Tensor | None:
        """The tensor of that name."""
        return next((t for t in self.tensors if t.name == name), None)


class _InitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def read_header(path: Path) -> GgufHeader:
    """Read a GGUF file's header.

    Raises:
        BundleError: it is no GGUF file, or a damaged one.
    """
    with _opened(path) as gguf:
        numbers: dict[str, float] = {}
        texts: dict[str, str] = {}
        for i in range(_call("gguf_get_n_kv", ctypes.c_int64, gguf)):
            key = _text(_call("gguf_get_key", ctypes.c_char_p, gguf, i))
            kind = _call("gguf_get_kv_type", ctypes.c_int, gguf, i)
            if kind in _NUMBERS:  # asking for another type than the key has would abort the process
                name, result = _NUMBERS[kind]
                numbers[key] = _call(f"gguf_get_val_{name}", result, gguf, i)
            elif kind == _STRING:
                texts[key] = _text(_call("gguf_get_val_str", ctypes.c_char_p, gguf, i))
        tensors = tuple(_tensor(gguf, i) for i in range(_call("gguf_get_n_tensors", ctypes.c_int64, gguf)))
    return GgufHeader(path, numbers, texts, tensors)


def text_spec(header: GgufHeader) -> TextSpec:
    """The decoder's shape, as the header of its backbone tells it.

    Raises:
        BundleError: the file is an adapter, another architecture, or lacks a number or the embedding.
    """
    architecture = header.texts.get("general.architecture", "none")
    if header.texts.get("general.type") == "adapter":
        raise BundleError(f"{header.path}: is an adapter, expected a model")
    if architecture != ARCHITECTURE:
        raise BundleError(f"{header.path}: has architecture {architecture!r}, expected {ARCHITECTURE!r}")

    def number(key: str) -> float:
        return header.number(f"{ARCHITECTURE}.{key}")

    def count(key: str) -> int:
        value = number(key)
        if not 1 <= value < 1 << 31:
            raise BundleError(f"{header.path}: has {key} {value:g}, expected 1 to {(1 << 31) - 1}")
        return int(value)

    embedding = header.tensor("token_embd.weight")
    if embedding is None:
        raise BundleError(f"{header.path}: has no tensor 'token_embd.weight'")
    d_model, n_heads = count("embedding_length"), count("attention.head_count")
    long_rope = header.tensor("rope_factors_long.weight") is not None
    return TextSpec(
        d_model=d_model,
        n_layers=count("block_count"),
        n_heads=n_heads,
        n_kv_heads=count("attention.head_count_kv"),
        head_dim=d_model // n_heads,
        d_ff=count("feed_forward_length"),
        vocab_size=embedding.shape[1],
        context_length=count("context_length"),
        rms_eps=number("attention.layer_norm_rms_epsilon"),
        tied_head=header.tensor("output.weight") is None,
        rope=RopeSpec(
            dims=count("rope.dimension_count"),
            theta=number("rope.freq_base"),
            original_context=count("rope.scaling.original_context_length")
            if long_rope
            else count("context_length"),
            attention_factor=number("rope.scaling.attn_factor") if long_rope else 1.0,
            # Which table a length needs is all that is asked of these: the values are llama.cpp's business.
            short_factor=() if long_rope else None,
            long_factor=() if long_rope else None,
        ),
    )


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    ENGINE_LOG.forget()
    open_file = _function("gguf_init_from_file", ctypes.c_void_p, [ctypes.c_char_p, _InitParams])
    gguf = open_file(os.fsencode(path), _InitParams(True, None))
    if not gguf:
        raise BundleError(f"{path}: is not a GGUF file: {ENGINE_LOG.reason or 'it cannot be read'}")
    try:
        yield gguf
    finally:
        _function("gguf_free", None, [ctypes.c_void_p])(gguf)


def _tensor(gguf: int, i: int) -> Tensor:
    ne = _call("gguf_get_tensor_ne", ctypes.POINTER(ctypes.c_int64), gguf, i)
    return Tensor(
        _text(_call("gguf_get_tensor_name", ctypes.c_char_p, gguf, i)),
        (ne[0], ne[1], ne[2], ne[3]),
        _call("gguf_get_tensor_size", ctypes.c_size_t, gguf, i),
    )


def _call(name: str, result: Any, gguf: int, *index: int) -> Any:
    """One of the many functions that take the file, and perhaps a number: of a key or a tensor."""
    arguments = [ctypes.c_void_p, *([ctypes.c_int64] * len(index))]
    return _function(name, result, arguments)(gguf, *index)


def _function(name: str, result: Any, arguments: list[Any]) -> Any:
    try:
        function: Any = _LIB[name]  # a fresh one: the library's attributes are llama_cpp's to declare
    except AttributeError:
        raise KernelError(f"this build of llama-cpp-python does not export {name}") from None
    function.restype, function.argtypes = result, arguments
    return function


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")
