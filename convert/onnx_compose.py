# SPDX-License-Identifier: Apache-2.0
"""Builds a graph out of graphs that were written before, with loops and choices between.

A part's nodes are copied under new names. Its weights stay where they are: they are declared again and refer
to the same data file. Same calls, same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from ..runtime.bundle import BundleFile
from .onnx_graph import IR_VERSION, OPSET
from .output import write_file

Dim = int | str
INT64, FLOAT, BOOL = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT, onnx.TensorProto.BOOL
_DTYPES = {"int64": INT64, "float32": FLOAT, "bool": BOOL}


def read_part(path: Path) -> onnx.GraphProto:
    """A graph without the data beside it; one that this conversion has written."""
    return onnx.load(path, load_external_data=False).graph


class Composition:
    """One graph under construction: its inputs, outputs and weights."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tensors: dict[str, onnx.TensorProto] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.n_names = 0
        self.main = Scope(self)

    def input(self, name: str, dtype: str, shape: Iterable[Dim]) -> str:
        """Declare an input; `dtype` is numpy's name."""
        self.inputs.append(helper.make_tensor_value_info(name, _DTYPES[dtype], list(shape)))
        return name

    def replaceable(self, tensor: onnx.TensorProto) -> str:
        """A weight that is an input with a default: ONNX Runtime computes nothing from it ahead of time."""
        self.inputs.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        self.tensors[tensor.name] = tensor
        return tensor.name

    def output(self, value: str, name: str, dtype: str, shape: Iterable[Dim]) -> None:
        """Give a value of the main scope to the outside."""
        self.main.nodes.append(helper.make_node("Identity", [value], [name], name=f"{name}:Identity"))
        self.outputs.append(helper.make_tensor_value_info(name, _DTYPES[dtype], list(shape)))

    def write(self, directory: Path, producer: str) -> BundleFile:
        """Write `name.onnx`.

        Raises:
            OutputError: the file cannot be written.
        """
        nodes, tensors = self.main.nodes, list(self.tensors.values())
        model = helper.make_model(
            helper.make_graph(nodes, self.name, self.inputs, self.outputs, tensors),
            producer_name=producer,
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)],
        )
        return write_file(directory, f"{self.name}.onnx", model.SerializeToString(deterministic=True))


