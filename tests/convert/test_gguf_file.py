# SPDX-License-Identifier: Apache-2.0
"""The GGUF reader: what gguf writes it reads, and whatever lies is refused at once."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from pocketphi.convert.gguf_file import read_gguf
from pocketphi.runtime.errors import CheckpointError


def sample(path: Path) -> bytes:
    """A small file with every kind of value."""
    writer = gguf.GGUFWriter(path, "phi3")
    writer.add_uint8("u8", 200)
    writer.add_int64("i64", -5)
    writer.add_float32("f32", 0.5)
    writer.add_bool("yes", True)
    writer.add_string("text", "grüße")
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("texts", ["a", "bc"])
    writer.add_tensor("m", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("v", np.ones(5, np.float32))
    writer.add_tensor("h", np.ones(2, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_reads_what_gguf_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    sample(path)
    file = read_gguf(path)
    assert dict(file.keys) == {
        "general.architecture": "phi3",
        "u8": 200,
        "i64": -5,
        "f32": 0.5,
        "yes": True,
        "text": "grüße",
        "numbers": [1, 2, 3],
        "texts": ["a", "bc"],
    }
    assert {t.name: t.shape for t in file.tensors.values()} == {"m": (3, 4), "v": (5,), "h": (2,)}
    assert np.array_equal(file.float32("m"), np.arange(12, dtype=np.float32).reshape(3, 4))
    with pytest.raises(CheckpointError, match="expected F32"):
        file.float32("h")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = sample(tmp_path / "a.gguf")
    path = tmp_path / "cut.gguf"
    refused = 0
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        try:
            file = read_gguf(path)
            file.float32("m"), file.float32("v")
        except CheckpointError as exc:
            assert str(path) in str(exc) and "\n" not in str(exc)
            refused += 1
    # Only the bytes after "v", padding and a tensor that is not read, can be missing unnoticed.
    assert refused > len(whole) - 32 - 64


U32, U64 = struct.Struct("<I").pack, struct.Struct("<Q").pack
HEAD = b"GGUF" + U32(3)


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return U64(len(name)) + name + U32(kind) + value


def tensor(dims: list[int], offset: int = 0, kind: int = 0, name: bytes = b"t") -> bytes:
    return U64(len(name)) + name + U32(len(dims)) + b"".join(map(U64, dims)) + U32(kind) + U64(offset)


HOSTILE = {
    "empty": b"",
    "one byte": b"G",
    "magic only": b"GGUF",
    "other magic": b"GGML" + U32(3) + U64(0) * 2,
    "big-endian": b"GGUF" + struct.pack(">I", 3) + U64(0) * 2,
    "version 1": b"GGUF" + U32(1) + U64(0) * 2,
    "2^63 tensors": HEAD + U64(2**63) + U64(0) + bytes(64),
    "2^64-1 keys": HEAD + U64(0) + U64(2**64 - 1) + bytes(64),
    "2^31 keys": HEAD + U64(0) + U64(2**31) + bytes(64),
    "long key": HEAD + U64(0) + U64(1) + U64(2**63) + bytes(64),
    "long text": HEAD + U64(0) + U64(1) + key(b"k", 8, U64(2**40)) + bytes(64),
    "2^63 array": HEAD + U64(0) + U64(1) + key(b"k", 9, U32(0) + U64(2**63)) + bytes(64),
    "2^63 text array": HEAD + U64(0) + U64(1) + key(b"k", 9, U32(8) + U64(2**63)) + bytes(64),
    "array of arrays": HEAD + U64(0) + U64(1) + key(b"k", 9, U32(9) + U64(1)) + bytes(64),
    "unknown value": HEAD + U64(0) + U64(1) + key(b"k", 99, bytes(8)) + bytes(64),
    "key twice": HEAD + U64(0) + U64(2) + key(b"k", 0, b"1") * 2 + bytes(64),
    "not UTF-8": HEAD + U64(0) + U64(1) + key(b"\xff\xfe", 0, b"1") + bytes(64),
    "alignment 0": HEAD + U64(0) + U64(1) + key(b"general.alignment", 4, U32(0)) + bytes(64),
    "alignment 3": HEAD + U64(0) + U64(1) + key(b"general.alignment", 4, U32(3)) + bytes(64),
    "alignment 2^31": HEAD + U64(0) + U64(1) + key(b"general.alignment", 4, U32(2**31)) + bytes(64),
    "alignment text": HEAD + U64(0) + U64(1) + key(b"general.alignment", 8, U64(2) + b"32") + bytes(64),
    "alignment true": HEAD + U64(0) + U64(1) + key(b"general.alignment", 7, b"\1") + bytes(64),
    "no dimensions": HEAD + U64(1) + U64(0) + tensor([]) + bytes(64),
    "5 dimensions": HEAD + U64(1) + U64(0) + tensor([1] * 5) + bytes(64),
    "dimension 0": HEAD + U64(1) + U64(0) + tensor([4, 0]) + bytes(64),
    "product overflow": HEAD + U64(1) + U64(0) + tensor([2**42 + 1, 2**22]) + bytes(64),
    "crooked offset": HEAD + U64(1) + U64(0) + tensor([4], 7) + bytes(64),
    "offset beyond": HEAD + U64(1) + U64(0) + tensor([4], 2**62) + bytes(64),
    "tensor twice": HEAD + U64(2) + U64(0) + tensor([4]) * 2 + bytes(64),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(case: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(HOSTILE[case])
    with pytest.raises(CheckpointError) as caught:
        read_gguf(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 300


def test_data_beyond_the_end(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(HEAD + U64(1) + U64(0) + tensor([1 << 30]) + bytes(64))
    with pytest.raises(CheckpointError, match="beyond the end"):
        read_gguf(path).float32("t")


def test_places_that_are_not_files(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", Path("/dev/zero")):
        with pytest.raises(CheckpointError):
            read_gguf(path)
