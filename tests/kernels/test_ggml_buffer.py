# SPDX-License-Identifier: Apache-2.0
"""Packed weights look like ggml's bytes from outside: in parts, through views, copied and cleared."""

from __future__ import annotations

import numpy as np
import pytest

from pocketphi.convert.ggml_types import F16, F32, Q4_0, GgmlType

from ..ggml_graph import Device, Graph
from .ggml_operands import FLOATS, QUANTIZED, activations, matrix

COLUMNS = 512
ROWS = 50  # three panels of 16 rows, and two rows

KINDS = pytest.mark.parametrize("kind", (*QUANTIZED, *FLOATS), ids=lambda t: t.name)


def ranges(row: int) -> list[tuple[int, int]]:
    """[first, last) in bytes: within a row, across rows, panels and all, at both ends; odd where possible."""
    panel, end = 16 * row, ROWS * row
    return [
        (0, 1),
        (3, 8),
        (row - 1, row + 1),
        (row + 5, 3 * row - 7),
        (panel - 1, panel + 1),
        (panel, 2 * panel),
        (panel // 2 + 1, 3 * panel + 1),
        (3 * panel - 3, end - 1),
        (end - 1, end),
        (1, end),
        (0, end - 1),
    ]


@KINDS
def test_parts(device: Device, kind: GgmlType) -> None:
    """Written, filled and read in pieces, beside the same done to plain bytes: any, not only numbers."""
    plain = matrix(kind, ROWS, COLUMNS).data.reshape(-1).copy()
    noise = np.random.default_rng(kind.id)
    with Graph(device) as g:
        w = g.weight(plain.reshape(ROWS, -1).copy(), kind, COLUMNS)
        g.load()
        for i, (first, last) in enumerate(ranges(kind.row_bytes(COLUMNS))):
            assert np.array_equal(g.read_bytes(w, first, last - first), plain[first:last])
            new = noise.integers(0, 256, last - first).astype(np.uint8)
            g.write_bytes(w, first, new)
            plain[first:last] = new
            assert np.array_equal(g.read_bytes(w, 0, plain.size), plain), (first, last)
            g.fill_bytes(w, first, last - first, 17 * i % 256)
            plain[first:last] = 17 * i % 256
            assert np.array_equal(g.read_bytes(w, 0, plain.size), plain), (first, last)
        g.write_bytes(w, 0, matrix(kind, ROWS, COLUMNS).data.reshape(-1))
        assert np.array_equal(g.read(w).view(np.uint8).reshape(ROWS, -1), matrix(kind, ROWS, COLUMNS).data)


@KINDS
def test_rows_replaced_are_the_ones_multiplied(device: Device, kind: GgmlType) -> None:
    """What is written in part is packed again, and the other rows' products are what they were."""
    m, other, x = matrix(kind, ROWS, COLUMNS), matrix(kind, ROWS + 1, COLUMNS), activations(3, COLUMNS)
    row = kind.row_bytes(COLUMNS)
    found = []
    for data in (m.data, other.data[:ROWS]):
        with Graph(device) as g:
            y = g.op("mul_mat", g.weight(data.copy(), kind, COLUMNS), g.input(x))
            found += g.compute([y])
    with Graph(device) as g:
        w = g.weight(m.data, kind, COLUMNS)
        y = g.op("mul_mat", w, g.input(x))
        g.compute([y])
        g.write_bytes(w, 10 * row, other.data[10:40].reshape(-1).copy())
        assert g.again() == 0
        got = g.read(y)
    assert np.array_equal(got[:, 10:40], found[1][:, 10:40])
    assert np.array_equal(got[:, :10], found[0][:, :10])
    assert np.array_equal(got[:, 40:], found[0][:, 40:])


@KINDS
def test_views(device: Device, kind: GgmlType) -> None:
    """A view of some rows, and a view of that: read and written where the weights are, multiplied by ggml."""
    m = matrix(kind, ROWS, COLUMNS)
    row = kind.row_bytes(COLUMNS)
    with Graph(device) as g:
        w = g.weight(m.data, kind, COLUMNS)
        view = g.op("view_2d", w, COLUMNS, 30, row, 7 * row)
        inner = g.op("view_2d", view, COLUMNS, 5, row, 13 * row)
        kept = g.op("add", g.input(activations(1, 8)), g.input(activations(1, 8)))
        product = g.op("mul_mat", inner, g.input(activations(1, COLUMNS)))
        g.expand(view)
        g.expand(inner)
        g.compute([kept])
        assert not g.supports(product)
        assert np.array_equal(g.read(inner).view(np.uint8).reshape(5, -1), m.data[20:25])
        assert np.array_equal(
            g.read_bytes(view, row + 1, 20 * row), m.data[7:].reshape(-1)[row + 1 :][: 20 * row]
        )
        g.write_bytes(inner, row // 2, m.data[0].copy())
        g.fill_bytes(view, 29 * row, row, 0xAB)
        want = m.data.reshape(-1).copy()
        want[20 * row + row // 2 :][:row] = m.data[0]
        want[36 * row :][:row] = 0xAB
        assert np.array_equal(g.read_bytes(w, 0, want.size), want)


@KINDS
def test_a_cleared_buffer_is_zero(device: Device, kind: GgmlType) -> None:
    m = matrix(kind, ROWS, COLUMNS)
    with Graph(device) as g:
        w = g.weight(m.data, kind, COLUMNS)
        g.load()
        g.clear_weights()
        assert not g.read_bytes(w, 0, m.data.size).any()


def test_a_row_of_floats_is_not_packed(device: Device) -> None:
    """A norm's weights: the plug-in's other steps read them as they are. One quantized row is a matrix."""
    values = activations(1, COLUMNS)[0]
    with Graph(device) as g:
        vector = g.vector(values)
        rows = [g.weight(matrix(kind, 1, COLUMNS).data, kind, COLUMNS) for kind in (F32, F16, Q4_0)]
        scaled = g.op("mul", g.input(activations(2, COLUMNS)), vector)
        (got,) = g.compute([scaled])
        for w, kind in zip(rows, (F32, F16, Q4_0), strict=True):
            assert np.array_equal(g.read(w).view(np.uint8).reshape(1, -1), matrix(kind, 1, COLUMNS).data)
    assert np.array_equal(got, activations(2, COLUMNS) * values)


@KINDS
def test_only_what_is_multiplied_is_asked_for(device: Device, kind: GgmlType) -> None:
    """An embedding table of floats in our memory would be packed, and unpacked whole for every token."""
    with Graph(device) as g:
        w = g.weight(matrix(kind, ROWS, COLUMNS).data, kind, COLUMNS)
        taken = g.op("get_rows", w, g.input(np.zeros(2, np.int32)))
        product = g.op("mul_mat", w, g.input(activations(2, COLUMNS)))
        vector = g.vector(activations(1, COLUMNS)[0])
        scaled = g.op("mul", g.input(activations(2, COLUMNS)), vector)
        assert not g.supports_with(taken, w)
        assert g.supports_with(product, w)
        assert g.supports_with(scaled, vector)
