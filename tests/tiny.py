# SPDX-License-Identifier: Apache-2.0
"""Tiny random checkpoints of every family member, as real Hugging Face directories.

    write("phi4-mini", tmp_path, dtype="bf16", shards=2)     one member, any dtype, any number of files
    write("phi4-multimodal", tmp_path, layout="original")    Microsoft's key names, LoRAs in the shards
    nano_original(tmp_path)                                  phi4-nano in that layout

The weights come from PCG64's raw bits, seeded with the member and the tensor's name, by integer
arithmetic alone: the same on every machine and with every numpy. They are rounded to bfloat16 and
kept away from float16's subnormals, so all three dtypes hold the same numbers, and the two layouts
of phi4-multimodal the same tensors. `golden/make_golden.py` is run on exactly these.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from .tiny_files import ITEM_BYTES, DType, Float32, encode, read_safetensors, write_safetensors
from .tiny_multimodal import (
    LORA,
    audio_shapes,
    native_config,
    original_config,
    original_lora_name,
    original_name,
    vision_shapes,
)
from .tiny_tokenizers import PHI4_BASE, PHI35_BASE, phi4_tokenizer, phi35_tokenizer

Member = Literal["phi4-mini", "phi4-mini-reasoning", "phi4-14b", "phi35-mini", "phi4-multimodal"]
Layout = Literal["native", "original"]

MEMBERS: tuple[Member, ...] = get_args(Member)
ROOT = Path(__file__).resolve().parent
NANO = ROOT.parent / "nano" / "checkpoint"
GOLDEN = ROOT / "golden"

_DTYPES: dict[DType, str] = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
_NANO_ADDED = 2848  # phi4-nano's <|endoftext|>; ids below are ordinary, ids from 2862 on name no token
_LONG = [round(1.16**i, 4) for i in range(24)]
_MINI: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2880,
    "max_position_embeddings": 2048,
    "original_max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "rope_scaling": {"long_factor": _LONG, "short_factor": [1.0] * 24, "type": "longrope"},
    "sliding_window": 262144,
    "tie_word_embeddings": True,
    "bos_token_id": _NANO_ADDED,
    "eos_token_id": _NANO_ADDED,
    "pad_token_id": _NANO_ADDED,
}
_MINI_ONLY: dict[str, Any] = {
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 0.75,
}
_PHI35: dict[str, Any] = {
    **_MINI,
    "num_key_value_heads": 4,
    "vocab_size": PHI35_BASE + 64,
    "rope_scaling": {
        "long_factor": [round(1.08 + 0.9 * i, 4) for i in range(32)],
        "short_factor": [round(1 + 0.03 * i, 4) for i in range(32)],
        "type": "longrope",
    },
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": PHI35_BASE,
    "pad_token_id": PHI35_BASE,
}
_PHI4: dict[str, Any] = {
    **_MINI,
    "intermediate_size": 768,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "vocab_size": PHI4_BASE + 96,
    "max_position_embeddings": 1024,
    "original_max_position_embeddings": 1024,
    "rope_theta": 250000,
    "rope_scaling": None,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": PHI4_BASE + 1,
    "eos_token_id": PHI4_BASE + 1,
    "pad_token_id": PHI4_BASE + 1,
}
_SHAPE: dict[Member, dict[str, Any]] = {
    "phi4-mini": {**_MINI, **_MINI_ONLY},
    "phi4-mini-reasoning": {**_MINI, **_MINI_ONLY},
    "phi4-14b": _PHI4,
    "phi35-mini": _PHI35,
    "phi4-multimodal": {**_MINI, **_MINI_ONLY},
}
_STOP: dict[Member, Any] = {
    "phi4-mini": [_NANO_ADDED + 5, _NANO_ADDED],
    "phi4-mini-reasoning": [_NANO_ADDED + 5, _NANO_ADDED],
    "phi4-14b": PHI4_BASE + 9,
    "phi35-mini": [PHI35_BASE + 7, PHI35_BASE + 1, PHI35_BASE],
    "phi4-multimodal": [_NANO_ADDED + 5, _NANO_ADDED],
}
_TEMPLATE: dict[Member, str] = {
    "phi4-mini": "phi4-mini",
    "phi4-mini-reasoning": "phi4-mini-reasoning",
    "phi4-14b": "phi4",
    "phi35-mini": "phi3.5",
    "phi4-multimodal": "phi4-mini",
}


def write(
    member: Member, dst: Path, *, layout: Layout = "native", dtype: DType = "bf16", shards: int | None = None
) -> Path:
    """Write one member's checkpoint into `dst` (made if missing) and return `dst`.

    `layout` matters for phi4-multimodal alone: "native" is transformers' (adapter folders beside the
    model), "original" is Microsoft's (LoRAs inside the shards, two of them by default). `shards` is
    the number of files; 1 means model.safetensors without an index.
    """
    dst.mkdir(parents=True, exist_ok=True)
    original = layout == "original"
    weights = tensors(member, layout=layout)
    _write_json(dst / "config.json", config(member, layout=layout, dtype=dtype))
    _write_json(dst / "generation_config.json", generation_config(member))
    write_tokenizer(member, dst)
    _write_model(weights, dst, dtype, shards or (2 if original else 1))
    if member == "phi4-multimodal":
        if original:
            shutil.copy(GOLDEN / "nano-original" / "preprocessor_config.json", dst)
        else:
            shutil.copy(NANO / "processor_config.json", dst)
        for name in LORA:
            folder = dst / f"{name}-lora"
            folder.mkdir(exist_ok=True)
            save_tensors(folder / "adapter_model.safetensors", adapter_tensors(name), dtype, metadata=None)
            _write_json(folder / "adapter_config.json", adapter_config(name))
    return dst


def config(member: Member, *, layout: Layout = "native", dtype: DType = "bf16") -> dict[str, Any]:
    """The contents of `config.json`, with every key that the published one has."""
    text = {
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "embd_pdrop": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "model_type": "phi3",
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "torch_dtype": _DTYPES[dtype],
        "use_cache": True,
        **_SHAPE[member],
    }
    if member != "phi4-multimodal":
        return text
    return original_config(text) if layout == "original" else native_config(text)


def generation_config(member: Member) -> dict[str, Any]:
    """The contents of `generation_config.json`."""
    shape = _SHAPE[member]
    pad = PHI4_BASE + 93 if member == "phi4-14b" else shape["pad_token_id"]
    return {
        "_from_model_config": True,
        "bos_token_id": shape["bos_token_id"],
        "eos_token_id": _STOP[member],
        "pad_token_id": pad,
        "transformers_version": "4.45.0",
    }


def chat_template(member: Member) -> str:
    """The member's published Jinja template."""
    templates: dict[str, str] = json.loads((GOLDEN / "chat_templates.json").read_text("utf-8"))
    return templates[_TEMPLATE[member]]


