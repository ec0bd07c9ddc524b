# SPDX-License-Identifier: Apache-2.0
"""How the plug-in runs a graph: any number of threads, stopped at any moment, two graphs at once."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pocketphi.convert.ggml_types import F16, Q4_0, Q4_K, Q8_0

from .. import ggml_graph
from ..ggml_graph import Device, Graph
from .ggml_operands import Float32
from .test_ggml_layer import Layer

ABORTED = 1  # GGML_STATUS_ABORTED
LAYER = Layer(Q4_0, F16, tokens=3, rank=32)
LAYERS = (LAYER, Layer(Q4_K, Q8_0, tokens=1, rank=0), Layer(Q8_0, Q8_0, tokens=40, rank=320))


def result(device: Device, layer: Layer, threads: int) -> Float32:
    with Graph(device) as g:
        out: Float32 = g.compute([layer.build(g)], threads=threads)[0]
        return out


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_any_number_of_threads_gives_the_same_bits(device: Device, layer: Layer) -> None:
    """Also more than there are units of work, and more than the machine has."""
    want = result(device, layer, 1)
    for threads in (2, 3, 8, 33):
        assert np.array_equal(result(device, layer, threads), want), threads


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_a_graph_can_be_stopped_after_any_step(device: Device, threads: int) -> None:
    """No thread waits for one that has seen the wish and left; the next run is whole."""
    with Graph(device) as g:
        out = LAYER.build(g)
        (want,) = g.compute([out], threads=threads)

        def run(stop_at: int) -> tuple[int, int]:
            asked = itertools.count(1)
            device.set_abort(lambda: next(asked) == stop_at)
            return g.again(), next(asked) - 1

        try:
            status, steps = run(0)
            assert status == 0 and steps > 10
            for step in range(1, steps):
                assert run(step) == (ABORTED, step)
        finally:
            device.set_abort(None)
        assert g.again() == 0
        assert np.array_equal(g.read(out), want)


def test_two_graphs_at_once_do_not_meet(device: Device) -> None:
    """Two backends, as two contexts have, each from a thread of its own."""
    want = [result(device, layer, 2) for layer in LAYERS]

    def run(own: Device, order: list[int]) -> list[Float32]:
        return [result(own, LAYERS[i], 2) for i in order]

    other = ggml_graph.Device(device.handle)
    orders = ([0, 1, 2] * 4, [2, 0, 1] * 4)
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(run, d, order) for d, order in zip((device, other), orders, strict=True)]
        found = [f.result() for f in futures]
    other.close()
    for order, results in zip(orders, found, strict=True):
        for i, got in zip(order, results, strict=True):
            assert np.array_equal(got, want[i])
