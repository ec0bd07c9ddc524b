# SPDX-License-Identifier: Apache-2.0
"""Every matmul variant this CPU has, against float64 within a derived bound. gguf-py decodes the weights."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quant_shape_to_byte_shape

from pocketphi.runtime import kernels

Float64 = npt.NDArray[np.float64]
Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

QUANTIZED = (Type.Q4_0, Type.Q8_0, Type.Q4_K, Type.Q5_K, Type.Q6_K)
FLOATS = (Type.F16, Type.BF16, Type.F32)
SCALE_AT = {Type.Q4_0: [0], Type.Q8_0: [0], Type.Q4_K: [0, 2], Type.Q5_K: [0, 2], Type.Q6_K: [208]}  # bytes
COLUMNS = {Type.Q4_0: (96, 768), Type.Q8_0: (160, 256)} | dict.fromkeys(
    (Type.Q4_K, Type.Q5_K, Type.Q6_K), (512,)
)
FLOAT_COLUMNS = (77,)
BLOCK = 32  # columns of a dot product
STATUS = {"null": 1, "size": 3, "overlap": 4, "variant": 6, "type": 8}
NO_FLOATS = {"avxvnni", "avx512vnni", "neon_dotprod", "neon_i8mm"}
FLOATS_ALONE = {"avx512f", "neon"}

PAIRS = [
    pytest.param(kind, columns, variant, id=f"{kind.name}-{columns}-{variant}")
    for kind in (*QUANTIZED, *FLOATS)
    for columns in COLUMNS.get(kind, FLOAT_COLUMNS)
    for variant in kernels.variants("matmul")
    if variant not in (NO_FLOATS if kind in FLOATS else FLOATS_ALONE)
]
SHAPES = [(1, 1), (15, 3), (16, 16), (17, 17), (40, 33), (33, 130)]  # rows, tokens
FILLS = ["normal", "outlier", "constant", "zero", "large", "small"]


def weights_of(kind: Type, rows: int, columns: int) -> Bytes:
    """Rows of random bytes, whose float16 scales are replaced by moderate ones of either sign."""
    rng = np.random.default_rng(3)
    if kind in FLOATS:
        numbers = 0.1 * rng.standard_normal((rows, columns), np.float32)
        if kind == Type.F16:
            return numbers.astype(np.float16).view(np.uint8)
        return (
            numbers.view(np.uint8)
            if kind == Type.F32
            else (numbers.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
        )
    raw = rng.integers(0, 256, quant_shape_to_byte_shape((rows, columns), kind), np.uint8)
    blocks = raw.reshape(-1, GGML_QUANT_SIZES[kind][1])
    for at in SCALE_AT[kind]:
        scales = 0.01 * rng.standard_normal((len(blocks), 1))
        blocks[:, at : at + 2] = scales.astype("<f2").view(np.uint8)
    return blocks.reshape(raw.shape)


def decoded(kind: Type, raw: Bytes) -> tuple[Float64, Float64]:
    """Weights, and for each the size of its parts: scale * level and, in Q4_K and Q5_K, the minimum."""
    values = dequantize(raw, kind).astype(np.float64)
    if kind not in (Type.Q4_K, Type.Q5_K):
        return values, np.abs(values)
    parts = raw.copy().reshape(-1, GGML_QUANT_SIZES[kind][1])
    parts[:, 1] &= 0x7F  # d: no sign
    parts[:, 3] |= 0x80  # dmin: with one, so that it is added
    return values, dequantize(parts.reshape(raw.shape), kind).astype(np.float64)


def activations_of(fill: str, tokens: int, columns: int) -> Float32:
    x = np.random.default_rng(4).standard_normal((tokens, columns), np.float32)
    if fill == "outlier":
        x[:, ::61] *= 1000
    elif fill == "constant":
        x[:] = -0.3
    elif fill == "zero":
        x[:] = 0
    elif fill == "large":
        x *= np.float32(1e30)
    elif fill == "small":
        x *= np.float32(1e-30)
    return x


def rounded(kind: Type, x: Float32) -> Float64:
    """To 8 bits, in float32 as the contract has it, written a second time on purpose.

    A scale is for 256 columns where they can be divided so, in Q8_0 for 32.
    """
    blocks = x.reshape(len(x), -1, 256 if x.shape[1] % 256 == 0 and kind != Type.Q8_0 else 32)
    largest = np.abs(blocks).max(axis=2, keepdims=True)
    inverse = np.float32(127) / np.where(largest > 0, largest, np.float32(1))
    levels = np.where(largest > 0, np.rint(blocks * inverse), np.float32(0))
    assert levels.dtype == np.float32
    scales = largest / np.float32(127)
    near: Float64 = (scales.astype(np.float64) * levels).reshape(x.shape)
    return near


def expected(kind: Type, raw: Bytes, x: Float32) -> tuple[Float64, Float64]:
    """The product in float64 [tokens, rows], and how far a kernel may be from it.

    Scales of weights and integer dot products are exact. Each of a kernel's terms is rounded at most four
    times, gguf-py's weights twice; a sum once for each of up to two terms of 32 columns, or column of floats.
    Where the 16 terms of a shared scale are summed first, such a sum counts as one term.
    """
    values, sizes = decoded(kind, raw)
    exact = x.astype(np.float64) if kind in FLOATS else rounded(kind, x)
    terms = x.shape[1] if kind in FLOATS else x.shape[1] // BLOCK * 2
    return exact @ values.T, (terms + 6) * 2.0**-24 * (np.abs(exact) @ sizes.T)


def call(
    out: Float32, raw: Bytes, x: Float32, kind: int, *, variant: str | None = None, scale: float | None = None
) -> int:
    """The status of pk_matmul, which adds when there is a scale."""
    (rows, _), (tokens, columns) = raw.shape, x.shape
    name = None if variant is None else variant.encode()
    sizes = (rows, columns, tokens)
    pointers = (out.ctypes.data, out.size, raw.ctypes.data, raw.size, x.ctypes.data, x.size)
    return int(
        kernels._library().pk_matmul(*pointers, *sizes, int(kind), scale or 0.0, scale is not None, name)
    )


def multiply(kind: Type, raw: Bytes, x: Float32, variant: str | None = None) -> Float32:
    """The product [tokens, rows]; nothing around it is written."""
    n = len(x) * len(raw)
    memory = np.full(n + 128, 7, np.float32)
    out = memory[64 : 64 + n].reshape(len(x), len(raw))
    assert call(out, raw, x, kind, variant=variant) == 0
    assert (memory[:64] == 7).all() and (memory[64 + n :] == 7).all()
    return out


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize(("kind", "columns", "variant"), PAIRS)
def test_product_is_near_float64(kind: Type, columns: int, variant: str, fill: str) -> None:
    for rows, tokens in SHAPES:
        raw, x = weights_of(kind, rows, columns), activations_of(fill, tokens, columns)
        want, bound = expected(kind, raw, x)
        off = np.abs(multiply(kind, raw, x, variant) - want)
        assert (off <= bound).all(), f"{rows} rows, {tokens} tokens: {np.nanmax(off / bound)} of the bound"


@pytest.mark.parametrize(("kind", "columns", "variant"), PAIRS)
def test_product_is_added(kind: Type, columns: int, variant: str) -> None:
    scale = 2.5
    raw, x = weights_of(kind, 17, columns), activations_of("normal", 19, columns)
    before = np.random.default_rng(5).standard_normal((19, 17), np.float32)
    want, bound = expected(kind, raw, x)
    total = before + scale * want
    bound = scale * bound + 2 * 2.0**-24 * (np.abs(before) + np.abs(scale * want) + scale * bound)
    out = before.copy()
    assert call(out, raw, x, kind, variant=variant, scale=scale) == 0
    assert (np.abs(out - total) <= bound).all()


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda k: k.name)
def test_rounding_activations_costs_little(kind: Type) -> None:
    """Against float64 of normal activations as they are: the error's power over the product's."""
    raw, x = weights_of(kind, 64, 2048), activations_of("normal", 16, 2048)
    want = x.astype(np.float64) @ decoded(kind, raw)[0].T
    error = multiply(kind, raw, x) - want
    assert np.mean(error**2) <= 5e-4 * np.mean(want**2)


@pytest.mark.parametrize(("kind", "columns", "variant"), PAIRS)
def test_a_number_that_is_not_finite_stays_with_its_token(kind: Type, columns: int, variant: str) -> None:
    raw, x = weights_of(kind, 33, columns), activations_of("normal", 18, columns)
    clean = multiply(kind, raw, x, variant)
    x[3, columns // 2] = np.nan
    poisoned = multiply(kind, raw, x, variant)
    assert np.isnan(poisoned[3]).all()
    assert np.array_equal(np.delete(poisoned, 3, 0), np.delete(clean, 3, 0))


@pytest.mark.parametrize(("kind", "columns", "variant"), PAIRS)
def test_a_token_does_not_depend_on_the_others(kind: Type, columns: int, variant: str) -> None:
    raw, x = weights_of(kind, 33, columns), activations_of("normal", 131, columns)
    alone = np.vstack([multiply(kind, raw, x[t : t + 1], variant) for t in range(len(x))])
    for tokens in (18, 131):
        assert np.array_equal(multiply(kind, raw, x[:tokens], variant), alone[:tokens])


@pytest.mark.parametrize("variant", [v for v in kernels.variants("matmul") if v not in NO_FLOATS])
def test_every_float16_is_read(variant: str) -> None:
    """Subnormal, infinite, NaN: one row each. A zero loses its sign in the sum."""
    raw = np.arange(2**16, dtype="<u2").view(np.uint8).reshape(-1, 2)
    want = raw.view("<f2").reshape(-1).astype(np.float32)
    got = multiply(Type.F16, raw, np.ones((1, 1), np.float32), variant)
    assert np.array_equal(got[0], want, equal_nan=True)


@pytest.mark.parametrize("kind", (*QUANTIZED, *FLOATS), ids=lambda k: k.name)
def test_the_fastest_is_the_last_that_has_the_type(kind: Type) -> None:
    columns = COLUMNS.get(kind, FLOAT_COLUMNS)[-1]
    raw, x = weights_of(kind, 33, columns), activations_of("normal", 18, columns)
    last = [str(p.values[2]) for p in PAIRS if p.values[0] == kind][-1]
    assert np.array_equal(multiply(kind, raw, x), multiply(kind, raw, x, last))


def test_a_variant_without_the_type_is_refused() -> None:
    out = np.zeros((1, 16), np.float32)
    for kind, names in ((Type.F16, NO_FLOATS), (Type.Q4_0, FLOATS_ALONE), (Type.Q4_0, {"sse9"})):
        raw, x = weights_of(kind, 16, 96), activations_of("normal", 1, 96)
        for name in names:
            assert call(out, raw, x, kind, variant=name) == STATUS["variant"]
    assert (out == 0).all()


def test_wrong_arguments_are_refused() -> None:
    raw, x = weights_of(Type.Q4_0, 17, 96), activations_of("normal", 3, 96)
    out = np.full((3, 17), 7, np.float32)
    for status, wrong in (
        ("type", (out, raw, x, 3)),
        ("type", (out, raw, x, -1)),
        ("size", (out, raw, x, Type.Q4_K)),  # 96 columns are no block of 256
        ("size", (out, raw, x, Type.Q8_0)),
        ("size", (out, raw[:, :-1].copy(), x, Type.Q4_0)),
        ("size", (out, raw, x[:, :64].copy(), Type.Q4_0)),
        ("size", (out[:2], raw, x, Type.Q4_0)),
        ("size", (out, raw, x[:0], Type.Q4_0)),
        ("size", (out, raw[:0], x, Type.Q4_0)),
        ("overlap", (x.reshape(-1)[:51].reshape(3, 17), raw, x, Type.Q4_0)),
    ):
        assert call(*wrong) == STATUS[status]
    assert (out == 7).all()
    nothing = (out.ctypes.data, out.size, None, raw.size, x.ctypes.data, x.size)
    assert kernels._library().pk_matmul(*nothing, 17, 96, 3, 2, 0.0, 0, None) == STATUS["null"]
    wide = (out.ctypes.data, out.size, raw.ctypes.data, 2**63, x.ctypes.data, 2**63)
    assert kernels._library().pk_matmul(*wide, 1, 2**63, 1, 0, 0.0, 0, None) == STATUS["size"]
