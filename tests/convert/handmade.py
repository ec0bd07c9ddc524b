# SPDX-License-Identifier: Apache-2.0
"""The smallest checkpoints that can be read, for tests that then break them in one place."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

INDEX = "model.safetensors.index.json"
ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": "layers.*"}


def put(path: Path, value: object) -> None:
    """Write bytes as they are, anything else as JSON."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())


def weights(path: Path, *names: str) -> None:
    path.parent.mkdir(exist_ok=True)
    save_file({name: np.full((2, 3), len(name), np.float32) for name in names}, path)


def single(root: Path) -> Path:
    """The smallest checkpoint there is."""
    root.mkdir()
    put(root / "config.json", {"model_type": "phi3"})
    put(root / "tokenizer.json", {"version": "1.0"})
    weights(root / "model.safetensors", "a", "b")
    return root


def sharded(root: Path) -> Path:
    single(root)
    (root / "model.safetensors").unlink()
    weights(root / "one.safetensors", "a", "b")
    weights(root / "two.safetensors", "c")
    put(
        root / INDEX,
        {
            "metadata": {},
            "weight_map": {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"},
        },
    )
    return root


def with_adapter(root: Path) -> Path:
    single(root)
    put(root / "vision-lora" / "adapter_config.json", ADAPTER)
    weights(root / "vision-lora" / "adapter_model.safetensors", "x.lora_A.weight")
    return root
