# SPDX-License-Identifier: Apache-2.0
"""Stock llama.cpp on what convert writes: every member and recipe loads, answers are the reference's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketphi.convert.recipe import LORA_TYPES, RECIPES
from pocketphi.convert.write_gguf import general_name
from pocketphi.runtime import bundle
from pocketphi.runtime.gguf_header import read_header

from .. import tiny
from ..conftest import Converted
from ..tiny import NANO
from .stock_llama import Stock

REFERENCES: list[dict[str, Any]] = json.loads((NANO.parent / "reference_outputs.json").read_text("utf-8"))[
    "items"
]
TEXT = [item for item in REFERENCES if item["mode"] == "text"]
STOP = (2853, 2848)  # phi4-nano's <|end|> and <|endoftext|>


def backbone(directory: Path) -> Path:
    made = bundle.load(directory)
    return made.path(made.decoder)


def test_metadata(converted: Converted) -> None:
    file = read_header(backbone(converted("phi4-nano", "Q4_K_M")))
    want = {
        "general.architecture": "phi3",
        "general.type": "model",
        "general.name": "phi4-nano",
        "general.file_type": 15,
        "general.quantization_version": 2,
        "phi3.context_length": 8192,
        "phi3.rope.scaling.original_context_length": 1024,
        "phi3.embedding_length": 256,
        "phi3.feed_forward_length": 768,
        "phi3.block_count": 4,
        "phi3.attention.head_count": 4,
        "phi3.attention.head_count_kv": 2,
        "phi3.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "phi3.attention.sliding_window": 0,
        "phi3.rope.dimension_count": 48,
        "phi3.rope.freq_base": 10000.0,
        "phi3.rope.scaling.attn_factor": float(np.float32(np.sqrt(1 + np.log(8) / np.log(1024)))),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-4o",
        "tokenizer.ggml.eos_token_id": 2848,
    }
    assert {key: file.keys.get(key) for key in want} == want
    assert len(file.tensors) == 4 * 6 + 2 + 2  # layers, embedding and last norm, rope factors
    config = json.loads((NANO / "config.json").read_text("utf-8"))["rope_parameters"]
    for kind in ("long", "short"):
        assert np.array_equal(
            file.float32(f"rope_factors_{kind}.weight"), np.array(config[f"{kind}_factor"], np.float32)
        )


def test_members_without_long_rope_have_no_factors(converted: Converted) -> None:
    file = read_header(backbone(converted("phi4-14b", "F32")))
    assert not any("rope" in name for name in file.tensors)
    assert "phi3.rope.scaling.attn_factor" not in file.keys
    assert "output.weight" in file.tensors


def test_adapter_metadata(converted: Converted) -> None:
    made = bundle.load(converted("phi4-nano", "Q8_0", "Q8_0"))
    for name, rank, alpha in (("vision", 32, 64.0), ("speech", 64, 128.0)):
        adapter = made.adapters[name]
        file = read_header(made.path(adapter.file))
        assert file.keys["general.type"] == "adapter" and file.keys["adapter.type"] == "lora"
        assert file.keys["pocketphi.adapter"] == name
        assert file.keys["pocketphi.source.fingerprint"] == made.source.fingerprint
        assert file.keys["general.architecture"] == "phi3" and file.keys["adapter.lora.alpha"] == alpha
        assert (adapter.rank, adapter.alpha, adapter.quant) == (rank, alpha, "Q8_0")
        assert len(file.tensors) == 4 * 4 * 2
        assert file.tensors["blk.3.ffn_up.weight.lora_a"].shape == (256, rank)
        assert file.tensors["blk.3.ffn_up.weight.lora_b"].shape == (rank, 1536)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", [*tiny.MEMBERS, "phi4-nano"])
def test_stock_llama_cpp_loads_and_decodes(model: str, recipe: str, converted: Converted) -> None:
    made = bundle.load(converted(model, recipe))
    with Stock(made.path(made.decoder)) as stock:
        logits = stock.logits([1, 2, 3])
        assert logits.shape == (made.text.vocab_size,) and np.isfinite(logits).all() and logits.std() > 0
        plain = logits
        for adapter in made.adapters.values():
            stock.set_adapter(made.path(adapter.file))
            logits = stock.logits([1, 2, 3])
            assert np.isfinite(logits).all() and not np.array_equal(logits, plain)


@pytest.mark.parametrize("quant", LORA_TYPES)
def test_every_adapter_type_acts_alike(quant: str, converted: Converted) -> None:
    """A quantized adapter moves the logits where the exact one does, give or take its own error."""
    ids = [1, 2, 3, 4, 5]

    def moved(quant: str) -> Any:
        made = bundle.load(converted("phi4-nano", "F32", quant))
        with Stock(made.path(made.decoder)) as stock:
            plain = stock.logits(ids)
            stock.set_adapter(made.path(made.adapters["speech"].file))
            return stock.logits(ids) - plain

    exact, found = moved("F32"), moved(quant)
    cosine = float(exact @ found / np.linalg.norm(exact) / np.linalg.norm(found))
    # A and B in 4 bits are each about 10 % off: sqrt(2) of that is an angle with cosine 0.98.
    assert cosine > {"F32": 1 - 1e-6, "F16": 1 - 1e-5, "Q8_0": 0.999, "Q4_0": 0.95}[quant]


@pytest.mark.parametrize("item", TEXT, ids=lambda i: i["id"])
def test_nano_in_f32_answers_as_transformers_does(item: dict[str, Any], converted: Converted) -> None:
    with Stock(backbone(converted("phi4-nano", "F32"))) as stock:
        assert stock.greedy(item["prompt"], STOP) == item["output_ids"]


@pytest.mark.parametrize("name", ["vision", "speech"])
def test_a_merged_backbone_is_the_backbone_with_its_adapter(name: str, converted: Converted) -> None:
    """Both in F32 and F16: they differ by the adapter's rounding to F16 and by the order of sums."""
    made = bundle.load(converted("phi4-nano", "F32", "F16"))
    merged = bundle.load(converted("phi4-nano", "F32", merge=name))
    assert merged.merged == name and merged.adapters == {}
    ids = list(range(100, 140))
    with Stock(made.path(made.decoder)) as stock:
        plain = stock.logits(ids)
        stock.set_adapter(made.path(made.adapters[name].file))
        adapted = stock.logits(ids)
    with Stock(merged.path(merged.decoder)) as stock:
        found = stock.logits(ids)
    # bf16 values are exact in float16 above its subnormals, so rounding moves the logits by parts in
    # 1e5; the adapter itself moves them by whole units.
    assert np.abs(found - adapted).max() < 1e-2 * np.abs(adapted - plain).max()


def test_names_llama_cpp_would_take_a_hint_from() -> None:
    assert general_name("Phi-3.5-mini-instruct") == "Phi 3.5-mini-instruct"
    assert general_name("my-PHI3-phi-3-tune") == "my-PHI 3-phi 3-tune"
    assert general_name("Phi-4-mini") == "Phi-4-mini"
