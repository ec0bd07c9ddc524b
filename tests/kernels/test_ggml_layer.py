# SPDX-License-Identifier: Apache-2.0
"""A whole layer on the plug-in, and what it leaves to ggml."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from pocketphi.convert.ggml_types import F16, F32, Q4_0, Q4_K, Q8_0, GgmlType
from pocketphi.convert.quantize import Quantizer

from ..ggml_graph import PLUGIN, ROPE_NEOX, Device, Graph, Tensor
from .ggml_operands import HEAD, NMSE, ROTARY, activations, causal, matrix, nmse


@dataclass(frozen=True, slots=True)
class Layer:
    """A small model's layer in llama.cpp's terms."""

    weights: GgmlType
    cache: GgmlType
    tokens: int
    rank: int = 0  # of a LoRA on every linear

    def build(self, g: Graph) -> Tensor:
        """The same nodes in the same order as src/models/phi3.cpp."""
        heads, kv_heads, wide, inner, keys = 6, 2, 6 * HEAD, 1024, 256
        start = 20  # tokens that the cache holds already
        x = g.input(activations(self.tokens, wide))
        places = np.arange(start, start + self.tokens)
        place = g.input(places.astype(np.int32))
        y = self._norm(g, x, wide)
        qkv = self._linear(g, y, (heads + 2 * kv_heads) * HEAD, wide)
        table = g.vector(1.08 ** np.arange(ROTARY // 2))
        rope = (place, table, ROTARY, ROPE_NEOX, 4096, 1e4, 1.0, 0.0, 1.19, 32, 1)

        def cut(n: int, first: int) -> Tensor:
            return g.op("view_3d", qkv, HEAD, n, self.tokens, 4 * HEAD, qkv.nb[1], 4 * HEAD * first)

        q = g.op("rope_ext", cut(heads, 0), *rope)
        k = g.op("rope_ext", cut(kv_heads, heads), *rope)
        v = cut(kv_heads, heads + kv_heads)
        q = g.op("scale", q, HEAD**-0.5)
        g.expand(q)
        views = [g.op("permute", g.op("view_4d", q, *q.ne[:3], 1, *q.nb[1:4], 0), 0, 2, 1, 3)]
        row = self.cache.row_bytes(kv_heads * HEAD)
        for new in (k, v):
            old = Quantizer().quantize(activations(keys, kv_heads * HEAD), self.cache)
            cache = g.blocks(old, self.cache, kv_heads * HEAD)
            flat = g.op("view_2d", new, kv_heads * HEAD, self.tokens, new.nb[2], 0)
            g.expand(g.op("set_rows", cache, flat, g.input(places.astype(np.int64))))
            view = g.op("view_4d", cache, HEAD, kv_heads, keys, 1, row // kv_heads, row, row * keys, 0)
            views.append(g.op("permute", view, 0, 2, 1, 3))
        mask = g.input(causal(self.tokens, keys, start + self.tokens))
        y = g.op("flash_attn_ext", *views, mask, 1.0, 0.0, 0.0)
        y = self._linear(g, g.op("reshape_2d", y, heads * HEAD, self.tokens), wide, heads * HEAD)
        x = g.op("add", y, x)
        y = self._linear(g, self._norm(g, x, wide), 2 * inner, wide)
        y = self._linear(g, g.op("swiglu", y), wide, inner)
        return g.op("add", x, y)

    def _norm(self, g: Graph, x: Tensor, wide: int) -> Tensor:
        return g.op("mul", g.op("rms_norm", x, 1e-5), g.vector(np.linspace(0.5, 1.5, wide)))

    def _linear(self, g: Graph, x: Tensor, rows: int, columns: int) -> Tensor:
        w = matrix(self.weights, rows, columns)
        y = g.op("mul_mat", g.weight(w.data, w.kind, columns), x)
        if not self.rank:
            return y
        kind = F32 if self.weights is F32 else Q8_0
        a, b = matrix(kind, self.rank, columns), matrix(kind, rows, self.rank)
        inner = g.op("mul_mat", g.adapter(a.data, kind, columns), x)
        ab = g.op("mul_mat", g.adapter(b.data, kind, self.rank), inner)
        return g.op("add", y, g.op("scale", ab, 2.0))


LAYERS = [
    Layer(weights, cache, tokens, rank)
    for weights, cache in ((F32, F16), (Q4_0, F16), (Q4_K, Q8_0), (Q8_0, Q8_0))
    for tokens in (1, 40)
    for rank in (0, 320)
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_layer(device: Device, peer: Device, layer: Layer) -> None:
    """A whole layer is the plug-in's, and five products deep it is where ggml is.

    With F32 weights and an F16 cache nothing has 8 bits; ggml's attention rounds q, the weights and its sums
    to float16, whose relative error has a variance below 2^-22.
    """
    with Graph(device) as g:
        (got,) = g.compute([layer.build(g)], threads=2, scheduled=True)
        assert {op: where for op, where in g.placement if where != PLUGIN} == {}
    with Graph(device) as g:
        assert np.array_equal(g.compute([layer.build(g)], threads=2)[0], got)
    with Graph(peer) as g:
        want = g.compute([layer.build(g)])[0]
    assert nmse(got, want) <= (5 * NMSE if layer.weights is not F32 else 4 * 2.0**-22)


def rope_of_neighbours(g: Graph) -> Tensor:
    x, place = g.input(activations(4, 3 * HEAD).reshape(4, 3, HEAD)), g.input(np.arange(4, dtype=np.int32))
    return g.op("rope_ext", x, place, None, HEAD, 0, 4096, 1e4, 1.0, 0.0, 1.0, 32, 1)


def yarn(g: Graph) -> Tensor:
    x, place = g.input(activations(4, 3 * HEAD).reshape(4, 3, HEAD)), g.input(np.arange(4, dtype=np.int32))
    return g.op("rope_ext", x, place, None, HEAD, ROPE_NEOX, 4096, 1e4, 0.5, 1.0, 1.0, 32, 1)


def flash(g: Graph, head: int, max_bias: float, softcap: float) -> Tensor:
    rng = np.random.default_rng(0)
    q = g.input(rng.standard_normal((4, 5, head), np.float32))
    k, v = (g.input(rng.standard_normal((2, 64, head)).astype(np.float16)) for _ in "kv")
    return g.op("flash_attn_ext", q, k, v, g.input(causal(5, 64, 64)), head**-0.5, max_bias, softcap)


def attention_in_steps(g: Graph) -> Tensor:
    """What llama.cpp does with a float32 cache."""
    rng = np.random.default_rng(1)
    q, k = (g.input(rng.standard_normal((n, 48, HEAD), np.float32)) for n in (6, 2))
    v = g.input(rng.standard_normal((2, HEAD, 48), np.float32))
    mask = g.input(causal(48, 48, 48).astype(np.float32))
    return g.op("mul_mat", v, g.op("soft_max_ext", g.op("mul_mat", k, q), mask, HEAD**-0.5, 0.0))


def broadcast_add(g: Graph) -> Tensor:
    return g.op("add", g.input(activations(7, 300)), g.input(activations(1, 300)))


def transposed_norm(g: Graph) -> Tensor:
    return g.op(
        "rms_norm", g.op("permute", g.input(activations(60, 128).reshape(5, 12, 128)), 0, 2, 1, 3), 1e-5
    )


UNUSUAL = {
    "RoPE of neighbours": rope_of_neighbours,
    "YaRN": yarn,
    "soft cap": lambda g: flash(g, HEAD, 0.0, 30.0),
    "ALiBi": lambda g: flash(g, HEAD, 8.0, 0.0),
    "head of 80": lambda g: flash(g, 80, 0.0, 0.0),
    "float32 cache": attention_in_steps,
    "broadcast": broadcast_add,
    "strided norm": transposed_norm,
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_phi_does_not_use_is_refused_or_right(device: Device, peer: Device, name: str) -> None:
    """Some of ggml's own attention sums are float16."""
    with Graph(device) as g:
        (got,) = g.compute([UNUSUAL[name](g)], threads=2, scheduled=True)
    with Graph(peer) as g:
        want = g.compute([UNUSUAL[name](g)])[0]
    assert nmse(got, want) <= 4 * 2.0**-22
