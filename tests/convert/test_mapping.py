# SPDX-License-Identifier: Apache-2.0
"""Which tensors a checkpoint must have: against the published lists, and every way to deviate from them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from pocketphi.convert.checkpoint import AdapterFolder
from pocketphi.convert.config import ModelConfig, read_config
from pocketphi.convert.mapping import TensorMap, expected, map_tensors, text_targets
from pocketphi.convert.safetensors_file import TensorInfo
from pocketphi.runtime.errors import CheckpointError, TensorShapeError

from .. import tiny
from .test_config import mini, multimodal, native

KEYS = tiny.GOLDEN / "keys"
ROOT = Path("checkpoint")
PUBLISHED_AUDIO = {
    "attention_dim": 1024,
    "attention_heads": 16,
    "depthwise_seperable_out_channel": 1024,
    "ext_pw_out_channel": 1024,
    "linear_units": 1536,
    "num_blocks": 24,
    "nemo_conv_settings": {"conv_channels": 1024},
}


def published(name: str) -> dict[str, tuple[int, ...]]:
    raw = json.loads(gzip.decompress((KEYS / f"{name}.json.gz").read_bytes()))
    return {key: tuple(shape) for key, shape in raw["tensors"].items()}


def full_size(raw: dict[str, Any]) -> dict[str, Any]:
    """A tiny multimodal configuration grown to Phi-4-multimodal's sizes."""
    text = {k: v for k, v in mini().items() if k not in ("architectures", "model_type", "rope_scaling")}
    return raw | text


def test_phi4_mini_is_the_published_list() -> None:
    assert expected(read_config(mini(), "c")) == published("phi4_mini_keys")


def test_the_original_multimodal_model_is_the_published_list() -> None:
    raw = full_size(multimodal(img_processor=None, rope_scaling=mini()["rope_scaling"]))
    raw["audio_processor"]["config"] |= PUBLISHED_AUDIO
    raw["vision_lora"], raw["speech_lora"] = {"r": 256, "lora_alpha": 512}, {"r": 320, "lora_alpha": 640}
    found = expected(read_config(raw, "c"))
    assert len(found) == 2047
    assert found == published("phi4mm_original_keys")


def test_the_native_multimodal_model_is_the_published_list() -> None:
    raw = native(vision_config={}, audio_config={"bias_max_distance": 500})
    raw = full_size(raw) | {"rope_scaling": None, "rope_theta": None}
    raw["rope_parameters"] = mini()["rope_scaling"] | {"rope_theta": 1e4, "partial_rotary_factor": 0.75}
    found = expected(read_config({k: v for k, v in raw.items() if v is not None}, "c"))
    assert len(found) == 1535
    assert found == published("phi4mm_native_keys")


# -- a checkpoint without files: map_tensors looks at names and shapes only ---------------------------


def info(name: str, shape: tuple[int, ...]) -> TensorInfo:
    return TensorInfo(name, "BF16", shape, Path("model.safetensors"), 0, 0)