def write_tokenizer(member: Member, dst: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    eos = pad = unk = bos = "<|endoftext|>"
    extra: dict[str, Any] = {}
    if member == "phi4-14b":
        tokenizer, eos, pad, kind = phi4_tokenizer(), "<|im_end|>", "<|dummy_85|>", "GPT2Tokenizer"
    elif member == "phi35-mini":
        tokenizer, bos, unk, kind = phi35_tokenizer(), "<s>", "<unk>", "LlamaTokenizer"
        extra = {"legacy": False, "padding_side": "left", "sp_model_kwargs": {}}
    else:
        tokenizer = json.loads((NANO / "tokenizer.json").read_text("utf-8"))
        # The published multimodal repository says Fast where the text ones do not.
        kind = "GPT2TokenizerFast" if member == "phi4-multimodal" else "GPT2Tokenizer"
    _write_json(dst / "tokenizer.json", tokenizer)
    tokens = {"bos_token": bos, "eos_token": eos, "pad_token": pad, "unk_token": unk}
    added = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in tokenizer["added_tokens"]}
    _write_json(
        dst / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_eos_token": False,
            "added_tokens_decoder": added,
            **tokens,
            "chat_template": chat_template(member),
            "clean_up_tokenization_spaces": False,
            "model_max_length": _SHAPE[member]["max_position_embeddings"],
            "tokenizer_class": kind,
            **extra,
        },
    )
    _write_json(dst / "special_tokens_map.json", tokens)


