# SPDX-License-Identifier: Apache-2.0
"""The tiny checkpoints are what the golden files were made from, and look like the published ones."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from . import tiny
from .golden import cases, decoder64
from .tiny_files import CODES, DType, decode, read_checkpoint, read_safetensors
from .tiny_multimodal import LORA, original_lora_name, original_name

NANO_ORIGINAL = {  # phi4-nano as its training wrote it in Microsoft's layout
    "model-00001-of-00002.safetensors": "d591c55be2bd4f23155ef56481e44f13c0722b26237706fc1578830283e8530d",
    "model-00002-of-00002.safetensors": "5685d0c2bdea81594bfe4f03a581b5cc966c9ccf5e7b85f0abaeee4eb370e97e",
    "model.safetensors.index.json": "6e2a03fc0c8a0e57f28341882197f469474c5f1a63ffd20e7bfb1a24fc984f31",
    "config.json": "68e024254d1e37035ec795033bd984ddf5089da721b969dedbda04eca69fc601",
    "preprocessor_config.json": "adc7d64e041bf0c9db08d0e212eac49510057bf956e63e2a3b8fb8437b947e5d",
}
LAYOUTS: list[tuple[tiny.Member, tiny.Layout]] = [
    *((member, "native") for member in tiny.MEMBERS),
    ("phi4-multimodal", "original"),
]


def file_hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def real_names(file: str) -> dict[str, Any]:
    """A list of a published checkpoint's tensors, name -> shape; without its adapters."""
    whole = json.loads(gzip.decompress((tiny.GOLDEN / "keys" / file).read_bytes()))
    found: dict[str, Any] = whole["tensors"]
    return found


def pattern(names: Any) -> set[str]:
    """The names with every layer number replaced: the same set for a small and for a large model."""
    return {re.sub(r"(layers|encoders)\.\d+\.", r"\1.N.", name) for name in names}


@pytest.mark.parametrize(("member", "layout"), LAYOUTS)
def test_the_same_bytes_each_time(member: tiny.Member, layout: tiny.Layout, tmp_path: Path) -> None:
    first = file_hashes(tiny.write(member, tmp_path / "a", layout=layout))
    assert first == file_hashes(tiny.write(member, tmp_path / "b", layout=layout))
    assert "config.json" in first and "tokenizer.json" in first


@pytest.mark.parametrize("model", cases.MODELS)
def test_golden_files_belong_to_these_weights(model: str, tmp_path: Path) -> None:
    folder = cases.checkpoint(model, tmp_path)
    got = cases.checkpoint_hash(read_checkpoint(folder))
    assert got == cases.index()["models"][model]["weights_sha256"], "run tests/golden/make_golden.py again"


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_dtype_holds_the_same_numbers(dtype: DType, shards: int, tmp_path: Path) -> None:
    tiny.write("phi4-mini", tmp_path, dtype=dtype, shards=shards)
    got, want = read_checkpoint(tmp_path), tiny.tensors("phi4-mini")
    assert set(got) == set(want)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == shards
    assert {e.code for f in files for e in read_safetensors(f).values()} == {CODES[dtype]}


def test_weights_are_spread_as_promised() -> None:
    value = tiny.weight("any", "model.layers.0.mlp.down_proj.weight", (256, 512))
    # 131072 draws of standard deviation 1/sqrt(512): mean and deviation are off by less than 6 sigma.
    sigma = 512**-0.5
    assert abs(value.mean()) < 6 * sigma / value.size**0.5
    assert abs(value.std() / sigma - 1) < 6 / (2 * value.size) ** 0.5 + 2**-9  # bfloat16 rounding
    assert abs(value).max() <= 2 * 3**0.5 * sigma * (1 + 2**-8)


def test_names_of_the_original_layout_are_the_published_ones() -> None:
    assert pattern(tiny.tensors("phi4-multimodal", layout="original")) == pattern(
        real_names("phi4mm_original_keys.json.gz")
    )


def test_names_of_the_native_layout_are_the_published_ones() -> None:
    assert pattern(tiny.tensors("phi4-multimodal")) == pattern(real_names("phi4mm_native_keys.json.gz"))
    whole = json.loads(gzip.decompress((tiny.GOLDEN / "keys" / "phi4mm_native_keys.json.gz").read_bytes()))
    for adapter in LORA:
        assert pattern(tiny.adapter_tensors(adapter)) == pattern(whole["adapters"][adapter])


@pytest.mark.parametrize("member", ["phi4-mini", "phi4-mini-reasoning"])
def test_names_of_the_text_members_are_the_published_ones(member: tiny.Member) -> None:
    assert pattern(tiny.tensors(member)) == pattern(real_names("phi4_mini_keys.json.gz"))


@pytest.mark.parametrize("member", ["phi4-14b", "phi35-mini"])
def test_untied_members_have_a_head(member: tiny.Member) -> None:
    assert set(tiny.tensors(member)) - pattern(real_names("phi4_mini_keys.json.gz")) >= {"lm_head.weight"}


def test_axes_of_the_multimodal_tensors_are_the_published_ones() -> None:
    real = real_names("phi4mm_original_keys.json.gz")
    for name, value in tiny.tensors("phi4-multimodal", layout="original").items():
        want = real[name]  # the first layers exist in both
        assert value.ndim == len(want), name
        assert [n == 1 for n in value.shape] == [n == 1 for n in want], name


