# SPDX-License-Identifier: Apache-2.0
"""The plug-in's other operations inside ggml: within bounds of float64, and beside ggml's CPU device."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from pocketphi.convert.ggml_types import F16, Q8_0, GgmlType
from pocketphi.convert.quantize import Quantizer

from ..ggml_graph import ROPE_NEOX, Device, Graph, Tensor
from .ggml_operands import EPS, HEAD, NMSE, ROTARY, Float32, Float64, activations, causal, nmse, uneven


def attend(
    g: Graph, q: Float32, caches: list[Tensor], mask: npt.NDArray[np.float16], kv_heads: int
) -> Tensor:
    """As llama.cpp's build_attn_mha. q [tokens, heads, HEAD] stands at the start of wider rows."""
    tokens, heads, _ = q.shape
    fused = np.zeros((tokens, heads + 2 * kv_heads, HEAD), np.float32)
    fused[:, :heads] = q
    wide = g.input(fused.reshape(tokens, -1))
    qs = g.op("view_4d", wide, HEAD, heads, tokens, 1, 4 * HEAD, wide.nb[1], wide.nb[1] * tokens, 0)
    parts = [g.op("permute", qs, 0, 2, 1, 3)]
    for cache in caches:
        row = cache.kind.row_bytes(HEAD)
        step = cache.nb[1]
        keys = mask.shape[1]
        view = g.op("view_4d", cache, HEAD, kv_heads, keys, 1, row, step, step * cache.ne[1], 0)
        parts.append(g.op("permute", view, 0, 2, 1, 3))
    out = g.op("flash_attn_ext", *parts, g.input(mask), HEAD**-0.5, 0.0, 0.0)
    return g.op("reshape_2d", out, heads * HEAD, tokens)


