# SPDX-License-Identifier: Apache-2.0
"""The speech encoder's trunk with one thing in it that the converter never writes, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx
from onnx import TensorProto, helper

Edit = Callable[[onnx.ModelProto], object]


def external(model: onnx.ModelProto) -> onnx.TensorProto:
    """The first tensor that lies in the data file."""
    return next(t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL)


def entry(key: str, value: str) -> Edit:
    """Another value of an external tensor's entry."""

    def edit(model: onnx.ModelProto) -> None:
        next(e for e in external(model).external_data if e.key == key).value = value

    return edit


def without(key: str) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        entries = external(model).external_data
        entries.remove(next(e for e in entries if e.key == key))

    return edit


def node(op: str, domain: str = "", **attributes: object) -> Edit:
    return lambda model: model.graph.node.append(
        helper.make_node(op, ["tokens"], ["other"], domain=domain, **attributes)
    )


def sparse(model: onnx.ModelProto) -> None:
    values = helper.make_tensor("s", TensorProto.FLOAT, [1], [1.0])
    values.ClearField("float_data")
    values.data_location = TensorProto.EXTERNAL
    values.external_data.add(key="location", value="/etc/passwd")
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))


def loop(model: onnx.ModelProto) -> None:
    body = helper.make_graph([], "body", [], [])
    model.graph.node.append(helper.make_node("Loop", ["", ""], [], body=body))


def subgraph(model: onnx.ModelProto) -> None:
    body = helper.make_graph([], "body", [], [])
    model.graph.node[0].attribute.append(helper.make_attribute("body", body))


def tensor_elsewhere_in_a_node(model: onnx.ModelProto) -> None:
    value = TensorProto(name="v", data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
    value.external_data.add(key="location", value="/etc/passwd")
    model.graph.node[0].attribute.append(helper.make_attribute("value", value))


def opset(domain: str, version: int) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        for one in model.opset_import:
            if one.domain == domain:
                one.version = version
                return
        model.opset_import.append(helper.make_opsetid(domain, version))

    return edit


def function(model: onnx.ModelProto) -> None:
    model.functions.append(helper.make_function("local", "F", [], [], [], [helper.make_opsetid("", 21)]))


def twice(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(model.graph.initializer[0])


def dims(value: list[int]) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        del external(model).dims[:]
        external(model).dims.extend(value)

    return edit


def named(what: str, name: str) -> Edit:
    return lambda model: setattr(getattr(model.graph, what)[0], "name", name)


ELSEWHERE = r"refers to a file other than speech\.onnx\.data"

SPOILT: Mapping[str, tuple[Edit, str]] = {
    "data in the folder above": (entry("location", "../speech.onnx.data"), ELSEWHERE),
    "data at an absolute path": (entry("location", "/etc/passwd"), ELSEWHERE),
    "data of another graph": (entry("location", "vision.onnx.data"), ELSEWHERE),
    "data in a folder": (entry("location", "./speech.onnx.data"), ELSEWHERE),
    "data in a folder below": (entry("location", "sub/speech.onnx.data"), ELSEWHERE),
    "data in the graph's memory": (entry("location", "*/_ORT_MEM_ADDR_/*"), ELSEWHERE),
    "data nowhere": (without("location"), ELSEWHERE),
    "no offset": (without("offset"), "has no offset and length in the data file"),
    "no length": (without("length"), "has no offset and length"),
    "offset -1": (entry("offset", "-1"), "has no offset and length"),
    "offset 2^63": (entry("offset", str(2**63)), "has no offset and length"),
    "offset past the end": (entry("offset", str(10**12)), r"its shape needs \d+ of the \d+ that"),
    "length 0": (entry("length", "0"), "takes 0 bytes from"),
    "length 10^12": (entry("length", str(10**12)), "takes 1000000000000 bytes from"),
    "offset that is no number": (entry("offset", "0x10"), "has no offset and length"),
    "a checksum": (
        lambda model: external(model).external_data.add(key="checksum", value="0"),
        "has 'checksum' twice, or for no reason",
    ),
    "two places": (
        lambda model: external(model).external_data.add(key="location", value="/etc/passwd"),
        "has 'location' twice",
    ),
    "data here and there": (
        lambda model: setattr(external(model), "raw_data", b"\0" * 4),
        "is partly here and partly elsewhere",
    ),
    "a sparse tensor": (sparse, r"holds field 15 \(graph\)"),
    "a tensor elsewhere in a node": (tensor_elsewhere_in_a_node, "is partly here and partly elsewhere"),
    "a tensor twice": (twice, "holds a tensor twice"),
    "huge dimensions": (dims([2**40, 2**40]), "has the impossible shape"),
    "a negative dimension": (dims([-1]), "has the impossible shape"),
    "a product of 0 modulo 2^64": (dims([2**32, 2**32]), "has the impossible shape"),
    "other dimensions": (dims([3]), "its shape needs"),
    "an unknown type": (lambda model: setattr(external(model), "data_type", 8), "is of no type that"),
    "a loop": (loop, "holds field|uses the operator '.Loop'"),
    "a graph in a node": (subgraph, r"holds field 6 \(attribute\)"),
    "an operator of another domain": (node("Run", "evil.example"), "uses the operator 'evil.example.Run'"),
    "an operator that is never used": (node("Resize"), "uses the operator '.Resize'"),
    "another opset": (opset("", 22), r"uses the operators 'ai\.onnx 22', expected"),
    "an older opset": (opset("", 1), r"uses the operators 'ai\.onnx 1'"),
    "an opset of another domain": (opset("evil.example", 1), "uses the operators 'evil.example 1'"),
    "another IR version": (lambda model: setattr(model, "ir_version", 3), "ONNX graph of IR version 10"),
    "a function": (function, r"holds field 25 \(model\)"),
    "metadata": (lambda m: m.metadata_props.add(key="session", value="x"), r"holds field 14 \(model\)"),
    "another input": (named("input", "other"), r"has inputs other\[2\] and outputs hidden, expected tokens"),
    "another output": (named("output", "other"), "and outputs other, expected"),
    "one dimension more": (
        lambda model: model.graph.input[0].type.tensor_type.shape.dim.add(dim_value=1),
        r"has inputs tokens\[3\]",
    ),
    "no shape": (
        lambda model: model.graph.input[0].type.tensor_type.ClearField("shape"),
        "has an input or output without a shape",
    ),
    "a dimension of 2^62": (
        lambda model: model.graph.input[0].type.tensor_type.shape.dim.add(dim_value=2**62),
        "with a dimension of",
    ),
}