def test_both_layouts_hold_the_same_tensors(tmp_path: Path) -> None:
    native = read_checkpoint(tiny.write("phi4-multimodal", tmp_path / "native"))
    original = read_checkpoint(tiny.write("phi4-multimodal", tmp_path / "original", layout="original"))
    for name, value in native.items():
        np.testing.assert_array_equal(original.pop(original_name(name)), value)
    for adapter in LORA:
        path = tmp_path / "native" / f"{adapter}-lora" / "adapter_model.safetensors"
        for name, entry in read_safetensors(path).items():
            np.testing.assert_array_equal(original.pop(original_lora_name(name, adapter)), decode(entry))
    assert not original


def test_phi4_nano_in_the_original_layout(tmp_path: Path) -> None:
    got = file_hashes(tiny.nano_original(tmp_path))
    assert {name: got[name] for name in NANO_ORIGINAL} == NANO_ORIGINAL


@pytest.mark.parametrize("member", tiny.MEMBERS)
def test_stop_ids_are_the_templates_turn_ends(member: tiny.Member, tmp_path: Path) -> None:
    tiny.write_tokenizer(member, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    stop = tiny.generation_config(member)["eos_token_id"]
    names = {tokenizer.id_to_token(i) for i in (stop if isinstance(stop, list) else [stop])}
    assert names == {
        "phi4-14b": {"<|im_end|>"},
        "phi35-mini": {"<|end|>", "<|assistant|>", "<|endoftext|>"},
    }.get(member, {"<|end|>", "<|endoftext|>"})
    assert tokenizer.get_vocab_size() <= tiny.config(member)["vocab_size"]


@pytest.mark.parametrize("model", cases.MODELS)
def test_golden_cases_read_back(model: str) -> None:
    for case in cases.load(model):
        assert np.isfinite(case.logits).all()
        assert case.greedy[:1].tolist() in ([], [int(case.logits.argmax())])
        assert len(case.greedy) == len(case.margins) and (case.margins > 0).all()
        assert sum(len(span) for span in case.spans()) == len(case.ids)
        assert case.step_logits.shape == (len(case.steps), len(case.logits))
        for step, logits in zip(case.steps, case.step_logits, strict=True):
            assert int(logits.argmax()) == case.greedy[step]


@pytest.mark.parametrize("model", cases.MODELS)
def test_golden_logits_agree_with_float64(model: str, tmp_path: Path) -> None:
    """A second implementation, in float64: within the distance that was measured when the files were made."""
    folder = cases.checkpoint(model, tmp_path)
    config, weights = json.loads((folder / "config.json").read_text("utf-8")), read_checkpoint(folder)
    case = next(c for c in cases.load(model) if c.name in ("short", "text-000"))
    rows = weights["model.embed_tokens.weight"][case.ids]
    error = np.abs(decoder64.logits(config, weights, rows) - case.logits).max()
    # float32_error is kept to two digits, and float64 sums differ in their last bits.
    assert error <= 1.05 * case.float32_error


@pytest.mark.parametrize("model", cases.MODELS)
def test_every_greedy_token_is_decided_beyond_the_bound(model: str) -> None:
    """Within the bound the best logit may lose that much and the second gain it, and still be the best."""
    for case in cases.load(model):
        assert (case.margins > 2 * case.bound).all(), case.name


@pytest.mark.parametrize("model", ["phi4-mini", "phi35-mini", "phi4-nano"])
def test_a_wrong_table_is_far_outside_the_bound(model: str, tmp_path: Path) -> None:
    folder = cases.checkpoint(model, tmp_path)
    config, weights = json.loads((folder / "config.json").read_text("utf-8")), read_checkpoint(folder)
    found = {case.name: case for case in cases.load(model)}
    for name, wrong in (("at", "long"), ("over", "short")):
        case = found[name]
        rows = weights["model.embed_tokens.weight"][case.ids]
        off = np.abs(decoder64.logits(config, weights, rows, table=wrong) - case.logits).max()
        assert off > 100 * case.bound


def test_golden_answers_of_phi4_nano_are_its_reference_outputs() -> None:
    """Two runs of transformers: with a cache (the shipped reference) and without (the golden files)."""
    reference = json.loads((tiny.NANO.parent / "reference_outputs.json").read_text("utf-8"))["items"]
    outputs = {item["id"]: item["output_ids"] for item in reference}
    compared = 0
    for case in cases.load("phi4-nano"):
        if case.name in outputs:
            want = outputs[case.name][: len(case.greedy)]
            assert case.greedy[: len(want)].tolist() == want
            compared += 1
    assert compared >= 4


def test_chat_ids_come_from_the_stored_rendering(tmp_path: Path) -> None:
    chat = json.loads((tiny.GOLDEN / "chat.json").read_text("utf-8"))
    for entry in chat.values():
        if entry["tokenizer"] == "phi4-nano":
            folder = tiny.NANO
        else:
            folder = tmp_path / entry["tokenizer"]
            folder.mkdir()
            tiny.write_tokenizer(entry["tokenizer"], folder)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        for item in entry["conversations"]:
            assert tokenizer.encode(item["rendered"], add_special_tokens=False).ids == item["ids"]
