# SPDX-License-Identifier: Apache-2.0
"""The plug-in's products inside ggml: within derived bounds of float64, and beside ggml's CPU device."""

from __future__ import annotations

import numpy as np
import pytest

from pocketphi.convert.ggml_types import F16, F32, Q4_0, Q4_K, Q6_K, Q8_0, GgmlType

from ..ggml_graph import BF16, PLUGIN, Device, Graph, Tensor
from .ggml_operands import (
    EPS,
    FLOATS,
    NMSE,
    QUANTIZED,
    Float32,
    Matrix,
    activations,
    matrix,
    nmse,
    product,
    uneven,
)

KINDS = pytest.mark.parametrize("kind", (*QUANTIZED, *FLOATS), ids=lambda t: t.name)


def multiply(device: Device, m: Matrix, x: Float32, threads: int = 2) -> Float32:
    with Graph(device) as g:
        y = g.op("mul_mat", g.weight(m.data, m.kind, x.shape[1]), g.input(x))
        return g.compute([y], threads=threads)[0]


@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 33, 512])
@KINDS
def test_matmul(device: Device, peer: Device, kind: GgmlType, tokens: int) -> None:
    m, x = matrix(kind, 200, 512), activations(tokens, 512)
    got = multiply(device, m, x)
    want, bound = product(m, x.astype(np.float64))
    assert (abs(got - want) <= bound).all()
    assert nmse(got, multiply(peer, m, x)) <= NMSE


@pytest.mark.parametrize("tokens", [1, 33])
@KINDS
def test_large_columns(device: Device, peer: Device, kind: GgmlType, tokens: int) -> None:
    """Within the bound; and where as many columns share a scale as in ggml, as far from the truth as it is.

    Chance decides which is nearer: 200 outputs tell a mean square to 10 %, three times that on both sides.
    Q4_0 shares among 256 where ggml shares among 32.
    """
    m, x = matrix(kind, 200, 512), uneven(tokens, 512)
    got = multiply(device, m, x)
    want, bound = product(m, x.astype(np.float64))
    assert (abs(got - want) <= bound).all()
    if kind in QUANTIZED and kind is not Q4_0:
        assert nmse(got, want) <= 1.5 * nmse(multiply(peer, m, x), want)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 300])
@KINDS
def test_rows_that_fill_no_panel(device: Device, kind: GgmlType, rows: int) -> None:
    """A float matrix of one row may be the scheduler's to place: it looks like a norm's weights."""
    m, x = matrix(kind, rows, 256), uneven(3, 256)
    with Graph(device) as g:
        y = g.op("mul_mat", g.weight(m.data, kind, 256), g.input(x))
        (got,) = g.compute([y], threads=2, scheduled=True)
        placement = g.placement
    want, bound = product(m, x.astype(np.float64))
    if kind in FLOATS and rows == 1 and placement != [("MUL_MAT", PLUGIN)]:
        assert nmse(got, want) <= NMSE
    else:
        assert placement == [("MUL_MAT", PLUGIN)]
        assert (abs(got - want) <= bound).all()


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("kind", [Q6_K, Q8_0, F16], ids=lambda t: t.name)
def test_output_head(device: Device, peer: Device, kind: GgmlType, tokens: int) -> None:
    m, x = matrix(kind, 5001, 768), activations(tokens, 768)
    got = multiply(device, m, x)
    want, bound = product(m, x.astype(np.float64))
    assert (abs(got - want) <= bound).all()
    assert nmse(got, multiply(peer, m, x)) <= NMSE


@KINDS
def test_a_product_depends_neither_on_threads_nor_on_the_other_tokens(device: Device, kind: GgmlType) -> None:
    m, x = matrix(kind, 200, 512), uneven(37, 512)
    whole = multiply(device, m, x, threads=1)
    for threads in (2, 3):
        assert np.array_equal(multiply(device, m, x, threads), whole)
    for start, stop in ((0, 1), (7, 8), (3, 20), (20, 37)):
        assert np.array_equal(multiply(device, m, x[start:stop]), whole[start:stop])


@pytest.mark.parametrize("rows", [1, 16, 200])
@KINDS
def test_weights_come_back_as_they_went_in(device: Device, kind: GgmlType, rows: int) -> None:
    m = matrix(kind, rows, 512)
    with Graph(device) as g:
        w = g.weight(m.data, kind, 512)
        g.load()
        assert np.array_equal(g.read_bytes(w, 0, m.data.size), m.data.reshape(-1))
        whole = m.data.reshape(-1)
        first, last = m.data.size // 3, m.data.size // 2 + 1
        assert np.array_equal(g.read_bytes(w, first, last - first), whole[first:last])
        g.write_bytes(w, first, whole[: last - first].copy())
        want = np.concatenate([whole[:first], whole[: last - first], whole[last:]])
        assert np.array_equal(g.read_bytes(w, 0, m.data.size), want)


def lora(g: Graph, w: Matrix, a: Matrix, b: Matrix, x: Float32, scale: float) -> Tensor:
    """As llama.cpp's build_lora_mm."""
    into = g.input(x)
    y = g.op("mul_mat", g.weight(w.data, w.kind, w.values.shape[1]), into)
    first, second = (g.adapter(m.data, m.kind, m.values.shape[1]) for m in (a, b))
    ab = g.op("mul_mat", second, g.op("mul_mat", first, into))
    return g.op("add", y, g.op("scale", ab, scale))


LORA_CASES = [
    (base, kind, rank)
    for base in (Q4_0, Q4_K, F16)
    for kind, ranks in (
        (Q8_0, (256, 320)),
        (Q4_0, (256, 320)),
        (F16, (8, 16, 256, 320)),
        (BF16, (320,)),
        (F32, (8, 16, 320)),
    )
    for rank in ranks
]


@pytest.mark.parametrize("tokens", [1, 21])
@pytest.mark.parametrize(("base", "kind", "rank"), LORA_CASES, ids=lambda v: getattr(v, "name", str(v)))
def test_lora(device: Device, peer: Device, base: GgmlType, kind: GgmlType, rank: int, tokens: int) -> None:
    scale = 2.0
    w, a, b = matrix(base, 200, 512), matrix(kind, rank, 512), matrix(kind, 200, rank)
    x = activations(tokens, 512)
    y, y_bound = product(w, x.astype(np.float64))
    ab, ab_bound = product(b, *product(a, x.astype(np.float64)))
    bound = y_bound + scale * ab_bound + 4 * EPS * (abs(y) + scale * abs(ab))
    for scheduled in (False, True):
        with Graph(device) as g:
            (got,) = g.compute([lora(g, w, a, b, x, scale)], threads=2, scheduled=scheduled)
            assert {where for _, where in g.placement} <= {PLUGIN}
        assert (abs(got - (y + scale * ab)) <= bound).all()
    with Graph(peer) as g:
        assert nmse(got, g.compute([lora(g, w, a, b, x, scale)])[0]) <= NMSE
