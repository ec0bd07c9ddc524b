# SPDX-License-Identifier: Apache-2.0
"""Every variant of the vector operations, against float64 within derived bounds, or bit for bit."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pocketphi.convert import quantize
from pocketphi.runtime import kernels

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

VARIANTS = kernels.variants("vector")
SIZES = [1, 3, 8, 15, 16, 17, 31, 33, 100, 3072, 3077]
GUARD = 16
U = 2.0**-24  # half an ulp, relative
LEAST = 2.0**-149  # the smallest float32: two roundings of subnormal numbers
EPS = float(np.float32(1e-5))

OK, NULL, SIZE, OVERLAP, VALUE, VARIANT = 0, 1, 3, 4, 5, 6  # as in kernels/include/pk.h


def ties(rng: np.random.Generator, n: int) -> npt.NDArray[np.floating]:
    """Half-way values: of integers beside a largest value of 127, and of float16's last bit."""
    halves = 0.5 * rng.integers(-253, 254, n)
    halves[::32] = 127.0
    halves[1::32] = np.nextafter(np.float32(0.5), np.float32(0))
    last_bits = np.ldexp(2.0 * rng.integers(-2048, 2048, n) + 1, rng.integers(-30, 4, n))
    return np.where(np.arange(n) // 32 % 2, last_bits, halves)


FILLS: dict[str, Callable[[np.random.Generator, int], npt.NDArray[np.floating]]] = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "wide": lambda rng, n: rng.uniform(-1, 1, n) * 2.0 ** rng.integers(-149, 128, n),
    "zero": lambda rng, n: rng.choice([-0.0, 0.0], n),
    "subnormal": lambda rng, n: rng.uniform(-1, 1, n) * 1e-38,
    "huge": lambda rng, n: rng.choice([-1e38, 1e38], n),
    "-110 to 110": lambda rng, n: rng.uniform(-110, 110, n),
    "ties": ties,
}
EACH = pytest.mark.parametrize("variant", VARIANTS)
FILL = pytest.mark.parametrize("fill", FILLS)


def filled(fill: str, n: int, seed: int = 5) -> Float32:
    """float32 [n], not aligned to more than its own size."""
    x = np.empty(n + 1, np.float32)[1:]
    x[:] = FILLS[fill](np.random.default_rng([seed, n]), n)
    return x


def address(argument: Any) -> Any:
    return argument.ctypes.data if isinstance(argument, np.ndarray) else argument


def call(op: str, *arguments: Any) -> int:
    """The status of pk_vector_<op>; arrays go as pointers."""
    return int(getattr(kernels._library(), f"pk_vector_{op}")(*map(address, arguments)))


def result(op: str, n: int, *arguments: Any, kind: type = np.float32) -> npt.NDArray[Any]:
    """What an operation writes to an output of n elements; nothing beside them may change."""
    guarded = np.full((n + 2 * GUARD) * np.dtype(kind).itemsize, 0xA5, np.uint8)
    memory: npt.NDArray[Any] = guarded.view(kind)
    assert call(op, memory[GUARD:], *arguments) == OK
    assert (memory[:GUARD].view(np.uint8) == 0xA5).all() and (memory[-GUARD:].view(np.uint8) == 0xA5).all()
    return memory[GUARD:-GUARD]


def assert_within(got: Float32, want: Float64, bound: Float64) -> None:
    with np.errstate(over="ignore"):
        rounded = want.astype(np.float32)
    beyond = np.isinf(rounded)  # the definition itself is infinite in float32
    assert np.array_equal(got[beyond], rounded[beyond])
    off = np.abs(got[~beyond] - want[~beyond])
    assert (off <= bound[~beyond]).all(), (off / bound[~beyond]).max()


@EACH
@FILL
def test_rms_norm(variant: str, fill: str) -> None:
    for n in SIZES:
        x, weight = filled(fill, n), filled("normal", n, seed=6)
        for w in (weight, None):
            factor = np.ones(n) if w is None else w.astype(np.float64)
            want = x / np.sqrt(np.mean(x.astype(np.float64) ** 2) + EPS) * factor
            got = result("rms_norm", n, x, w, n, EPS, variant.encode())
            # three roundings: 1 / sqrt, two products
            assert_within(got, want, 3.001 * U * np.abs(want) + LEAST * (np.abs(factor) + 1))


