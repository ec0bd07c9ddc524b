# SPDX-License-Identifier: Apache-2.0
"""The files of a checkpoint: safetensors headers, configuration, tokenizer, the index of shards."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

from pocketphi.convert.checkpoint import read_weight_map
from pocketphi.convert.config import read_config
from pocketphi.convert.safetensors_file import DTYPE_BYTES, read_header
from pocketphi.convert.source_file import parse_json_object
from pocketphi.convert.vocabulary import Vocabulary, read_vocabulary
from pocketphi.runtime.errors import CheckpointError

from ... import tiny_tokenizers
from ..documents import Source, changed, document, text
from ..target import SEEDS, Target, attempt, file_with, promise


@functools.cache
def _base(name: str) -> Any:
    """A good document to change."""
    return json.loads((SEEDS / "documents" / name).read_text("utf-8"))


def safetensors(data: bytes) -> None:
    """A whole file, or a header that is changed before zeros of the length that the good one has."""
    if data[:1] and data[0] % 2:
        base = _base("safetensors.json")
        header = text(changed(base, Source(data[1:])))
        size = max(entry["data_offsets"][1] for name, entry in base.items() if name != "__metadata__")
        data = b"\0" + len(header).to_bytes(8, "little") + header + bytes(size)
    path = file_with(data[1:], "model.safetensors")
    tensors = attempt(lambda: read_header(path), CheckpointError)
    end = None
    for name, info in (tensors or {}).items():
        promise(
            name == info.name and info.nbytes == math.prod(info.shape) * DTYPE_BYTES[info.dtype], "its bytes"
        )
        promise(info.nbytes > 0 and info.offset + info.nbytes <= len(data) - 1, f"{name!r} lies outside")
        promise(end is None or info.offset == end, f"{name!r} leaves a hole or lies on another")
        promise(info.rows * info.cols == math.prod(info.shape), f"{name!r}: rows and columns")
        end = info.offset + info.nbytes


def config(data: bytes) -> None:
    """config.json of both kinds."""
    name = ("config-mm.json", "config-mini.json")[data[0] // 2 % 2 if data else 0]
    raw = attempt(lambda: parse_json_object(document(data, _base(name)), "config.json"), CheckpointError)
    if raw is None:
        return
    found = attempt(lambda: read_config(raw, "config.json"), CheckpointError)
    if found is not None:
        t = found.text
        promise(
            t.head_dim * t.n_heads == t.d_model and t.n_heads % t.n_kv_heads == 0, "heads that do not fit"
        )
        promise(
            0 < t.rms_eps < math.inf and 0 < t.rope.dims <= t.head_dim and t.rope.dims % 2 == 0, "an odd rope"
        )
        for factors in (t.rope.short_factor, t.rope.long_factor):
            fits = factors is None or (
                len(factors) == t.rope.dims // 2 and all(0 < f < math.inf for f in factors)
            )
            promise(fits, "factors that do not fit")


@functools.cache
def _tokenizer(which: int) -> tuple[Any, int]:
    """One of the two kinds, and how many ids it has."""
    if which:
        return tiny_tokenizers.phi35_tokenizer(), tiny_tokenizers.PHI35_BASE + 11
    return tiny_tokenizers.phi4_tokenizer(), tiny_tokenizers.PHI4_BASE + 96


def _vocabulary(raw: bytes, raw_config: bytes, n: int) -> Vocabulary:
    """As the converter reads them: both files are JSON objects by then."""
    parse_json_object(raw, "tokenizer.json")
    return read_vocabulary(
        raw,
        n,
        tokenizer_config=parse_json_object(raw_config, "tokenizer_config.json"),
        config={},
        generation_config={},
        chat_template=None,
        where="tokenizer.json",
    )


def tokenizer(data: bytes) -> None:
    """tokenizer.json with the files beside it."""
    source = Source(data[1:] if data else b"")
    base, n = _tokenizer(data[0] // 2 % 2 if data else 0)
    raw_config = text(changed(_base("tokenizer_config.json"), source)) if source.below(4) == 3 else b"{}"
    raw = document(data[:1] + source.rest, base)
    vocabulary = attempt(lambda: _vocabulary(raw, raw_config, n), CheckpointError)
    if vocabulary is not None:
        v = vocabulary
        promise(len(v.tokens) == len(set(v.tokens)) == len(v.types) == n, "not one name for each id")
        promise(all(i is None or 0 <= i < n for i in (v.bos, v.eos, v.unk, v.pad)), "an id that is none")
        for token in v.tokens:
            token.encode("utf-8")


def weight_index(data: bytes) -> None:
    """model.safetensors.index.json: only plain names of files beside it."""
    path = file_with(document(data, _base("index.json")), "model.safetensors.index.json")
    for shard in (attempt(lambda: read_weight_map(path), CheckpointError) or {}).values():
        promise(
            (path.parent / shard).parent == path.parent and Path(shard).name == shard, f"{shard!r} leads away"
        )


TARGETS = (
    Target("safetensors", safetensors, runs=4000),
    Target("config", config, runs=4000),
    Target("tokenizer", tokenizer, runs=1500),
    Target("weight-index", weight_index, runs=3000, seeds="config"),
)
