# SPDX-License-Identifier: Apache-2.0
"""Reads an ONNX Runtime adapter file, in Python and with bounds: it is the one that bundle.json describes.

The file is a flatbuffer with the identifier TORT:

    Adapter      format_version: int, adapter_version: int, model_version: int, parameters: [Parameter]
    Parameter    name: string, dims: [int64], data_type: int, raw_data: [uint8]

Numbers are not read: they are mapped, and native code computes with them where they lie. Whether they are
finite shows in the logits. A file that becomes shorter later on ends the process with SIGBUS, as a GGUF does.

Source: onnxruntime/lora/adapter_format/adapter_schema.fbs; flatbuffers' internals.md.
"""

from __future__ import annotations

import math
import mmap
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from .errors import BundleError
from .onnx_check import End, lora_ends
from .spec import TextSpec

_MAX_BYTES = (1 << 31) - 1  # what a flatbuffer can refer to
_MIN_BYTES = 12  # a root, the identifier, and something
_VERSION = 1
_MAX_FIELDS = 8  # of a table; ours have four
_DTYPES = {1: "float32", 3: "int8", 10: "float16"}  # of TensorProto.DataType


@dataclass(frozen=True, slots=True)
class OnnxAdapter:
    """An adapter of the ONNX backbone, and what bundle.json says of it."""

    path: Path
    rank: int
    quant: str  # fp32, fp16 or int8


def read_adapter(adapter: OnnxAdapter, text: TextSpec) -> dict[str, npt.NDArray[Any]]:
    """The numbers of an adapter by the names of the graph's inputs; the arrays are the mapped file.

    Raises:
        BundleError: missing, damaged, or not an adapter of this rank for a backbone of this shape.
    """
    path = adapter.path
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise BundleError(f"{path}: is not a regular file")
        if not _MIN_BYTES <= about.st_size <= _MAX_BYTES:
            raise BundleError(f"{path}: is not an ONNX Runtime adapter: it has {about.st_size:,} bytes")
        with path.open("rb") as file:
            raw = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise BundleError(f"{path}: no such file") from None
    except (OSError, ValueError) as exc:
        raise BundleError(f"{path}: cannot be read: {exc}") from None
    return _File(path, raw).parameters(lora_ends(text, adapter.quant, adapter.rank))


class _File:
    """A flatbuffer; every number of it is read through `_number`, which looks whether it is there."""

    def __init__(self, path: Path, raw: mmap.mmap) -> None:
        self._path, self._raw = path, raw

    def parameters(self, wanted: Mapping[str, End]) -> dict[str, npt.NDArray[Any]]:
        if self._raw[4:8] != b"TORT":
            self._fail("is not an ONNX Runtime adapter")
        root = self._table(self._number("I", 0))
        version = self._number("i", root[0]) if 0 in root else 0
        if version != _VERSION:
            self._fail(f"is an adapter of format version {version}, expected {_VERSION}")
        start, count = self._vector(root, 3, 4)
        if count != len(wanted):
            self._fail(f"holds {count} tensors, expected {len(wanted)}: it is an adapter of another model")
        found: dict[str, npt.NDArray[Any]] = {}
        for slot in range(start, start + 4 * count, 4):
            name, values = self._parameter(slot + self._number("I", slot), wanted)
            if name in found:
                self._fail(f"holds tensor {name!r} twice")
            found[name] = values
        return found

    def _parameter(self, at: int, wanted: Mapping[str, End]) -> tuple[str, npt.NDArray[Any]]:
        table = self._table(at)
        start, size = self._vector(table, 0, 1)
        name = self._raw[start : start + min(size, 60)].decode("ascii", "replace")
        if name not in wanted or size != len(name):
            self._fail(f"holds tensor {name!r}, which this model's adapters have not")
        end = wanted[name]
        start, n_dims = self._vector(table, 1, 8)
        dims = tuple(self._number("q", start + 8 * i) for i in range(min(n_dims, 3)))
        code = self._number("i", table[2]) if 2 in table else 0
        if dims != end.dims or _DTYPES.get(code) != end.dtype:
            dtype = _DTYPES.get(code, f"type {code}")
            self._fail(
                f"tensor {name!r} is {dtype} {list(dims)}, bundle.json means {end.dtype} {list(end.dims)}"
            )
        start, n_bytes = self._vector(table, 3, 1)
        dtype, count = np.dtype(end.dtype).newbyteorder("<"), math.prod(dims)
        if n_bytes != count * dtype.itemsize or start % dtype.itemsize:
            self._fail(
                f"tensor {name!r} has {n_bytes} bytes from {start}, expected {count * dtype.itemsize} "
                f"from a multiple of {dtype.itemsize}"
            )
        return name, np.frombuffer(self._raw, dtype, count, start).reshape(dims)

    def _table(self, at: int) -> dict[int, int]:
        """Where the fields of the table at `at` are, those that it has."""
        fields = at - self._number("i", at)
        size = self._number("H", fields)
        if size % 2 or not 4 <= size <= 4 + 2 * _MAX_FIELDS:
            self._fail("is damaged: it holds no table where one has to be")
        offsets = (self._number("H", fields + 4 + 2 * i) for i in range((size - 4) // 2))
        return {i: at + offset for i, offset in enumerate(offsets) if offset}

    def _vector(self, table: Mapping[int, int], field: int, item: int) -> tuple[int, int]:
        """Where a vector's items of so many bytes begin, and how many there are, all within the file."""
        if field not in table:
            self._fail("is damaged: it lacks a field")
        at = table[field] + self._number("I", table[field])
        count = self._number("I", at)
        if at + 4 + count * item > len(self._raw):
            self._fail(f"ends within a field: it has {len(self._raw)} bytes")
        return at + 4, count

    def _number(self, kind: str, at: int) -> int:
        if not 0 <= at <= len(self._raw) - struct.calcsize(kind):
            self._fail(f"refers to byte {at} of the {len(self._raw)} that it has")
        value: int = struct.unpack_from(f"<{kind}", self._raw, at)[0]
        return value

    def _fail(self, what: str) -> NoReturn:
        raise BundleError(f"{self._path}: {what}")