@EACH
@FILL
def test_swiglu(variant: str, fill: str) -> None:
    for n in SIZES:
        gate, up = filled(fill, n), filled("normal", n, seed=6)
        with np.errstate(over="ignore"):
            want = gate / (1 + np.exp(-gate.astype(np.float64))) * up
        got = result("swiglu", n, gate, up, n, variant.encode())
        # exp, within 2 ulp: 4 u; sum, quotient, product: 3 u. Where float32's exp is infinite the result is 0
        # instead of at most 89 / (the largest float32) < 2^-121.
        lost = np.where(gate < -88, 2.0**-121, LEAST) * np.abs(up)
        assert_within(got, want, 7 * U * np.abs(want) + lost + LEAST)


@EACH
def test_swiglu_follows_exp_to_the_ends(variant: str) -> None:
    gate = np.array([np.inf, -1e38, -89.0, -200.0, 200.0, 0.0, -0.0, np.nan], np.float32)
    got = result("swiglu", gate.size, gate, np.ones_like(gate), gate.size, variant.encode())
    assert np.array_equal(got[:7], np.array([np.inf, 0, 0, 0, 200, 0, 0], np.float32))
    assert np.isnan(got[7])


@EACH
@FILL
def test_add_and_scale_are_float32s(variant: str, fill: str) -> None:
    for n in SIZES:
        a, b, s, bias = filled(fill, n), filled(fill, n, seed=6), np.float32(1.7), np.float32(-0.3)
        with np.errstate(over="ignore"):
            total, scaled = a + b, a * s + bias
        assert np.array_equal(result("add", n, a, b, n, variant.encode()), total)
        assert np.array_equal(result("scale", n, a, n, s, bias, variant.encode()), scaled)


@EACH
@FILL
def test_to_f16_is_numpys(variant: str, fill: str) -> None:
    for n in SIZES:
        x = filled(fill, n)
        with np.errstate(over="ignore"):
            want = x.astype(np.float16)
        got = result("to_f16", n, x, n, variant.encode(), kind=np.uint16)
        assert np.array_equal(got, want.view(np.uint16))


@EACH
def test_to_f16_of_all_exponents_and_nan(variant: str) -> None:
    bits = np.random.default_rng(7).integers(0, 2**32, 100_003, np.uint32)
    bits[:4] = 0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF
    x = bits.view(np.float32)
    with np.errstate(all="ignore"):
        want = x.astype(np.float16).view(np.uint16)
    nan = np.isnan(x)
    want[nan] = (bits[nan] >> 16 & 0x8000) | 0x7E00 | (bits[nan] >> 13 & 0x3FF)
    assert np.array_equal(result("to_f16", x.size, x, x.size, variant.encode(), kind=np.uint16), want)