class Scope:
    """A list of nodes: the graph's own, a loop's, or a branch's. Values of outer scopes can be read."""

    def __init__(self, whole: Composition) -> None:
        self.whole = whole
        self.nodes: list[onnx.NodeProto] = []

    def name(self, what: str) -> str:
        """A name that no value has yet, anywhere in the graph."""
        self.whole.n_names += 1
        return f"{self.whole.n_names}:{what}"

    def ops(self, op: str, *inputs: str, n_outputs: int, domain: str = "", **attributes: Any) -> list[str]:
        """Add a node with several outputs."""
        name = self.name(op)
        outputs = [f"{name}.{i}" for i in range(n_outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), outputs, name=name, domain=domain, **attributes))
        return outputs

    def op(self, op: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output."""
        return self.ops(op, *inputs, n_outputs=1, domain=domain, **attributes)[0]

    def constant(self, value: npt.ArrayLike, dtype: str) -> str:
        """A small tensor; equal ones are stored once."""
        array = np.asarray(value, dtype)
        shape = "x".join(map(str, array.shape)) or "scalar"
        name = f"const:{dtype}:{shape}:{array.tobytes().hex()}"
        self.whole.tensors[name] = helper.make_tensor(
            name, _DTYPES[dtype], array.shape, array.tobytes(), raw=True
        )
        return name

    def ints(self, *values: int) -> str:
        """A constant int64 vector."""
        return self.constant(values, "int64")

    def number(self, value: int) -> str:
        """A constant int64 number."""
        return self.constant(value, "int64")

    def slice(self, x: str, start: str, end: str, axis: int) -> str:
        """x[start:end] along one axis; both are int64 [1]."""
        return self.op("Slice", x, start, end, self.ints(axis))

    def size(self, x: str, axis: int) -> str:
        """int64 [1]: the length of one axis."""
        return self.op("Shape", x, start=axis, end=axis + 1)

    def inline(self, part: onnx.GraphProto, key: str, /, **inputs: str) -> list[str]:
        """Copy a part in here; its outputs, in order.

        Args:
            key: the part's own, in front of its weights' names.
            inputs: a value for each of the part's inputs that has no default.
        """
        self.whole.tensors |= {f"{key}/{t.name}": _renamed(t, f"{key}/{t.name}") for t in part.initializer}
        names = {t.name: f"{key}/{t.name}" for t in part.initializer} | inputs
        for i in part.input:
            assert i.name in names, f"{key} takes {i.name}"
        return self.copy(part.node, names, [o.name for o in part.output])

    def copy(
        self, nodes: Iterable[onnx.NodeProto], names: dict[str, str], outputs: Sequence[str]
    ) -> list[str]:
        """Copy nodes; `names` says what their values are called here and learns the new ones."""
        for node in nodes:
            made = onnx.NodeProto()
            made.CopyFrom(node)
            made.name = self.name(node.op_type)
            made.input[:] = [names[i] if i else "" for i in node.input]
            for n, old in enumerate(node.output):
                if old:
                    names[old] = f"{made.name}.{n}"
            made.output[:] = [names[o] if o else "" for o in node.output]
            self.nodes.append(made)
        return [names[o] for o in outputs]

    def loop(
        self,
        count: str,
        state: Sequence[tuple[str, int, Sequence[Dim]]],
        body: Callable[[Scope, str, list[str]], Sequence[str]],
        stacked: Sequence[tuple[int, Sequence[Dim]]] = (),
    ) -> list[str]:
        """Run a body `count` times, an int64 number.

        Args:
            state: first value, type and shape of each value that is handed on.
            body: given its scope, the number of the round and the state, returns the next state, and
                after it what is stacked.
            stacked: type and shape of each value that is collected along a new first axis.

        Returns:
            The last state, then what was stacked.
        """
        inner = Scope(self.whole)
        turn, before = inner.name("turn"), [inner.name("state") for _ in state]
        going = inner.name("going")
        after = list(body(inner, turn, before))
        kinds = [(kind, shape) for _, kind, shape in state]
        went = inner.op("Identity", going)
        # A value that comes from outside unchanged is no output of a body's own.
        after = [inner.op("Identity", value) for value in after]
        graph = helper.make_graph(
            inner.nodes,
            inner.name("body"),
            [
                helper.make_tensor_value_info(turn, INT64, []),
                helper.make_tensor_value_info(going, BOOL, []),
                *(_info(n, *kind) for n, kind in zip(before, kinds, strict=True)),
            ],
            [
                helper.make_tensor_value_info(went, BOOL, []),
                *(_info(n, *kind) for n, kind in zip(after, [*kinds, *stacked], strict=True)),
            ],
        )
        first = [value for value, _, _ in state]
        return self.ops("Loop", count, "", *first, n_outputs=len(kinds) + len(stacked), body=graph)

    def choose(
        self,
        condition: str,
        then: Callable[[Scope], str],
        otherwise: Callable[[Scope], str],
        kind: int,
        shape: Sequence[Dim],
    ) -> str:
        """One value or another; only the chosen one is computed."""
        branches = {}
        for attribute, build in (("then_branch", then), ("else_branch", otherwise)):
            inner = Scope(self.whole)
            value = inner.op("Identity", build(inner))
            branches[attribute] = helper.make_graph(
                inner.nodes, inner.name("branch"), [], [_info(value, kind, shape)]
            )
        return self.op("If", condition, **branches)


def _info(name: str, kind: int, shape: Sequence[Dim]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, list(shape))


def _renamed(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    made = onnx.TensorProto()
    made.CopyFrom(tensor)
    made.name = name
    return made