def tensors(member: Member, *, layout: Layout = "native") -> dict[str, Float32]:
    """Every tensor of the model's own files: name -> float32, each value exact in bf16 and f16."""
    shapes = decoder_shapes(member)
    if member == "phi4-multimodal":
        shapes |= vision_shapes() | audio_shapes()
    weights = {name: weight(member, name, shape) for name, shape in shapes.items()}
    if layout == "native" or member != "phi4-multimodal":
        return weights
    renamed = {original_name(name): w for name, w in weights.items()}
    for adapter in LORA:
        for name, w in adapter_tensors(adapter).items():
            renamed[original_lora_name(name, adapter)] = w
    return dict(sorted(renamed.items()))


def adapter_tensors(name: str) -> dict[str, Float32]:
    """The tensors of phi4-multimodal's `vision-lora` or `speech-lora`, under PEFT's names."""
    rank, found = LORA[name][0], {}
    for target, (rows, cols) in _linears("phi4-multimodal").items():
        key = f"base_model.model.{target}"
        found[f"{key}.lora_A.weight"] = weight(name, f"{target}.lora_A", (rank, cols))
        found[f"{key}.lora_B.weight"] = weight(name, f"{target}.lora_B", (rows, rank))
    return found


def adapter_config(name: str) -> dict[str, Any]:
    """The contents of `adapter_config.json`."""
    shipped = json.loads((NANO / f"{name}-lora" / "adapter_config.json").read_text("utf-8"))
    rank, alpha = LORA[name]
    return {**shipped, "r": rank, "lora_alpha": alpha, "base_model_name_or_path": "tiny"}


def weight(scope: str, name: str, shape: tuple[int, ...]) -> Float32:
    """The tensor of that name: float32 `shape`, a sum of four uniforms scaled by what the name is."""
    seed = int.from_bytes(hashlib.sha256(f"{scope}/{name}".encode()).digest()[:8], "little")
    raw = np.random.PCG64(seed).random_raw(math.prod(shape)).view(np.uint16).reshape(-1, 4)
    # Irwin-Hall of order 4 has variance 4/12: times sqrt(3) it is 1. Exact in float64 up to the scaling.
    unit = (raw.sum(axis=1, dtype=np.int64) - 2 * 65535) / 65536 * math.sqrt(3)
    mean, std = _scale(name, shape)
    value = round_bf16((mean + std * unit).astype(np.float32))
    value[np.abs(value) < 2.0**-14] = 0.0  # float16 would round these once more
    return value.reshape(shape)


def round_bf16(value: Float32) -> Float32:
    """Round float32 to the nearest bfloat16 (ties to even), kept as float32."""
    bits = value.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def _scale(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """(mean, std): norms near 1, biases small, every product about as large as what goes in."""
    if name.endswith("global_mean"):
        return 4.0, 1.0  # log-mel is between 0 and about 10
    if name.endswith("global_invstd"):
        return 0.4, 0.05
    if len(shape) == 1:
        return (0.0, 0.05) if name.endswith("bias") else (1.0, 0.1)
    if name.endswith("lora_B"):
        return 0.0, 0.2 / math.sqrt(shape[1])  # the delta, scale 2 included, is 0.4 of the base
    return 0.0, 1 / math.sqrt(math.prod(shape[1:]))


def decoder_shapes(member: Member) -> dict[str, tuple[int, ...]]:
    """The decoder's tensors as Phi3ForCausalLM and Phi4MultimodalForCausalLM name them."""
    shape = _SHAPE[member]
    d, vocab = shape["hidden_size"], shape["vocab_size"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, d), "model.norm.weight": (d,)}
    for layer in range(shape["num_hidden_layers"]):
        found[f"model.layers.{layer}.input_layernorm.weight"] = (d,)
        found[f"model.layers.{layer}.post_attention_layernorm.weight"] = (d,)
    found |= {f"{name}.weight": dims for name, dims in _linears(member).items()}
    if not shape["tie_word_embeddings"]:
        found["lm_head.weight"] = (vocab, d)
    return found


