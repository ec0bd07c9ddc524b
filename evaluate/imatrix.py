# SPDX-License-Identifier: Apache-2.0
"""Importance matrices: how much each input column of each weight is used, as `llama-imatrix` counts it.

For every product W x of the backbone, the squares of x are summed over all tokens, by column. `convert`
weighs the error in a column of W with its mean square. The file is llama.cpp's: for a weight NAME a tensor
`NAME.in_sum2`, float32 [row length], and `NAME.counts`, the number of tokens.

More than llama-imatrix (tools/imatrix/imatrix.cpp) gives:

* Items are read as they are answered, with their media and through their adapters.
* The head, also when it is tied and so is called `token_embd.weight`.
* Adapters: the inputs of A (those of W under this adapter) and of B (A x), the former as
  `speech.blk.0.ffn_up.weight.lora_a`. All adapters have the same tensor names, hence the prefix; llama.cpp
  reads such entries and has no tensor for them.
* Every token: llama-imatrix passes over batches below 16. And sums in float64, rounded to float32 once.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..runtime.engine import Model
from ..runtime.errors import InputError, KernelError
from ..runtime.files import read_text, write_bytes
from ..runtime.ggml_observer import MatmulObserver
from ..runtime.parts import Float32, Int32, Progress
from ..runtime.prompt import Piece, parse_raw
from ..runtime.spec import IMATRIX_COUNTS, IMATRIX_SUMS, AdapterName
from .item_likelihood import item_prompt
from .items import Item, read_items
from .perplexity import SILENT, check_chunks
from .text_tokens import text_ids

TEXT_MAX_BYTES = 256 << 20
MIN_CTX = 16  # llama.cpp's smallest chunk that counts
_HEADS = ("output.weight", "token_embd.weight")  # untied, tied
_LORA = (".lora_a", ".lora_b")
_BASE = "none"  # how the report calls no adapter


@dataclass(slots=True)
class Sums:
    """Of one weight."""

    squares: npt.NDArray[np.float64]  # [row length]
    tokens: int = 0


@dataclass(slots=True)
class Importances:
    """What a model made of some text."""

    dataset: str
    chunk_size: int  # tokens
    weights: dict[str, Sums] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)  # by adapter; "none" without one
    sequences: int = 0  # chunks or items
    _current: dict[str, Sums] = field(default_factory=dict)  # of the sequence that is being read

    @property
    def chunk_count(self) -> int:
        """Whole chunks' worth of tokens, as llama.cpp counts them."""
        return max((s.tokens for s in self.weights.values()), default=0) // self.chunk_size

    def add(self, weight: str, inputs: Float32) -> None:
        """Count the rows of `inputs`, float32 [n, row length], for a weight of the sequence being read."""
        squares = np.square(inputs, dtype=np.float64).sum(axis=0)
        if not np.isfinite(squares).all():
            raise KernelError(f"{weight} gets inputs that are not finite: weights or adapter are damaged")
        _add(self._current, weight, squares, len(inputs))

    def end_sequence(self, n_tokens: int, adapter: str | None) -> None:
        """A sequence has been read through an adapter: only now is it known whose A and B those were."""
        for name, sums in self._current.items():
            entry = f"{adapter}.{name}" if name.endswith(_LORA) else name
            _add(self.weights, entry, sums.squares, sums.tokens)
        self._current.clear()
        self.sequences += 1
        self.tokens[adapter or _BASE] = self.tokens.get(adapter or _BASE, 0) + n_tokens

    def to_gguf(self) -> bytes:
        """The file, as llama-imatrix writes it."""
        keys: dict[str, Any] = {
            "general.type": "imatrix",
            "imatrix.datasets": [self.dataset],
            "imatrix.chunk_count": self.chunk_count,
            "imatrix.chunk_size": self.chunk_size,
        }
        tensors: dict[str, Float32] = {}
        for name in sorted(self.weights):
            tensors[name + IMATRIX_SUMS] = self.weights[name].squares.astype(np.float32)
            tensors[name + IMATRIX_COUNTS] = np.array([self.weights[name].tokens], np.float32)
        return gguf_bytes(keys, tensors)

    def to_object(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "sequences": self.sequences,
            "tokens": sum(self.tokens.values()),
            "tokens_by_adapter": self.tokens,
            "weights": len(self.weights),
            "chunk_count": self.chunk_count,
            "chunk_size": self.chunk_size,
        }


