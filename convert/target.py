# SPDX-License-Identifier: Apache-2.0
"""What `--target` stands for: a choice of everything that a kind of device asks for.

phone: the smallest recipe whose answers can still be told from the reference's by nothing but their
divergence. On phi4-nano (docs/recipes.md) Q4_K_M is smaller than Q4_0 and no farther from F32; adapters of
4 bits change no score, and neither do encoders of 4 bits, which halve what the device has to hold while it
looks and listens. Both backbones are written: ONNX for onnxruntime-genai, GGUF for programs that have
llama.cpp inside. An app needs one of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from ..runtime.errors import InputError
from .options import Options

TARGETS: Mapping[str, Mapping[str, str]] = {
    "phone": {
        "backbone": "both",
        "recipe": "Q4_K_M",
        "lora_quant": "Q4_0",
        "encoders": "int4",
        "onnx_quant": "int4",
        "onnx_lora": "int8",
    },
}


def with_target(options: Options, given: Collection[str] = ()) -> Options:
    """The options with their target's choices.

    Args:
        given: names of fields that the user chose, which stay as they are.

    Raises:
        InputError: no such target.
    """
    check_target(options.target)
    chosen: Mapping[str, Any] = TARGETS.get(options.target or "", {})
    return replace(options, **{name: value for name, value in chosen.items() if name not in given})


def check_target(name: str | None) -> None:
    """
    Raises:
        InputError: there is no such target.
    """
    if name is not None and name not in TARGETS:
        raise InputError(f"--target {name[:40]!r}: expected one of {', '.join(TARGETS)}")
