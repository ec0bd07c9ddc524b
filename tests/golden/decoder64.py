# SPDX-License-Identifier: Apache-2.0
"""The decoder in float64 numpy, written from the model's description: the yardstick for every float32 engine.

It shares no code with transformers or llama.cpp. One call reads a whole sequence at once, so the
LongRoPE table follows from the sequence's length and there is no cache that could be stale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Weights = Mapping[str, npt.NDArray[Any]]
Adapter = tuple[Weights, float]  # tensors under PEFT's names, alpha / rank


def logits(
    config: Mapping[str, Any],
    weights: Weights,
    rows: npt.NDArray[Any],
    adapter: Adapter | None = None,
    *,
    table: str | None = None,
    angle_roundings: int = 0,
) -> Float64:
    """Logits after the last position.

    Args:
        config: `config.json` of a Phi3, phi4mm or phi4_multimodal checkpoint.
        weights: the decoder's tensors under transformers' names.
        rows: [n, d_model], the embedded input: rows of the embedding, or an encoder's output.
        adapter: a LoRA on every linear of every layer, W x + scale · B (A x).
        table: "short" or "long" instead of the right one: how far off a mistake would be.
        angle_roundings: see `rope_table`.

    Returns:
        float64 [vocab_size].
    """
    x = np.asarray(rows, np.float64)
    cos, sin = rope_table(config, len(x), table=table, angle_roundings=angle_roundings)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        x = x + _attention(
            config, weights, name, _norm(config, weights, f"{name}.input_layernorm", x), adapter, cos, sin
        )
        x = x + _mlp(weights, name, _norm(config, weights, f"{name}.post_attention_layernorm", x), adapter)
    last = _norm(config, weights, "model.norm", x[-1:])
    head = weights["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    out: Float64 = (last @ head.astype(np.float64).T)[0]
    return out


def rope_table(
    config: Mapping[str, Any], n_tokens: int, *, table: str | None = None, angle_roundings: int = 0
) -> tuple[Float64, Float64]:
    """cos and sin, float64 [n_tokens, dims / 2], attention factor included.

    The long table serves sequences of more than original_max_position_embeddings tokens; the factor
    sqrt(1 + ln(s) / ln(original)) multiplies both tables.

    An engine may get angle i by i float32 multiplications (llama.cpp does), each rounded by up to
    2^-24. `angle_roundings` = 1 lets all of them round the same way: angle i is too large by i · 2^-24.
    """
    rope = config.get("rope_parameters") or {**config, **(config["rope_scaling"] or {})}
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    dims = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    factor: Float64 = np.ones(dims // 2)
    scale = 1.0
    if rope.get("long_factor"):
        original = config["original_max_position_embeddings"]
        table = table or ("long" if n_tokens > original else "short")
        factor = np.asarray(rope[f"{table}_factor"], np.float64)
        scale = math.sqrt(1 + math.log(config["max_position_embeddings"] / original) / math.log(original))
    inverse = 1.0 / (factor * float(rope["rope_theta"]) ** (np.arange(0, dims, 2) / dims))
    inverse = inverse * (1 + angle_roundings * np.arange(dims // 2) * 2.0**-24)
    angle = np.arange(n_tokens)[:, None] * inverse
    return np.cos(angle) * scale, np.sin(angle) * scale


def _linear(weights: Weights, name: str, x: Float64, adapter: Adapter | None) -> Float64:
    y: Float64 = x @ weights[f"{name}.weight"].astype(np.float64).T
    if adapter is not None:
        lora, scale = adapter
        a, b = (lora[f"base_model.model.{name}.lora_{side}.weight"].astype(np.float64) for side in "AB")
        y = y + scale * ((x @ a.T) @ b.T)
    return y


def _norm(config: Mapping[str, Any], weights: Weights, name: str, x: Float64) -> Float64:
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    y: Float64 = x / np.sqrt(mean_square + config["rms_norm_eps"]) * weights[f"{name}.weight"]
    return y


def _attention(
    config: Mapping[str, Any],
    weights: Weights,
    name: str,
    x: Float64,
    adapter: Adapter | None,
    cos: Float64,
    sin: Float64,
) -> Float64:
    n, d = x.shape
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = d // heads
    qkv = _linear(weights, f"{name}.self_attn.qkv_proj", x, adapter).reshape(
        n, heads + 2 * kv_heads, head_dim
    )
    q, k, v = np.split(qkv.transpose(1, 0, 2), [heads, heads + kv_heads])  # [heads, n, head_dim]
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    k, v = (np.repeat(t, heads // kv_heads, axis=0) for t in (k, v))
    score = q @ k.transpose(0, 2, 1) / math.sqrt(head_dim)
    score[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
    p = np.exp(score - score.max(axis=-1, keepdims=True))
    mixed = (p / p.sum(axis=-1, keepdims=True)) @ v
    return _linear(weights, f"{name}.self_attn.o_proj", mixed.transpose(1, 0, 2).reshape(n, d), adapter)


def _rotate(x: Float64, cos: Float64, sin: Float64) -> Float64:
    """Rotate dimension i with i + dims/2 (NeoX pairs); dimensions past `dims` pass through."""
    half = cos.shape[1]
    a, b = x[..., :half], x[..., half : 2 * half]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], axis=-1)


def _mlp(weights: Weights, name: str, x: Float64, adapter: Adapter | None) -> Float64:
    gate, up = np.split(_linear(weights, f"{name}.mlp.gate_up_proj", x, adapter), 2, axis=-1)
    return _linear(weights, f"{name}.mlp.down_proj", up * gate / (1 + np.exp(-gate)), adapter)
