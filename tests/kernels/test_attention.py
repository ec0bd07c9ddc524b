# SPDX-License-Identifier: Apache-2.0
"""Every attention variant this CPU has, against float64 within a derived bound."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pocketphi.runtime import kernels

Float64 = npt.NDArray[np.float64]
Float32 = npt.NDArray[np.float32]
Float16 = npt.NDArray[np.float16]
Bytes = npt.NDArray[np.uint8]

F16, Q8_0 = 1, 8  # ggml's numbers
STATUS = {"null": 1, "size": 3, "overlap": 4, "variant": 6, "type": 8}
BLOCK = 64  # keys whose sums are made apart
VARIANTS = pytest.mark.parametrize("variant", kernels.variants("attention"))
KINDS = pytest.mark.parametrize("kind", [F16, Q8_0], ids=["F16", "Q8_0"])

# tokens, heads, kv_heads, keys, head
SHAPES = {
    "nano": (5, 6, 3, 40, 32),
    "mini, decoding": (1, 24, 8, 300, 128),
    "mini, reading": (70, 6, 2, 130, 128),  # three calls of up to 32 tokens, the last of 6
    "14B, reading": (25, 8, 2, 65, 128),
    "one key": (3, 4, 2, 1, 64),
    "group 5": (20, 10, 2, 129, 96),
    "long": (1, 3, 1, 5000, 128),
    "long, reading": (9, 3, 1, 3001, 64),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """What a call takes, and keys and values as float64 [keys, kv_heads, head]."""

    shape: tuple[int, int, int, int, int]
    kind: int
    q: Float32  # [tokens, heads, head]
    k: Bytes
    v: Bytes
    mask: Float16 | None  # [tokens, keys]
    scale: float
    keys: Float64
    values: Float64


def stored(x: Float32, kind: int) -> tuple[Bytes, Float64]:
    """Rows as the cache holds them, and what they then are."""
    if kind == F16:
        half = x.astype("<f2")
        return half.view(np.uint8), half.astype(np.float64)
    blocks = x.reshape(-1, 32)
    d = (np.abs(blocks).max(1, keepdims=True) / 127).astype("<f2")
    q = np.clip(np.round(blocks / np.where(d == 0, 1, d).astype(np.float32)), -127, 127).astype(np.int8)
    raw = np.hstack([d.view(np.uint8), q.view(np.uint8)])
    return raw, (d.astype(np.float64) * q).reshape(x.shape)


def causal(tokens: int, keys: int) -> Float16:
    """The last `tokens` of the keys are the tokens' own. Those before the first key see nothing."""
    behind = np.arange(keys) > np.arange(tokens)[:, None] + keys - tokens
    return np.where(behind, -np.inf, 0).astype(np.float16)


@functools.cache
def problem(shape: str, kind: int, mask: str = "causal", size: float = 1.0) -> Problem:
    rng = np.random.default_rng(8)
    tokens, heads, kv_heads, n_keys, head = dims = SHAPES[shape]
    q = size * rng.standard_normal((tokens, heads, head), np.float32)
    k, keys = stored(rng.standard_normal((n_keys, kv_heads, head), np.float32), kind)
    v, values = stored(rng.standard_normal((n_keys, kv_heads, head), np.float32) + np.float32(0.5), kind)
    bias = None
    if mask == "causal":
        bias = causal(tokens, n_keys)
    elif mask == "sloped":  # ALiBi's shape, on top of causal
        bias = causal(tokens, n_keys) - np.float16(0.25) * np.arange(n_keys - 1, -1, -1).astype(np.float16)
    elif mask == "holes":
        bias = np.where(rng.random((tokens, n_keys)) < 0.5, -np.inf, 0).astype(np.float16)
        bias[:, 64:128] = -np.inf  # a block that none sees
        bias[2::3] = -np.inf  # tokens that see none
        bias[:2, -1] = 0
    elif mask == "hidden":
        bias = np.full((tokens, n_keys), -np.inf, np.float16)
    return Problem(dims, kind, q, k, v, bias, head**-0.5, keys, values)


