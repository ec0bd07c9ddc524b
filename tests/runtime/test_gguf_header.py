# SPDX-License-Identifier: Apache-2.0
"""A GGUF's header against the gguf package's reading of it; and whatever lies is refused at once."""

from __future__ import annotations

import ctypes
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest

from pocketphi.runtime import bundle as bundles
from pocketphi.runtime.errors import BundleError, CheckpointError
from pocketphi.runtime.gguf_header import BLOCKS, Array, read_header, text_spec

from ..conftest import Converted
from ..gguf_bytes import u32, u64

MEMBERS = [("phi4-nano", "Q4_K_M"), ("phi35-mini", "Q8_0"), ("phi4-14b", "F16"), ("phi4-mini", "Q4_0")]
ROPE_APPROXIMATE = ("theta", "attention_factor", "short_factor", "long_factor")


@pytest.mark.parametrize(("member", "recipe"), MEMBERS)
def test_the_header_is_what_the_gguf_package_reads(member: str, recipe: str, converted: Converted) -> None:
    bundle = bundles.load(converted(member, recipe))
    path = bundle.path(bundle.decoder)
    header, reader = read_header(path), gguf.GGUFReader(path)
    assert [
        (t.name, t.shape, t.type_id, t.offset, t.n_values, t.n_bytes) for t in header.tensors.values()
    ] == [
        (
            t.name,
            tuple(map(int, t.shape)),
            int(t.tensor_type),
            int(t.data_offset),
            int(t.n_elements),
            t.n_bytes,
        )
        for t in reader.tensors
    ]
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert list(header.keys) == list(fields)
    for name, field in fields.items():
        value, found = field.contents(), header.keys[name]
        if not isinstance(value, list):
            assert (found, header.kinds[name]) == (value, int(field.types[0]))
        elif isinstance(value[0], str):
            assert [s.decode("utf-8") for s in header.strings(name)] == value
        else:
            assert isinstance(found, Array) and (found.count, found.kind) == (len(value), int(field.types[1]))


@pytest.mark.parametrize(("member", "recipe"), MEMBERS)
def test_the_shape_is_the_one_of_bundle_json(member: str, recipe: str, converted: Converted) -> None:
    bundle = bundles.load(converted(member, recipe))
    found, wanted = text_spec(read_header(bundle.path(bundle.decoder))), bundle.text
    assert found.rope.theta == pytest.approx(wanted.rope.theta, rel=1e-7)  # float32 in the file
    assert found.rope.attention_factor == pytest.approx(wanted.rope.attention_factor, rel=1e-7)
    assert found.rms_eps == pytest.approx(wanted.rms_eps, rel=1e-7)
    assert found.rope.is_long_rope == wanted.rope.is_long_rope
    rope = replace(wanted.rope, **{f: getattr(found.rope, f) for f in ROPE_APPROXIMATE})
    assert found == replace(wanted, rms_eps=found.rms_eps, rope=rope)


def test_block_sizes_are_ggmls() -> None:
    library: Any = llama_cpp.llama_cpp._lib
    size, block = library["ggml_type_size"], library["ggml_blck_size"]
    size.restype, block.restype = ctypes.c_size_t, ctypes.c_int64
    found = {i: (block(i), size(i)) for i in range(43)}  # GGML_TYPE_COUNT
    assert {i: sizes for i, sizes in found.items() if sizes[0]} == {i: b[1:] for i, b in BLOCKS.items()}
    assert all(gguf.GGMLQuantizationType[name] == i for i, (name, _, _) in BLOCKS.items() if i < 42)


def test_an_adapter_is_no_model(converted: Converted) -> None:
    bundle = bundles.load(converted("phi4-nano", "Q4_0"))
    with pytest.raises(BundleError, match="is an adapter, expected a model"):
        text_spec(read_header(bundle.path(bundle.adapters["vision"].file)))


