# SPDX-License-Identifier: Apache-2.0
"""A GGUF of Phi-4-mini's shape with random weights, by the real converter: for measuring the decoder alone.

    python -m tests.tools.make_random_gguf --out MODEL.gguf --quant Q4_0 [--layers N] [--plain]
    python -m tests.tools.make_random_gguf --lora ADAPTER.gguf --rank 320 --lora-type Q8_0 [--layers N]

Tensors, types, metadata and the 200,064-token vocabulary are what `pocketphi convert` writes for the real
model; `--plain` takes llama.cpp's own choice of types for that name instead (its llama-quant.cpp). No
checkpoint is made first: the values come from one block of normal numbers, so eight layers take seconds.
"""

from __future__ import annotations

import argparse
import gzip
import os
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from pocketphi.convert.checkpoint import Checkpoint
from pocketphi.convert.config import ModelConfig, read_config
from pocketphi.convert.ggml_types import F16, Q4_0, Q4_K, Q5_K, Q6_K, Q8_0
from pocketphi.convert.gguf_header import Identity
from pocketphi.convert.mapping import Adapter, LoraPair, TensorMap, linear_shapes, text_targets
from pocketphi.convert.progress import Silent
from pocketphi.convert.quantize import Quantizer
from pocketphi.convert.recipe import LORA_TYPES, RECIPES, Recipe, named_lora
from pocketphi.convert.safetensors_file import TensorInfo
from pocketphi.convert.tensor_stream import Workshop
from pocketphi.convert.vocabulary import read_vocabulary
from pocketphi.convert.work_plan import CHUNK_VALUES, Choices, Plan, make_plan
from pocketphi.convert.write_gguf import write_backbone
from pocketphi.convert.write_gguf_lora import write_adapter
from pocketphi.runtime.bundle import BundleFile, Source

from .. import tiny
from .make_random_checkpoint import REAL_TOKENIZER, SHAPES, STD

Float32 = npt.NDArray[np.float32]

QUANTS = ("Q4_0", "Q4_K_M", "Q8_0", "F16")
# What llama_model_quantize makes of arch phi3 with a tied head and no importance matrix.
PLAIN: Mapping[str, Recipe] = {
    "Q4_0": Recipe("Q4_0", 2, base=Q4_0, head=Q6_K, qkv=Q4_0, down=Q4_0, down_more=Q4_0),
    "Q4_K_M": Recipe("Q4_K_M", 15, base=Q4_K, head=Q6_K, qkv=Q5_K, down=Q4_K, down_more=Q6_K),
    "Q8_0": Recipe("Q8_0", 7, base=Q8_0, head=Q8_0, qkv=Q8_0, down=Q8_0, down_more=Q8_0),
    "F16": Recipe("F16", 1, base=F16, head=F16, qkv=F16, down=F16, down_more=F16),
}
ENDOFTEXT = 199999
IDENTITY = Identity("random Phi-4-mini", "mit", Source("random", None, "0" * 64))
BLOCK_VALUES = 8 * CHUNK_VALUES
NOWHERE = Path("random")