def _linears(member: Member) -> dict[str, tuple[int, int]]:
    shape = _SHAPE[member]
    d, d_ff, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    d_qkv = d + 2 * shape["num_key_value_heads"] * (d // heads)
    dims = {
        "self_attn.qkv_proj": (d_qkv, d),
        "self_attn.o_proj": (d, d),
        "mlp.gate_up_proj": (2 * d_ff, d),
        "mlp.down_proj": (d, d_ff),
    }
    return {f"model.layers.{n}.{k}": v for n in range(shape["num_hidden_layers"]) for k, v in dims.items()}


def save_tensors(
    path: Path, weights: dict[str, Float32], dtype: DType, *, metadata: dict[str, str] | None
) -> None:
    """Write float32 arrays as one safetensors file of the given dtype."""
    write_safetensors(path, {name: encode(value, dtype) for name, value in weights.items()}, metadata)


def _write_model(weights: dict[str, Float32], dst: Path, dtype: DType, shards: int) -> None:
    """One model.safetensors, or shards of about equal size with their index."""
    meta = {"format": "pt"}
    if shards == 1:
        save_tensors(dst / "model.safetensors", weights, dtype, metadata=meta)
        return
    total, place, done = sum(w.size for w in weights.values()), {}, 0
    for name, value in weights.items():
        place[name] = min(done * shards // total, shards - 1)
        done += value.size
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    for i, file in enumerate(files):
        part = {name: value for name, value in weights.items() if place[name] == i}
        save_tensors(dst / file, part, dtype, metadata=meta)
    size = total * ITEM_BYTES[dtype]
    _write_json(
        dst / "model.safetensors.index.json",
        {"metadata": {"total_size": size}, "weight_map": {name: files[i] for name, i in place.items()}},
    )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def nano_original(dst: Path) -> Path:
    """Write phi4-nano in Microsoft's layout: two shards with the LoRAs inside; returns `dst`.

    The tensors come bit for bit from nano/checkpoint. Keys are sorted and the first shard ends before
    the tensor that crosses half of all values.
    """
    dst.mkdir(parents=True, exist_ok=True)
    entries = {original_name(k): v for k, v in read_safetensors(NANO / "model.safetensors").items()}
    for adapter in LORA:
        for name, entry in read_safetensors(NANO / f"{adapter}-lora" / "adapter_model.safetensors").items():
            entries[original_lora_name(name, adapter)] = entry
    sizes = {name: math.prod(entries[name].shape) for name in sorted(entries)}
    total, done, weight_map = sum(sizes.values()), 0, {}
    for name, size in sizes.items():
        done += size
        weight_map[name] = f"model-0000{1 if 2 * done <= total else 2}-of-00002.safetensors"
    for file in sorted(set(weight_map.values())):
        part = {name: entries[name] for name, place in weight_map.items() if place == file}
        write_safetensors(dst / file, part, {"format": "pt"})
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True)
    (dst / "model.safetensors.index.json").write_text(text, "utf-8")
    for file in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(NANO / file, dst)
    shutil.copy(NANO / "generation_config.json", dst)
    for file in ("config.json", "preprocessor_config.json"):
        shutil.copy(GOLDEN / "nano-original" / file, dst)
    return dst
