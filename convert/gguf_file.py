# SPDX-License-Identifier: Apache-2.0
"""A GGUF file's header, read with bounds: nothing it declares is believed before the file has room for it.

The gguf package's reader (0.19) allocates and loops by declared counts, so a 43-byte file can hang it.
Format: GGUF version 3 (and 2, the same layout), little-endian; source: docs/gguf.md in ggml-org/ggml.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..runtime.errors import CheckpointError

Value = int | float | bool | str | list[int] | list[float] | list[bool] | list[str]

MAX_HEADER_BYTES = 256 << 20  # a 200,064-token vocabulary takes 8 MiB
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_STRING = 16 << 20  # bytes
_MAX_DIMS = 4  # GGML_MAX_DIMS
_MAX_VALUES = 1 << 40  # in a tensor; far above any model's
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_F32 = 0


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One entry of the tensor table."""

    name: str
    shape: tuple[int, ...]  # PyTorch order, the reverse of ggml's
    type_id: int  # enum ggml_type
    offset: int  # bytes, from the start of the file


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A checked header."""

    path: Path
    size: int  # bytes of the whole file
    keys: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]

    def float32(self, name: str) -> npt.NDArray[np.float32]:
        """A float32 tensor's values, float32 [*shape].

        Raises:
            CheckpointError: another type, or data beyond the end of the file.
        """
        tensor = self.tensors[name]
        if tensor.type_id != _F32:
            raise CheckpointError(f"{self.path}: tensor {name!r} has type {tensor.type_id}, expected F32")
        n_bytes = 4 * math.prod(tensor.shape)
        if tensor.offset + n_bytes > self.size:
            raise CheckpointError(f"{self.path}: tensor {name!r} ends beyond the end of the file")
        try:
            with self.path.open("rb") as file:
                file.seek(tensor.offset)
                data = file.read(n_bytes)
        except OSError as exc:
            raise CheckpointError(f"{self.path}: cannot be read: {exc.strerror}") from None
        if len(data) != n_bytes:
            raise CheckpointError(f"{self.path}: ends while tensor {name!r} is read")
        return np.frombuffer(data, "<f4").reshape(tensor.shape)


def read_gguf(path: Path) -> GgufFile:
    """Read and check a header.

    Raises:
        CheckpointError: not a regular file, not GGUF version 2 or 3, or a header that contradicts
            itself or the file's size.
    """
    try:
        if not path.is_file():  # also keeps pipes and devices from being opened
            raise CheckpointError(f"{path}: no such file")
        size = path.stat().st_size
        with path.open("rb") as file:
            data = file.read(min(size, MAX_HEADER_BYTES))
    except OSError as exc:
        raise CheckpointError(f"{path}: cannot be read: {exc.strerror}") from None
    return _Cursor(path, data).header(size)


class _Cursor:
    """A place in the header; every step is checked against its end."""

    def __init__(self, path: Path, data: bytes) -> None:
        self._path, self._data, self._at = path, data, 0

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {what}")

    def header(self, size: int) -> GgufFile:
        if self._bytes(4, "magic") != b"GGUF":
            raise self.error("is not a GGUF file")
        version = self._number("I")
        if version not in (2, 3):
            raise self.error(f"has GGUF version {version}, expected 2 or 3 (little-endian)")
        n_tensors = self._count(MAX_TENSORS, "tensors", 8 + 4 + 4 + 8)
        n_keys = self._count(MAX_KEYS, "keys", 8 + 4 + 1)
        keys: dict[str, Value] = {}
        for _ in range(n_keys):
            key = self._string("key")
            if key in keys:
                raise self.error(f"key {key[:60]!r} is there twice")
            keys[key] = self._value(key)
        alignment = keys.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            raise self.error(
                f"general.alignment is {str(alignment)[:40]}, expected a power of two from 8 to 65536"
            )
        entries = [self._tensor(alignment) for _ in range(n_tensors)]
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for t in entries:
            if t.name in tensors:
                raise self.error(f"tensor {t.name[:60]!r} is there twice")
            if start + t.offset > size:
                raise self.error(f"tensor {t.name[:60]!r} starts beyond the end of the file")
            tensors[t.name] = GgufTensor(t.name, t.shape, t.type_id, start + t.offset)
        return GgufFile(self._path, size, keys, tensors)

    def _bytes(self, n: int, what: str) -> bytes:
        if n > len(self._data) - self._at:
            raise self.error(f"ends within its header (at {what[:60]!r})")
        self._at += n
        return self._data[self._at - n : self._at]

    def _number(self, code: str) -> int:
        value: int = struct.unpack("<" + code, self._bytes(struct.calcsize("<" + code), "a number"))[0]
        return value

    def _count(self, limit: int, what: str, each: int) -> int:
        n = self._number("Q")
        if n > limit or n * each > len(self._data) - self._at:
            raise self.error(f"declares {n} {what}, more than the file or {limit} allow")
        return n

    def _string(self, what: str) -> str:
        n = self._number("Q")
        if n > MAX_STRING:
            raise self.error(f"has a {what[:60]} of {n} bytes, expected at most {MAX_STRING}")
        try:
            return self._bytes(n, what).decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"has a {what[:60]} that is not UTF-8") from None

    def _value(self, key: str) -> Value:
        kind = self._number("I")
        if kind == _STRING:
            return self._string(key)
        if kind != _ARRAY:
            return self._scalars(kind, 1, key)[0]
        inner = self._number("I")
        if inner == _STRING:
            return [self._string(key) for _ in range(self._count(MAX_HEADER_BYTES, "strings", 8))]
        if inner not in _SCALARS:
            raise self.error(
                f"key {key[:60]!r} is an array of type {inner}, which is not known or not allowed"
            )
        n = self._count(MAX_HEADER_BYTES, "values", struct.calcsize("<" + _SCALARS[inner]))
        return list(self._scalars(inner, n, key))

    def _scalars(self, kind: int, n: int, key: str) -> tuple[int, ...]:
        code = _SCALARS.get(kind)
        if code is None:
            raise self.error(f"key {key[:60]!r} has the unknown value type {kind}")
        return struct.unpack(f"<{n}{code}", self._bytes(n * struct.calcsize("<" + code), key))

    def _tensor(self, alignment: int) -> GgufTensor:
        name = self._string("tensor name")
        n_dims = self._number("I")
        if not 1 <= n_dims <= _MAX_DIMS:
            raise self.error(f"tensor {name[:60]!r} has {n_dims} dimensions, expected 1 to {_MAX_DIMS}")
        dims = [self._number("Q") for _ in range(n_dims)]
        if min(dims) < 1 or math.prod(dims) > _MAX_VALUES:
            raise self.error(f"tensor {name[:60]!r} has the impossible size {dims}")
        type_id, offset = self._number("I"), self._number("Q")
        if offset % alignment:
            raise self.error(f"tensor {name[:60]!r} starts at {offset}, expected a multiple of {alignment}")
        return GgufTensor(name, tuple(reversed(dims)), type_id, offset)