def infos(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    return {name: info(name, shape) for name, shape in shapes.items()}


def folder(name: str, rename: Callable[[str], str] = lambda key: key, **config: Any) -> AdapterFolder:
    """tests/tiny.py's adapter folder, its keys renamed and its configuration changed."""
    tensors = {rename(k): info(rename(k), v.shape) for k, v in tiny.adapter_tensors(name).items()}
    return AdapterFolder(name, tiny.adapter_config(name) | config, tensors, ROOT / f"{name}-lora")


def mapped(raw: dict[str, Any], *folders: AdapterFolder, **shapes: tuple[int, ...] | None) -> TensorMap:
    """Map a checkpoint that fits `raw`, but for the tensors in `shapes`; None removes one."""
    config = read_config(raw, "config.json")
    tensors = infos(expected(config))
    for name, shape in shapes.items():
        if shape is None:
            del tensors[name]
        else:
            tensors[name] = info(name, shape)
    return map_tensors(config, tensors, {f.name: f for f in folders}, ROOT)


def config_of(raw: dict[str, Any]) -> ModelConfig:
    return read_config(raw, "config.json")


def test_targets_come_in_model_order() -> None:
    names = [t.name for t in text_targets(config_of(tiny.config("phi35-mini")).text)]
    assert names[:9] == [
        "token_embd.weight",
        "rope_factors_long.weight",
        "rope_factors_short.weight",
        "blk.0.attn_norm.weight",
        "blk.0.attn_qkv.weight",
        "blk.0.attn_output.weight",
        "blk.0.ffn_norm.weight",
        "blk.0.ffn_up.weight",
        "blk.0.ffn_down.weight",
    ]
    assert names[-2:] == ["output_norm.weight", "output.weight"]
    assert len(set(names)) == len(names)


def test_every_source_tensor_is_used_once() -> None:
    for raw, folders in (
        (tiny.config("phi4-mini"), ()),
        (multimodal(), ()),
        (native(), (folder("vision"), folder("speech"))),
    ):
        found = mapped(raw, *folders)
        used = [i.name for _, i in found.text if i is not None] + [i.name for i in found.encoders]
        pairs = [i.name for a in found.adapters.values() for p in a.pairs for i in (p.a, p.b)]
        held = list(expected(config_of(raw))) + [name for f in folders for name in f.tensors]
        assert sorted(used + pairs) == sorted(held)


def test_both_layouts_give_one_model() -> None:
    ours, theirs = mapped(native(), folder("vision"), folder("speech")), mapped(multimodal())
    assert [t for t, _ in ours.text] == [t for t, _ in theirs.text]
    for name in ("vision", "speech"):
        a, b = ours.adapters[name], theirs.adapters[name]
        assert (a.rank, a.alpha, len(a.pairs)) == (b.rank, b.alpha, len(b.pairs))
        shapes = [[(p.target, p.a.shape, p.b.shape) for p in x.pairs] for x in (a, b)]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "model.layers.1.mlp.down_proj.base_layer.weight",
        "model.layers.0.mlp.down_proj.lora_B.speech.weight",
        "model.embed_tokens_extend.image_embed.glb_GN",
        "model.embed_tokens_extend.audio_embed.encoder.embed.conv.3.bias",
        "model.embed_tokens_extend.image_embed.img_processor.head.probe",
    ],
)
def test_a_missing_or_misshapen_tensor_is_named(name: str) -> None:
    with pytest.raises(CheckpointError, match="is missing") as caught:
        mapped(multimodal(), **{name: None})
    assert repr(name) in str(caught.value)
    with pytest.raises(TensorShapeError) as wrong:
        mapped(multimodal(), **{name: (3, 5)})
    assert wrong.value.name == name and "[3, 5]" in str(wrong.value)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.down_proj.weight",  # a layer too many
        "model.layers.0.self_attn.q_proj.weight",  # not fused
        "model.layers.0.self_attn.qkv_proj.bias",
        "model.layers.0.mlp.down_proj.lora_A.video.weight",
        "x" * 5000,
    ],
)
def test_an_unknown_tensor_is_named(name: str) -> None:
    with pytest.raises(CheckpointError, match="not part of the model") as caught:
        mapped(multimodal(), **{name: (2, 2)})
    assert name[:80] in str(caught.value) and len(str(caught.value)) < 300


def test_an_untied_head_must_be_there_and_a_tied_one_is_checked_later() -> None:
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        mapped(tiny.config("phi35-mini"), **{"lm_head.weight": None})
    raw = tiny.config("phi4-mini")
    head = mapped(raw, **{"lm_head.weight": (raw["vocab_size"], raw["hidden_size"])}).tied_head
    assert head is not None and head.name == "lm_head.weight"
    assert mapped(raw).tied_head is None
    with pytest.raises(TensorShapeError):
        mapped(raw, **{"lm_head.weight": (1, raw["hidden_size"])})


# -- adapter folders -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rename",
    [
        lambda k: k,
        lambda k: k.removeprefix("base_model.model."),
        lambda k: k.replace(".weight", ".default.weight"),
        lambda k: k.replace(".weight", ".vision.weight"),
        lambda k: k.replace(".lora_", ".base_layer.lora_"),
    ],
)
def test_every_spelling_of_an_adapter(rename: Callable[[str], str]) -> None:
    found = mapped(native(), folder("vision", rename)).adapters
    assert list(found) == ["vision"] and len(found["vision"].pairs) == 8  # 2 layers of 4 linears


def test_a_native_model_without_adapters_is_said_to_be_one() -> None:
    found = mapped(native())
    assert found.adapters == {} and "no vision and speech adapter" in found.notes[0]


def test_folders_may_repeat_what_the_shards_hold() -> None:
    found = mapped(multimodal(), folder("vision"))
    assert "vision-lora/ repeats" in found.notes[0]
    assert found.adapters["vision"].pairs[0].a.name.endswith(".lora_A.vision.weight")
    with pytest.raises(CheckpointError, match=r"config\.json says"):
        mapped(multimodal(), folder("vision", lora_alpha=1))


def test_adapter_refusals() -> None:
    def refused(raw: dict[str, Any], one: AdapterFolder, match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            mapped(raw, one)

    speech_key = "base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight"
    whole = folder("speech")
    half = {k: v for k, v in whole.tensors.items() if k != speech_key}
    refused(tiny.config("phi4-mini"), folder("vision"), "text-only")
    refused(native(), folder("speech", r=tiny.adapter_config("speech")["r"] + 1), "has shape")
    refused(native(), folder("speech", r=0), "'r'")
    refused(native(), folder("speech", lora_alpha=float("nan")), "'lora_alpha'")
    refused(
        native(), folder("speech", lambda k: k.replace(".weight", ".vision.weight")), "not part of a speech"
    )
    refused(native(), folder("speech", lambda k: k.replace("o_proj", "q_proj")), "not part of a speech")
    refused(native(), AdapterFolder("speech", whole.config, half, whole.directory), "is missing")
    twice = dict(whole.tensors) | {speech_key.removeprefix("base_model.model."): whole.tensors[speech_key]}
    refused(native(), AdapterFolder("speech", whole.config, twice, whole.directory), "repeats")
