# SPDX-License-Identifier: Apache-2.0
"""Nodes that the plug-in makes one step of: the bits of the same nodes one by one, whatever surrounds them.

A node that is an output of the graph is computed as it stands, and its memory is never another's. So the same
graph with every node an output is the truth: no fusion, no memory used twice.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pocketphi.convert.ggml_types import F16, F32, Q4_0, Q4_K, Q8_0, GgmlType

from ..ggml_graph import PLUGIN, Device, Graph, Tensor
from .ggml_operands import Float32, activations, matrix

TOKENS, WIDE = 5, 256
Build = Callable[[Graph], list[Tensor]]


class Recorder(Graph):
    """A graph that remembers its nodes; gaps in what is given are NaN."""

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.made: list[Tensor] = []

    def op(self, name: str, *args: Tensor | float | None) -> Tensor:
        node = super().op(name, *args)
        if name not in ("view_2d", "view_3d", "view_4d", "reshape_2d", "permute", "add_inplace"):
            self.made.append(node)
        return node

    def linear(self, x: Tensor, rows: int = WIDE, kind: GgmlType = Q4_0) -> Tensor:
        m = matrix(kind, rows, x.ne[0])
        return self.op("mul_mat", self.weight(m.data, m.kind, x.ne[0]), x)


def fused_and_not(device: Device, build: Build, threads: int = 2) -> tuple[list[Float32], list[Float32]]:
    found = []
    for every in (False, True):
        with Recorder(device) as g:
            outputs = build(g)
            g.compute([*g.made, *outputs] if every else outputs, threads=threads, scheduled=True)
            found.append([g.read(node).copy() for node in outputs])
    return found[0], found[1]


def residual_of_other_rows(g: Recorder) -> list[Tensor]:
    wide = g.input(activations(TOKENS, 2 * WIDE))
    other = g.op("view_2d", wide, WIDE, TOKENS, wide.nb[1], 4 * WIDE)
    return [g.op("add", g.linear(g.input(activations(TOKENS, WIDE))), other)]


def residual_with_a_gap(g: Recorder) -> list[Tensor]:
    """Rows and planes next to each other, but half of each cube left out."""
    x = g.input(activations(12, WIDE).reshape(2, 2, 3, WIDE))
    whole = g.input(activations(24, WIDE).reshape(2, 4, 3, WIDE))
    other = g.op("view_4d", whole, WIDE, 3, 2, 2, *whole.nb[1:], 0)
    return [g.op("add", g.linear(x), other)]


def residual_is_the_input(g: Recorder) -> list[Tensor]:
    x = g.op("scale", g.input(activations(TOKENS, WIDE)), 3.0)
    return [g.op("add", x, g.linear(x))]


def residual_in_place(g: Recorder) -> list[Tensor]:
    x = g.op("scale", g.input(activations(TOKENS, WIDE)), 3.0)
    return [g.op("add_inplace", g.op("scale", x, 0.5), g.linear(x))]


def product_in_place(g: Recorder) -> list[Tensor]:
    x = g.op("scale", g.input(activations(TOKENS, WIDE)), 3.0)
    return [g.op("add_inplace", g.linear(x), x)]


def product_twice(g: Recorder) -> list[Tensor]:
    y = g.linear(g.input(activations(TOKENS, WIDE)))
    return [g.op("add", y, y)]


def product_read_later(g: Recorder) -> list[Tensor]:
    x = g.input(activations(TOKENS, WIDE))
    y = g.linear(x)
    z = g.op("add", y, x)
    return [g.op("mul", z, g.op("rms_norm", y, 1e-5))]


def product_read_through_a_view(g: Recorder) -> list[Tensor]:
    x = g.input(activations(TOKENS, WIDE))
    y = g.linear(x)
    half = g.op("view_2d", y, WIDE // 2, TOKENS, y.nb[1], 0)
    return [g.op("add", y, x), g.op("scale", half, 2.0)]


def product_read_by_another_backend(g: Recorder) -> list[Tensor]:
    """The scheduler gives each backend a part of the graph; the other part's reads count as well."""
    x = g.input(activations(TOKENS, WIDE))
    y = g.linear(x)
    return [g.op("add", y, x), g.op("soft_max_ext", y, None, 1.0, 0.0)]


def norm_read_by_another_backend(g: Recorder) -> list[Tensor]:
    y = g.op("rms_norm", g.input(activations(TOKENS, WIDE)), 1e-5)
    z = g.op("mul", y, g.vector(activations(1, WIDE)[0]))
    return [z, g.op("soft_max_ext", y, None, 1.0, 0.0)]