def collect(
    opened: Callable[[MatmulObserver], Model],
    data: Path,
    *,
    adapter: AdapterName | None = None,
    n_ctx: int = 512,
    chunks: int = -1,
    progress: Progress = SILENT,
) -> Importances:
    """Read text or items with a model and sum up what its weights get to see.

    Args:
        opened: opens the model with an observer; the less it is quantized, the truer. It is closed here.
        data: a .jsonl file of items (see `items`), of which prompt and reference are read; any other is plain
            UTF-8 text, of which whole chunks of `n_ctx` tokens are read, each on its own.
        adapter: read everything through this LoRA; None: text through none, items as they are routed.
        n_ctx: tokens of a chunk of text.
        chunks: read so many chunks or items at most; -1: all.
        progress: told after each.

    Raises:
        InputError: the data cannot be used, or holds less than a chunk.
        BundleError: the model cannot be used.
        KernelError: llama.cpp failed, or is laid out in an unknown way.
    """
    if n_ctx < MIN_CTX:
        raise InputError(f"chunks have {n_ctx} tokens, expected at least {MIN_CTX} (see -c)")
    most = check_chunks(chunks)
    found = Importances(str(data), n_ctx)
    items = read_items(data, limit=most).items if data.suffix.lower() == ".jsonl" else ()
    text = "" if items else read_text(data, max_bytes=TEXT_MAX_BYTES)
    with opened(MatmulObserver(found.add, is_quantizable)) as model:
        work: list[tuple[str, Callable[[], Sequence[Piece] | Int32]]]
        if items:
            work = [(item.where, partial(item_pieces, model, item)) for item in items]
        else:
            chunks_of = text_chunks(model, text, data, n_ctx, most, progress)
            work = [("", partial(np.array, ids)) for ids in chunks_of]
        _read(model, work, found, adapter, progress)
    return found


def is_quantizable(name: str) -> bool:
    """Whether a product's weight is one that `convert` may quantize."""
    return (name.startswith("blk.") and name.endswith((".weight", *_LORA))) or name in _HEADS


def _add(to: dict[str, Sums], name: str, squares: npt.NDArray[np.float64], tokens: int) -> None:
    found = to.setdefault(name, Sums(np.zeros(len(squares))))
    found.squares += squares
    found.tokens += tokens


def text_chunks(
    model: Model, text: str, where: Path, n_ctx: int, most: int | None, progress: Progress
) -> Int32:
    """The token ids of whole chunks, `most` of them: int32 [n, n_ctx]. What is no token: see `perplexity`."""
    if n_ctx > model.context_limit:
        raise InputError(f"chunks have {n_ctx} tokens, expected {MIN_CTX} to {model.context_limit} (see -c)")
    ids, _ = text_ids(model, text, None if most is None else most * n_ctx, progress)
    if len(ids) < n_ctx:
        raise InputError(f"{where}: has {len(ids)} tokens, expected at least one chunk of {n_ctx} (see -c)")
    return ids[: len(ids) // n_ctx * n_ctx].reshape(-1, n_ctx)[:most]


def gguf_bytes(keys: Mapping[str, str | int | Sequence[str]], tensors: Mapping[str, Float32]) -> bytes:
    """A GGUF file of float32 vectors, as ggml's own writer lays it out.

    Args:
        keys: metadata: texts, whole numbers below 2³² and lists of texts.
        tensors: by name, float32 [n].

    Source: the format's description in ggml/include/gguf.h.
    """
    u32, f32, string, array, alignment = 4, 0, 8, 9, 32
    head = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(keys))]
    for key, value in keys.items():
        head.append(_string(key))
        if isinstance(value, str):
            head.append(struct.pack("<I", string) + _string(value))
        elif isinstance(value, int):
            head.append(struct.pack("<II", u32, value))
        else:
            head.append(struct.pack("<IIQ", array, string, len(value)) + b"".join(map(_string, value)))
    data: list[bytes] = []
    offset = 0
    for name, values in tensors.items():
        head.append(_string(name) + struct.pack("<IQIQ", 1, len(values), f32, offset))
        data.append(_padded(values.astype("<f4").tobytes(), alignment))
        offset += len(data[-1])
    return _padded(b"".join(head), alignment) + b"".join(data)


def write(path: Path, found: Importances) -> None:
    """Write the file, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    write_bytes(path, found.to_gguf())


def table(found: Importances, path: Path) -> list[str]:
    """What was read, as lines of Markdown."""
    return [
        f"{path}: importances of {len(found.weights)} weights from {found.sequences} sequences",
        "",
        "| adapter | tokens |",
        "|---|---|",
        *(f"| {adapter} | {tokens} |" for adapter, tokens in found.tokens.items()),
    ]


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "replace")  # a path may hold bytes that are no text
    return struct.pack("<Q", len(raw)) + raw


def _padded(raw: bytes, alignment: int) -> bytes:
    return raw + bytes(-len(raw) % alignment)


def item_pieces(model: Model, item: Item) -> list[Piece]:
    """An item's prompt with its reference answer behind it, as the model would have read both."""
    return [*item_prompt(model, item), *parse_raw(item.reference, model.tokenizer.control_tokens)]


def _read(
    model: Model,
    work: Sequence[tuple[str, Callable[[], Sequence[Piece] | Int32]]],
    found: Importances,
    adapter: AdapterName | None,
    progress: Progress,
) -> None:
    """Read every sequence; `work` names each, for errors, and makes it."""
    progress.start(len(work), found.dataset)
    try:
        for where, make in work:
            try:
                n, used = model.run_through(make(), adapter=adapter)
            except InputError as exc:
                said = str(exc)
                named = not where or said.startswith(where)
                raise InputError(said if named else f"{where}: {said}") from None
            found.end_sequence(n, used)
            progress.advance(1, found.dataset)
    finally:
        progress.finish()
