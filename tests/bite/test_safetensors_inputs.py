# SPDX-License-Identifier: Apache-2.0
"""Checkpoints whose weight files are damaged or lie: `convert` names the file and what is wrong with it."""

# ruff: noqa: E501  (one case a line reads as a table)
from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import Bitten
from .table import Case, Place

Header = dict[str, Any]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM = "model.norm.weight"
HUGE = 1 << 40


def converting(spoil: Callable[[Path], object], member: str = "phi4-mini") -> Callable[[Place], list[str]]:
    """Convert a checkpoint after `spoil` has had it."""

    def make(place: Place) -> list[str]:
        source = place.checkpoint(member)
        spoil(source)
        return ["convert", str(source), "-o", str(place.path / "out"), "--quant", "Q8_0"]

    return make


def raw(change: Callable[[bytes], bytes]) -> Callable[[Place], list[str]]:
    """Change the weight file's bytes."""
    return converting(lambda source: (source / WEIGHTS).write_bytes(change((source / WEIGHTS).read_bytes())))


def packed(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def parts(content: bytes) -> tuple[Header, bytes]:
    start = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:start]), content[start:]


def header(change: Callable[[Header], object]) -> Callable[[Place], list[str]]:
    """Change the weight file's header; the data stays."""

    def spoil(content: bytes) -> bytes:
        entries, data = parts(content)
        change(entries)
        return packed(json.dumps(entries).encode(), data)

    return raw(spoil)


def norm(**changes: object) -> Callable[[Place], list[str]]:
    """Change what the header says of one tensor."""
    return header(lambda entries: entries[NORM].update(changes))


def twice(content: bytes) -> bytes:
    """The same name a second time."""
    entries, data = parts(content)
    text = json.dumps(entries)
    return packed((text[:-1] + f', "{NORM}": {json.dumps(entries[NORM])}}}').encode(), data)


def overlapping(entries: Header) -> None:
    """The last tensor begins in the one before it."""
    last = max((e for n, e in entries.items() if n != "__metadata__"), key=lambda e: e["data_offsets"])
    size = last["data_offsets"][1] - last["data_offsets"][0]
    last["data_offsets"] = [last["data_offsets"][0] - size, last["data_offsets"][0]]


def values(pattern: bytes) -> Callable[[Place], list[str]]:
    """Every number of one tensor is `pattern`, a bf16."""

    def spoil(content: bytes) -> bytes:
        entries, data = parts(content)
        begin, end = entries[NORM]["data_offsets"]
        return content[: len(content) - len(data)] + (
            data[:begin] + pattern * ((end - begin) // 2) + data[end:]
        )

    return raw(spoil)


def sharded(weight_map: Callable[[dict[str, str]], object]) -> Callable[[Place], list[str]]:
    """The one file as a shard, with an index that `weight_map` has changed."""

    def spoil(source: Path) -> None:
        (source / WEIGHTS).rename(source / "one.safetensors")
        entries, _ = parts((source / "one.safetensors").read_bytes())
        names = {name: "one.safetensors" for name in entries if name != "__metadata__"}
        weight_map(names)
        (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}), "utf-8")

    return converting(spoil)


def replaced(make: Callable[[Path], object]) -> Callable[[Place], list[str]]:
    """Something else where the weight file was."""

    def spoil(source: Path) -> None:
        (source / WEIGHTS).unlink()
        make(source / WEIGHTS)

    return converting(spoil)


def adapter(change: Callable[[Header], object]) -> Callable[[Place], list[str]]:
    """Change the header of a multimodal checkpoint's vision LoRA."""

    def spoil(source: Path) -> None:
        file = source / "vision-lora" / "adapter_model.safetensors"
        entries, data = parts(file.read_bytes())
        change(entries)
        file.write_bytes(packed(json.dumps(entries).encode(), data))

    return converting(spoil, "phi4-multimodal")