class RandomSource:
    """What the converter's last stage reads of a checkpoint: values that its name and row decide."""

    root = NOWHERE

    def __init__(self) -> None:
        """Draw the one block."""
        self._block: Float32 = np.random.default_rng(4).standard_normal(BLOCK_VALUES, np.float32) * STD

    def rows(self, info: TensorInfo, start: int, stop: int) -> Float32:
        """float32 [stop - start, cols] from some place in the block."""
        n = (stop - start) * info.cols
        at = zlib.crc32(f"{info.name} {start}".encode()) % (BLOCK_VALUES - n)
        return self._block[at : at + n].reshape(stop - start, info.cols).copy()

    def read(self, info: TensorInfo) -> Float32:
        """A norm's weights, the only tensors read whole: 1 and a little."""
        return 1.0 + self.rows(info, 0, info.rows).reshape(info.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the backbone here")
    parser.add_argument("--quant", choices=QUANTS, default="Q4_0")
    parser.add_argument("--plain", action="store_true", help="llama.cpp's choice of types")
    parser.add_argument("--layers", type=int, default=8, help="of 32")
    parser.add_argument("--lora", type=Path, help="write an adapter for such a backbone here")
    parser.add_argument("--rank", type=int, default=320)
    parser.add_argument("--lora-type", choices=list(LORA_TYPES), default="Q8_0")
    args = parser.parse_args()
    if args.out is None and args.lora is None:
        parser.error("nothing to write: give --out or --lora")
    if args.out is not None:
        write_model(args.out, (PLAIN if args.plain else RECIPES)[args.quant], args.layers)
    if args.lora is not None:
        write_lora(args.lora, args.lora_type, args.rank, args.layers)


def write_model(out: Path, recipe: Recipe, n_layers: int) -> None:
    """Write a backbone, replacing what is there."""
    raw = _config(n_layers)
    config = read_config(raw, "config.json")
    vocabulary = read_vocabulary(
        gzip.decompress(REAL_TOKENIZER.read_bytes()),
        config.text.vocab_size,
        tokenizer_config={"add_bos_token": False},
        config=raw,
        generation_config={},
        chat_template=tiny.chat_template("phi4-mini"),
        where=str(REAL_TOKENIZER),
    )
    plan = _plan(config, Choices(recipe, "Q8_0", None, _threads()), {})
    _write_as(
        out,
        lambda directory: write_backbone(directory, plan, config, vocabulary, IDENTITY, _shop(), Silent()),
    )


def write_lora(out: Path, quant: str, rank: int, n_layers: int) -> None:
    """Write an adapter of every linear, replacing what is there. Its scale is 2, as the real ones'."""
    config = read_config(_config(n_layers), "config.json")
    pairs = []
    for n in range(n_layers):
        for group, (n_out, n_in) in linear_shapes(config.text).items():
            target = f"blk.{n}.{group}.weight"
            a, b = _info(f"{target}.a", (rank, n_in)), _info(f"{target}.b", (n_out, rank))
            pairs.append(LoraPair(target, a, b))
    adapter = Adapter("speech", rank, 2.0 * rank, tuple(pairs))
    choices = Choices(RECIPES["Q4_0"], named_lora(quant), None, _threads())
    plan = _plan(config, choices, {"speech": adapter})
    _write_as(out, lambda directory: write_adapter(directory, plan, adapter, IDENTITY, _shop(), Silent()))


def _config(n_layers: int) -> dict[str, Any]:
    config = tiny.config("phi4-mini") | SHAPES["phi4-mini"] | {"num_hidden_layers": n_layers}
    config |= {"bos_token_id": ENDOFTEXT, "eos_token_id": ENDOFTEXT, "pad_token_id": ENDOFTEXT}
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    n = int(head_dim * config["partial_rotary_factor"]) // 2
    config["rope_scaling"] |= {"long_factor": [1.08**i for i in range(n)], "short_factor": [1.0] * n}
    return config


def _info(name: str, shape: tuple[int, ...]) -> TensorInfo:
    return TensorInfo(name, "F32", shape, NOWHERE, 0, 0)


def _plan(config: ModelConfig, choices: Choices, adapters: Mapping[Any, Adapter]) -> Plan:
    text = tuple(
        (t, None if t.source is None else _info(t.source, t.shape)) for t in text_targets(config.text)
    )
    tensors = TensorMap(text, adapters, (), None, ())
    return make_plan("random", config, tensors, choices, {"tokenizer.json": 0}, ())


def _threads() -> int:
    return os.cpu_count() or 1


def _shop() -> Workshop:
    return Workshop(cast("Checkpoint", RandomSource()), Quantizer(), {}, _threads())


def _write_as(out: Path, write: Callable[[Path], BundleFile]) -> None:
    """The converter names its own files, so it gets a directory; the file is then renamed."""
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".random-") as scratch:
        written = write(Path(scratch))
        (Path(scratch) / written.path).replace(out)


if __name__ == "__main__":
    main()
