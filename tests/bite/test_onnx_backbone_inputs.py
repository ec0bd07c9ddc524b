# SPDX-License-Identifier: Apache-2.0
"""A backbone as ONNX with graphs, weights, adapters or a vocabulary that are missing, damaged or others'."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from pocketphi.runtime.bundle import MANIFEST

from .. import gguf_bytes
from .conftest import Bitten
from .spoilt_onnx import external, function, loop, opset, sparse
from .table import Case, Place, copy_folder, seal

Make = Callable[[Place], list[str]]
GRAPH, EMBEDDING, DATA = "decoder.onnx", "embedding.onnx", "model.onnx.data"
ADAPTER, OTHER, VOCABULARY = "adapter-speech.onnx_adapter", "adapter-vision.onnx_adapter", "vocabulary.gguf"
ASK = ["-p", "Hi", "-n", "2"]
YES = ["--grammar", 'root ::= "yes"']


def changed(change: Callable[[Path], object], *more: str) -> Make:
    """A question to a model directory after `change(directory)`; its list of files is right again."""

    def make(place: Place) -> list[str]:
        model = place.model(recipe="onnx")
        change(model)
        return ["run", "-m", str(seal(model)), *ASK, *more]

    return make


def unsealed(change: Callable[[Path], object]) -> Make:
    """The same, and the list says what it said."""

    def make(place: Place) -> list[str]:
        model = place.model(recipe="onnx")
        change(model)
        return ["run", "-m", str(model), *ASK]

    return make


def edited(edit: Callable[[onnx.ModelProto], object], name: str = GRAPH) -> Make:
    """With something else in a graph."""

    def change(model: Path) -> None:
        graph = onnx.load(model / name, load_external_data=False)
        edit(graph)
        (model / name).write_bytes(graph.SerializeToString())

    return changed(change)


def cut(name: str, numerator: int) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        raw = (model / name).read_bytes()
        (model / name).write_bytes(raw[: len(raw) * numerator // 10])

    return change


def flipped(name: str, at: float) -> Callable[[Path], object]:
    """One bit is another, at a place from 0 to 1."""

    def change(model: Path) -> None:
        raw = bytearray((model / name).read_bytes())
        raw[int(at * len(raw))] ^= 0x40
        (model / name).write_bytes(raw)

    return change


def place_of(value: str) -> Callable[[onnx.ModelProto], object]:
    def edit(model: onnx.ModelProto) -> None:
        next(e for e in external(model).external_data if e.key == "location").value = value

    return edit


def node(op: str, domain: str = "") -> Callable[[onnx.ModelProto], object]:
    return lambda model: model.graph.node.append(
        helper.make_node(op, ["inputs_embeds"], ["other"], domain=domain)
    )


def wider(model: onnx.ModelProto) -> None:
    """The mask has a dimension more."""
    mask = next(i for i in model.graph.input if i.name == "attention_mask")
    mask.type.tensor_type.shape.dim.add(dim_value=1)


def renamed(model: onnx.ModelProto) -> None:
    model.graph.input[0].name = "pixels"


def of_integers(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64


def not_finite(model: Path) -> None:
    (model / DATA).write_bytes(b"\xff" * (model / DATA).stat().st_size)


def link_outside(model: Path) -> None:
    (model / DATA).rename(model.parent / "weights")
    (model / DATA).symlink_to("../weights")


def link_inside(model: Path) -> None:
    (model / DATA).rename(model / "weights")
    (model / DATA).symlink_to("weights")


def swap(a: str, b: str) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        first = (model / a).read_bytes()
        (model / a).write_bytes((model / b).read_bytes())
        (model / b).write_bytes(first)

    return change


def gone(name: str) -> Callable[[Path], object]:
    return lambda model: (model / name).unlink()


def manifest(change: Callable[[dict[str, object]], object]) -> Callable[[Path], object]:
    def edit(model: Path) -> None:
        plain = json.loads((model / MANIFEST).read_text("utf-8"))
        change(plain)
        (model / MANIFEST).write_text(json.dumps(plain), "utf-8")

    return edit


def other_adapter(place: Place) -> list[str]:
    """That of another member of the family."""
    model = place.model(recipe="onnx")
    other = copy_folder(place.shared_model("phi4-multimodal", "onnx"), place.path / "other")
    (model / ADAPTER).write_bytes((other / ADAPTER).read_bytes())
    return ["run", "-m", str(seal(model)), *ASK, "--adapter", "speech"]


def other_graph(place: Place) -> list[str]:
    model = place.model(recipe="onnx")
    other = copy_folder(place.shared_model("phi4-multimodal", "onnx"), place.path / "other")
    for name in (GRAPH, EMBEDDING, DATA):
        (model / name).write_bytes((other / name).read_bytes())
    return ["run", "-m", str(seal(model)), *ASK]


def pipe(model: Path) -> None:
    (model / GRAPH).unlink()
    os.mkfifo(model / GRAPH)


def vocabulary(edit: Callable[[gguf_bytes.Gguf], object]) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        parts = gguf_bytes.read(model / VOCABULARY)
        edit(parts)
        (model / VOCABULARY).write_bytes(parts.pack())

    return change


SPEECH = ("--adapter", "speech")
CASES = [
    Case("as it is", changed(lambda m: None), 0, ""),
    Case("as it is, with an adapter", changed(lambda m: None, *SPEECH), 0, ""),
    Case("as it is, with a grammar", changed(lambda m: None, *YES), 0, "", out="yes"),
    # graphs
    *(
        Case(f"{n} tenths", changed(cut(GRAPH, n)), 3, r"decoder\.onnx: (ends within|is not an ONNX)")
        for n in range(10)
    ),
    Case("embedding cut", changed(cut(EMBEDDING, 5)), 3, r"embedding\.onnx: ends within"),
    Case("a bit of the graph", unsealed(flipped(GRAPH, 0.5)), 3, r"decoder\.onnx: SHA-256 is"),
    Case("a bit of the weights", unsealed(flipped(DATA, 0.5)), 3, r"model\.onnx\.data: SHA-256 is"),
    Case("a bit of an adapter", unsealed(flipped(ADAPTER, 0.5)), 3, r"speech\.onnx_adapter: SHA-256 is"),
    Case(
        "data elsewhere", edited(place_of("/etc/passwd")), 3, r"refers to a file other than model\.onnx\.data"
    ),
    Case("data in the folder above", edited(place_of("../model.onnx.data")), 3, "refers to a file other"),
    Case("data of its own", edited(place_of("decoder.onnx.data")), 3, "refers to a file other"),
    Case(
        "embedding's data elsewhere", edited(place_of("/etc/shadow"), EMBEDDING), 3, "refers to a file other"
    ),
    Case("sparse", edited(sparse), 3, r"holds field 15 \(graph\)"),
    Case("a loop", edited(loop), 3, r"holds field|uses the operator '\.Loop'"),
    Case("a function", edited(function), 3, r"holds field 25 \(model\)"),
    Case("our own operators", edited(node("MatMulNBits", "pocketphi")), 3, "uses the operator 'pocketphi"),
    Case("a foreign opset", edited(opset("evil.example", 1)), 3, r"uses the operators 'evil\.example 1'"),
    Case("a wider mask", edited(wider), 3, r"input 'attention_mask' is int64 \[any, any, 1\], expected"),
    Case("another input", edited(renamed), 3, "has the input 'pixels', which the converter does not write"),
    Case("input of integers", edited(of_integers), 3, r"is int64 \[any, any, 256\], expected float32"),
    Case("graphs swapped", changed(swap(GRAPH, EMBEDDING)), 3, r"decoder\.onnx: (has|input)"),
    Case("genai's graph", changed(swap(GRAPH, "model.onnx")), 3, r"decoder\.onnx: has the input 'input_ids'"),
    Case("of another model", other_graph, 3, r"decoder\.onnx: (has|input|output)"),
    Case("no graph", unsealed(gone(GRAPH)), 3, r"decoder\.onnx: listed in bundle\.json but missing"),
    Case("a pipe", unsealed(pipe), 3, r"decoder\.onnx: is not a regular file", max_seconds=10),
    # weights
    Case("no data", unsealed(gone(DATA)), 3, r"model\.onnx\.data: listed in bundle\.json but missing"),
    Case("data cut", changed(cut(DATA, 9)), 3, r"its shape needs \d+ of the \d+ that model\.onnx\.data has"),
    Case("data not finite", changed(not_finite), 4, "gave logits that are not finite"),
    Case("data through a link outside", changed(link_outside), 3, "points outside the model directory"),
    Case("data through a link inside", changed(link_inside), 0, ""),
    # adapters
    *(
        Case(f"adapter, {n} tenths", changed(cut(ADAPTER, n), *SPEECH), 3, r"speech\.onnx_adapter: ")
        for n in range(10)
    ),
    Case(
        "adapters swapped",
        changed(swap(ADAPTER, OTHER), *SPEECH),
        3,
        r"lora_A' is float16 \[256, \d+\], bundle\.json",
    ),
    Case(
        "adapter of another model",
        other_adapter,
        3,
        r"speech\.onnx_adapter: .*(another model|bundle\.json means)",
    ),
    Case(
        "no adapter", unsealed(gone(ADAPTER)), 3, r"speech\.onnx_adapter: listed in bundle\.json but missing"
    ),
    # the manifest
    Case(
        "another rank",
        changed(manifest(lambda m: m["adapters"]["speech"].update(rank=7)), *SPEECH),  # type: ignore[index]
        3,
        r"lora_A' is float16 \[256, \d+\], bundle\.json means float16 \[256, 7\]",
    ),
    Case(
        "another type",
        changed(manifest(lambda m: m["onnx"].update(lora_quant="int8"))),  # type: ignore[attr-defined]
        3,
        r"input '.*lora_A' is float16|has no input|has the input|expected int8",
    ),
    Case(
        "a type that there is not",
        changed(manifest(lambda m: m["onnx"].update(lora_quant="int3"))),  # type: ignore[attr-defined]
        3,
        "field 'lora_quant' is 'int3', expected one of fp32, fp16, int8",
    ),
    Case(
        "a path outside",
        changed(manifest(lambda m: m["onnx"].update(decoder="../decoder.onnx"))),  # type: ignore[attr-defined]
        3,
        "expected a path inside the directory",
    ),
    # the vocabulary: only a grammar needs it
    Case("vocabulary cut", changed(cut(VOCABULARY, 5), *YES), 3, r"vocabulary\.gguf: "),
    Case("vocabulary cut, no grammar", changed(cut(VOCABULARY, 5)), 0, ""),
    Case(
        "no GGUF", changed(lambda m: (m / VOCABULARY).write_bytes(b"x" * 99), *YES), 3, "is not a GGUF file"
    ),
    Case(
        "vocabulary without a model",
        changed(vocabulary(lambda p: p.drop("tokenizer.ggml.model")), *YES),
        3,
        r"vocabulary\.gguf: has tokenizer",
    ),
    # options
    Case("no GGUF backbone", changed(lambda m: None, "--backbone", "gguf"), 2, "has no GGUF backbone"),
    Case(
        "a provider that is not there",
        changed(lambda m: None, "--provider", "dml"),
        2,
        "provider is 'dml', but",
    ),
    Case("a cache type that it has not", changed(lambda m: None, "--cache-type", "q8_0"), 2, "cache is f32"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_onnx_backbone(case: Case, bitten: Bitten) -> None:
    bitten(case)