def attention(q: Float64, k: Float64, v: Float64, mask: Float64) -> tuple[Float64, Float64]:
    """The definition, and how far float32 sums may be from it.

    q [tokens, heads, HEAD], k and v [keys, kv_heads, HEAD]. A score is HEAD products and sums and a scale;
    its error e moves a weight by a factor exp(e), and the sum of weights likewise. exp has 2 ulp, each
    rescaling (at most one for 16 keys) two roundings and an exp, each key a product and an addition, in
    both sums.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat(group, 1), v.repeat(group, 1)
    scores = np.einsum("thd,khd->thk", q, k) * HEAD**-0.5 + mask[:, None]
    e = np.einsum("thd,khd->thk", abs(q), abs(k)).max(2) * HEAD**-0.5 * ((HEAD + 4) * EPS)
    p = np.exp(scores - scores.max(2, keepdims=True))
    p /= p.sum(2, keepdims=True)
    relative = 2 * (e + (2 * len(k) + 6 * (len(k) / 16) + 16) * EPS)
    bound = relative[..., None] * np.einsum("thk,khd->thd", p, abs(v))
    return np.einsum("thk,khd->thd", p, v).reshape(len(q), -1), bound.reshape(len(q), -1)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("keys", "used"), [(512, 340), (333, 333), (64, 47)])
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("kind", [F16, Q8_0], ids=lambda t: t.name)
def test_attention(
    device: Device, peer: Device, kind: GgmlType, tokens: int, keys: int, used: int, threads: int
) -> None:
    heads, kv_heads = 6, 2
    rng = np.random.default_rng(keys)
    q = rng.standard_normal((tokens, heads, HEAD), np.float32)
    data = [
        Quantizer().quantize(rng.standard_normal((keys, kv_heads * HEAD), np.float32), kind) for _ in "kv"
    ]
    k, v = (
        dequantize(d, GGMLQuantizationType(kind.id)).astype(np.float64).reshape(keys, kv_heads, HEAD)
        for d in data
    )
    mask = causal(tokens, keys, used)
    found = []
    for where in (device, peer):
        with Graph(where) as g:
            caches = [g.blocks(d, kind, kv_heads * HEAD) for d in data]
            found += g.compute([attend(g, q, caches, mask, kv_heads)], threads=threads)
    want, bound = attention(q.astype(np.float64), k, v, mask.astype(np.float64))
    assert (abs(found[0] - want) <= bound).all()
    assert nmse(found[0], found[1]) <= NMSE


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("tokens", "width"), [(1, 3072), (7, 256), (3, 100)])
def test_rms_norm(device: Device, tokens: int, width: int, fused: bool) -> None:
    """Half of the error of a sum over eight or more lanes, and four roundings."""
    x, weight, eps = uneven(tokens, width) * 3, activations(1, width)[0], 1e-5
    with Graph(device) as g:
        y = g.op("rms_norm", g.input(x), eps)
        if fused:
            y = g.op("mul", y, g.vector(weight))
        (got,) = g.compute([y], threads=2)
    want = x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + eps) * (weight if fused else 1)
    assert (abs(got - want) <= abs(want) * ((width / 8 + 12) / 2 + 4) * EPS).all()


@pytest.mark.parametrize("factors", [True, False])
@pytest.mark.parametrize("start", [0, 4000, 100_000])
def test_rope(device: Device, start: int, factors: bool) -> None:
    """ggml's angles are powers made by repeated float32 multiplication: (i + 3) roundings for pair i."""
    tokens, heads = 5, 6
    x = activations(tokens, (heads + 4) * HEAD)
    place = np.arange(start, start + tokens, dtype=np.int32)
    long = 1.08 ** np.arange(ROTARY // 2)
    magnitude = 1.19
    with Graph(device) as g:
        wide = g.input(x)
        # Queries, as build_qkv cuts them out of the fused projection.
        cut = g.op("view_3d", wide, HEAD, heads, tokens, 4 * HEAD, wide.nb[1], 4 * HEAD)
        table = g.vector(long.astype(np.float32)) if factors else None
        y = g.op(
            "rope_ext", cut, g.input(place), table, ROTARY, ROPE_NEOX, 4096, 1e4, 1.0, 0.0, magnitude, 32, 1
        )
        (got,) = g.compute([y], threads=2)
    taken = x.astype(np.float64).reshape(tokens, -1, HEAD)[:, 1 : 1 + heads]
    pair = np.arange(ROTARY // 2)
    angle = place[:, None, None] * 1e4 ** (-2 * pair / ROTARY) / (long if factors else 1)
    left, right = taken[..., : ROTARY // 2], taken[..., ROTARY // 2 : ROTARY]
    cos, sin = np.cos(angle) * magnitude, np.sin(angle) * magnitude
    want = np.concatenate([left * cos - right * sin, left * sin + right * cos, taken[..., ROTARY:]], 2)
    size = magnitude * (abs(left) + abs(right)) * ((abs(angle) * (pair + 3) + 6) * EPS)
    bound = np.concatenate([size, size, np.zeros_like(taken[..., ROTARY:])], 2)
    assert (abs(got.reshape(want.shape) - want) <= bound).all()


def test_swiglu(device: Device) -> None:
    """exp with 2 ulp = 4 roundings, an addition, a quotient and a product."""
    x = uneven(9, 2 * 1000) * 4
    x[0, :4] = [-200, -88, 0, 100]
    with Graph(device) as g:
        (got,) = g.compute([g.op("swiglu", g.input(x))], threads=2)
    gate, up = x[:, :1000].astype(np.float64), x[:, 1000:].astype(np.float64)
    want = gate / (1 + np.exp(-gate)) * up
    assert (abs(got - want) <= 8 * EPS * abs(want) + 1e-35).all()  # exp(88) and more may be infinite


def test_add_and_scale_are_exact(device: Device) -> None:
    a, b = activations(9, 1000), activations(9, 1000)[::-1].copy()
    with Graph(device) as g:
        total = g.op("add", g.input(a), g.input(b))
        scaled = g.op("scale", g.input(a), 0.0884)
        got = g.compute([total, scaled], threads=2)
    assert np.array_equal(got[0], a + b)
    assert np.array_equal(got[1], a * np.float32(0.0884))


@pytest.mark.parametrize("kind", [F16, Q8_0], ids=lambda t: t.name)
def test_set_rows_of_a_cache(device: Device, kind: GgmlType) -> None:
    """Keys cut out of the fused projection go to scattered cells, rounded as the type's definition says."""
    tokens, width = 6, 2 * HEAD
    x = activations(tokens, 4 * width)
    old = Quantizer().quantize(activations(50, width), kind)
    cells = np.array([3, 49, 0, 17, 16, 30], np.int64)
    with Graph(device) as g:
        wide, cache = g.input(x), g.blocks(old, kind, width)
        cut = g.op("view_2d", wide, width, tokens, wide.nb[1], 4 * width)
        node = g.op("set_rows", cache, cut, g.input(cells))
        g.compute([node], threads=2)
        got = g.read(cache).view(np.uint8).reshape(50, -1)
    old[cells] = Quantizer().quantize(x[:, width : 2 * width].copy(), kind)
    assert np.array_equal(got, old)


def test_get_rows(device: Device) -> None:
    x, rows = activations(40, 300), np.array([39, 0, 7], np.int32)
    with Graph(device) as g:
        (got,) = g.compute([g.op("get_rows", g.input(x), g.input(rows))], threads=2, scheduled=True)
    assert np.array_equal(got, x[rows])
