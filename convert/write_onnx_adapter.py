# SPDX-License-Identifier: Apache-2.0
"""Writes one LoRA as an ONNX Runtime adapter file: what `onnx_lora.add_lora` has inputs for.

The file is a flatbuffer with the identifier TORT:

    Adapter      format_version: int, adapter_version: int, model_version: int, parameters: [Parameter]
    Parameter    name: string, dims: [int64], data_type: int, raw_data: [uint8]

Its references point forward, so it is written front to back, one matrix in memory at a time. Numbers start
at multiples of 64 bytes: ONNX Runtime computes with them where they lie.

Source: onnxruntime/lora/adapter_format/adapter_schema.fbs; flatbuffers' internals.md.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from ..runtime.bundle import BundleFile
from ..runtime.errors import OutputError
from .checkpoint import Checkpoint
from .ggml_types import F16, F32
from .mapping import Adapter, LoraPair
from .onnx_graph import Float32, quantize_int8
from .onnx_lora import DTYPES, LoraKind
from .output import HashedFile
from .progress import Progress, Silent
from .quantize import check_values
from .safetensors_file import TensorInfo

_IDENTIFIER = b"TORT"
_FORMAT_VERSION = 1
_VERSION = 1  # of adapter and model: ONNX Runtime passes them on and compares nothing
_FIELDS = struct.pack(
    "<6H", 12, 20, 4, 8, 12, 16
)  # both tables: size of this, of a table, four offsets in it
_FIELDS_AT, _ROOT_AT, _TABLE_BYTES = 8, 20, 20
_ALIGNMENT = 64  # bytes
_MAX_BYTES = (1 << 31) - 1  # what a flatbuffer can refer to
_HEADER_BYTES = 256  # what a parameter takes at most besides its numbers: table, name, dims, padding


@dataclass(frozen=True, slots=True)
class _Parameter:
    """One tensor of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def adapter_name(adapter: Adapter) -> str:
    """The file of an adapter."""
    return f"adapter-{adapter.name}.onnx_adapter"


def write_onnx_adapter(
    directory: Path, source: Checkpoint, adapter: Adapter, kind: LoraKind, progress: Progress | None = None
) -> BundleFile:
    """Write `adapter_name(adapter)` into `directory`.

    Args:
        kind: the one that the graph was written with.

    Raises:
        CheckpointError: a tensor cannot be read, or holds what its type cannot.
        OutputError: the file cannot be written, or would be too large for its format.
    """
    parameters = [p for pair in adapter.pairs for p in _parameters(pair, kind)]
    name = adapter_name(adapter)
    total = sum(p.n_bytes + _HEADER_BYTES for p in parameters)
    if total > _MAX_BYTES:
        raise OutputError(
            f"{directory / name}: would have {total:,} bytes, its format allows {_MAX_BYTES:,}: "
            f"choose a smaller type than {kind}"
        )
    header, places = _layout(parameters)
    told = progress or Silent()
    arrays = (a for pair in adapter.pairs for a in _arrays(source, adapter, pair, kind, told))
    with HashedFile(directory, name) as file:
        file.write(header)
        size = len(header)
        for parameter, place, array in zip(parameters, places, arrays, strict=True):
            assert array.shape == parameter.shape and array.dtype == parameter.dtype, parameter.name
            file.write(bytes(place - 4 - size) + struct.pack("<I", array.nbytes))
            little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
            file.write(little.reshape(-1).view(np.uint8).data)
            size = place + array.nbytes
        return file.finish()


def _parameters(pair: LoraPair, kind: LoraKind) -> Iterator[_Parameter]:
    """What one linear layer takes, in the order of `_arrays`."""
    name, dtype = pair.target.removesuffix(".weight"), DTYPES[kind]
    (rank, d_in), (d_out, _) = pair.a.shape, pair.b.shape
    yield _Parameter(f"{name}.lora_A", dtype, (d_in, rank))
    yield _Parameter(f"{name}.lora_B", dtype, (rank, d_out))
    if kind == "int8":
        yield _Parameter(f"{name}.lora_scale", "float32", (rank,))


def _arrays(
    source: Checkpoint, adapter: Adapter, pair: LoraPair, kind: LoraKind, progress: Progress
) -> Iterator[npt.NDArray[Any]]:
    """The numbers of `_parameters`."""

    def read(info: TensorInfo) -> Float32:
        values = source.read(info)
        progress.advance(info.nbytes, info.name)
        return values

    scales = []
    for info, factor in ((pair.a, 1.0), (pair.b, adapter.alpha / adapter.rank)):
        values = read(info) * np.float32(factor)
        check_values(values, F16 if kind == "fp16" else F32, info.name, info.file)
        by_rank = values if info is pair.a else values.T
        if kind == "int8":
            q, scale = quantize_int8(by_rank)
            scales.append(scale)
            by_rank = q
        yield (by_rank.T if info is pair.a else by_rank).astype(DTYPES[kind])
    if kind == "int8":
        yield scales[0] * scales[1]


def _layout(parameters: list[_Parameter]) -> tuple[bytes, list[int]]:
    """All that comes before the numbers, and where each parameter's numbers begin."""
    tables_at = _ROOT_AT + _TABLE_BYTES + 4 + 4 * len(parameters)
    at = tables_at + _TABLE_BYTES * len(parameters)
    small = bytearray()  # names and dims, from `at` on
    names, dims = [], []
    for p in parameters:
        names.append(at + len(small))
        text = p.name.encode("ascii")
        small += struct.pack("<I", len(text)) + text + b"\0"
        small += bytes((4 - at - len(small)) % 8)  # so that the 64-bit numbers stand at multiples of 8
        dims.append(at + len(small))
        small += struct.pack(f"<I{len(p.shape)}q", len(p.shape), *p.shape)
    end, places = at + len(small), []
    for p in parameters:
        places.append(end + 4 + -(end + 4) % _ALIGNMENT)  # in front of them is their count
        end = places[-1] + p.n_bytes
    head = struct.pack("<I", _ROOT_AT) + _IDENTIFIER + _FIELDS
    vector_at = _ROOT_AT + _TABLE_BYTES
    head += struct.pack(
        "<i4I", _ROOT_AT - _FIELDS_AT, _FORMAT_VERSION, _VERSION, _VERSION, vector_at - (_ROOT_AT + 16)
    )
    head += struct.pack("<I", len(parameters))
    tables = b""
    for i, (p, name, dim, place) in enumerate(zip(parameters, names, dims, places, strict=True)):
        table, slot = tables_at + i * _TABLE_BYTES, vector_at + 4 + 4 * i
        head += struct.pack("<I", table - slot)
        code = helper.np_dtype_to_tensor_dtype(np.dtype(p.dtype))
        assert code != onnx.TensorProto.UNDEFINED
        fields = (name - (table + 4), dim - (table + 8), code, place - 4 - (table + 16))
        tables += struct.pack("<i4I", table - _FIELDS_AT, *fields)
    return head + tables + bytes(small), places
