# SPDX-License-Identifier: Apache-2.0
"""The graphs for onnxruntime-genai on ONNX Runtime alone, against our encoders and transformers' logits."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest

from pocketphi.convert.onnx_adapter_file import adapter_tensors
from pocketphi.runtime import bundle as bundles
from pocketphi.runtime.hd import layout
from pocketphi.runtime.speech_encoder import SpeechEncoder, SpeechFiles
from pocketphi.runtime.vision_encoder import VisionEncoder, VisionFiles

from ..conftest import Converted
from ..golden import cases
from . import client

Float32 = npt.NDArray[np.float32]

GRAPHS = ["genai-decoder.onnx", "genai-embedding.onnx", "genai-speech.onnx", "genai-vision.onnx"]
SAME = 588 * 2.0**-24  # of the largest: the longest sum, 588 products, in another order


def exact(converted: Converted, model: str = "phi4-nano") -> Path:
    return converted(model, "F32", lora_quant="F32", backbone="both")


def session(directory: Path, name: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    return onnxruntime.InferenceSession(str(directory / name), options, providers=["CPUExecutionProvider"])


def tensors_of(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    return [t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]


def test_no_weight_is_stored_twice(converted: Converted) -> None:
    """All data of theirs is in files that other graphs, or adapters, have anyway."""
    directory = exact(converted)
    theirs = {path.name for path in directory.iterdir() if path.name.startswith("genai-")}
    assert theirs == set(GRAPHS)
    used = set()
    for name in GRAPHS:
        path = directory / name
        assert path.stat().st_size < 500_000, name
        graph = onnx.load(path, load_external_data=False).graph
        for tensor in tensors_of(graph):
            entry = {e.key: e.value for e in tensor.external_data}
            used.add(entry["location"])
            end = int(entry["offset"]) + int(entry["length"])
            assert end <= (directory / entry["location"]).stat().st_size, tensor.name
    assert used == {path.name for path in directory.iterdir() if path.suffix in (".data", ".onnx_adapter")}
    listed = {file.path for file in bundles.load(directory).files}
    assert {*GRAPHS, "genai_config.json", "tokenizer_config.json"} <= listed
    assert {"vision_processor.json", "speech_processor.json"} <= listed


def test_the_adapters_numbers_are_found_in_their_files(converted: Converted) -> None:
    """As ONNX Runtime's own reader gives them."""
    path = exact(converted) / "adapter-vision.onnx_adapter"
    known = onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters()
    found = adapter_tensors(path)
    assert found.keys() == known.keys()
    whole = path.read_bytes()
    for name, tensor in found.items():
        entry = {e.key: e.value for e in tensor.external_data}
        data = whole[int(entry["offset"]) :][: int(entry["length"])]
        assert np.array_equal(np.frombuffer(data, "<f4").reshape(tensor.dims), known[name].numpy()), name


@pytest.mark.parametrize(
    "sizes", [[(448, 448)], [(449, 300)], [(640, 480)], [(100, 1000), (448, 20)]], ids=str
)
def test_pictures(sizes: list[tuple[int, int]], converted: Converted) -> None:
    """Any window of any crop: rows as our encoder's. Their global view is not read: it is made here."""
    directory = exact(converted)
    ours = VisionEncoder(
        VisionFiles(directory / "vision.onnx", directory / "vision-projector.onnx"), n_threads=2
    )
    rng, pictures = np.random.default_rng(3), []
    for width, height in sizes:
        plan = layout(width, height)
        crops = rng.uniform(-1, 1, (plan.n_crops, 3, 448, 448)).astype(np.float32)
        crops[0] = bicubic(crops[1:], plan.rows, plan.columns)
        pictures.append(SimpleNamespace(crops=crops, layout=plan, n_tokens=plan.n_tokens))
    inputs = client.picture_inputs(pictures)  # type: ignore[arg-type]
    inputs["pixel_values"][:, 0] = 7
    (rows,) = session(directory, "genai-vision.onnx").run(None, inputs)
    want = np.concatenate([ours.encode(p) for p in pictures])  # type: ignore[arg-type]
    assert rows.shape == (len(want), want.shape[1] + 2)
    assert abs(rows[:, :-2] - want).max() <= 4 * SAME * abs(want).max()
    assert (rows[:, -2:] == [1, 0]).all()


def bicubic(crops: Float32, rows: int, columns: int) -> Float32:
    """The canvas, 448 pixels a side: cubic with a = -0.75 at pixel centres, edges repeated, in float64."""
    canvas = crops.reshape(rows, columns, 3, 448, 448).transpose(2, 0, 3, 1, 4).reshape(3, rows * 448, -1)
    found = canvas.astype(np.float64)
    for axis, scale in ((1, rows), (2, columns)):
        at = (np.arange(448) + 0.5) * scale - 0.5
        low, most = np.floor(at).astype(int), found.shape[axis] - 1
        total = 0.0
        for tap in range(-1, 3):
            x = abs(at - (low + tap))
            near = (1.25 * x - 2.25) * x * x + 1
            far = ((-0.75 * x + 3.75) * x - 6) * x + 3
            weight = np.where(x <= 1, near, far).reshape([-1 if n == axis else 1 for n in range(3)])
            total = total + weight * found.take(np.clip(low + tap, 0, most), axis)
        found = total
    return found.astype(np.float32)


