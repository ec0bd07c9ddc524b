# SPDX-License-Identifier: Apache-2.0
"""One safetensors file's header: bytes nobody vouches for become a table of tensors, or one clear error.

The format: 8 bytes little-endian header length n, n bytes of JSON, then the data. The JSON maps each
name to its dtype, shape and byte range within the data; `__metadata__` maps strings to strings.
Source: the format section of huggingface/safetensors' README. Stricter than it on purpose: key
order aside, every byte of the file must be accounted for and no tensor may be empty.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from ..runtime.errors import CheckpointError
from .source_file import SourceFile, parse_json_object, quoted, refuse_lfs_pointer, shown

Dtype = Literal["BF16", "F16", "F32"]

DTYPE_BYTES: Mapping[str, int] = {"BF16": 2, "F16": 2, "F32": 4}
MAX_HEADER_BYTES = 100_000_000  # the reference implementation's own limit
_MAX_DIMS = 8  # real tensors have at most 4
_DTYPE_NAME = re.compile(r"[A-Z0-9_]{1,16}")
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies and how; row-major, little-endian."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]  # no dimension is 0; () is one number
    file: Path
    offset: int  # of the first byte, from the start of the file
    nbytes: int

    @property
    def rows(self) -> int:
        """The first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def cols(self) -> int:
        """Numbers in one row: the product of the other dimensions."""
        return math.prod(self.shape[1:])


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: its tensors in file order, and its bytes as they stand in the file."""

    tensors: Mapping[str, TensorInfo]
    raw: bytes


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and check one file's header; the data is not read.

    Returns:
        The tensors by name, in the order of their data.

    Raises:
        CheckpointError: not a regular file, or anything in it that is not exactly as the format says.
    """
    with SourceFile(path) as file:
        return dict(parse_header(file).tensors)


def parse_header(file: SourceFile) -> Header:
    """As `read_header`, of a file that is already open."""
    where = shown(file.path)
    if file.size < 8:
        raise CheckpointError(f"{where}: has {file.size} bytes, expected a safetensors file")
    start = file.read(0, min(file.size, 64))
    refuse_lfs_pointer(start, file.path)
    length = int.from_bytes(start[:8], "little")
    if not 2 <= length <= min(file.size - 8, MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{where}: says that its header has {length} bytes, expected 2 to "
            f"{max(2, min(file.size - 8, MAX_HEADER_BYTES))}: cut short, or not a safetensors file"
        )
    raw = file.read(8, length)
    entries = parse_json_object(raw, f"{where}: header")
    _check_metadata(entries.pop("__metadata__", {}), where)
    data = 8 + length
    infos = [_tensor(name, entry, file, data) for name, entry in entries.items()]
    infos.sort(key=lambda info: info.offset)
    _check_coverage(infos, data, file)
    return Header({info.name: info for info in infos}, raw)


def _check_metadata(metadata: object, where: str) -> None:
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{where}: __metadata__ is {quoted(metadata)}, expected an object")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise CheckpointError(
                f"{where}: __metadata__ entry {quoted(key)} is {quoted(value)}, expected a string"
            )


def _tensor(name: str, entry: Any, file: SourceFile, data: int) -> TensorInfo:
    """Check one entry by itself; `data` is where the data section begins."""
    where = f"{shown(file.path)}: tensor {quoted(name)}"
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        found = sorted(entry) if isinstance(entry, dict) else entry
        raise CheckpointError(f"{where} has {quoted(found)}, expected dtype, shape and data_offsets")
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        found = dtype if isinstance(dtype, str) and _DTYPE_NAME.fullmatch(dtype) else quoted(dtype)
        raise CheckpointError(f"{where} has dtype {found}, expected BF16, F16 or F32")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _is_counts(shape) or len(shape) > _MAX_DIMS:
        raise CheckpointError(
            f"{where} has shape {quoted(shape)}, expected up to {_MAX_DIMS} whole numbers from 0"
        )
    if not _is_counts(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where} has data_offsets {quoted(offsets)}, expected two whole numbers")
    begin, end = offsets
    if begin > end:
        raise CheckpointError(f"{where} begins at byte {begin} of the data and ends before it, at {end}")
    if 0 in shape:
        raise CheckpointError(f"{where} has shape {shape}, expected no empty dimension")
    nbytes = math.prod(shape) * DTYPE_BYTES[dtype]  # Python's integers do not overflow
    if end - begin != nbytes:
        raise CheckpointError(f"{where} has {end - begin} bytes, but {dtype} of shape {shape} takes {nbytes}")
    if data + end > file.size:
        raise CheckpointError(
            f"{where} ends at byte {data + end}, but the file has {file.size} bytes: is it cut short?"
        )
    return TensorInfo(name, cast(Dtype, dtype), tuple(shape), file.path, data + begin, nbytes)


def _is_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _check_coverage(infos: list[TensorInfo], data: int, file: SourceFile) -> None:
    """The tensors, in order of offset, fill the data section: no overlap, no hole, nothing after them."""
    where = shown(file.path)
    if not infos:
        raise CheckpointError(f"{where}: holds no tensors")
    expected, before = data, None
    for info in infos:
        if info.offset < expected and before is not None:
            raise CheckpointError(
                f"{where}: tensor {quoted(info.name)} begins at byte {info.offset}, "
                f"inside tensor {quoted(before.name)}, which ends at {expected}"
            )
        if info.offset > expected:
            raise CheckpointError(
                f"{where}: bytes {expected} to {info.offset}, before tensor {quoted(info.name)}, "
                "belong to no tensor"
            )
        expected, before = info.offset + info.nbytes, info
    if expected != file.size:
        raise CheckpointError(
            f"{where}: its last tensor ends at byte {expected}, but the file has {file.size} bytes"
        )
