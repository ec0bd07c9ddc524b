# SPDX-License-Identifier: Apache-2.0
"""phi4-nano's directory through onnxruntime-genai as `phi4mm`: modes, adapters, crossings, processors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from pocketphi.runtime import audio, image
from pocketphi.runtime.engine import Model
from pocketphi.runtime.logmel import log_mel

from .. import scoring
from ..conftest import Converted
from ..golden import cases
from . import client
from .client import AUDIO, EVAL, IMAGE, ITEMS

pytestmark = client.needs_genai

GENAI_IDS = {IMAGE: 200_010, AUDIO: 200_011}  # fixed in its processor: phi4-nano has others
MODES = ("text", "vision", "speech", "vision_speech")


@pytest.fixture(scope="module")
def exact(converted: Converted) -> Path:
    return converted("phi4-nano", "F32", lora_quant="F32", backbone="both")


@pytest.fixture(scope="module")
def default(converted: Converted) -> Path:
    """What `convert --backbone onnx` gives."""
    return converted("phi4-nano", "Q4_K_M", "Q8_0", None, "int8", "onnx", "int4", "fp16")


@pytest.fixture(scope="module")
def endless(exact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exact one, that no token stops but one that phi4-nano never gives."""
    return client.variant(exact, tmp_path_factory.mktemp("endless") / "nano", {"eos_token_id": [4095]})