@pytest.mark.parametrize(("frames", "mode"), [([1], 2), ([257], 3), ([4001], 2), ([300, 90], 2)], ids=str)
def test_clips(frames: list[int], mode: int, converted: Converted) -> None:
    """One token, a second piece, a second block, two clips; and both projectors."""
    directory = exact(converted)
    heads = {
        "speech": directory / "speech-projector.onnx",
        "vision": directory / "speech-vision-projector.onnx",
    }
    files = SpeechFiles(directory / "speech-front.onnx", directory / "speech.onnx", heads)  # type: ignore[arg-type]
    ours = SpeechEncoder(files, n_threads=2)
    rng = np.random.default_rng(4)
    clips = [rng.uniform(0, 12, (n, 80)).astype(np.float32) for n in frames]
    inputs = client.clip_inputs(clips) | {"audio_projection_mode": np.array([mode], np.int64)}
    (rows,) = session(directory, "genai-speech.onnx").run(None, inputs)
    want = np.concatenate([ours.encode(clip, "vision" if mode == 3 else "speech") for clip in clips])
    assert rows.shape == (len(want), want.shape[1] + 2)
    assert abs(rows[:, :-2] - want).max() <= 4 * SAME * abs(want).max()
    assert (rows[:, -2:] == [0, 1]).all()


@pytest.mark.parametrize("model", ["phi4-nano", "phi4-multimodal"])
def test_logits(model: str, converted: Converted) -> None:
    """Every golden case in one pass: what the two columns say decides which adapter is on."""
    directory = exact(converted, model)
    text = bundles.load(directory).text
    embedding, decoder = (session(directory, f"genai-{name}.onnx") for name in ("embedding", "decoder"))
    empty = {"image_features": (0, text.d_model + 2), "audio_features": (0, text.d_model + 2)}
    none = {name: np.zeros(shape, np.float32) for name, shape in empty.items()}
    past = {
        i.name: np.zeros([1, i.shape[1], 0, i.shape[3]], np.float32)
        for i in decoder.get_inputs()
        if i.name.startswith("past_key_values.")
    }
    assert len(past) == 2 * (text.n_layers + 1)
    adapters = set()
    for case in cases.load(model):
        ids = np.maximum(case.ids, 0)[None].astype(np.int64)
        (rows,) = embedding.run(None, {"input_ids": ids, **none})
        assert not rows[..., -2:].any()
        rows[0, case.ids < 0, :-2] = case.rows
        for n, adapter in enumerate(("vision", "speech")):
            rows[0, len(case.ids) // 2, text.d_model + n] = case.adapter == adapter
        mask = np.ones(ids.shape, np.int64)
        (logits,) = decoder.run(["logits"], {"inputs_embeds": rows, "attention_mask": mask, **past})
        assert abs(logits[0, -1] - case.logits).max() <= case.bound, case.name
        adapters.add(case.adapter)
    assert adapters == {None, "vision", "speech"}


def test_pictures_go_before_sound(converted: Converted) -> None:
    """A request with both has the vision adapter."""
    directory = exact(converted)
    decoder = session(directory, "genai-decoder.onnx")
    past = {
        i.name: np.zeros([1, i.shape[1], 0, i.shape[3]], np.float32)
        for i in decoder.get_inputs()
        if i.name.startswith("past_key_values.")
    }
    rows = np.random.default_rng(5).uniform(-1, 1, (1, 9, 258)).astype(np.float32)
    found = []
    for flags in ((1, 0), (1, 1), (0, 1), (0, 0)):
        rows[..., -2:] = flags
        feeds = {"inputs_embeds": rows, "attention_mask": np.ones((1, 9), np.int64), **past}
        found.append(decoder.run(["logits"], feeds)[0])
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[1], found[2])
    assert not np.array_equal(found[2], found[3])


def test_a_merged_adapter_leaves_nothing_to_choose(converted: Converted) -> None:
    directory = converted("phi4-nano", "F32", merge="vision", backbone="onnx")
    graph = onnx.load(directory / "genai-decoder.onnx", load_external_data=False).graph
    assert not [n for n in graph.node if n.op_type == "If"]
    assert not list(directory.glob("*.onnx_adapter"))
    assert "logits" in [o.name for o in session(directory, "genai-decoder.onnx").get_outputs()]
    assert json.loads((directory / "genai_config.json").read_text("utf-8"))["model"]["type"] == "phi4mm"


def test_rows_take_the_places_of_their_placeholders(converted: Converted) -> None:
    """In order, pictures and sound apart; and nothing happens where there are more places than rows."""
    embedding = session(exact(converted), "genai-embedding.onnx")
    ids = np.array([[300, 2849, 2849, 301, 2850, 2849]])
    pictures, sound = (np.full((n, 258), 10.0 * n, np.float32) + np.arange(n)[:, None] for n in (3, 1))
    pictures, sound = pictures.astype(np.float32), sound.astype(np.float32)
    (rows,) = embedding.run(None, {"input_ids": ids, "image_features": pictures, "audio_features": sound})
    assert np.array_equal(rows[0, [1, 2, 5]], pictures)
    assert np.array_equal(rows[0, [4]], sound)
    none = np.zeros((0, 258), np.float32)
    (plain,) = embedding.run(None, {"input_ids": ids, "image_features": none, "audio_features": none})
    assert np.array_equal(plain[0, [0, 3]], rows[0, [0, 3]])
    assert not plain[..., -2:].any()
