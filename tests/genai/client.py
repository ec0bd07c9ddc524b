# SPDX-License-Identifier: Apache-2.0
"""Asks the real onnxruntime-genai, in another process, and makes inputs for it as our own runtime does."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tokenizers import Tokenizer

from pocketphi.runtime import audio, image
from pocketphi.runtime.image import ImageInput
from pocketphi.runtime.logmel import log_mel

from .. import tiny

ROOT = tiny.NANO.parent
EVAL = ROOT / "eval"
ITEMS: list[dict[str, Any]] = json.loads((ROOT / "reference_outputs.json").read_text("utf-8"))["items"]
IMAGE, AUDIO = "<|endoftext10|>", "<|endoftext11|>"
WORKER = Path(__file__).with_name("worker.py")
ONE_THREAD = {"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}  # for all four graphs
SECONDS = 120  # a run that takes longer hangs

# Release 0.18.0 has wheels for CPython 3.11 to 3.14 on these; pyproject.toml says the same.
WHEELS = {
    ("linux", "x86_64"),
    ("linux", "aarch64"),
    ("darwin", "arm64"),
    ("win32", "AMD64"),
    ("win32", "ARM64"),
}
needs_genai = pytest.mark.skipif(
    not (3, 11) <= sys.version_info[:2] <= (3, 14)
    or platform.python_implementation() != "CPython"
    or (sys.platform, platform.machine()) not in WHEELS,
    reason="onnxruntime-genai has no wheel for this interpreter and machine",
)


def ask(directory: Path, jobs: Sequence[Mapping[str, Any]], overlay: Mapping[str, Any] | None = None) -> Any:
    """What worker.py answers to each job, over one directory that was opened once."""
    overlays = [ONE_THREAD, *([overlay] if overlay else [])]
    work = {"directory": str(directory), "overlays": overlays, "jobs": list(jobs)}
    done = subprocess.run(
        [sys.executable, str(WORKER)],
        input=json.dumps(work),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=os.environ | {"ORT_DISABLE_TELEMETRY": "1"},
    )
    assert done.returncode == 0, f"genai: {done.returncode}: {done.stderr[-2000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def variant(source: Path, out: Path, change: Mapping[str, Any]) -> Path:
    """The same directory with another `model` in its genai_config.json. The files are shared."""
    out.mkdir()
    for path in source.iterdir():
        if path.name == "genai_config.json":
            config = json.loads(path.read_text("utf-8"))
            config["model"] |= change
            (out / path.name).write_text(json.dumps(config), "utf-8")
        else:
            os.link(path, out / path.name)
    return out


def mask_of(picture: ImageInput, n_crops: int) -> npt.NDArray[np.float32]:
    """float32 [n_crops, 32, 32], 1 for each patch of the picture; crops that it has not are ones."""
    layout = picture.layout
    whole = np.zeros((32 * layout.rows, 32 * layout.columns), np.float32)
    whole[: layout.valid_rows, : layout.valid_columns] = 1
    masks = np.ones((n_crops, 32, 32), np.float32)
    tiles = whole.reshape(layout.rows, 32, layout.columns, 32).transpose(0, 2, 1, 3)
    masks[1 : layout.n_crops] = tiles.reshape(-1, 32, 32)
    return masks


def picture_inputs(pictures: Sequence[ImageInput]) -> dict[str, npt.NDArray[Any]]:
    """The inputs of genai-vision.onnx."""
    most = max(len(p.crops) for p in pictures)
    pixels = np.zeros((len(pictures), most, 3, 448, 448), np.float32)
    for row, picture in zip(pixels, pictures, strict=True):
        row[: len(picture.crops)] = picture.crops
    return {
        "pixel_values": pixels,
        "image_attention_mask": np.stack([mask_of(p, most) for p in pictures]),
        "image_sizes": np.array([[448 * p.layout.rows, 448 * p.layout.columns] for p in pictures], np.int64),
    }


def clip_inputs(clips: Sequence[npt.NDArray[np.float32]]) -> dict[str, npt.NDArray[Any]]:
    """The inputs of genai-speech.onnx but the mode; clips are log-mel features [frames, 80]."""
    most = max(len(c) for c in clips)
    features, mask = np.zeros((len(clips), most, 80), np.float32), np.zeros((len(clips), most), np.bool_)
    for n, clip in enumerate(clips):
        features[n, : len(clip)], mask[n, : len(clip)] = clip, True
    sizes = np.array([-(-len(c) // 8) for c in clips], np.int64)
    return {"audio_embeds": features, "audio_attention_mask": mask, "audio_sizes": sizes}


def our_inputs(
    directory: Path, prompt: str, images: Sequence[Path] = (), audios: Sequence[Path] = ()
) -> dict[str, npt.NDArray[Any]]:
    """All that genai's Generator takes for a request, pre-processed by our own runtime."""
    found: dict[str, npt.NDArray[Any]] = {}
    counts: dict[str, list[int]] = {IMAGE: [], AUDIO: []}
    if images:
        pictures = [image.prepare(image.load(path)) for path in images]
        counts[IMAGE] = [p.n_tokens for p in pictures]
        found |= picture_inputs(pictures) | {"num_image_tokens": np.array(counts[IMAGE], np.int64)}
    if audios:
        clips = [audio.load(path) for path in audios]
        found |= clip_inputs([log_mel(c.samples, c.sample_rate) for c in clips])
        counts[AUDIO] = found["audio_sizes"].tolist()
    found["audio_projection_mode"] = np.array([bool(images) + 2 * bool(audios)], np.int64)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    for kind, placeholder in (("image", IMAGE), ("audio", AUDIO)):
        for n in range(1, len(counts[placeholder]) + 1):
            prompt = prompt.replace(f"<|{kind}_{n}|>", placeholder)
    ids: list[int] = []
    for token in tokenizer.encode(prompt, add_special_tokens=False).ids:
        left = next((n for text, n in counts.items() if tokenizer.token_to_id(text) == token), None)
        ids += [token] * (left.pop(0) if left else 1)
    assert not any(counts.values()), "each picture and clip has its place"
    found["input_ids"] = np.array([ids], np.int32)
    return found


def item_inputs(directory: Path, item: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
    """`our_inputs` of one item of phi4-nano's reference outputs."""
    audios = [EVAL / item["audio"]] if item["audio"] else []
    return our_inputs(directory, item["prompt"], [EVAL / path for path in item["images"] or ()], audios)


def save(path: Path, inputs: Mapping[str, npt.NDArray[Any]]) -> str:
    """Where worker.py finds them."""
    np.savez(path, **inputs)
    return str(path)
