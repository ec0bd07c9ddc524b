# SPDX-License-Identifier: Apache-2.0
"""Quantized bytes against llama_model_quantize's, against themselves in pieces, and within derived bounds."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest

from pocketphi.convert import quantize as module
from pocketphi.convert.ggml_types import F16, F32, Q4_0, Q4_K, Q5_K, Q6_K, Q8_0, TYPES, GgmlType
from pocketphi.convert.quantize import Quantizer, check_values
from pocketphi.runtime.errors import CheckpointError, KernelError

from ..conftest import Converted

Float32 = npt.NDArray[np.float32]
HALF_ULP = 2.0**-11  # relative rounding of a float16


@pytest.fixture(scope="module")
def quantizer() -> Quantizer:
    return Quantizer()


def weights(rows: int, cols: int, seed: int = 4) -> Float32:
    """Heavy-tailed, as real weights are."""
    return np.random.default_rng(seed).standard_t(4, (rows, cols)).astype(np.float32)


def dequantized(data: npt.NDArray[np.uint8], kind: GgmlType) -> Float32:
    """By the gguf package, which knows the formats independently of ggml's C."""
    found: Float32 = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(kind.id))
    return found


@pytest.mark.parametrize("kind", TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("weighted", [False, True])
def test_pieces_give_the_same_bytes(quantizer: Quantizer, kind: GgmlType, weighted: bool) -> None:
    rows = weights(37, 768)
    importance = np.random.default_rng(5).random(768, np.float32) if weighted else None
    whole = quantizer.quantize(rows, kind, importance)
    assert whole.shape == (37, kind.row_bytes(768))
    for piece in (1, 5, 36):
        parts = [quantizer.quantize(rows[i : i + piece], kind, importance) for i in range(0, 37, piece)]
        assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("kind", [Q4_0, Q8_0, Q4_K, Q5_K, Q6_K], ids=lambda t: t.name)
def test_bytes_are_those_of_llama_model_quantize(
    quantizer: Quantizer, kind: GgmlType, converted: Converted, tmp_path: Path
) -> None:
    """Every linear of phi4-nano, from our F32 file, "pure": one type everywhere."""
    source = converted("phi4-nano", "F32") / "backbone-F32.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = {"Q4_0": 2, "Q8_0": 7, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18}[kind.name]
    params.pure, params.nthread = True, 2
    target = tmp_path / "theirs.gguf"
    assert (
        llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) == 0
    )
    floats = {t.name: t for t in gguf.GGUFReader(source).tensors}
    compared = 0
    for theirs in gguf.GGUFReader(target).tensors:
        if theirs.tensor_type == kind.id:
            rows = np.array(floats[theirs.name].data)
            assert np.array_equal(quantizer.quantize(rows, kind), theirs.data), theirs.name
            compared += 1
    assert compared == 17  # the embedding and 4 layers of 4 linears


@pytest.mark.parametrize("kind", [Q4_0, Q8_0], ids=lambda t: t.name)
def test_error_of_plain_blocks(quantizer: Quantizer, kind: GgmlType) -> None:
    """Q4_0 holds -8…7 times d = max / -8: the far end may be a step off. Q8_0 is off by half of max / 127.

    d is stored as float16: its rounding is multiplied by up to 8 or 127. Float32 rounding, a millionth of
    that, is covered by the last factor.
    """
    rows = weights(64, 1024)
    error = np.abs(dequantized(quantizer.quantize(rows, kind), kind) - rows).reshape(-1, 32)
    largest = np.abs(rows).reshape(-1, 32).max(axis=1)
    levels, steps_off = (8, 1.0) if kind is Q4_0 else (127, 0.5)
    bound = largest / levels * (steps_off + levels * HALF_ULP) * (1 + 1e-5)
    assert (error.max(axis=1) <= bound).all()


@pytest.mark.parametrize(
    ("kind", "block", "levels", "asymmetric"),
    [
        (Q4_K, 32, 15, True),
        (Q5_K, 32, 31, True),
        (Q6_K, 16, 63, False),
    ],
    ids=["Q4_K", "Q5_K", "Q6_K"],
)
def test_error_of_k_blocks(
    quantizer: Quantizer, kind: GgmlType, block: int, levels: int, asymmetric: bool
) -> None:
    """The search for a scale may clip single values, so the bound is on the mean: one step of an even grid.

    An even grid of `levels` steps over a sub-block's range (over twice its largest value for the symmetric
    Q6_K) is off by at most half a step. Sub-block scales have 6 bits (8 in Q6_K) and are off by at most
    1/126 of the super-block's largest: for every value that is at most another half of its largest step.
    """
    rows = weights(64, 1024)
    error = (dequantized(quantizer.quantize(rows, kind), kind) - rows).reshape(-1, 256)
    parts = rows.reshape(-1, 256 // block, block)
    if asymmetric:
        span = np.maximum(parts.max(2), 0) - np.minimum(parts.min(2), 0)
    else:
        span = 2 * np.abs(parts).max(2)
    step = span.max(axis=1) / levels
    assert (np.sqrt((error.astype(np.float64) ** 2).mean(axis=1)) <= step).all()


def test_half_precision_is_rounding(quantizer: Quantizer) -> None:
    rows = weights(8, 256)
    assert np.array_equal(quantizer.quantize(rows, F16).view("<f2"), rows.astype(np.float16))
    assert np.array_equal(quantizer.quantize(rows, F32).view("<f4"), rows)


@pytest.mark.parametrize("kind", [Q4_0, Q4_K, Q5_K, Q6_K], ids=lambda t: t.name)
def test_importances_act(quantizer: Quantizer, kind: GgmlType) -> None:
    """The weighted error, which the quantizer is to minimise, must come down."""
    rows = weights(64, 1024)
    importance = np.where(np.arange(1024) % 7 == 0, np.float32(100), np.float32(0.01))

    def weighted(data: npt.NDArray[np.uint8]) -> float:
        return float((importance * (dequantized(data, kind) - rows).astype(np.float64) ** 2).sum())

    plain, aware = quantizer.quantize(rows, kind), quantizer.quantize(rows, kind, importance)
    assert weighted(aware) < 0.9 * weighted(plain)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", TYPES, ids=lambda t: t.name)
def test_not_a_number_is_refused_wherever_it_is(kind: GgmlType, bad: float) -> None:
    for place in (0, 100, 511):
        rows = weights(2, 256)
        rows.reshape(-1)[place] = bad
        with pytest.raises(CheckpointError, match="finite") as caught:
            check_values(rows, kind, "blk", Path("model.safetensors"))
        assert str(caught.value).startswith("model.safetensors: tensor 'blk' holds ")


def test_values_beyond_float16_are_refused_but_in_f32() -> None:
    rows = weights(2, 256)
    rows[1, 3] = -65504
    check_values(rows, Q4_K, "blk", Path("f"))
    rows[1, 3] = -65505
    check_values(rows, F32, "blk", Path("f"))
    for kind in TYPES[1:]:
        with pytest.raises(CheckpointError, match="65504"):
            check_values(rows, kind, "blk", Path("f"))


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LIBRARY", "libnothing.so")
    with pytest.raises(KernelError, match="llama-cpp-python"):
        Quantizer()


def test_a_library_with_other_blocks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TYPES", (GgmlType("Q4_0", 2, 64, 36),))
    with pytest.raises(KernelError, match="Q4_0 has blocks"):
        Quantizer()
