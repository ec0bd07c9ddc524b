# SPDX-License-Identifier: Apache-2.0
"""The vision encoder's graphs against the model's formulas in float64; their bytes, names and refusals."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from pocketphi.convert.checkpoint import Checkpoint
from pocketphi.convert.config import read_config
from pocketphi.convert.onnx_graph import (
    ENCODER_QUANTS,
    INT4_BLOCK,
    EncoderQuant,
    OnnxGraph,
    named_quant,
    quantize_int4,
    quantize_int8,
)
from pocketphi.convert.write_onnx_vision import write_vision
from pocketphi.runtime.errors import CheckpointError, InputError
from pocketphi.runtime.hd import Window
from pocketphi.runtime.onnx_session import OnnxSession

from .. import tiny
from ..tiny_files import read_checkpoint

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

HEADS, USED_LAYERS, D = 4, 2, 64  # of the tiny phi4-multimodal
IMAGE = "model.embed_tokens_extend.image_embed."
FILES = ["vision.onnx", "vision.onnx.data", "vision-projector.onnx", "vision-projector.onnx.data"]


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write("phi4-multimodal", tmp_path_factory.mktemp("native"))


def convert(checkpoint: Path, out: Path, quant: EncoderQuant = "fp32") -> Path:
    out.mkdir()
    with Checkpoint.open(checkpoint) as source:
        made = write_vision(out, source, read_config(source.config, "config.json"), quant)
    assert [f.path for f in made] == FILES
    assert {f.path: f.size for f in made} == {f.name: f.stat().st_size for f in out.iterdir()}
    return out


class Tower64:
    """The tower and projector in float64, written from the model's description."""

    def __init__(self, checkpoint: Path) -> None:
        found = read_checkpoint(checkpoint).items()
        self.w = {k.removeprefix(IMAGE): v.astype(np.float64) for k, v in found if k.startswith(IMAGE)}

    def linear(self, x: Float64, name: str) -> Float64:
        weight = self.w[f"{name}.weight"]
        return x @ weight.reshape(len(weight), -1).T + self.w[f"{name}.bias"]

    def norm(self, x: Float64, name: str) -> Float64:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return scaled * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def attend(self, x: Float64, layer: str, keys: npt.NDArray[np.int64]) -> Float64:
        q, k, v = (self.linear(x, f"{layer}self_attn.{n}_proj").reshape(len(x), HEADS, -1) for n in "qkv")
        scores = np.einsum("qhd,khd->hqk", q, k[keys]) / math.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", weights, v[keys]).reshape(len(x), -1)
        return self.linear(mixed, f"{layer}self_attn.out_proj")

    def features(self, patches: Float32, window: Window) -> Float64:
        x = self.linear(patches.astype(np.float64), "img_processor.embeddings.patch_embedding")
        x += self.w["img_processor.embeddings.position_embedding.weight"][window.position_ids]
        for n in range(USED_LAYERS):
            layer = f"img_processor.encoder.layers.{n}."
            x = x + self.attend(self.norm(x, layer + "layer_norm1"), layer, window.keys)
            h = self.linear(self.norm(x, layer + "layer_norm2"), layer + "mlp.fc1")
            h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
            x = x + self.linear(h, layer + "mlp.fc2")
        grid = x.reshape(window.rows // 2, 2, window.columns // 2, 2, -1)
        return grid.mean(axis=(1, 3)).reshape(-1, x.shape[-1])

    def project(self, features: Float64, rows: npt.NDArray[np.int64]) -> Float64:
        separators = [self.w[f"{n}_img_feature_extensor"].reshape(1, -1) for n in ("sub", "global")]
        x = self.linear(np.concatenate([*separators, features])[rows], "img_projection_up")
        x = x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
        return self.linear(x, "img_projection_down")


@pytest.mark.parametrize("shape", [(32, 32), (5, 32), (32, 1), (6, 4)])
def test_against_float64(shape: tuple[int, int], native: Path, tmp_path: Path) -> None:
    """fp32: a few hundred roundings of 2^-24 in a chain of norms keep the relative error under 1e-5."""
    out = convert(native, tmp_path / "out")
    tower = OnnxSession(
        out / "vision.onnx", 2, {"patches": 3, "position_ids": 1, "keys": 1, "grid": 1}, "features"
    )
    projector = OnnxSession(out / "vision-projector.onnx", 2, {"features": 2, "rows": 1}, "embeddings")
    window, truth = Window(*shape), Tower64(native)
    rng = np.random.default_rng(0)
    crops = rng.standard_normal((2, window.rows * window.columns, 588), np.float32)
    grid = np.array([window.rows // 2, window.columns // 2])
    got = tower.run(patches=crops, position_ids=window.position_ids, keys=window.keys, grid=grid)
    want = np.concatenate([truth.features(crop, window) for crop in crops])
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)
    rows = rng.integers(0, len(want) + 2, 50)
    embeddings, right = projector.run(features=got, rows=rows), truth.project(want, rows)
    assert np.linalg.norm(embeddings - right) <= 1e-5 * np.linalg.norm(right)


def test_layouts_and_repetition_give_the_same_bytes(native: Path, tmp_path: Path) -> None:
    original = tiny.write("phi4-multimodal", tmp_path / "original", layout="original")
    for quant in ENCODER_QUANTS:
        made = [
            convert(checkpoint, tmp_path / f"{quant}{n}", quant)
            for n, checkpoint in enumerate((native, native, original))
        ]
        for name in FILES:
            assert len({(m / name).read_bytes() for m in made}) == 1, (quant, name)


@pytest.mark.parametrize("quant", ENCODER_QUANTS)
def test_graphs(quant: EncoderQuant, native: Path, tmp_path: Path) -> None:
    out = convert(native, tmp_path / "out", quant)
    for name in FILES[::2]:
        onnx.checker.check_model(str(out / name))
        model = onnx.load(str(out / name), load_external_data=False)
        tensors = list(model.graph.initializer)
        for tensor in tensors:
            for entry in tensor.external_data:
                assert entry.key != "location" or entry.value == f"{name}.data"
        names = " ".join(t.name for t in tensors)
        assert "layers.2." not in names and "post_layernorm" not in names and "head" not in names
        if name == "vision.onnx":
            assert "layers.1.mlp.fc2" in names
            kinds = {t.name: t.data_type for t in tensors}
            stored = kinds["img_processor.encoder.layers.0.mlp.fc1.weight"]
            proto = onnx.TensorProto
            assert (
                stored
                == {
                    "fp32": proto.FLOAT,
                    "fp16": proto.FLOAT16,
                    "int8": proto.INT8,
                    "int4": proto.UINT8,
                }[quant]
            )
            if quant == "int4":  # where most of the rounding error would come from stays at 8 bits
                attention = {
                    n: k for n, k in kinds.items() if "self_attn.q_proj" in n or "self_attn.k_proj" in n
                }
                weights = {n: k for n, k in attention.items() if n.endswith(".weight")}
                assert len(weights) == 2 * 2
                assert set(weights.values()) == {proto.INT8}


def test_refusals(native: Path, tmp_path: Path) -> None:
    assert named_quant("INT8") == "int8"
    with pytest.raises(InputError, match="expected one of fp32, fp16, int8, int4"):
        named_quant("q4")
    with Checkpoint.open(native) as source:
        config = read_config(source.config, "config.json")
        assert config.vision is not None
        smaller = dataclasses.replace(config.vision, image_size=224)
        with pytest.raises(CheckpointError, match=r"are \(224, 14, 3\), expected \(448, 14, 3\)"):
            write_vision(tmp_path, source, dataclasses.replace(config, vision=smaller), "fp32")
        broken = dataclasses.replace(source, tensors={**source.tensors})
        name = IMAGE + "img_projection_up.bias"
        whole = type(broken).read

        class Broken(Checkpoint):
            def read(self, info):  # type: ignore[no-untyped-def]
                values = whole(self, info)
                return values * np.float32("nan") if info.name == name else values

        fields = {f.name: getattr(source, f.name) for f in dataclasses.fields(source)}
        with pytest.raises(CheckpointError, match=r"img_projection_up.bias' holds nan"):
            write_vision(tmp_path, Broken(**fields), config, "int8")


def test_quantize_int8() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((17, 50), np.float32) * np.exp(rng.standard_normal((17, 1), np.float32))
    weight[3] = 0
    q, scale = quantize_int8(weight)
    assert q.dtype == np.int8 and abs(q.astype(int)).max() == 127 and not q[3].any()
    # Half a step, and the rounding of the quotient: at most 127 times 2^-24, twice.
    assert np.all(np.abs(q * scale[:, None].astype(np.float64) - weight) <= scale[:, None] * (0.5 + 2e-5))


@pytest.mark.parametrize("columns", [64, 65, 31])
def test_quantize_int4(columns: int) -> None:
    weight = np.random.default_rng(1).standard_normal((9, columns), np.float32)
    weight[2, :32] = 0
    packed, scale = quantize_int4(weight)
    q = np.stack([packed & 15, packed >> 4], axis=-1).reshape(9, -1, INT4_BLOCK).astype(np.float64)
    values = ((q - 8) * scale[..., None]).reshape(9, -1)
    assert not values[:, columns:].any() and not values[2, :31].any()
    # Half a step; a whole one for a value that is as large as the block's largest but of the other sign.
    steps = np.repeat(np.abs(scale), INT4_BLOCK, axis=1)[:, :columns]
    error = np.abs(values[:, :columns] - weight)
    assert np.all(error <= steps * (1 + 1e-6)) and np.mean(error <= steps * (0.5 + 1e-6)) > 0.95


def test_names_and_constants_are_shared(tmp_path: Path) -> None:
    with OnnxGraph(tmp_path, "g") as graph:
        assert graph.constant([1, 2], "int64") == graph.constant([1, 2], "int64")
        assert graph.constant([1, 2], "int64") != graph.constant([[1, 2]], "int64")
        x = graph.input("x", "float32", ("n", 2))
        graph.output(graph.op("Add", x, graph.weight("w", np.ones(2, np.float32))), "y", "float32", ("n", 2))
        (only,) = graph.finish()
    assert only.path == "g.onnx", "small tensors need no data file"
    y = OnnxSession(tmp_path / "g.onnx", 1, {"x": 2}, "y").run(x=np.zeros((3, 2), np.float32))
    assert np.array_equal(y, np.ones((3, 2)))