@pytest.fixture(scope="module")
def ggml_q8_0() -> Callable[[Float32], npt.NDArray[np.uint8]]:
    function = ctypes.CDLL(str(quantize._library_path())).quantize_row_q8_0_ref
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None

    def blocks(x: Float32) -> npt.NDArray[np.uint8]:
        out = np.zeros(x.size // 32 * 34, np.uint8)
        function(x.ctypes.data, out.ctypes.data, x.size)
        return out

    return blocks


@EACH
@FILL
def test_to_q8_0_is_ggmls(
    variant: str, fill: str, ggml_q8_0: Callable[[Float32], npt.NDArray[np.uint8]]
) -> None:
    for n in (32, 64, 96, 128, 3072):
        x = filled(fill, n)
        if fill in ("wide", "subnormal"):  # where 1 / d is infinite ggml's levels are undefined
            x.reshape(-1, 32)[:, 0] = 2.0 ** np.random.default_rng(n).integers(-120, 127, n // 32)
        got = result("to_q8_0", n // 32 * 34, n // 32 * 34, x, n, variant.encode(), kind=np.uint8)
        assert np.array_equal(got, ggml_q8_0(x))


@EACH
@pytest.mark.parametrize(
    ("value", "d"), [(np.inf, 0x7E00), (-np.inf, 0x7E00), (np.nan, 0x7E00), (1e-37, 0), (-1e-45, 0)]
)
def test_to_q8_0_where_ggmls_is_undefined(variant: str, value: float, d: int) -> None:
    for place in range(32):
        x = np.zeros(96, np.float32)
        x[:32] = x[64:] = 1.0
        x[32 + place] = value
        got = result("to_q8_0", 102, 102, x, 96, variant.encode(), kind=np.uint8).reshape(3, 34)
        assert (got[[0, 2], 2:] == 127).all()  # its neighbours do not notice
        assert got[1, :2].view(np.uint16)[0] == d and not got[1, 2:].any()


@EACH
@pytest.mark.parametrize("fill", ["normal", "wide", "zero", "subnormal", "huge"])
def test_rope(variant: str, fill: str) -> None:
    for n in SIZES:
        for n_rot in {0, n // 2 // 2 * 2, n // 2 * 2}:
            half = n_rot // 2
            x, angle = filled(fill, n), np.random.default_rng(n).uniform(-4, 4, half)
            c, s = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
            want, size = x.astype(np.float64), np.zeros(n)
            a, b = want[:half].copy(), want[half:n_rot].copy()
            want[:half], want[half:n_rot] = a * c - b * s, a * s + b * c
            size[:half], size[half:n_rot] = abs(a * c) + abs(b * s), abs(a * s) + abs(b * c)
            got = result("rope", n, x, c, s, n_rot, n, variant.encode())
            # two products and a sum, or a product and a fused one: 2 u; exact beyond n_rot
            assert_within(got, want, 2.001 * U * size + 2 * LEAST * (np.arange(n) < n_rot))


@EACH
def test_an_operation_may_be_done_in_place(variant: str) -> None:
    n = 77
    x, y = filled("normal", n), filled("normal", n, seed=6)
    cases: list[tuple[str, tuple[Any, ...]]] = [
        ("rms_norm", (y, n, EPS)),
        ("swiglu", (y, n)),
        ("add", (y, n)),
        ("scale", (n, 1.7, -0.3)),
        ("rope", (y[:30], y[30:60], 60, n)),
    ]
    for op, rest in cases:
        want, own = result(op, n, x, *rest, variant.encode()), x.copy()
        assert call(op, own, own, *rest, variant.encode()) == OK
        assert np.array_equal(own, want)


def test_the_fastest_is_the_last() -> None:
    x = filled("-110 to 110", 333)
    assert np.array_equal(
        result("swiglu", 333, x, x, 333, None), result("swiglu", 333, x, x, 333, VARIANTS[-1].encode())
    )


def test_wrong_arguments_are_refused() -> None:
    x = np.ones(200, np.float32)
    out, rest = np.zeros(64, np.float32), (64, None)
    assert call("add", None, x, x, *rest) == NULL
    assert call("add", out, None, x, *rest) == NULL
    assert call("add", out, x, None, *rest) == NULL
    assert call("swiglu", out, x, None, *rest) == NULL
    assert call("rope", out, x, None, x, 2, *rest) == NULL
    assert call("scale", out, x, 0, 1.0, 0.0, None) == SIZE
    assert call("scale", out, x, 2**62, 1.0, 0.0, None) == SIZE
    assert call("rope", out, x, x, x, 3, *rest) == SIZE
    assert call("rope", out, x, x, x, 66, *rest) == SIZE
    assert call("to_q8_0", out, 68, x, 65, None) == SIZE
    assert call("to_q8_0", out, 67, x, 64, None) == SIZE
    assert call("to_q8_0", out, 102, x, 64, None) == SIZE
    assert call("rms_norm", out, x, None, 64, 0.0, None) == VALUE
    assert call("rms_norm", out, x, None, 64, float("nan"), None) == VALUE
    assert call("rms_norm", x, out, x, 64, 1.0, None) == OVERLAP
    assert call("add", x[1:], x, x, *rest) == OVERLAP
    assert call("to_f16", x, x, *rest) == OVERLAP
    assert call("rope", out, x, out, x, 64, *rest) == OVERLAP
    assert call("add", out, x, x, 64, b"sse9") == VARIANT
    assert not out.any()