def norm_read_twice(g: Recorder) -> list[Tensor]:
    y = g.op("rms_norm", g.input(activations(TOKENS, WIDE)), 1e-5)
    return [g.op("mul", y, g.vector(activations(1, WIDE)[0])), g.op("scale", y, 2.0)]


def norm_then_products(g: Recorder) -> list[Tensor]:
    """Tiles for all threads: they are packed as soon as they are computed, as the first product wants it."""
    y = g.op("rms_norm", g.input(activations(40, WIDE)), 1e-5)
    z = g.op("mul", y, g.vector(activations(1, WIDE)[0]))
    return [g.linear(z), g.linear(z, kind=F16), g.linear(z, kind=Q4_K), g.op("scale", z, 2.0)]


def norm_then_an_adapter(g: Recorder) -> list[Tensor]:
    """Base and adapter want their activations in two ways, one step after the other."""
    y = g.op("rms_norm", g.input(activations(40, WIDE)), 1e-5)
    z = g.op("mul", y, g.vector(activations(1, WIDE)[0]))
    base, low = g.linear(z), g.linear(z, 32, F16)
    return [g.op("add", base, g.op("scale", g.linear(low, kind=F16), 0.5))]


def norm_of_a_norm_then_a_product(g: Recorder) -> list[Tensor]:
    x = g.input(activations(70, WIDE))
    for _ in range(2):
        x = g.op("mul", g.op("rms_norm", x, 1e-5), g.vector(activations(1, WIDE)[0]))
    return [g.linear(x, kind=Q8_0), g.linear(x)]


def halves(g: Recorder) -> list[Tensor]:
    return [g.op("swiglu", g.linear(g.input(activations(TOKENS, WIDE)), 96))]


def halves_that_fill_no_panel(g: Recorder) -> list[Tensor]:
    return [g.op("swiglu", g.linear(g.input(activations(TOKENS, WIDE)), 48))]


def gate_and_up_apart(g: Recorder) -> list[Tensor]:
    x = g.input(activations(TOKENS, WIDE))
    return [g.op("swiglu_split", g.linear(x, 48), g.linear(x, 48))]


def three_dimensions(g: Recorder) -> list[Tensor]:
    x = g.input(activations(35, WIDE).reshape(7, 5, WIDE))
    y = g.op("add", g.linear(x), x)
    return [g.op("mul", g.op("rms_norm", y, 1e-5), g.vector(activations(1, WIDE)[0])), g.linear(y)]


CASES: dict[str, Callable[[Recorder], list[Tensor]]] = {
    f.__name__.replace("_", " "): f
    for f in (
        residual_of_other_rows,
        residual_with_a_gap,
        residual_is_the_input,
        residual_in_place,
        product_in_place,
        product_twice,
        product_read_later,
        product_read_through_a_view,
        product_read_by_another_backend,
        norm_read_by_another_backend,
        norm_read_twice,
        norm_then_products,
        norm_then_an_adapter,
        norm_of_a_norm_then_a_product,
        halves,
        halves_that_fill_no_panel,
        gate_and_up_apart,
        three_dimensions,
    )
}


@pytest.mark.parametrize("case", CASES)
def test_fused_is_the_same(device: Device, case: str) -> None:
    got, want = fused_and_not(device, CASES[case])
    for a, b in zip(got, want, strict=True):
        assert np.array_equal(a, b)
        assert np.isfinite(b).all()


def test_what_a_pattern_leaves_out_is_not_written(device: Device) -> None:
    """So the tests here do compare something: in memory that nobody writes the products stay NaN."""
    with Graph(device) as g:
        m, x = matrix(Q4_0, WIDE, WIDE), g.input(activations(TOKENS, WIDE))
        w = g.weight(m.data, m.kind, WIDE)
        products = [g.op("mul_mat", w, x) for _ in range(2)]
        gate = g.op("swiglu", products[1])
        norm = g.op("rms_norm", x, 1e-5)
        weighted = g.op("mul", norm, g.vector(activations(1, WIDE)[0]))
        outputs = g.compute([g.op("add", products[0], x), gate, weighted])
        assert all(np.isfinite(out).all() for out in outputs)
        assert all(np.isnan(g.read(node)).all() for node in (*products, norm))


