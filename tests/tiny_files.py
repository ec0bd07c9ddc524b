# SPDX-License-Identifier: Apache-2.0
"""safetensors files by hand: any dtype without torch, and headers that hostile tests can bend."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

DType = Literal["bf16", "f16", "f32"]
Float32 = npt.NDArray[np.float32]

CODES: dict[DType, str] = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
ITEM_BYTES: dict[DType, int] = {"bf16": 2, "f16": 2, "f32": 4}


class Entry(NamedTuple):
    """One tensor as it is stored."""

    code: str  # "BF16", "F16", "F32"
    shape: tuple[int, ...]
    data: bytes  # little-endian, row-major


def encode(value: Float32, dtype: DType) -> Entry:
    """Store a float32 array; bf16 truncates, so the value must be one that bf16 can hold."""
    if dtype == "bf16":
        data = (value.view(np.uint32) >> 16).astype("<u2").tobytes()
    else:
        data = value.astype("<f2" if dtype == "f16" else "<f4").tobytes()
    return Entry(CODES[dtype], value.shape, data)


def decode(entry: Entry) -> Float32:
    """The stored tensor as float32."""
    if entry.code == "BF16":
        value = (np.frombuffer(entry.data, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        value = np.frombuffer(entry.data, {"F16": "<f2", "F32": "<f4"}[entry.code]).astype(np.float32)
    return value.reshape(entry.shape)


def write_safetensors(
    path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None
) -> None:
    """Write entries in name order, header padded with spaces to 8 bytes: the bytes the library writes."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name in sorted(entries):
        code, shape, data = entries[name]
        header[name] = {"dtype": code, "shape": shape, "data_offsets": (offset, offset + len(data))}
        offset += len(data)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.writelines(entries[name].data for name in sorted(entries))


def read_safetensors(path: Path) -> dict[str, Entry]:
    """Every tensor of a well-formed file."""
    raw = path.read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    found = {}
    for name, spec in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            begin, end = spec["data_offsets"]
            found[name] = Entry(spec["dtype"], tuple(spec["shape"]), raw[start + begin : start + end])
    return found


def read_checkpoint(folder: Path) -> dict[str, Float32]:
    """Every tensor of a folder's model files (not its adapters'), as float32."""
    return {
        name: decode(entry)
        for path in sorted(folder.glob("*.safetensors"))
        for name, entry in read_safetensors(path).items()
    }