@pytest.fixture(scope="module")
def with_genai_ids(exact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exact one with a tokenizer whose placeholders have genai's ids: what its processor counts by."""
    root = tmp_path_factory.mktemp("ids")
    tokenizer = json.loads((exact / "tokenizer.json").read_text("utf-8"))
    for token in tokenizer["added_tokens"]:
        token["id"] = GENAI_IDS.get(token["content"], token["id"])
    out = client.variant(exact, root / "nano", {"tokenizer_dir": "own"})
    (out / "own").mkdir()
    (out / "own" / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    shutil.copy(exact / "tokenizer_config.json", out / "own")
    return out


def back(directory: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    """What genai's processor made, with the model's own ids."""
    with (directory / "tokenizer.json").open("rb") as file:
        own = {t["content"]: t["id"] for t in json.load(file)["added_tokens"]}
    ids = inputs["input_ids"]
    for text, number in GENAI_IDS.items():
        ids = np.where(ids == number, own[text], ids)
    return inputs | {"input_ids": ids.astype(np.int32)}


def test_all_reference_answers(exact: Path, tmp_path: Path) -> None:
    """All 24, token for token, text, sound, pictures, and sound about pictures, from our own inputs."""
    jobs = []
    for item in ITEMS:
        path = client.save(tmp_path / f"{item['id']}.npz", client.item_inputs(exact, item))
        jobs.append({"kind": "inputs", "inputs": path, "new": 80})
    for item, (tokens,) in zip(ITEMS, client.ask(exact, jobs), strict=True):
        assert tokens == item["output_ids"], item["id"]


def test_default_answers_are_our_own(default: Path, tmp_path: Path) -> None:
    """int4 decoder, int8 encoders, float16 adapters: what our own runtime answers over the same files."""
    jobs, items = [], [i for mode in MODES for i in [i for i in ITEMS if i["mode"] == mode][:2]]
    for item in items:
        path = client.save(tmp_path / f"{item['id']}.npz", client.item_inputs(default, item))
        jobs.append({"kind": "inputs", "inputs": path, "new": 80})
    found = client.ask(default, jobs)
    with Model(default) as model:
        for item, (tokens,) in zip(items, found, strict=True):
            ours = model.complete(item["prompt"], max_tokens=80, media=scoring.media_of(item))
            assert tokens == list(ours.token_ids), item["id"]


def test_its_own_processor(exact: Path, with_genai_ids: Path, tmp_path: Path) -> None:
    """From files to tokens by genai alone but for the ids; phi4-nano's pictures and clips, all 15."""
    items = [i for i in ITEMS if i["mode"] != "text"]
    jobs = [
        {
            "kind": "process",
            "prompt": item["prompt"],
            "images": [str(EVAL / path) for path in item["images"] or ()],
            "audios": [str(EVAL / item["audio"])] if item["audio"] else [],
            "out": str(tmp_path / f"{item['id']}.npz"),
        }
        for item in items
    ]
    client.ask(with_genai_ids, jobs)
    asked = []
    for item in items:
        with np.load(tmp_path / f"{item['id']}.npz") as file:
            made = back(exact, dict(file))
        ours = client.item_inputs(exact, item)
        assert made.keys() == ours.keys()
        for name in (
            "input_ids",
            "image_sizes",
            "image_attention_mask",
            "audio_sizes",
            "audio_attention_mask",
        ):
            assert np.array_equal(made.get(name, 0), ours.get(name, 0)), (item["id"], name)
        asked.append({"kind": "inputs", "inputs": client.save(tmp_path / "again.npz", made), "new": 80})
        (tmp_path / "again.npz").rename(tmp_path / f"{item['id']}.own.npz")
        asked[-1]["inputs"] = str(tmp_path / f"{item['id']}.own.npz")
    for item, (tokens,) in zip(items, client.ask(exact, asked), strict=True):
        assert tokens == item["output_ids"], item["id"]


def test_what_its_processor_does_differently(with_genai_ids: Path, tmp_path: Path) -> None:
    """Crops: a step or two of 255 in few pixels. Features: as far as docs/genai.md says. Counts: nothing."""
    rng = np.random.default_rng(1)
    jobs, pictures = [], {}
    for width, height in ((640, 480), (500, 300), (100, 1000), (1000, 700)):
        path = tmp_path / f"{width}x{height}.png"
        assert cv2.imwrite(str(path), rng.integers(0, 256, (height, width, 3)).astype(np.uint8))
        pictures[path] = image.prepare(image.load(path))
        out = str(path.with_suffix(".npz"))
        prompt = "<|user|><|image_1|><|end|>"
        jobs.append({"kind": "process", "prompt": prompt, "images": [str(path)], "audios": [], "out": out})
    clips = sorted((EVAL / "audio").glob("asr-00*.flac"))[:4]
    prompt, out = "<|user|><|audio_1|><|audio_2|><|audio_3|><|audio_4|><|end|>", str(tmp_path / "clips.npz")
    paths = [str(path) for path in clips]
    jobs.append({"kind": "process", "prompt": prompt, "images": [], "audios": paths, "out": out})
    client.ask(with_genai_ids, jobs)
    for path, picture in pictures.items():
        with np.load(path.with_suffix(".npz")) as file:
            assert file["num_image_tokens"].tolist() == [[picture.n_tokens]], path
            assert np.array_equal(
                file["image_attention_mask"][0], client.mask_of(picture, len(picture.crops))
            )
            difference = abs(file["pixel_values"][0, 1:] - picture.crops[1:]) * 127.5
        assert difference.max() < 2.01, path  # of 255
        assert (difference > 0.01).mean() < 0.01, path
    ours = client.clip_inputs([log_mel(c.samples, c.sample_rate) for c in map(audio.load, clips)])
    with np.load(tmp_path / "clips.npz") as file:
        for name in ("audio_sizes", "audio_attention_mask"):
            assert np.array_equal(file[name], ours[name]), name
        difference = abs(file["audio_embeds"] - ours["audio_embeds"])
    assert difference.mean() < 0.01  # of features between 0 and about 20
    assert difference.max() < 1


def test_it_reads_again_what_crosses_the_original_context(endless: Path, tmp_path: Path) -> None:
    """1,024 tokens of phi4-nano, as transformers; and with a picture, as if each token were the first."""
    jobs = []
    text = [c for c in cases.load("phi4-nano") if not c.adapter and len(c.greedy) and (c.ids >= 0).all()]
    for case in text:
        inputs = {"input_ids": case.ids[None], "audio_projection_mode": np.array([0], np.int64)}
        path = client.save(tmp_path / f"{case.name}.npz", inputs)
        jobs.append({"kind": "inputs", "inputs": path, "new": len(case.greedy)})
    assert any(len(c.ids) < 1024 < len(c.ids) + len(c.greedy) for c in text)
    for case, (tokens,) in zip(text, client.ask(endless, jobs), strict=True):
        assert tokens == case.greedy.tolist(), case.name
    prompt = f"<|user|><|image_1|>{'Describe the image. ' * 116}<|end|><|assistant|>"
    inputs = client.our_inputs(endless, prompt, [EVAL / "images" / "img-000.png"])
    n, new = inputs["input_ids"].size, 12
    assert n < 1024 < n + new - 2
    job = {"kind": "inputs", "inputs": client.save(tmp_path / "whole.npz", inputs), "new": new}
    ((crossed,),) = client.ask(endless, [job])
    k = 1024 - n + 1  # tokens after which the long table is on from the start
    ids = np.concatenate([inputs["input_ids"][0], np.array(crossed[:k], np.int32)])
    path = client.save(tmp_path / "fresh.npz", inputs | {"input_ids": ids[None]})
    ((fresh,),) = client.ask(endless, [{"kind": "inputs", "inputs": path, "new": new - k}])
    assert crossed[k:] == fresh


@pytest.mark.parametrize("mode", ["vision", "speech", "vision_speech"])
def test_a_second_turn_keeps_the_adapter(mode: str, exact: Path, tmp_path: Path) -> None:
    """Pictures and sound come with the first turn; later turns are tokens, and all that was said counts.

    genai drops the stop token of an answer when more is appended: the next turn begins with it.
    """
    item = next(i for i in ITEMS if i["mode"] == mode)
    inputs = client.item_inputs(exact, item)
    turn = [2853, 2854, 444, 260, 258, 2853, 2852]
    first = {"kind": "inputs", "inputs": client.save(tmp_path / "1.npz", inputs), "new": 40, "turns": [turn]}
    ((answer, second),) = client.ask(exact, [first])
    assert answer == item["output_ids"]
    ids = np.concatenate([inputs["input_ids"][0], np.array(answer[:-1] + turn, np.int32)])
    path = client.save(tmp_path / "2.npz", inputs | {"input_ids": ids[None]})
    ((whole,),) = client.ask(exact, [{"kind": "inputs", "inputs": path, "new": 40}])
    assert second == whole


def test_a_generated_placeholder_is_an_ordinary_token(exact: Path, tmp_path: Path) -> None:
    """After the prompt there are no rows for it."""
    item = next(i for i in ITEMS if i["mode"] == "vision")
    inputs = client.save(tmp_path / "1.npz", client.item_inputs(exact, item))
    job = {"kind": "inputs", "inputs": inputs, "new": 5, "turns": [[2849, 2850]]}
    ((_, second),) = client.ask(exact, [job])
    assert len(second) >= 1