def attend(p: Problem, variant: str | None, parts: int = 1) -> Float32:
    """Through libpk, between sentinels."""
    guarded = np.full((p.q.size + 64,), 7, np.float32)
    out = guarded[32:-32].reshape(p.q.shape)
    assert call(p, out=out.ctypes.data, parts=parts, variant=variant) == 0
    assert (guarded[:32] == 7).all(), "wrote before out"
    assert (guarded[-32:] == 7).all(), "wrote behind out"
    return out


def call(p: Problem, **changes: Any) -> int:
    shape = np.array(p.shape, np.uintp)
    arguments: dict[str, Any] = {
        "out": None,
        "n_out": p.q.size,
        "q": p.q.ctypes.data,
        "k": p.k.ctypes.data,
        "n_k": p.k.size,
        "v": p.v.ctypes.data,
        "n_v": p.v.size,
        "mask": None if p.mask is None else p.mask.ctypes.data,
        "shape": shape.ctypes.data,
        "k_type": p.kind,
        "v_type": p.kind,
        "scale": p.scale,
        "parts": 1,
        "variant": None,
    } | changes
    name = arguments["variant"]
    arguments["variant"] = None if name is None else name.encode()
    return int(kernels._library().pk_attention(*arguments.values()))


@functools.cache
def truth(p: Problem, parts: int = 1) -> tuple[Float64, Float64]:
    """The definition in float64, and how far float32 may be from it.

    With u = 2^-24 and any order of additions:

    - a score is a dot of `head` products, of k with at most one rounding, times the scale, plus the mask:
      (head + 3) u of the sum of sizes;
    - its exp: u |s - m| of the subtraction, 2 u (1 ulp) of exp and u of a product, and the same each time the
      maximum grows, whose steps add up to less than the range of s; 0 for what is below e^-87;
    - sums: of 64 in a block, then of the blocks and parts, each with a factor; v's rounding and the division:
      (64 + 2 blocks + 8) u, in the numerator and the divisor.

    A relative change e of p moves the average by w e (v - out), with w = p / sum, over 1 - (sum of w e).
    """
    _, heads, kv_heads, n_keys, head = p.shape
    u, blocks = 2.0**-24, n_keys / BLOCK + 1 + parts
    want, bound = np.zeros(p.q.shape), np.zeros(p.q.shape)
    bias = np.zeros((len(p.q), n_keys)) if p.mask is None else p.mask.astype(np.float64)
    seen = np.isfinite(bias)
    rows = seen.any(1)
    for h in range(heads):
        q, k = p.q[rows, h].astype(np.float64), p.keys[:, h // (heads // kv_heads)]
        v = p.values[:, h // (heads // kv_heads)]
        s = p.scale * (q @ k.T) + bias[rows]
        e = (head + 3) * u * (p.scale * (np.abs(q) @ np.abs(k).T) + np.abs(np.where(seen, bias, 0)[rows]))
        span = s.max(1) - np.where(seen[rows], s, np.inf).min(1)
        w = np.exp(s - s.max(1, keepdims=True))
        w /= w.sum(1, keepdims=True)
        e = w * np.expm1(e + 2 * u * span[:, None] + 4 * u * (blocks + 1))
        moved = e.sum(1, keepdims=True)
        assert (moved < 0.5).all(), "the bound says nothing"
        out = w @ v
        change = np.stack([np.abs(v - row).T @ weight for row, weight in zip(out, e, strict=True)])
        sums = 2 * (72 + 2 * blocks) * u * (w @ np.abs(v))
        want[rows, h] = out
        bound[rows, h] = change / (1 - moved) + sums + np.exp(-87) * np.abs(v).sum(0)
    return want, bound


@VARIANTS
@KINDS
@pytest.mark.parametrize("mask", ["none", "causal", "sloped", "holes"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_variant_against_float64(shape: str, mask: str, kind: int, variant: str) -> None:
    p = problem(shape, kind, mask)
    want, bound = truth(p)
    # 72 roundings on both sides, and 2 more for each block, of values below 10: still far below a value.
    assert bound.max() < 1e-3, "the bound says nothing"
    got = attend(p, variant)
    wrong = ~(np.abs(got - want) <= bound)  # NaN too
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size}, {np.abs(got - want).max()} off"


@VARIANTS
@KINDS
@pytest.mark.parametrize("size", [0.0, 200.0])
def test_flat_and_steep_scores(size: float, kind: int, variant: str) -> None:
    """All weights the same; scores of hundreds, so that nearly all weight is on one key."""
    p = problem("mini, reading", kind, size=size)
    want, bound = truth(p)
    assert (np.abs(attend(p, variant) - want) <= bound).all()


@VARIANTS
@KINDS
@pytest.mark.parametrize("parts", [2, 7, 40])
@pytest.mark.parametrize("shape", ["nano", "mini, decoding", "mini, reading"])
def test_parts_put_together(shape: str, parts: int, kind: int, variant: str) -> None:
    p = problem(shape, kind, "holes")
    want, bound = truth(p, parts)
    assert (np.abs(attend(p, variant, parts) - want) <= bound).all()


@VARIANTS
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("shape", ["nano", "mini, decoding"])
def test_a_query_that_sees_no_key_gives_zeros(shape: str, parts: int, variant: str) -> None:
    assert not attend(problem(shape, F16, "hidden"), variant, parts).any()


@VARIANTS
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("shape", ["nano", "mini, decoding"])
def test_a_nan_stays_visible(shape: str, parts: int, variant: str) -> None:
    p = problem(shape, F16, "none")
    p = dataclasses.replace(p, q=p.q.copy())
    p.q[0, 1, 3] = np.nan
    spoilt = np.isnan(attend(p, variant, parts))
    assert spoilt[0, 1].all()
    assert spoilt.sum() == p.shape[-1]


@VARIANTS
def test_keys_and_values_of_two_types(variant: str) -> None:
    a, b = problem("mini, decoding", F16), problem("mini, decoding", Q8_0)
    mixed = dataclasses.replace(a, v=b.v, values=b.values)
    out = np.zeros_like(a.q)
    status = call(mixed, out=out.ctypes.data, v_type=Q8_0, variant=variant)
    want, bound = truth(mixed)
    assert status == 0
    assert (np.abs(out - want) <= bound).all()


def test_the_fastest_variant_is_the_default() -> None:
    p = problem("nano", F16)
    assert attend(p, None).tobytes() == attend(p, kernels.variants("attention")[-1]).tobytes()


def test_wrong_arguments_are_refused() -> None:
    p = problem("nano", F16)
    out = np.full_like(p.q, 7)
    to = out.ctypes.data

    def shape(*dims: int) -> npt.NDArray[np.uintp]:
        return np.array(dims, np.uintp)

    for pointer in ("out", "q", "k", "v", "shape"):
        assert call(p, **({"out": to} | {pointer: None})) == STATUS["null"], pointer
    for name in ("n_out", "n_k", "n_v"):
        assert call(p, **{"out": to, name: p.q.size - 1}) == STATUS["size"], name
    for dims in (
        shape(0, 6, 3, 40, 32),
        shape(5, 6, 4, 40, 32),
        shape(5, 6, 0, 40, 32),
        shape(5, 6, 3, 0, 32),
        shape(5, 6, 3, 40, 16),
        shape(5, 6, 3, 40, 160),
        shape(2**63, 6, 3, 40, 32),
        shape(5, 194, 2, 40, 32),  # a group of 97
    ):
        assert call(p, out=to, shape=dims.ctypes.data) == STATUS["size"], dims
    for parts in (0, 41, 65):
        assert call(p, out=to, parts=parts) == STATUS["size"], parts
    assert call(p, out=to, k_type=2) == STATUS["type"]
    assert call(p, out=to, v_type=-1) == STATUS["type"]
    assert call(p, out=to, variant="sse9") == STATUS["variant"]
    assert call(p, out=p.q.ctypes.data) == STATUS["overlap"]
    assert call(p, out=to, mask=to) == STATUS["overlap"]
    assert (out == 7).all(), "wrote before it checked"
