# SPDX-License-Identifier: Apache-2.0
"""Every reader of bytes that nobody vouches for, by name. A group's file is imported when asked for."""

from __future__ import annotations

import importlib

from ..target import Target

GROUPS = {
    "gguf": ("gguf",),
    "checkpoint": ("safetensors", "config", "tokenizer", "weight-index"),
    "bundle": ("bundle",),
    "media": ("image-header", "image", "mpeg", "sound", "pipe"),
    "texts": ("schema", "tools", "calls", "chat", "raw-prompt"),
    "evaluation": ("items", "logits"),
    "graphs": ("onnx",),
}
NAMES = tuple(name for names in GROUPS.values() for name in names)


def find(name: str) -> Target:
    """The target of that name."""
    group = next(group for group, names in GROUPS.items() if name in names)
    targets: tuple[Target, ...] = importlib.import_module(f".{group}", __name__).TARGETS
    return next(target for target in targets if target.name == name)
