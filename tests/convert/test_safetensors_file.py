# SPDX-License-Identifier: Apache-2.0
"""Headers: every way in which one can lie, every truncation, random damage, the reference writer's files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pocketphi.convert.safetensors_file import TensorInfo, read_header
from pocketphi.runtime.errors import CheckpointError

NANO = Path(__file__).parents[2] / "nano" / "checkpoint"


def entry(begin: int = 0, end: int = 12, **changes: object) -> dict[str, object]:
    return {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]} | changes


GOOD = {"a": entry(), "b": {"dtype": "F32", "shape": [2], "data_offsets": [12, 20]}}  # 20 bytes of data


def write(path: Path, header: object, n_data: int = 20, *, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + bytes(n_data))
    return path


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        read_header(path)
    text = str(error.value)
    assert error.value.exit_code == 5
    assert len(text.splitlines()) == 1 and text.isprintable() and len(text) < 1000
    assert text.startswith(f"{path}: ")
    return text


def test_a_valid_file(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", {"__metadata__": {"format": "pt"}} | GOOD)
    start = path.stat().st_size - 20
    infos = read_header(path)
    assert infos == {
        "a": TensorInfo("a", "BF16", (2, 3), path, start, 12),
        "b": TensorInfo("b", "F32", (2,), path, start + 12, 8),
    }
    assert [(i.rows, i.cols) for i in infos.values()] == [(2, 3), (2, 1)]


def test_rows_and_cols() -> None:
    sizes = {(): (1, 1), (5,): (5, 1), (5, 4): (5, 4), (5, 4, 3, 2): (5, 24)}
    for shape, want in sizes.items():
        info = TensorInfo("t", "F32", shape, Path("x"), 0, 0)
        assert (info.rows, info.cols) == want


def test_padding_and_any_order_are_valid(tmp_path: Path) -> None:
    raw = json.dumps({"b": GOOD["b"], "a": GOOD["a"]}).encode() + b"   "
    assert list(read_header(write(tmp_path / "m.safetensors", raw))) == ["a", "b"]  # in order of data


def test_scalar(tmp_path: Path) -> None:
    header = {"s": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}
    assert read_header(write(tmp_path / "m.safetensors", header, 4))["s"].shape == ()


LENGTHS = {
    "empty": (b"", "has 0 bytes"),
    "one byte": (b"\x01", "has 1 bytes"),
    "seven bytes": (b"\x02" + bytes(6), "has 7 bytes"),
    "length only": (bytes(8), "its header has 0 bytes"),
    "length 1": (b"\x01" + bytes(7) + b"{", "its header has 1 bytes"),
    "one too long": (b"\x03" + bytes(7) + b"{}", "its header has 3 bytes, expected 2 to 2"),
    "2^31": ((1 << 31).to_bytes(8, "little") + b"{}", "its header has 2147483648 bytes"),
    "2^63": ((1 << 63).to_bytes(8, "little") + b"{}", "its header has 9223372036854775808 bytes"),
    "2^64-1": (b"\xff" * 8 + b"{}", "its header has 18446744073709551615 bytes"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(40), "not a safetensors file"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
}


@pytest.mark.parametrize("case", LENGTHS)
def test_header_lengths(case: str, tmp_path: Path) -> None:
    raw, said = LENGTHS[case]
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw)
    assert said in refused(path)


def test_header_above_the_cap_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes((100_000_001).to_bytes(8, "little"))
    os.truncate(path, 1 << 40)  # the file is large enough for it
    assert "its header has 100000001 bytes, expected 2 to 100000000" in refused(path)


HEADERS: dict[str, tuple[object, str]] = {
    "no tensors": ({}, "holds no tensors"),
    "metadata only": ({"__metadata__": {"format": "pt"}}, "holds no tensors"),
    "array": ([], "header: is a JSON array, expected an object"),
    "not UTF-8": (b'{"\xff": 1}', "header: is not UTF-8 at byte 2"),
    "not JSON": (b'{"a": ', "header: is not valid JSON"),
    "junk after": (b"{} {}", "header: is not valid JSON"),
    "key twice": (b'{"a": 1, "a": 2}', "key 'a' stands twice"),
    "field twice": (b'{"a": {"dtype": "F32", "dtype": "F16"}}', "key 'dtype' stands twice"),
    "depth bomb": (b'{"a":' * 50_000, "nested too deeply"),
    "metadata is a list": (GOOD | {"__metadata__": []}, "__metadata__ is [], expected an object"),
    "metadata holds a number": (
        GOOD | {"__metadata__": {"n": 1}},
        "__metadata__ entry 'n' is 1, expected a string",
    ),
    "tensor is a list": ({"a": [1]}, "tensor 'a' has [1], expected dtype, shape and data_offsets"),
    "field missing": ({"a": {"dtype": "F32", "shape": []}}, "tensor 'a' has ['dtype', 'shape'], expected"),
    "field unknown": ({"a": entry(x=1)}, "tensor 'a' has ['data_offsets', 'dtype', 'shape', 'x'], expected"),
    "dtype is a number": ({"a": entry(dtype=3)}, "tensor 'a' has dtype 3, expected BF16, F16 or F32"),
    "dtype is a list": ({"a": entry(dtype=[])}, "tensor 'a' has dtype [], expected"),
    "dtype with line end": ({"a": entry(dtype="F\n32")}, "tensor 'a' has dtype 'F\\n32', expected"),
    "dtype in small letters": ({"a": entry(dtype="bf16")}, "tensor 'a' has dtype 'bf16', expected"),
    "shape is a number": ({"a": entry(shape=6)}, "tensor 'a' has shape 6, expected"),
    "shape is null": ({"a": entry(shape=None)}, "tensor 'a' has shape None, expected"),
    "shape is negative": ({"a": entry(shape=[-2, -3])}, "tensor 'a' has shape [-2, -3], expected"),
    "shape holds true": ({"a": entry(shape=[True, 6])}, "tensor 'a' has shape [True, 6], expected"),
    "shape holds 2.0": ({"a": entry(shape=[2.0, 3])}, "tensor 'a' has shape [2.0, 3], expected"),
    "shape holds text": ({"a": entry(shape=["2", 3])}, "tensor 'a' has shape ['2', 3], expected"),
    "nine dimensions": ({"a": entry(shape=[1] * 9)}, "tensor 'a' has shape a list of 9, expected up to 8"),
    "a million dimensions": (
        {"a": entry(shape=[9] * 1_000_000)},
        "has shape a list of 1000000, expected up to 8",
    ),
    "zero size": (
        {"a": entry(0, 0, shape=[0, 3])},
        "tensor 'a' has shape [0, 3], expected no empty dimension",
    ),
    # 2^32 * 2^32 * 2 bytes are 0 in 64 bits
    "product of 2^64": (
        {"a": entry(0, 0, shape=[1 << 32, 1 << 32])},
        f"tensor 'a' has 0 bytes, but BF16 of shape [4294967296, 4294967296] takes {1 << 65}",
    ),
    # (2^62 + 3) * 2 * 2 is 12 in 64 bits
    "product wraps to 12": ({"a": entry(shape=[(1 << 62) + 3, 2])}, "tensor 'a' has 12 bytes, but"),
    "product of 2^500": ({"a": entry(shape=[(1 << 63) - 1] * 8)}, "tensor 'a' has 12 bytes, but"),
    "dimension of 2^63": (
        {"a": entry(shape=[1 << 63])},
        "tensor 'a' has shape [9223372036854775808], expected",
    ),
    "dimension of 60 digits": ({"a": entry(shape=[10**60] * 8)}, "tensor 'a' has shape [1000000"),
    "wrong size": ({"a": entry(0, 10)}, "tensor 'a' has 10 bytes, but BF16 of shape [2, 3] takes 12"),
    "wrong size for dtype": (
        {"a": entry(dtype="F32")},
        "tensor 'a' has 12 bytes, but F32 of shape [2, 3] takes 24",
    ),
    "one offset": ({"a": entry(data_offsets=[12])}, "tensor 'a' has data_offsets [12], expected two"),
    "three offsets": (
        {"a": entry(data_offsets=[0, 1, 2])},
        "tensor 'a' has data_offsets [0, 1, 2], expected two",
    ),
    "offsets are text": (
        {"a": entry(data_offsets="0,12")},
        "tensor 'a' has data_offsets '0,12', expected two",
    ),
    "negative offset": ({"a": entry(-4, 8)}, "tensor 'a' has data_offsets [-4, 8], expected two"),
    "offset is true": (
        {"a": entry(data_offsets=[True, 13])},
        "tensor 'a' has data_offsets [True, 13], expected",
    ),
    "end before begin": (
        {"a": entry(12, 0)},
        "tensor 'a' begins at byte 12 of the data and ends before it, at 0",
    ),
    "past the end": ({"a": entry(12, 24)}, "tensor 'a' ends at byte"),
    "far past the end": ({"a": entry(1 << 62, (1 << 62) + 12)}, "tensor 'a' ends at byte 461168601842738"),
    "overlap": ({"a": entry(), "b": entry(8, 20)}, "tensor 'b' begins at byte"),
    "the same bytes twice": ({"a": entry(), "b": entry()}, "inside tensor 'a', which ends at"),
    "one inside another": (
        {"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}, "b": entry(4, 16)},
        "inside tensor 'a', which ends at",
    ),
    "hole at the start": ({"a": entry(4, 16)}, "before tensor 'a', belong to no tensor"),
    "hole between": (
        {"a": entry(0, 2, shape=[1]), "b": entry(8, 20)},
        "before tensor 'b', belong to no tensor",
    ),
    "bytes after the end": ({"a": entry()}, "its last tensor ends at byte"),
    "name with line ends": (
        {"x\n\r\x1b[2J\u2028": entry(0, 1)},
        "tensor 'x\\n\\r\\x1b[2J\\u2028' has 1 bytes",
    ),
    "name of 100,000 letters": ({"n" * 100_000: entry(0, 1)}, "…nnnnnnnnnnnnnnnnnnn' has 1 bytes"),
    "name with half a pair": (b'{"\\ud800": 1}', "half of a surrogate pair"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_lie(case: str, tmp_path: Path) -> None:
    header, said = HEADERS[case]
    assert said in refused(write(tmp_path / "m.safetensors", header))


@pytest.mark.parametrize(
    "dtype",
    [
        "I64",
        "I32",
        "I16",
        "I8",
        "U8",
        "U16",
        "U32",
        "U64",
        "BOOL",
        "F64",
        "F8_E4M3",
        "F8_E5M2",
        "F4",
        "C64",
        "F128",
    ],
)
def test_dtypes_that_are_not_weights(dtype: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", {"model.norm.weight": entry(dtype=dtype)})
    assert refused(path) == f"{path}: tensor 'model.norm.weight' has dtype {dtype}, expected BF16, F16 or F32"


def test_every_truncation(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", GOOD)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        refused(path)
    path.write_bytes(whole + b"\0")
    refused(path)
    path.write_bytes(whole)
    read_header(path)


def test_random_damage_is_an_error_or_a_valid_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    path = write(tmp_path / "m.safetensors", {"__metadata__": {"format": "pt"}} | GOOD)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    accepted = 0
    for _ in range(2000):
        damaged = whole.copy()
        for at in rng.integers(0, len(whole) - 20, rng.integers(1, 4)):
            # Half the time a character JSON cares about, for such damage gets furthest.
            damaged[at] = rng.choice(list(b'0123456789[]{},":')) if rng.random() < 0.5 else rng.integers(256)
        path.write_bytes(damaged.tobytes())
        try:
            infos = read_header(path)
        except CheckpointError as error:
            assert len(str(error).splitlines()) == 1 and str(error).isprintable()
            continue
        accepted += 1
        assert sum(info.nbytes for info in infos.values()) == 20
        assert all(info.offset + info.nbytes <= len(whole) for info in infos.values())
    assert 0 < accepted < 1000  # names and metadata may change; most damage must be seen


def test_the_reference_writer(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    arrays: dict[str, Any] = {
        "half": rng.normal(size=(3, 5)).astype(np.float16),
        "single": rng.normal(size=(7,)).astype(np.float32),
        "cube": rng.normal(size=(2, 3, 4)).astype(np.float32),
    }
    path = tmp_path / "m.safetensors"
    save_file(arrays, path, metadata={"format": "np"})
    raw, infos = path.read_bytes(), read_header(path)
    assert set(infos) == set(arrays)
    for name, array in arrays.items():
        info = infos[name]
        assert info.shape == array.shape
        assert raw[info.offset : info.offset + info.nbytes] == array.tobytes()


def test_nano() -> None:
    infos = read_header(NANO / "model.safetensors")
    # 4 layers of 6 tensors, the embedding and the last norm are the decoder; the rest are the encoders.
    assert sum(name.startswith("model.layers.") for name in infos) == 24
    assert infos["model.embed_tokens.weight"].shape == (4096, 256)
    assert {info.dtype for info in infos.values()} == {"BF16"}