DEEP = b'{"a":' + b"[" * 200_000
CASES = [
    Case("empty", raw(lambda _: b""), 5, r"model\.safetensors: has 0 bytes, expected a safetensors file"),
    Case("1 byte", raw(lambda c: c[:1]), 5, r"model\.safetensors: has 1 bytes, expected"),
    Case("7 bytes", raw(lambda c: c[:7]), 5, r"model\.safetensors: has 7 bytes, expected"),
    Case("length only", raw(lambda c: c[:8]), 5, r"header has \d+ bytes, expected 2 to 2: cut short"),
    Case("header cut", raw(lambda c: c[:100]), 5, r"header has \d+ bytes, expected 2 to 92: cut short"),
    Case("header > file", raw(lambda c: struct.pack("<Q", HUGE) + c[8:]), 5, rf"header has {HUGE} bytes, expe"),
    Case("header 2^64-1", raw(lambda c: b"\xff" * 8 + c[8:]), 5, rf"header has {(1 << 64) - 1} bytes, expected"),
    Case("header 2^63", raw(lambda c: struct.pack("<Q", 1 << 63) + c[8:]), 5, rf"header has {1 << 63} bytes"),
    Case("header 0", raw(lambda c: struct.pack("<Q", 0) + c[8:]), 5, r"header has 0 bytes, expected 2 to"),
    Case("header > 100 MB", replaced(lambda p: sparse(p, 100_000_001)), 5, r"header has 100000001 bytes, expec"),
    Case("header not JSON", raw(lambda c: packed(b"{nonsense}", b"")), 5, r"header: .*JSON"),
    Case("header not UTF-8", raw(lambda c: packed(b'{"\xff": 1}', b"")), 5, r"header: .*UTF-8"),
    Case("header a list", raw(lambda c: packed(b"[1, 2]", b"")), 5, r"header: .*object"),
    Case("header deep", raw(lambda c: packed(DEEP, b"")), 5, r"header: .*(nest|deep|JSON)"),
    Case("header NaN", raw(lambda c: packed(b'{"a": NaN}', b"")), 5, r"header: .*NaN"),
    Case("header a number of 5,000 digits", raw(lambda c: packed(b'{"a": 1' + b"0" * 5000 + b"}", b"")), 5, "header"),
    Case("no tensors", raw(lambda c: packed(b"{}", b"")), 5, r"model\.safetensors: holds no tensors"),
    Case("duplicate key", raw(twice), 5, rf"{NORM}.* twice"),
    Case("data cut", raw(lambda c: c[:-1]), 5, r"ends at byte \d+, but the file has \d+ bytes: is it cut short"),
    Case("bytes after", raw(lambda c: c + b"\0"), 5, r"last tensor ends at byte \d+, but the file has \d+"),
    Case("overlap", header(overlapping), 5, r"begins at byte \d+, inside tensor|bytes, but"),
    Case("hole", header(lambda e: e.pop(NORM)), 5, r"belong to no tensor|last tensor ends"),
    Case("dtype unknown", norm(dtype="Q4"), 5, rf"{NORM}' has dtype Q4, expected BF16, F16 or F32"),
    Case("dtype F64", norm(dtype="F64"), 5, rf"{NORM}' has dtype F64, expected BF16, F16 or F32"),
    Case("dtype a number", norm(dtype=3), 5, rf"{NORM}' has dtype 3, expected BF16"),
    Case("dtype F32 of bf16 bytes", norm(dtype="F32"), 5, rf"{NORM}' has 512 bytes, but F32 of shape \[256\] takes 1"),
    Case("shape too large", norm(shape=[257]), 5, rf"{NORM}' has 512 bytes, but BF16 of shape \[257\] takes 514"),
    Case("shape overflows", norm(shape=[1 << 62, 1 << 62]), 5, rf"{NORM}' has 512 bytes, but BF16 of shape"),
    Case("shape wraps to right", norm(shape=[256, (1 << 63) - 1]), 5, rf"{NORM}' has 512 bytes, but BF16"),
    Case("shape 2^64", norm(shape=[1 << 64]), 5, rf"{NORM}' has shape .*expected up to 8 whole numbers"),
    Case("shape negative", norm(shape=[-256]), 5, rf"{NORM}' has shape \[-256\], expected"),
    Case("shape 0", norm(shape=[0]), 5, rf"{NORM}' has shape \[0\], expected no empty|512 bytes"),
    Case("shape of 9", norm(shape=[1] * 8 + [256]), 5, rf"{NORM}' has shape .*expected up to 8"),
    Case("shape text", norm(shape="256"), 5, rf"{NORM}' has shape .256., expected"),
    Case("shape true", norm(shape=[True, 256]), 5, rf"{NORM}' has shape .*expected"),
    Case("shape another", norm(shape=[2, 128]), 5, r"norm\.weight' has shape \[2, 128\], expected \[256\]"),
    Case("offsets reversed", norm(data_offsets=[512, 0]), 5, rf"{NORM}' begins at byte 512 of the data and ends"),
    Case("offsets negative", norm(data_offsets=[-512, 0]), 5, rf"{NORM}' has data_offsets .*expected two"),
    Case("offsets past the end", norm(data_offsets=[HUGE, HUGE + 512]), 5, rf"{NORM}' ends at byte \d+, but the f"),
    Case("offsets of one", norm(data_offsets=[0]), 5, rf"{NORM}' has data_offsets .*expected two whole"),
    Case("entry without dtype", header(lambda e: e[NORM].pop("dtype")), 5, rf"{NORM}' has .*expected dtype, shape"),
    Case("entry a list", header(lambda e: e.update({NORM: []})), 5, rf"{NORM}' has \[\], expected dtype, shape"),
    Case("metadata a list", header(lambda e: e.update(__metadata__=[])), 5, r"__metadata__ is \[\], expected"),
    Case("missing tensor", header(lambda e: e.update({"x": e.pop(NORM)})), 5, r"model\.norm\.weight|'x'"),
    Case("bf16 NaN", values(b"\xc0\x7f"), 5, r"model\.norm\.weight.*(NaN|not a number|finite)"),
    Case("bf16 infinity", values(b"\x80\x7f"), 5, r"model\.norm\.weight.*(inf|finite)"),
    Case("shard missing", sharded(lambda m: m.update({NORM: "two.safetensors"})), 5, r"two\.safetensors"),
    Case("shard ../", sharded(lambda m: m.update({NORM: "../x.safetensors"})), 5, r"index\.json: .*\.\./x\.safet"),
    Case("shard absolute", sharded(lambda m: m.update({NORM: "/etc/passwd"})), 5, r"index\.json: .*/etc/passwd"),
    Case("shard a pickle", sharded(lambda m: m.update({NORM: "one.bin"})), 5, r"index\.json: .*one\.bin"),
    Case("shard NUL", sharded(lambda m: m.update({NORM: "a\0b.safetensors"})), 5, r"index\.json: "),
    Case("shard a number", sharded(lambda m: m.update({NORM: 3})), 5, r"index\.json: .*3"),  # type: ignore[dict-item]
    Case("shard without it", sharded(lambda m: m.update(more="one.safetensors")), 5, r"'more'"),
    Case("index without one", sharded(lambda m: m.pop(NORM)), 5, rf"{NORM}"),
    Case("a directory", replaced(lambda p: p.mkdir()), 5, r"model\.safetensors: .*(regular|directory)"),
    Case("a FIFO", replaced(os.mkfifo), 5, r"model\.safetensors: .*regular file"),
    Case("/dev/zero", replaced(lambda p: p.symlink_to("/dev/zero")), 5, r"model\.safetensors: .*regular file"),
    Case("a link to nowhere", replaced(lambda p: p.symlink_to("gone")), 5, r"model\.safetensors: "),
    Case("a link to itself", replaced(lambda p: p.symlink_to(p)), 5, r"model\.safetensors: "),
    Case("an LFS pointer", raw(lambda c: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"), 5,
         r"model\.safetensors: .*LFS"),
    Case("a pickle alone", replaced(lambda p: p.with_name("pytorch_model.bin").write_bytes(b"\x80\x04.")), 5,
         r"(pickle|safetensors)"),
    Case("LoRA without B", adapter(lambda e: e.pop(next(n for n in e if "lora_B" in n))), 5, r"adapter_model\.safe"),
    Case("LoRA of an unknown module", adapter(lambda e: e.update({"x": e.pop(next(n for n in e if "lora_A" in n))})),
         5, r"adapter|'x'"),
    Case("as it should be", raw(lambda c: c), 0, r"out: checkpoint, Q8_0, \d files", leaves="^out/"),
]  # fmt: skip


def sparse(path: Path, length: int) -> None:
    """A file that announces a header of `length` bytes and has them, all zero, at no cost on disk."""
    with path.open("wb") as file:
        file.write(struct.pack("<Q", length))
        file.truncate(8 + length + 8)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_weight_file(case: Case, bitten: Bitten) -> None:
    bitten(case)
