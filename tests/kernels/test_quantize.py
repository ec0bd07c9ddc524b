# SPDX-License-Identifier: Apache-2.0
"""Every quantizer variant this CPU has, against ggml's own bytes."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pocketphi import convert as converter
from pocketphi.convert import libpk
from pocketphi.convert.ggml_types import Q4_0, Q4_K, GgmlType
from pocketphi.convert.quantize import MAX_VALUE, Quantizer
from pocketphi.runtime import kernels
from pocketphi.runtime.errors import KernelError

from ..golden import cases

Float32 = npt.NDArray[np.float32]
Fill = Callable[[np.random.Generator, int], npt.NDArray[np.floating]]

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="ggml's multiply-adds are fused elsewhere"
)

VARIANTS = kernels.variants("quantize")
BLOCKS = 385  # odd: a variant that takes two blocks at once has one left
TYPES = pytest.mark.parametrize("kind", libpk.TYPES, ids=lambda t: t.name)


def normal(rng: np.random.Generator, n: int) -> Float32:
    return rng.standard_normal(n, np.float32)


def outlier(rng: np.random.Generator, n: int) -> Float32:
    x = 0.02 * normal(rng, n)
    x[rng.integers(0, 256, n // 256) + np.arange(0, n, 256)] = rng.choice([-MAX_VALUE, MAX_VALUE], n // 256)
    return x


def scaled(low: int, high: int, run: int) -> Fill:
    """Normal values times a power of ten that changes every `run` values."""
    return lambda rng, n: normal(rng, n) * 10.0 ** rng.integers(low, high, n // run).repeat(run)


def any_bits(rng: np.random.Generator, n: int) -> Float32:
    return np.nan_to_num(rng.integers(0, 2**32, n, np.uint32).view(np.float32), nan=1.0)


def bf16(rng: np.random.Generator, n: int) -> Float32:
    return ((0.05 * normal(rng, n)).view(np.uint32) & 0xFFFF0000).view(np.float32)


def around_zero_limit(rng: np.random.Generator, n: int) -> npt.NDArray[np.floating]:
    """Below 1e-15, ggml calls values zero: that number and its two neighbours."""
    limit = np.float32(1e-15)
    near = np.array([np.nextafter(limit, np.float32(0)), limit, np.nextafter(limit, np.float32(1))])
    return rng.choice(near, n // 16).repeat(16) * rng.choice([-1, 1], n)


FILLS: dict[str, Fill] = {
    "normal": lambda rng, n: 0.02 * normal(rng, n),
    "uniform": lambda rng, n: rng.uniform(-1, 1, n),
    "heavy tails": lambda rng, n: rng.standard_t(1, n),
    "bf16": bf16,
    "zero": lambda rng, n: np.zeros(n),
    "signed zeros": lambda rng, n: rng.choice([-0.0, 0.0], n),
    "constant blocks": lambda rng, n: normal(rng, n // 256).repeat(256),
    "constant sub-blocks": lambda rng, n: normal(rng, n // 16).repeat(16),
    "outlier": outlier,
    "positive": lambda rng, n: np.abs(normal(rng, n)),
    "negative": lambda rng, n: -np.abs(normal(rng, n)),
    "alternating": lambda rng, n: np.abs(normal(rng, n)) * np.tile([1, -1], n // 2),
    "square": lambda rng, n: np.tile([1, -1], n // 2),
    "small integers": lambda rng, n: rng.integers(-2, 3, n).astype(np.float32),  # ties everywhere
    "sparse": lambda rng, n: normal(rng, n) * (rng.random(n) < 0.03),
    "zero limit": around_zero_limit,
    "near the zero limit": scaled(-17, -12, 16),
    "scales that float16 loses": scaled(-8, -3, 32),
    "smallest normal": scaled(-39, -36, 32),  # where 15 / (max - min) becomes infinite
    "subnormal": lambda rng, n: normal(rng, n) * 1e-41,
    "mixed sub-blocks": scaled(-44, 4, 32),
    "mixed values": scaled(-44, 4, 1),
    "far from zero": lambda rng, n: -1000 + 6.1035e-5 * np.round(normal(rng, n)),  # steps of one ulp
    "quotients beyond 2^22": lambda rng, n: -65504 + np.abs(scaled(-5, 1, 32)(rng, n)),
    "any bits": any_bits,
}


@pytest.fixture(scope="module")
def own() -> libpk.BlockQuantizer:
    found = libpk.load()
    assert found is not None
    return found


@pytest.fixture(scope="module")
def ggml() -> Quantizer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(libpk, "LIBRARY", Path("nowhere"))
        return Quantizer()


def rows_of(fill: str, blocks: int = BLOCKS, seed: int = 6) -> Float32:
    with np.errstate(all="ignore"):  # products beyond float32's range, on both ends
        x = FILLS[fill](np.random.default_rng(seed), 256 * blocks)
        return np.clip(x, -MAX_VALUE, MAX_VALUE).astype(np.float32).reshape(blocks, 256)


def empty(rows: Float32, kind: GgmlType) -> npt.NDArray[np.uint8]:
    return np.zeros((len(rows), kind.row_bytes(rows.shape[1])), np.uint8)


@pytest.mark.parametrize("fill", FILLS)
@TYPES
def test_bytes_are_ggmls(own: libpk.BlockQuantizer, ggml: Quantizer, kind: GgmlType, fill: str) -> None:
    rows = rows_of(fill)
    want = ggml.quantize(rows, kind)
    for variant in VARIANTS:
        own.quantize(rows, kind, got := empty(rows, kind), variant)
        wrong = np.flatnonzero((got != want).any(axis=1))
        assert wrong.size == 0, f"{variant}: {wrong.size} blocks differ, first {wrong[0]}"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("blocks", [1, 2, 3, 8])
@TYPES
def test_nothing_outside_the_output_is_written(
    own: libpk.BlockQuantizer, ggml: Quantizer, kind: GgmlType, blocks: int, variant: str
) -> None:
    rows = rows_of("normal", blocks, seed=blocks)
    guarded = np.full((blocks + 2, kind.block_bytes), 0xA5, np.uint8)
    own.quantize(rows, kind, guarded[1:-1], variant)
    assert (guarded[[0, -1]] == 0xA5).all()
    assert np.array_equal(guarded[1:-1], ggml.quantize(rows, kind))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 65520.0, -65520.0])
def test_a_weight_that_float16_cannot_hold_is_refused(own: libpk.BlockQuantizer, bad: float) -> None:
    for place in (0, 255, 256, 767):
        rows = rows_of("normal", 3)
        rows.reshape(-1)[place] = bad
        with pytest.raises(KernelError, match=r"quantizing \[3, 256\] to Q4_K: a value is not finite"):
            own.quantize(rows, Q4_K, empty(rows, Q4_K))


def test_wrong_arguments_are_refused(own: libpk.BlockQuantizer) -> None:
    rows, out = rows_of("normal", 2), np.zeros((2, 144), np.uint8)
    for bad_rows, kind, bad_out, message in (
        (rows[:, :255].copy(), Q4_K, out, "not in whole blocks"),
        (rows[:0], Q4_K, out[:0], "not in whole blocks"),
        (rows, Q4_K, out[:1], "output does not fit"),
        (rows, Q4_K, np.zeros(289, np.uint8), "output does not fit"),
        (rows, Q4_0, out, "none of Q4_K, Q5_K and Q6_K"),
        (rows, Q4_K, rows.reshape(-1).view(np.uint8)[:288], "share memory"),
    ):
        with pytest.raises(KernelError, match=message):
            own.quantize(bad_rows, kind, bad_out)
    with pytest.raises(KernelError, match="no such variant"):
        own.quantize(rows, Q4_K, out, "sse9")


@pytest.mark.parametrize(
    ("mask", "found"), [("none", "same"), ("avx9", "POCKETPHI_CPU_MASK names an unknown")]
)
def test_the_mask_is_obeyed(mask: str, found: str) -> None:
    """A fresh process, because the mask is read once."""
    code = (
        "import numpy as np\nfrom pocketphi.convert import libpk\nfrom pocketphi.convert.quantize import *\n"
        "rows = np.random.default_rng(7).standard_normal((4, 256), np.float32)\nkind = libpk.TYPES[0]\n"
        "own = Quantizer()\nlibpk.LIBRARY = Path('nowhere')\nggml = Quantizer()\n"
        "try:\n print('same' if (own.quantize(rows, kind) == ggml.quantize(rows, kind)).all() else 'other')\n"
        "except KernelError as exc:\n print(exc)"
    )
    environment = os.environ | {"POCKETPHI_CPU_MASK": mask}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert found in done.stdout, done.stderr


def test_without_our_library_ggml_does_the_work(tmp_path: Path) -> None:
    assert libpk.load(tmp_path / "libpk.so") is None
    (tmp_path / "libpk.so").write_bytes(b"not a library")
    assert libpk.load(tmp_path / "libpk.so") is None
    assert libpk.load(Path(ctypes.__file__)) is None


def test_a_library_of_another_abi_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libpk, "ABI", libpk.ABI + 1)
    assert libpk.load() is None


def test_the_two_bindings_agree() -> None:
    assert libpk.ABI == kernels.ABI
    assert kernels.library_path() == libpk.LIBRARY


def test_a_model_is_the_same_without_our_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = cases.checkpoint("phi4-nano", tmp_path)
    options = converter.Options(recipe="Q4_K_M", encoders="fp32", name="phi4-nano")
    assert libpk.load() is not None
    converter.convert(checkpoint, tmp_path / "own", options)
    monkeypatch.setattr(libpk, "LIBRARY", tmp_path / "nowhere")
    assert libpk.load() is None
    converter.convert(checkpoint, tmp_path / "ggml", options)
    files = {p.name: p.read_bytes() for p in (tmp_path / "own").iterdir()}
    assert any(name.endswith(".gguf") for name in files)
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "ggml").iterdir()}
