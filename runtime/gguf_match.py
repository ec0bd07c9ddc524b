# SPDX-License-Identifier: Apache-2.0
"""Whether what llama.cpp loaded is what the bundle describes: the model's and the adapters' metadata."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from typing import Any

import llama_cpp

from .errors import BundleError
from .spec import TextSpec


def match_model(model: Any, spec: TextSpec, path: Path) -> None:
    """Compare a loaded model with its spec.

    Args:
        model: `llama_model *`.
        spec: what the bundle says the model is.
        path: the file it was loaded from, for the message.

    Raises:
        BundleError: a value differs, or the file does not say it.
    """
    found = {
        "d_model": llama_cpp.llama_model_n_embd(model),
        "n_layers": llama_cpp.llama_model_n_layer(model),
        "n_heads": llama_cpp.llama_model_n_head(model),
        "n_kv_heads": llama_cpp.llama_model_n_head_kv(model),
        "vocab_size": llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model)),
    }
    wanted = {name: getattr(spec, name) for name in found}
    rope = spec.rope
    described = {
        "feed_forward_length": spec.d_ff,
        "attention.layer_norm_rms_epsilon": spec.rms_eps,
        "rope.dimension_count": rope.dims,
        "rope.freq_base": rope.theta,
    }
    if rope.is_long_rope:
        described["rope.scaling.original_context_length"] = rope.original_context
        described["rope.scaling.attn_factor"] = rope.attention_factor
    for name, value in described.items():
        found[name], wanted[name] = _metadata(model, f"phi3.{name}"), value
    for name, value in found.items():
        if not _same(value, wanted[name]):
            raise BundleError(f"{path}: has {name} {value:g}, bundle.json says {wanted[name]:g}")


def match_adapter(lora: Any, name: str, alpha: float, path: Path) -> None:
    """Compare a loaded adapter's alpha with the bundle's.

    Args:
        lora: `llama_adapter_lora *`.
        name: the adapter's name in the bundle.
        alpha: what the bundle says; NaN matches nothing.
        path: the file it was loaded from, for the message.

    Raises:
        BundleError: it differs, or the file does not say it.
    """
    text = ctypes.create_string_buffer(64)
    llama_cpp.llama_adapter_meta_val_str(lora, b"adapter.lora.alpha", text, len(text))
    found = _number(text.value)
    if not _same(found, alpha):
        raise BundleError(f"{path}: has alpha {found:g}, bundle.json says {alpha:g} for {name}")


def _metadata(model: Any, key: str) -> float:
    """A number from the model's metadata; NaN when there is none."""
    text = ctypes.create_string_buffer(64)
    llama_cpp.llama_model_meta_val_str(model, key.encode(), text, len(text))  # none: left empty
    return _number(text.value)


def _same(found: float, wanted: float) -> bool:
    return abs(found - wanted) <= 1e-6 * abs(wanted)  # float32 in the file; NaN: missing


def _number(raw: bytes) -> float:
    try:
        return float(raw)
    except ValueError:
        return math.nan