def test_what_lacks_a_number_or_is_of_another_kind(nano: Path) -> None:
    bundle = bundles.load(nano)
    header = read_header(bundle.path(bundle.decoder))
    keys = dict(header.keys)
    for changed, want in (
        (replace(header, keys=keys | {"general.architecture": "llama"}), "architecture 'llama'"),
        (replace(header, keys={}), "architecture 'none'"),
        (replace(header, keys={"general.architecture": "phi3"}), r"has no number 'phi3\."),
        (replace(header, keys=keys | {"phi3.block_count": 0}), "block_count 0, expected 1"),
        (replace(header, keys=keys | {"phi3.block_count": True}), r"has no number 'phi3\.block_count'"),
        (replace(header, keys=keys | {"phi3.attention.head_count": -1}), "head_count -1"),
        (replace(header, tensors={}), r"has no tensor 'token_embd\.weight'"),
    ):
        with pytest.raises(BundleError, match=want):
            text_spec(changed)


# ---- small files, as the gguf package writes them, and as nobody should ----


def sample(path: Path) -> bytes:
    """A small file with every kind of value."""
    writer = gguf.GGUFWriter(path, "phi3")
    writer.add_uint8("u8", 200)
    writer.add_int64("i64", -5)
    writer.add_float32("f32", 0.5)
    writer.add_bool("yes", True)
    writer.add_string("text", "grüße")
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("texts", ["a", "bc", ""])
    writer.add_tensor("m", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("h", np.ones(2, np.float16))
    writer.add_tensor("v", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_reads_what_gguf_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    sample(path)
    header = read_header(path, CheckpointError)
    assert {key: value for key, value in header.keys.items() if not isinstance(value, Array)} == {
        "general.architecture": "phi3",
        "u8": 200,
        "i64": -5,
        "f32": 0.5,
        "yes": True,
        "text": "grüße",
    }
    assert header.strings("texts") == [b"a", b"bc", b""]
    assert header.array("numbers", "i32").count == 3
    assert {t.name: t.shape for t in header.tensors.values()} == {"m": (4, 3), "h": (2,), "v": (8,)}
    assert np.array_equal(header.float32("m"), np.arange(12, dtype=np.float32).reshape(3, 4))
    with pytest.raises(CheckpointError, match="is F16, expected F32"):
        header.float32("h")
    for key in ("numbers", "text", "gone"):
        with pytest.raises(CheckpointError, match=f"has no '{key}' that is an array of string"):
            header.strings(key)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = sample(tmp_path / "a.gguf")
    path = tmp_path / "cut.gguf"
    for n in range(len(whole)):  # the last tensor fills its padding
        path.write_bytes(whole[:n])
        with pytest.raises(BundleError) as caught:
            read_header(path)
        assert str(caught.value).startswith(f"{path}: ") and str(caught.value).isprintable()


def test_every_byte_may_be_another(tmp_path: Path) -> None:
    """Read or refused, never anything else: each byte of the header set to 0, 255 and off by one."""
    whole = sample(tmp_path / "a.gguf")
    start = read_header(tmp_path / "a.gguf").tensors["m"].offset
    path = tmp_path / "flipped.gguf"
    refused = 0
    for i in range(start):
        for byte in {0, 255, (whole[i] + 1) % 256} - {whole[i]}:
            path.write_bytes(whole[:i] + bytes([byte]) + whole[i + 1 :])
            try:
                header = read_header(path)
                for tensor in header.tensors.values():
                    assert tensor.offset + tensor.n_bytes <= header.size
            except BundleError as exc:
                assert str(exc).isprintable()
                refused += 1
    assert refused > start  # of some three times as many


def test_a_file_that_changes_under_the_reader(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    whole = sample(path)
    header = read_header(path)
    path.write_bytes(whole[:200])
    with pytest.raises(BundleError, match="ends while tensor 'm' is read"):
        header.float32("m")
    path.write_bytes(b"\xff" * len(whole))
    with pytest.raises(BundleError, match="changed while texts was read"):
        header.strings("texts")


HEAD = b"GGUF" + u32(3)


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return u64(len(name)) + name + u32(kind) + value


def tensor(dims: list[int], offset: int = 0, kind: int = 0, name: bytes = b"t") -> bytes:
    return u64(len(name)) + name + u32(len(dims)) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


def keyed(*keys: bytes) -> bytes:
    return HEAD + u64(0) + u64(len(keys)) + b"".join(keys) + bytes(64)


def tabled(*tensors: bytes) -> bytes:
    return HEAD + u64(len(tensors)) + u64(0) + b"".join(tensors) + bytes(64)


HOSTILE = {
    "empty": b"",
    "one byte": b"G",
    "magic only": b"GGUF",
    "other magic": b"GGML" + u32(3) + u64(0) * 2,
    "big-endian": b"GGUF" + struct.pack(">I", 3) + u64(0) * 2,
    "version 1": b"GGUF" + u32(1) + u64(0) * 2,
    "2^63 tensors": HEAD + u64(2**63) + u64(0) + bytes(64),
    "2^64-1 keys": HEAD + u64(0) + u64(2**64 - 1) + bytes(64),
    "2^31 keys": HEAD + u64(0) + u64(2**31) + bytes(64),
    "long key": HEAD + u64(0) + u64(1) + u64(2**63) + bytes(64),
    "long text": keyed(key(b"k", 8, u64(2**40))),
    "2^63 array": keyed(key(b"k", 9, u32(0) + u64(2**63))),
    "2^63 text array": keyed(key(b"k", 9, u32(8) + u64(2**63))),
    "a text of 2^64-1 in an array": keyed(key(b"k", 9, u32(8) + u64(2) + u64(2**64 - 1) + u64(0))),
    "array of arrays": keyed(key(b"k", 9, u32(9) + u64(1))),
    "unknown value": keyed(key(b"k", 99, bytes(8))),
    "key twice": keyed(key(b"k", 0, b"1"), key(b"k", 0, b"1")),
    "not UTF-8": keyed(key(b"\xff\xfe", 0, b"1")),
    "control character": keyed(key(b"a\nb", 0, b"1")),
    "alignment 0": keyed(key(b"general.alignment", 4, u32(0))),
    "alignment 3": keyed(key(b"general.alignment", 4, u32(3))),
    "alignment 2^31": keyed(key(b"general.alignment", 4, u32(2**31))),
    "alignment text": keyed(key(b"general.alignment", 8, u64(2) + b"32")),
    "alignment true": keyed(key(b"general.alignment", 7, b"\1")),
    "alignment array": keyed(key(b"general.alignment", 9, u32(4) + u64(1) + u32(32))),
    "alignment 32.0": keyed(key(b"general.alignment", 6, struct.pack("<f", 32.0))),
    "no dimensions": tabled(tensor([])),
    "5 dimensions": tabled(tensor([1] * 5)),
    "dimension 0": tabled(tensor([4, 0])),
    "product overflow": tabled(tensor([2**42 + 1, 2**22])),
    "crooked offset": tabled(tensor([4], 7)),
    "offset beyond": tabled(tensor([4], 2**62)),
    "hole": tabled(tensor([4]), tensor([4], 64, name=b"u")),
    "overlap": tabled(tensor([4]), tensor([4], 0, name=b"u")),
    "half a block": tabled(tensor([16], kind=8)),
    "unknown type": tabled(tensor([4], kind=99)),
    "tensor twice": tabled(tensor([4]), tensor([4], 32)),
    "name of 64 bytes": tabled(tensor([4], name=b"n" * 64)),
    "data beyond the end": tabled(tensor([1 << 30])),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(case: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(HOSTILE[case])
    with pytest.raises(BundleError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.isprintable() and len(message) < len(str(path)) + 150


def test_a_header_without_end(tmp_path: Path) -> None:
    """A sparse file of 1 TiB: no more than a header may have is read."""
    path = tmp_path / "huge.gguf"
    path.write_bytes(keyed(key(b"k", 8, u64(1 << 39))))
    os.truncate(path, 1 << 40)
    with pytest.raises(BundleError, match="of 549755813888 bytes, expected at most"):
        read_header(path)
    path.write_bytes(keyed(key(b"k", 9, u32(0) + u64((64 << 20) - 8))))
    os.truncate(path, 1 << 40)
    with pytest.raises(BundleError, match="has a header of more than 64 MiB"):
        read_header(path)


def test_places_that_are_not_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path, want in (
        (tmp_path, "is not a regular file"),
        (tmp_path / "none", "no such file"),
        (tmp_path / "pipe", "is not a regular file"),
        (Path("/dev/zero"), "is not a regular file"),
        (tmp_path / "loop", "cannot be opened"),
        (tmp_path / ("x" * 300), "cannot be opened"),
        (Path("a\0b"), "cannot be opened"),
    ):
        with pytest.raises(BundleError, match=want) as caught:
            read_header(path)
        assert str(caught.value).isprintable()
