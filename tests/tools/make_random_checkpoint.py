# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of a real member's shape with random weights: for measuring cost, where only sizes matter.

    python -m tests.tools.make_random_checkpoint --shape phi4-mini --out DIR [--layers N]

The weights are normally distributed bfloat16 numbers from one block that is repeated, so that writing
is as fast as the disk. Phi-4-mini and Phi-4-multimodal get the real 200,064-token vocabulary; the
LongRoPE factors are invented.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from pocketphi.convert.config import read_config
from pocketphi.convert.mapping import expected

from .. import tiny

SHAPES: dict[str, dict[str, Any]] = {
    "phi4-mini": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 200064,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
    },
    "phi4-14b": {
        "hidden_size": 5120,
        "intermediate_size": 17920,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 10,
        "vocab_size": 100352,
        "max_position_embeddings": 16384,
        "original_max_position_embeddings": 16384,
        "rope_theta": 250000.0,
    },
    "phi35-mini": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32064,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
    },
}
AUDIO = {
    "attention_dim": 1024,
    "attention_heads": 16,
    "depthwise_seperable_out_channel": 1024,
    "ext_pw_out_channel": 1024,
    "linear_units": 1536,
    "num_blocks": 24,
    "nemo_conv_settings": {"conv_channels": 1024},
}
LORA = {"vision_lora": {"r": 256, "lora_alpha": 512}, "speech_lora": {"r": 320, "lora_alpha": 640}}
REAL_TOKENIZER = tiny.GOLDEN / "tokenizer-phi-4-mini" / "tokenizer.json.gz"

SHARD_BYTES = 5_000_000_000  # what the hub's own sharding aims at
BLOCK_VALUES = 1 << 25
STD = 0.02  # of the weights; transformers' initializer_range


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shape", choices=["phi4-mini", "phi4-multimodal", "phi4-14b", "phi35-mini"], required=True
    )
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the real model")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    write(args.shape, args.out, args.layers)


def write(shape: str, out: Path, layers: int | None = None) -> None:
    """Write the checkpoint into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    config = _config(shape, layers)
    (out / "config.json").write_text(json.dumps(config, indent=1), "utf-8")
    _write_tokenizer(shape, out, config)
    block = (np.random.default_rng(4).standard_normal(BLOCK_VALUES, np.float32) * STD).view(np.uint32)
    bf16 = (block >> 16).astype("<u2").tobytes()
    _write_shards(expected(read_config(config, "config.json")), bf16, out)


def _config(shape: str, layers: int | None) -> dict[str, Any]:
    """The tiny member's configuration, grown to the real sizes."""
    multimodal = shape == "phi4-multimodal"
    config = tiny.config(shape, layout="original" if multimodal else "native")  # type: ignore[arg-type]
    config |= SHAPES["phi4-mini" if multimodal else shape]
    if layers is not None:
        config["num_hidden_layers"] = layers
    if config["rope_scaling"]:
        head_dim = config["hidden_size"] // config["num_attention_heads"]
        n = int(head_dim * config.get("partial_rotary_factor", 1.0)) // 2
        config["rope_scaling"] |= {"long_factor": [1.08**i for i in range(n)], "short_factor": [1.0] * n}
    if multimodal:
        config["img_processor"] = None  # the published file's way to say SigLIP so400m
        config["audio_processor"]["config"] |= AUDIO
        for name, sizes in LORA.items():
            config[name] |= sizes
    return config


def _write_tokenizer(shape: str, out: Path, config: dict[str, Any]) -> None:
    if config["vocab_size"] != 200064:
        tiny.write_tokenizer(shape, out)  # type: ignore[arg-type]
    else:
        tiny.write_tokenizer("phi4-mini", out)
        (out / "tokenizer.json").write_bytes(gzip.decompress(REAL_TOKENIZER.read_bytes()))
        config |= {"bos_token_id": 199999, "eos_token_id": 199999, "pad_token_id": 199999}
    (out / "config.json").write_text(json.dumps(config, indent=1), "utf-8")


def _write_shards(shapes: dict[str, tuple[int, ...]], block: bytes, out: Path) -> None:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        n_bytes = 2 * math.prod(shape)
        if size and size + n_bytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += n_bytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        _write_shard(out / file, shard, block)
    index = {"metadata": {}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], block: bytes) -> None:
    header, at = {}, 0
    for name, shape in shapes.items():
        n_bytes = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + n_bytes]}
        at += n_bytes
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        view = memoryview(block)
        while at:
            at -= file.write(view[: min(at, len(view))])


if __name__ == "__main__":
    main()
