# SPDX-License-Identifier: Apache-2.0
"""What a GGUF file says of itself, read with bounds: nothing it declares is believed before it is there.

The one reader of the project, for models, adapters and importance matrices. Python alone: what is refused
here never reaches llama.cpp. At least as strict as llama.cpp's own reader: tensors follow one another without
a gap, in the table's order, and end inside the file. Format: GGUF version 3 (and 2, the same layout),
little-endian; source: docs/gguf.md in ggml-org/ggml, ggml/src/gguf.cpp.
"""

from __future__ import annotations

import math
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from .errors import BundleError, PocketPhiError
from .spec import RopeSpec, TextSpec

ARCHITECTURE = "phi3"
MAX_HEADER_BYTES = 64 << 20  # 200,064 tokens and 446,189 merges take 13 MB
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
_MAX_NAME = 63  # bytes: GGML_MAX_NAME with its zero
_MAX_DIMS = 4  # GGML_MAX_DIMS
_CHUNK = 1 << 20  # bytes to read at once, where no more is asked for
_ALIGNMENTS = tuple(1 << n for n in range(3, 17))
KINDS = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64")
"""The value types, numbered as in enum gguf_type."""
_STRING, _ARRAY, _U32 = KINDS.index("string"), KINDS.index("array"), KINDS.index("u32")
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_U64 = struct.Struct("<Q")

BLOCKS: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36), 10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}  # fmt: skip
"""enum ggml_type -> its name, the values of a block, a block's bytes. Source: ggml.c, ggml-common.h."""


@dataclass(frozen=True, slots=True)
class Array:
    """An array of the metadata: where it lies. `GgufHeader.strings` and `.values` read what is in it."""

    kind: int  # of its elements, enum gguf_type
    count: int
    start: int  # bytes, from the start of the file
    n_bytes: int


Value = int | float | bool | str | Array


@dataclass(frozen=True, slots=True)
class Tensor:
    """One entry of the tensor table."""

    name: str
    shape: tuple[int, ...]  # ggml's order: the row's length first
    type_id: int  # enum ggml_type
    offset: int  # bytes, from the start of the file
    n_bytes: int

    @property
    def n_values(self) -> int:
        """How many weights it holds."""
        return math.prod(self.shape)

    @property
    def type_name(self) -> str:
        """Its ggml type."""
        return BLOCKS[self.type_id][0]


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """A checked header. Arrays stay in the file until they are asked for."""

    path: Path
    size: int  # bytes of the whole file
    alignment: int  # bytes
    keys: Mapping[str, Value]
    kinds: Mapping[str, int]  # of each key, enum gguf_type
    tensors: Mapping[str, Tensor]  # in the file's order
    error: type[PocketPhiError]  # what every complaint about this file is raised as

    def number(self, key: str) -> float:
        """A number of the metadata.

        Raises:
            PocketPhiError: there is none of that name, or it is not finite.
        """
        value = self.keys.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(f"{self.path}: has no number {key!r}")
        if not math.isfinite(value):
            raise self.error(f"{self.path}: has {key} {value}, expected a finite number")
        return value

    def text(self, key: str) -> str | None:
        """A text of the metadata; None where there is none of that name."""
        value = self.keys.get(key)
        return value if isinstance(value, str) else None

    def strings(self, key: str) -> list[bytes]:
        """An array of strings.

        Raises:
            PocketPhiError: there is none of that name, or the file has changed.
        """
        array = self.array(key, "string")
        data, at, found = self._bytes(array.start, array.n_bytes, key), 0, []
        for _ in range(array.count):
            if at + 8 > len(data):
                raise self.error(f"{self.path}: changed while {key} was read")
            start = at + 8
            at = start + _U64.unpack_from(data, at)[0]
            found.append(data[start:at])
        return found

    def float32(self, name: str) -> npt.NDArray[np.float32]:
        """A float32 tensor's values, float32 [*shape] in PyTorch's order, the reverse of ggml's.

        Raises:
            PocketPhiError: another type, or the file has changed.
        """
        tensor = self.tensors[name]
        if tensor.type_id != 0:
            raise self.error(f"{self.path}: tensor {name!r} is {tensor.type_name}, expected F32")
        data = self._bytes(tensor.offset, tensor.n_bytes, f"tensor {name!r}")
        return np.frombuffer(data, "<f4").reshape(tensor.shape[::-1])

    def array(self, key: str, *kinds: str) -> Array:
        """An array of the metadata, of elements of one of `kinds`; none of that name is an error."""
        value = self.keys.get(key)
        if not isinstance(value, Array) or KINDS[value.kind] not in kinds:
            raise self.error(f"{self.path}: has no {key!r} that is an array of {' or '.join(kinds)}")
        return value

    def _bytes(self, start: int, n: int, what: str) -> bytes:
        with _opened(self.path, self.error) as file:
            try:
                file.seek(start)
                data = file.read(n)
            except OSError as exc:
                raise self.error(f"{self.path}: cannot be read: {exc.strerror}") from None
        if len(data) != n:
            raise self.error(f"{self.path}: ends while {what} is read")
        return data


