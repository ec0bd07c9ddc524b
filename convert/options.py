# SPDX-License-Identifier: Apache-2.0
"""What a user may choose about a conversion."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Options:
    """Every choice with its default."""

    recipe: str = "Q4_K_M"  # of the GGUF backbone: see recipe.RECIPES
    lora_quant: str = "Q8_0"  # of the GGUF adapters: see recipe.LORA_TYPES
    encoders: str = "int8"  # see onnx_graph.ENCODER_QUANTS
    merge: str | None = None  # "vision" or "speech": add it to the backbone, write no adapters
    imatrix: Path | None = None  # an importance matrix: see imatrix.py
    threads: int | None = None  # None: all cores this process may use
    chat_format: str | None = None  # None: recognised by the chat template
    name: str | None = None  # None: the source's
    revision: str | None = None  # the source's hub commit, recorded only
    source_name: str | None = None  # the source's hub id; None: the folder's name
    licence: str | None = None  # None: from the checkpoint's README or LICENSE
    overwrite: bool = False  # replace a model directory that is there
    backbone: str = "gguf"  # "gguf", "onnx" or "both"
    onnx_quant: str = "int4"  # of the ONNX backbone: see decoder_quant.DECODER_KINDS
    onnx_lora: str = "fp16"  # of the ONNX adapters: see decoder_quant.LORA_KINDS
    target: str | None = None  # "phone": what target.with_target chose; adds a README.md
