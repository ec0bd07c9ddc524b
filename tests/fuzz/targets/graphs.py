# SPDX-License-Identifier: Apache-2.0
"""An ONNX graph: what the check lets through names no other file; ONNX Runtime opens it or says why not."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import onnx

from pocketphi.runtime.errors import BundleError
from pocketphi.runtime.onnx_check import check_graph
from pocketphi.runtime.onnx_session import OnnxSession

from ..target import Target, attempt, file_with, promise

_INPUTS, _OUTPUT = {"x": 2}, "y"
_DATA_BYTES = 16  # of the seeds' weights


@functools.cache
def _data() -> Path:
    return file_with(bytes(_DATA_BYTES), "graph.onnx.data")


def one_input(data: bytes) -> None:
    """Checked, parsed again by protobuf's own reader, and opened."""
    _data()
    path = file_with(data, "graph.onnx")

    def check() -> bool:
        check_graph(path, _INPUTS, _OUTPUT)
        return True

    if attempt(check, BundleError) is None:
        return
    model = onnx.ModelProto.FromString(data)
    found = {value.name: len(value.type.tensor_type.shape.dim) for value in model.graph.input}
    promise(
        found == _INPUTS and [value.name for value in model.graph.output] == [_OUTPUT],
        "other inputs or outputs",
    )
    for tensor in _tensors(model.graph):
        places = {entry.key: entry.value for entry in tensor.external_data}
        if places:
            start, length = int(places.get("offset", "0")), int(places.get("length", "0"))
            promise(places.get("location") == "graph.onnx.data", f"names the file {places.get('location')!r}")
            promise(0 <= start <= start + length <= _DATA_BYTES, "reads outside the data file")
    attempt(lambda: OnnxSession(path, 1, _INPUTS, _OUTPUT), BundleError)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Of the graph, and of every graph and constant within its nodes."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


TARGETS = (Target("onnx", one_input, runs=2000),)