def random_graph(seed: int) -> Callable[[Recorder], list[Tensor]]:
    """Twenty nodes, each of any earlier ones; ggml's CPU device alone has soft max."""

    def build(g: Recorder) -> list[Tensor]:
        rng = np.random.default_rng(seed)
        known = [g.op("scale", g.input(activations(n, WIDE)), 1.0) for n in (TOKENS,)]

        def one() -> Tensor:  # the latest twice as often as all before it
            return known[-1] if rng.random() < 2 / 3 else known[rng.integers(len(known))]

        for _ in range(20):
            match rng.choice(["linear", "residual", "swiglu", "norm", "add", "scale", "soft max"]):
                case "linear":
                    node = g.linear(one())
                case "residual":
                    x, other = one(), one()
                    node = g.op("add", *rng.permutation(np.array([g.linear(x), other], object)))
                case "swiglu":
                    node = g.op("swiglu", g.linear(one(), 2 * WIDE))
                case "norm":
                    node = g.op("mul", g.op("rms_norm", one(), 1e-5), g.vector(activations(1, WIDE)[0]))
                case "add":
                    node = g.op("add", one(), one())
                case "scale":
                    node = g.op("scale", one(), 0.5)
                case _:
                    node = g.op("soft_max_ext", one(), None, 1.0, 0.0)
            known.append(node)
        return [known[-1], known[-2]]

    return build


@pytest.mark.parametrize("seed", range(24))
def test_random_graphs(device: Device, seed: int) -> None:
    got, want = fused_and_not(device, random_graph(seed), threads=1 + seed % 3)
    for a, b in zip(got, want, strict=True):
        assert np.array_equal(a, b, equal_nan=True)


def whole_numbers(rows: int, columns: int) -> Float32:
    rng = np.random.default_rng(rows * columns)
    return rng.integers(-2, 3, (rows, columns)).astype(np.float32)


@pytest.mark.parametrize("n_adapters", [1, 2])
@pytest.mark.parametrize("swiglu", [False, True])
def test_adapters_are_exact_where_floats_are(device: Device, swiglu: bool, n_adapters: int) -> None:
    """Whole numbers, and sums below 2^24, have no rounding: W x + 2 B A x is one number in any order.

    |x| and |w| <= 2: A x is below 4 * 64, B A x below 2^11 * 16, all sums below 2^18.
    """
    rows, columns, rank = 96, 64, 16
    x, w = whole_numbers(TOKENS, columns), whole_numbers(rows, columns)
    pairs = [
        (whole_numbers(rank + 16 * i, columns), whole_numbers(rows, rank + 16 * i)) for i in range(n_adapters)
    ]
    with Graph(device) as g:
        into = g.input(x)
        y = g.op("mul_mat", g.weight(w.view(np.uint8), F32, columns), into)
        for a, b in pairs:
            inner = g.op("mul_mat", g.adapter(a.view(np.uint8), F32, columns), into)
            ab = g.op("mul_mat", g.adapter(b.view(np.uint8), F32, a.shape[0]), inner)
            y = g.op("add", y, g.op("scale", ab, 2.0))
        if swiglu:
            y = g.op("swiglu", g.op("scale", y, 2.0**-12))
        (got,) = g.compute([y], threads=2, scheduled=True)
        assert {where for _, where in g.placement} == {PLUGIN}
    want = x @ w.T + sum(2 * (x @ a.T) @ b.T for a, b in pairs)
    if swiglu:
        with Graph(device) as g:
            (want,) = g.compute([g.op("swiglu", g.input((want * 2.0**-12).astype(np.float32)))])
    assert np.array_equal(got, want)


@pytest.mark.parametrize("kind", [Q4_0, Q4_K, F32], ids=lambda t: t.name)
def test_a_batch_without_rows(device: Device, kind: object) -> None:
    """A batch that wants no logits ends like this."""
    m = matrix(kind, 32, WIDE)
    with Graph(device) as g:
        x = g.input(activations(TOKENS, WIDE))
        taken = g.op("get_rows", x, g.input(np.zeros(0, np.int32)))
        y = g.op(
            "add",
            g.op("mul_mat", g.weight(m.data, m.kind, WIDE), taken),
            g.input(np.zeros((0, 32), np.float32)),
        )
        other = g.op("mul_mat", g.weight(m.data, m.kind, WIDE), x)
        got = g.compute([y, other], threads=2, scheduled=True)
    assert got[0].shape == (0, 32)
    assert np.isfinite(got[1]).all()
