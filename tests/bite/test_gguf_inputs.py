# SPDX-License-Identifier: Apache-2.0
"""Models that are none, that lie about themselves, or that llama.cpp would end the process for."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from pocketphi.runtime.bundle import load

from .. import gguf_bytes
from ..gguf_bytes import u32, u64
from .conftest import Bitten
from .spoilt_gguf import MODELS, ODDITIES
from .table import Case, Place, seal

Make = Callable[[Place], list[str]]
MEASURE = ["-p", "4", "-n", "1", "-r", "1", "-t", "1"]
HEAD = b"GGUF" + u32(3)
SHORT = (
    r"ends (within|beyond)|declares \d+ [\w ]+.*more than there is room for|has shape .* more than the file"
)


def backbone(model: Path) -> Path:
    bundle = load(model)
    return bundle.path(bundle.decoder)


def good(place: Place) -> Path:
    """Everybody's backbone, to read only."""
    return backbone(place.shared_model("phi4-nano", "Q8_0"))


def measured(path: Path) -> list[str]:
    return ["bench", "-m", str(path), *MEASURE]


def bare(what: str) -> Make:
    """A spoilt file on its own: it may say more than we know."""

    def make(place: Place) -> list[str]:
        parts = gguf_bytes.read(good(place))
        (MODELS | dict(ODDITIES))[what].edit(parts)
        return measured(place.write("m.gguf", parts.pack()))

    return make


def ours(what: str) -> Make:
    """A spoilt file in a model directory whose list of files is right."""

    def make(place: Place) -> list[str]:
        model = place.model()
        path = backbone(model)
        parts = gguf_bytes.read(path)
        (MODELS | dict(ODDITIES))[what].edit(parts)
        path.write_bytes(parts.pack())
        return ["run", "-m", str(seal(model)), "-p", "Hi", "-n", "1"]

    return make


def written(content: bytes) -> Make:
    return lambda place: measured(place.write("m.gguf", content))


def cut(numerator: int) -> Make:
    """The first twentieths of a model."""

    def make(place: Place) -> list[str]:
        raw = good(place).read_bytes()
        return measured(place.write("m.gguf", raw[: len(raw) * numerator // 20]))

    return make


def cut_to(n: int) -> Make:
    return lambda place: measured(place.write("m.gguf", good(place).read_bytes()[:n]))


def pipe(place: Place) -> Path:
    os.mkfifo(place.path / "pipe.gguf")
    return place.path / "pipe.gguf"


def listener(place: Place) -> Path:
    folder = os.open(place.path, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(f"/proc/self/fd/{folder}/socket.gguf")  # a socket's name has at most 107 bytes
    os.close(folder)
    return place.path / "socket.gguf"


def unreadable(place: Place) -> list[str]:
    path = place.write("m.gguf", good(place).read_bytes())
    path.chmod(0)
    return measured(path)


def link_to_itself(place: Place) -> list[str]:
    (place.path / "m.gguf").symlink_to("m.gguf")
    return measured(place.path / "m.gguf")


def shrunk(place: Place) -> list[str]:
    """A directory's file that became shorter, and nothing else."""
    model = place.model()
    path = backbone(model)
    path.write_bytes(path.read_bytes()[:-1])
    return ["run", "-m", str(model), "-p", "Hi", "-n", "1"]


def not_finite(tensor: str) -> Make:
    """Blocks whose scales are NaN: what all readers let pass, and the logits show."""

    def make(place: Place) -> list[str]:
        model = place.model()
        path = backbone(model)
        parts = gguf_bytes.read(path)
        part = parts.part(tensor)
        part.data = b"\xff" * len(part.data)
        path.write_bytes(parts.pack())
        return ["run", "-m", str(seal(model)), "-p", "Hi", "-n", "1"]

    return make


FILES = [
    Case("empty", written(b""), 3, "is not a GGUF file"),
    Case("one byte", written(b"G"), 3, "is not a GGUF file"),
    Case("magic only", written(b"GGUF"), 3, "ends within its header"),
    Case("other magic", written(b"GGML" + u32(3) + u64(0) * 2), 3, "is not a GGUF file"),
    Case("big-endian", written(b"GGUF\0\0\0\3" + u64(0) * 2), 3, "is a big-endian GGUF file"),
    Case("zeros", written(bytes(1 << 20)), 3, "is not a GGUF file"),
    Case("no keys", written(HEAD + u64(0) * 2), 3, "has architecture 'none'|has no number"),
    *(
        Case(f"{n} keys", written(HEAD + u64(0) + u64(n) + bytes(99)), 3, r"declares \d+ keys")
        for n in (2**31, 2**63, 2**64 - 1)
    ),
    *(
        Case(f"{n} tensors", written(HEAD + u64(n) + u64(0) + bytes(99)), 3, r"declares \d+ tensors")
        for n in (2**31, 2**63, 2**64 - 1)
    ),
    # The first file of 43 bytes that kept the gguf package busy for ever.
    Case("2^63 values in 43 bytes",
         written((HEAD + u64(0) + u64(1) + u64(1) + b"k" + u32(9) + u32(0) + u64(2**63)).ljust(43, b"\0")),
         3, r"declares \d+ "),
    *(Case(f"{n} twentieths", cut(n), 3, SHORT) for n in range(1, 20)),
    *(Case(f"{n} bytes", cut_to(n), 3, SHORT) for n in (5, 8, 16, 23, 24, 40, 500)),
    Case("folder", lambda place: measured(place.path), 3, r"not a model directory"),
    Case("nothing there", lambda place: measured(place.path / "gone.gguf"), 3, "gone.gguf: no such"),
    Case("pipe", lambda place: measured(pipe(place)), 3, "no such model directory", max_seconds=10),
    Case("socket", lambda place: measured(listener(place)), 3, "no such model directory"),
    Case("/dev/zero", lambda place: measured(Path("/dev/zero")), 3, "no such model directory"),
    Case("a link to itself", link_to_itself, 3, r"m\.gguf"),
    *(
        Case(f"NaN in {name}", not_finite(f"{name}.weight"), 4, "gave logits that are not finite")
        for name in ("token_embd", "blk.1.attn_qkv", "blk.2.ffn_down", "blk.0.attn_norm")
    ),
    Case("shrunk", shrunk, 3, r"has \d+ bytes, bundle\.json says"),
]  # fmt: skip
BARE = [Case(what, bare(what), 3, rf"m\.gguf: .*({one.line})") for what, one in MODELS.items()]
STRICT = [
    *("block_count 3", "block_count 513", "3 heads", "width 512", "rope base 0", "a token twice", "experts"),
    *("a norm in F16", "a matrix of integers", "factors in F16", "alignment 16", "a zero in a key"),
    *ODDITIES.keys() - {"an unknown key"},
]
OURS = [
    Case(what, ours(what), 3, rf"gguf: .*({(MODELS | dict(ODDITIES))[what].said(foreign=False)})")
    for what in sorted(STRICT)
]


@pytest.mark.parametrize("case", FILES, ids=lambda case: case.id)
def test_file(case: Case, bitten: Bitten) -> None:
    bitten(case)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(bitten: Bitten) -> None:
    bitten(Case("unreadable", unreadable, 3, "Permission denied"))


@pytest.mark.parametrize("case", BARE, ids=lambda case: case.id)
def test_bare(case: Case, bitten: Bitten) -> None:
    bitten(case)


@pytest.mark.parametrize("case", OURS, ids=lambda case: case.id)
def test_ours(case: Case, bitten: Bitten) -> None:
    bitten(case)