def read_header(path: Path, error: type[PocketPhiError] = BundleError) -> GgufHeader:
    """Read and check a GGUF file's header.

    Args:
        path: a regular file; anything else is refused without opening it.
        error: what to raise.

    Raises:
        PocketPhiError: as `error`: no such file, not GGUF, damaged, or contradicting itself or its size.
    """
    with _opened(path, error) as file:
        try:
            size = file.seek(0, 2)
            file.seek(0)
            return _Reader(path, file, size, error).header()
        except OSError as exc:
            raise error(f"{path}: cannot be read: {exc.strerror}") from None


def _opened(path: Path, error: type[PocketPhiError]) -> BinaryIO:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would wait for ever, a device may act
            raise error(f"{path}: is not a regular file")
        return path.open("rb")
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the name
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise error(f"{str(path)[:200]!r}: cannot be opened: {reason}") from None


class _Reader:
    """A place in the header; every step is checked against the file's end, or the most a header may be."""

    def __init__(self, path: Path, file: BinaryIO, size: int, error: type[PocketPhiError]) -> None:
        self._path, self._file, self._size, self._error = path, file, size, error
        self._data, self._at = bytearray(), 0

    def header(self) -> GgufHeader:
        if self._size < 4 or self._bytes(4, "magic") != b"GGUF":
            raise self._wrong("is not a GGUF file")
        version = self._integer("I")
        if version in (2 << 24, 3 << 24):
            raise self._wrong("is a big-endian GGUF file, expected a little-endian one")
        if version not in (2, 3):
            raise self._wrong(f"has GGUF version {version}, expected 2 or 3")
        n_tensors = self._count(MAX_TENSORS, "tensors", 8 + 4 + 8 + 4 + 8)
        n_keys = self._count(MAX_KEYS, "keys", 8 + 4 + 1)
        keys: dict[str, Value] = {}
        kinds: dict[str, int] = {}
        for _ in range(n_keys):
            key = self._name("key", 1 << 16)
            if key in keys:
                raise self._wrong(f"key {key[:60]!r} is there twice")
            kinds[key] = self._integer("I")
            keys[key] = self._value(key, kinds[key])
        alignment = keys.get("general.alignment", 32)
        if alignment not in _ALIGNMENTS or kinds.get("general.alignment", _U32) != _U32:
            raise self._wrong(f"has alignment {str(alignment)[:40]}, expected a power of two from 8 to 65536")
        assert isinstance(alignment, int)
        tensors = self._tensors(n_tensors, alignment)
        return GgufHeader(self._path, self._size, alignment, keys, kinds, tensors, self._error)

    def _tensors(self, n: int, alignment: int) -> dict[str, Tensor]:
        entries = [self._tensor() for _ in range(n)]
        start = -(-self._at // alignment) * alignment
        found: dict[str, Tensor] = {}
        expected = 0  # where the next one has to begin
        for name, shape, type_id, offset in entries:
            where = f"tensor {name!r}"
            if name in found:
                raise self._wrong(f"{where} is there twice")
            if offset != expected:
                raise self._wrong(f"{where} starts at {offset} of the data, expected {expected}")
            _, block, block_bytes = BLOCKS[type_id]
            n_bytes = math.prod(shape) // block * block_bytes
            if start + offset + n_bytes > self._size:
                raise self._wrong(f"{where} ends beyond the end of the file")
            expected = -(-(offset + n_bytes) // alignment) * alignment
            found[name] = Tensor(name, shape, type_id, start + offset, n_bytes)
        return found

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._name("tensor name", _MAX_NAME)
        where = f"tensor {name!r}"
        n_dims = self._integer("I")
        if not 1 <= n_dims <= _MAX_DIMS:
            raise self._wrong(f"{where} has {n_dims} dimensions, expected 1 to {_MAX_DIMS}")
        shape = tuple(self._integer("Q") for _ in range(n_dims))
        type_id, offset = self._integer("I"), self._integer("Q")
        if type_id not in BLOCKS:
            raise self._wrong(f"{where} has the unknown type {type_id}")
        kind, block, block_bytes = BLOCKS[type_id]
        if min(shape) < 1 or math.prod(shape) // block * block_bytes > self._size:
            raise self._wrong(f"{where} has shape {list(shape)}, more than the file or nothing at all")
        if shape[0] % block:
            raise self._wrong(f"{where} has rows of {shape[0]} values, {kind} needs a multiple of {block}")
        return name, shape, type_id, offset

    def _value(self, key: str, kind: int) -> Value:
        if kind == _STRING:
            return self._text(f"value of {key[:60]!r}", MAX_HEADER_BYTES)
        if kind in _SCALARS:
            code = "<" + _SCALARS[kind]
            value: int | float | bool = struct.unpack(code, self._bytes(struct.calcsize(code), key))[0]
            return value
        if kind != _ARRAY:
            raise self._wrong(f"key {key[:60]!r} has the unknown value type {kind}")
        inner = self._integer("I")
        if inner == _STRING:
            count = self._count(MAX_HEADER_BYTES, f"strings in {key[:60]!r}", 8)
            start = self._at
            self._skip_strings(count, key)
            return Array(inner, count, start, self._at - start)
        if inner not in _SCALARS:
            raise self._wrong(f"key {key[:60]!r} is an array of type {inner}: not known, or not allowed")
        size = struct.calcsize("<" + _SCALARS[inner])
        count = self._count(MAX_HEADER_BYTES, f"values in {key[:60]!r}", size)
        start = self._at
        self._load(count * size, key)
        self._at += count * size
        return Array(inner, count, start, count * size)

    def _skip_strings(self, n: int, key: str) -> None:
        """Past n strings. A real vocabulary has 600,000: hence no call for each."""
        data, at, loaded, length = self._data, self._at, len(self._data), _U64.unpack_from
        for _ in range(n):
            if at + 8 > loaded:
                self._at = at
                self._load(8, key)
                loaded = len(data)
            at += 8 + length(data, at)[0]
        self._at = at
        self._load(0, key)

    def _text(self, what: str, most: int) -> str:
        n = self._integer("Q")
        if n > most:
            raise self._wrong(f"has a {what} of {n} bytes, expected at most {most}")
        raw = self._bytes(n, what)
        if 0 in raw:  # llama.cpp would read up to there
            raise self._wrong(f"has a {what} with a zero in it")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self._wrong(f"has a {what} that is not UTF-8") from None

    def _name(self, what: str, most: int) -> str:
        name = self._text(what, most)
        if not name or not name.isprintable():
            raise self._wrong(f"has the {what} {name[:60]!r}, expected printable characters")
        return name

    def _count(self, limit: int, what: str, each: int) -> int:
        """How many of something follow, at least `each` bytes a piece."""
        n = self._integer("Q")
        if n > limit or n * each > self._size - self._at:
            raise self._wrong(f"declares {n} {what}, more than there is room for")
        return n

    def _integer(self, code: str) -> int:
        value: int = struct.unpack("<" + code, self._bytes(4 if code == "I" else 8, "a number"))[0]
        return value

    def _bytes(self, n: int, what: str) -> bytes:
        self._load(n, what)
        self._at += n
        return bytes(self._data[self._at - n : self._at])

    def _load(self, n: int, what: str) -> None:
        """Have the next n bytes in memory."""
        end, loaded = self._at + n, len(self._data)
        if end <= loaded:
            return
        if end > min(self._size, MAX_HEADER_BYTES):
            too_long = f"has a header of more than {MAX_HEADER_BYTES >> 20} MiB"
            raise self._wrong(too_long if end <= self._size else f"ends within its header (at {what[:60]})")
        self._data += self._file.read(max(end - loaded, min(_CHUNK, MAX_HEADER_BYTES - loaded)))
        if len(self._data) < end:
            raise self._wrong("became shorter while it was read")

    def _wrong(self, what: str) -> PocketPhiError:
        return self._error(f"{self._path}: {what}")


def text_spec(header: GgufHeader) -> TextSpec:
    """The decoder's shape, as the header of its backbone tells it.

    Raises:
        PocketPhiError: the file is an adapter, another architecture, or lacks a number or the embedding.
    """
    path, error = header.path, header.error
    if header.text("general.type") == "adapter":
        raise error(f"{path}: is an adapter, expected a model")
    architecture = header.text("general.architecture") or "none"
    if architecture != ARCHITECTURE:
        raise error(f"{path}: has architecture {architecture[:40]!r}, expected {ARCHITECTURE!r}")

    def number(key: str) -> float:
        return header.number(f"{ARCHITECTURE}.{key}")

    def count(key: str) -> int:
        value = number(key)
        if not 1 <= value < 1 << 31:
            raise error(f"{path}: has {key} {value:g}, expected 1 to {(1 << 31) - 1}")
        return int(value)

    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise error(f"{path}: has no tensor 'token_embd.weight'")
    d_model, n_heads = count("embedding_length"), count("attention.head_count")
    long_rope = "rope_factors_long.weight" in header.tensors
    return TextSpec(
        d_model=d_model,
        n_layers=count("block_count"),
        n_heads=n_heads,
        n_kv_heads=count("attention.head_count_kv"),
        head_dim=d_model // n_heads,
        d_ff=count("feed_forward_length"),
        vocab_size=embedding.n_values // embedding.shape[0],
        context_length=count("context_length"),
        rms_eps=number("attention.layer_norm_rms_epsilon"),
        tied_head="output.weight" not in header.tensors,
        rope=RopeSpec(
            dims=count("rope.dimension_count"),
            theta=number("rope.freq_base"),
            original_context=count(f"{'rope.scaling.original_' if long_rope else ''}context_length"),
            attention_factor=number("rope.scaling.attn_factor") if long_rope else 1.0,
            # Which table a length needs is all that is asked of these: the values are llama.cpp's.
            short_factor=() if long_rope else None,
            long_factor=() if long_rope else None,
        ),
    )
