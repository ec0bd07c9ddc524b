# SPDX-License-Identifier: Apache-2.0
"""The speech encoder's files: complete, valid, the same every time, and with nothing twice."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from pocketphi.convert.checkpoint import Checkpoint
from pocketphi.convert.config import read_config
from pocketphi.convert.encoder_quant import ENCODER_QUANTS, EncoderQuant
from pocketphi.convert.encoder_tensors import AUDIO
from pocketphi.convert.progress import Silent
from pocketphi.convert.write_onnx_speech import GRAPHS, write_speech
from pocketphi.runtime.bundle import ENCODER_GRAPHS, BundleFile
from pocketphi.runtime.errors import CheckpointError, OutputError

from .. import tiny
from ..tiny_files import read_checkpoint

BLOCKS = 2  # of the tiny member
LINEARS = {"front": 3, "trunk": 11 * BLOCKS, "speech-projector": 2, "vision-projector": 2}


def write(
    checkpoint: Path, out: Path, quant: EncoderQuant = "fp32", progress: Silent | None = None
) -> list[BundleFile]:
    out.mkdir()
    with Checkpoint.open(checkpoint) as source:
        return write_speech(out, source, read_config(source.config, "config.json"), quant, progress, "test")


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write("phi4-multimodal", tmp_path_factory.mktemp("native"))


def graph(directory: Path, part: str) -> onnx.GraphProto:
    return onnx.load(directory / GRAPHS[part], load_external_data=False).graph


def test_the_parts_are_those_of_a_bundle() -> None:
    assert tuple(GRAPHS) == ENCODER_GRAPHS["speech"]


@pytest.mark.parametrize("quant", ENCODER_QUANTS)
def test_files_are_valid_and_listed(native: Path, tmp_path: Path, quant: EncoderQuant) -> None:
    listed = write(native, tmp_path / "out", quant)
    assert {f.path for f in listed} == {p.name for p in (tmp_path / "out").iterdir()}
    for file in listed:
        raw = (tmp_path / "out" / file.path).read_bytes()
        assert (file.size, file.sha256) == (len(raw), hashlib.sha256(raw).hexdigest())
    for name in GRAPHS.values():
        onnx.checker.check_model(str(tmp_path / "out" / name), full_check=True)
        model = onnx.load(tmp_path / "out" / name, load_external_data=False)
        assert model.producer_name == "test"
        places = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
        assert places == {f"{name}.data"}  # beside it, by its bare name


@pytest.mark.parametrize("quant", ENCODER_QUANTS)
def test_layouts_and_runs_give_the_same_bytes(native: Path, tmp_path: Path, quant: EncoderQuant) -> None:
    original = tiny.write("phi4-multimodal", tmp_path / "original", layout="original")
    first = write(native, tmp_path / "a", quant)
    assert write(native, tmp_path / "b", quant) == first
    assert write(original, tmp_path / "c", quant) == first


def test_every_weight_is_there_once(native: Path, tmp_path: Path) -> None:
    write(native, tmp_path / "out")
    weights = {k: v for k, v in read_checkpoint(native).items() if k.startswith(AUDIO)}
    stored = 0
    for part in GRAPHS:
        tensors = graph(tmp_path / "out", part).initializer
        stored += sum(math.prod(t.dims) for t in tensors if t.data_type == onnx.TensorProto.FLOAT)
    merged = sum(
        v.size for k, v in weights.items() if k.endswith((".b1", ".b2"))
    )  # into the bias before them
    assert stored == sum(v.size for v in weights.values()) - merged


@pytest.mark.parametrize(
    ("quant", "trunk", "rest"),
    [
        ("fp32", "MatMul", "MatMul"),
        ("fp16", "MatMul", "MatMul"),
        ("int8", "DynamicQuantizeMatMul", "DynamicQuantizeMatMul"),
        ("int4", "MatMulNBits", "DynamicQuantizeMatMul"),
    ],
)
def test_every_linear_layer_has_its_kind(
    native: Path, tmp_path: Path, quant: EncoderQuant, trunk: str, rest: str
) -> None:
    write(native, tmp_path / "out", quant)
    for part, n in LINEARS.items():
        found = Counter(node.op_type for node in graph(tmp_path / "out", part).node)
        products = {k: v for k, v in found.items() if k.startswith(("MatMul", "Dynamic", "Gemm"))}
        assert products == {trunk if part == "trunk" else rest: n}
        assert (found["Cast"] > 0) == (quant == "fp16")
    found = Counter(node.op_type for node in graph(tmp_path / "out", "trunk").node)
    assert (found["MultiHeadAttention"], found["LayerNormalization"]) == (BLOCKS, 5 * BLOCKS)
    assert found["Gather"] == 1  # one relative position table, shared


def test_sizes_follow_the_kind(native: Path, tmp_path: Path) -> None:
    size = {q: sum(f.size for f in write(native, tmp_path / q, q)) for q in ENCODER_QUANTS}
    assert size["int4"] < size["int8"] < size["fp16"] < size["fp32"]


def test_progress_counts_every_tensor_once(native: Path, tmp_path: Path) -> None:
    seen: Counter[str] = Counter()
    sizes: list[int] = []

    class Told(Silent):
        def advance(self, n_bytes: int, what: str) -> None:
            seen[what] += 1
            sizes.append(n_bytes)

    write(native, tmp_path / "out", "int8", Told())
    weights = {k: v for k, v in read_checkpoint(native).items() if k.startswith(AUDIO)}
    assert seen == Counter(weights.keys())
    assert sum(sizes) == sum(2 * v.size for v in weights.values())  # bfloat16


@pytest.mark.parametrize(
    ("quant", "value"), [("fp32", np.nan), ("int8", np.inf), ("int4", np.nan), ("fp16", 1e5)]
)
def test_values_that_a_kind_cannot_hold(tmp_path: Path, quant: EncoderQuant, value: float) -> None:
    checkpoint = tiny.write("phi4-multimodal", tmp_path / "bad")
    name = f"{AUDIO}encoder.encoders.1.self_attn.v_proj.weight"
    weights = tiny.tensors("phi4-multimodal")
    weights[name][3, 5] = value
    tiny.save_tensors(checkpoint / "model.safetensors", weights, "bf16", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"encoders\.1\.self_attn\.v_proj\.weight") as caught:
        write(checkpoint, tmp_path / "out", quant)
    assert "\n" not in str(caught.value)


def test_a_place_that_cannot_be_written(native: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / GRAPHS["front"]).write_bytes(b"here already")
    with Checkpoint.open(native) as source, pytest.raises(OutputError):
        write_speech(tmp_path / "out", source, read_config(source.config, "config.json"), "fp32")
