# SPDX-License-Identifier: Apache-2.0
"""What onnxruntime-genai 0.18 does not do, as docs/genai.md says: one that fails says it has learned it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..conftest import Converted
from ..golden import cases
from . import client

pytestmark = client.needs_genai


def test_text_models_are_read_again_at_4097_tokens_and_nowhere_else(converted: Converted) -> None:
    """A `phi3` whose original context is another, as no published one's is, goes on with the wrong table."""
    directory = converted("phi4-mini", "F32", backbone="onnx")
    (case,) = (c for c in cases.load("phi4-mini") if c.name == "cross")
    job = {"kind": "text", "ids": case.ids.tolist(), "new": len(case.greedy)}
    (tokens,) = client.ask(directory, [job])
    before = 256 - len(case.ids) + 1  # the last of these is what 256 tokens give
    assert tokens[:before] == case.greedy[:before].tolist()
    assert tokens != case.greedy.tolist()


def test_a_growing_cache_cannot_be_read_again(
    converted: Converted, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """The multimodal decoder needs `past_present_share_buffer`, the default here; without, it is an error."""
    directory = converted("phi4-nano", "F32", lora_quant="F32", backbone="both")
    endless = client.variant(directory, tmp_path_factory.mktemp("limits") / "nano", {"eos_token_id": [4095]})
    (case,) = (c for c in cases.load("phi4-nano") if c.name == "cross")
    path = client.save(tmp_path / "ids.npz", {"input_ids": case.ids[None]})
    job = {"kind": "inputs", "inputs": path, "new": len(case.greedy)}
    shared, growing = client.ask(endless, [job, job | {"search": {"past_present_share_buffer": False}}])
    assert shared == [case.greedy.tolist()]
    assert "total_sequence_length" in growing["error"]


def test_its_processor_knows_two_ids_only(converted: Converted, tmp_path: Path) -> None:
    """200010 and 200011 are the placeholders, whatever the tokenizer says: phi4-nano's are not."""
    directory = converted("phi4-nano", "F32", lora_quant="F32", backbone="both")
    picture = str(client.EVAL / "images" / "img-000.png")
    prompt = "<|user|><|image_1|>Describe the image.<|end|><|assistant|>"
    job = {"kind": "process", "prompt": prompt, "images": [picture], "audios": []}
    (answer,) = client.ask(directory, [job | {"out": str(tmp_path / "none.npz")}])
    assert "Number of image tokens does not match the number of images" in answer["error"]
