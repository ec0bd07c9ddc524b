# SPDX-License-Identifier: Apache-2.0
"""The backbone as a GGUF file of llama.cpp's `phi3` architecture.

Source of the keys: conversion/phi.py and src/models/phi3.cpp in llama.cpp.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..runtime.bundle import BundleFile
from .config import ModelConfig
from .ggml_types import QUANTIZATION_VERSION
from .gguf_header import Identity, add_identity, write_header
from .output import HashedFile
from .progress import Progress
from .tensor_stream import Workshop, write_tensors
from .vocabulary import Vocabulary, add_to_gguf
from .work_plan import Plan

if TYPE_CHECKING:
    import gguf

VOCABULARY = "vocabulary.gguf"


def general_name(name: str) -> str:
    """A model name that llama.cpp takes no hint from.

    For a name with "phi-3" or "phi3" in it the loader looks `</s>` up in the vocabulary, and fails
    where there is none (src/llama-vocab.cpp).
    """
    return re.sub(r"(phi)-?3", r"\1 3", name, flags=re.IGNORECASE)


def write_backbone(
    directory: Path,
    plan: Plan,
    config: ModelConfig,
    vocabulary: Vocabulary,
    identity: Identity,
    shop: Workshop,
    progress: Progress,
) -> BundleFile:
    """Write `plan.backbone` into a directory.

    Raises:
        CheckpointError: a tensor cannot be read or quantized.
        OutputError: the file cannot be written.
    """
    writer = _writer(config, vocabulary, identity, plan)
    steps = plan.steps_of(plan.backbone)
    with HashedFile(directory, plan.backbone) as file:
        write_header(file, writer, steps)
        write_tensors(file, steps, shop, progress)
        return file.finish()


def write_vocabulary(
    directory: Path, config: ModelConfig, vocabulary: Vocabulary, identity: Identity
) -> BundleFile:
    """Write `VOCABULARY`, a backbone's metadata without its tensors: llama.cpp loads it as `vocab_only`.

    Raises:
        OutputError: the file cannot be written.
    """
    with HashedFile(directory, VOCABULARY) as file:
        write_header(file, _writer(config, vocabulary, identity, None), ())
        return file.finish()


def _writer(
    config: ModelConfig, vocabulary: Vocabulary, identity: Identity, plan: Plan | None
) -> gguf.GGUFWriter:
    """The metadata: what the model is, and how its tensors are stored if there is a plan for them."""
    import gguf

    text, rope = config.text, config.text.rope
    writer = gguf.GGUFWriter(None, "phi3")
    writer.add_type("model")
    writer.add_name(general_name(identity.name))
    add_identity(writer, identity)
    if "/" in identity.source.name:
        writer.add_source_repo_url(f"https://huggingface.co/{identity.source.name}")
    if identity.source.revision is not None:
        writer.add_string("pocketphi.source.revision", identity.source.revision)
    if plan is not None and plan.merged is not None:
        writer.add_string("pocketphi.merged", plan.merged)
    writer.add_context_length(text.context_length)
    writer.add_rope_scaling_orig_ctx_len(rope.original_context)
    writer.add_embedding_length(text.d_model)
    writer.add_feed_forward_length(text.d_ff)
    writer.add_block_count(text.n_layers)
    writer.add_head_count(text.n_heads)
    writer.add_head_count_kv(text.n_kv_heads)
    writer.add_layer_norm_rms_eps(text.rms_eps)
    writer.add_rope_dimension_count(rope.dims)
    writer.add_rope_freq_base(rope.theta)
    if rope.is_long_rope:
        writer.add_rope_scaling_attn_factors(rope.attention_factor)
    writer.add_sliding_window(config.sliding_window)
    if plan is not None:
        writer.add_file_type(plan.recipe.file_type)
        writer.add_quantization_version(QUANTIZATION_VERSION)
    add_to_gguf(writer, vocabulary)
    return writer
