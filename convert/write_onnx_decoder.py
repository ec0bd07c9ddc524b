# SPDX-License-Identifier: Apache-2.0
"""Writes the backbone as ONNX: whole for onnxruntime-genai, and in two parts for input that is no token.

    model.onnx       input_ids int64 [b, s]                  -> logits, present
    embedding.onnx   input_ids int64 [b, s]                  -> inputs_embeds float32 [b, s, d_model]
    decoder.onnx     inputs_embeds float32 [b, s, d_model]   -> logits, present

The second and the third are the first one's nodes, cut where the embeddings are; all three share
model.onnx.data. Besides, the first and the third take

    attention_mask               int64 [b, total]: ones for all tokens so far, then zeros
    past_key_values.N.key/value  float32 [b, n_kv_heads, past, head_dim], rotated already
    n_logits                     int64 [1], 1 if left out: how many of the last positions get logits
    rope_tokens                  int64 [1], 0 if left out: see below; with LongRoPE alone
    NAME.lora_A, .lora_B, …      of each linear layer, an adapter's: see onnx_lora.py

and give logits float32 [b, n_logits, vocab_size] and present.N.key/value float32 [b, n_kv_heads, present,
head_dim], which may be the very buffers of the past. Names are those that onnxruntime-genai's `phi3` has.
model.onnx declares one row of logits: genai reserves room for a row of every position otherwise.

RoPE's table is chosen by the number of ones in the mask, in the batch's longest row, or by `rope_tokens`
where those are more: a caller that crosses the original context has to feed the whole sequence again, without
a past, and says with `rope_tokens` how long it will be if it comes in pieces.

Source: `modeling_phi3.py` in transformers; the operators of ONNX Runtime in its ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from ..runtime.bundle import BundleFile
from ..runtime.errors import CheckpointError
from ..runtime.spec import RopeSpec, TextSpec
from .checkpoint import Checkpoint
from .config import ModelConfig
from .decoder_quant import BITS, DecoderKind
from .decoder_quant import DecoderQuant as DecoderQuant
from .ggml_types import F16, F32
from .in_order import in_order
from .mapping import Group, TensorMap, linear_shapes
from .onnx_graph import MICROSOFT, Float32, OnnxGraph, quantize_blocks
from .onnx_lora import add_lora
from .progress import Progress, Silent
from .quantize import check_values
from .safetensors_file import TensorInfo
from .work_plan import CHUNK_VALUES, Merge

MODEL, EMBEDDING, DECODER = "model", "embedding", "decoder"  # the names of the graphs
_NO_MERGES: Mapping[str, Merge] = MappingProxyType({})
_FLOAT = onnx.TensorProto.FLOAT
Stored = TypeVar("Stored")
Blocks = tuple[npt.NDArray[np.uint8], Float32]


@dataclass(frozen=True, slots=True)
class _Writer:
    """A graph, and the checkpoint that its weights come from."""

    graph: OnnxGraph
    source: Checkpoint
    text: TextSpec
    tensors: Mapping[str, TensorInfo]  # by their names in llama.cpp's `phi3`
    quant: DecoderQuant
    lora: bool
    merges: Mapping[str, Merge]
    threads: int
    progress: Progress

    def norm(self, name: str) -> str:
        """The weights of an RMSNorm."""
        info = self.tensors[f"{name}.weight"]
        values = self.source.read(info)
        check_values(values, F32, info.name, info.file)
        self.progress.advance(info.nbytes, info.name)
        return self.graph.weight(f"{name}.weight", values)

    def pieces(
        self, name: str, kind: DecoderKind, store: Callable[[Float32], Stored]
    ) -> Generator[tuple[int, Stored], None, None]:
        """What `store` makes of a matrix's rows, some rows at a time, and where each lot begins."""
        info, merge = self.tensors[name], self.merges.get(name)
        step = max(1, CHUNK_VALUES // info.cols)
        a = None if merge is None else self.source.read(merge.a)

        def job(start: int, stop: int) -> Stored:
            rows = self.source.rows(info, start, stop)
            if merge is not None and a is not None:
                rows += np.float32(merge.scale) * (self.source.rows(merge.b, start, stop) @ a)
            check_values(rows, F32 if kind == "fp32" else F16, info.name, info.file)
            return store(rows)

        starts = range(0, info.rows, step)
        jobs = ((n, partial(job, n, min(n + step, info.rows))) for n in starts)
        with closing(in_order(jobs, self.threads)) as done:
            for start, stored in done:
                yield start, stored
                n_rows = min(step, info.rows - start)
                self.progress.advance(info.nbytes // info.rows * n_rows, info.name)

    def matrix(self, name: str, group: Group) -> None:
        """Store `name.weight` [out, in] in its group's kind; blocks have their scales beside."""
        g, kind, info = self.graph, self.quant.of(group), self.tensors[f"{name}.weight"]
        weight = f"{name}.weight"
        if kind not in BITS:
            dtype = np.dtype(np.float32 if kind == "fp32" else np.float16)
            with closing(self.pieces(weight, kind, lambda rows: rows.astype(dtype, copy=False))) as whole:
                g.stream(weight, dtype.name, (info.rows, info.cols), (piece for _, piece in whole))
            return
        bits, block = BITS[kind], self.quant.block
        scales = np.empty((info.rows, info.cols // block), np.float32)

        def quantized(pieces: Iterator[tuple[int, Blocks]]) -> Iterator[npt.NDArray[np.uint8]]:
            for start, (q, scale) in pieces:
                scales[start : start + len(scale)] = scale
                yield q

        with closing(self.pieces(weight, kind, lambda rows: quantize_blocks(rows, bits, block))) as pieces:
            shape = (info.rows, info.cols // block, block * bits // 8)
            g.stream(weight, "uint8", shape, quantized(pieces))
        g.weight(f"{name}.scale", scales)

    def product(self, x: str, name: str, group: Group) -> str:
        """x Wᵀ with a stored matrix."""
        g, kind, info = self.graph, self.quant.of(group), self.tensors[f"{name}.weight"]
        weight = f"{name}.weight"
        if kind in BITS:
            return g.op(
                "MatMulNBits",
                x,
                weight,
                f"{name}.scale",
                domain=MICROSOFT,
                K=info.cols,
                N=info.rows,
                bits=BITS[kind],
                block_size=self.quant.block,
                accuracy_level=self.quant.accuracy_level,
            )
        if kind == "fp16":
            weight = g.op("Cast", weight, to=_FLOAT)
        return g.op("FusedMatMul", x, weight, domain=MICROSOFT, transB=1)

    def linear(self, x: str, layer: int, group: Group) -> str:
        """One linear layer, with what an adapter adds to it."""
        name = f"blk.{layer}.{group}"
        self.matrix(name, group)
        y = self.product(x, name, group)
        if self.lora:
            y = add_lora(self.graph, x, y, name, linear_shapes(self.text)[group], self.quant.lora)
        return y

    def ints(self, *values: int) -> str:
        """A constant int64 vector."""
        return self.graph.constant(values, "int64")


def write_decoder(
    directory: Path,
    source: Checkpoint,
    config: ModelConfig,
    tensors: TensorMap,
    quant: DecoderQuant,
    progress: Progress | None = None,
    producer: str = "",
    *,
    merges: Mapping[str, Merge] = _NO_MERGES,
    threads: int = 1,
) -> list[BundleFile]:
    """Write the graphs into `directory`; memory is the graph and some rows of one matrix.

    Args:
        tensors: adapters among them are not written here, but give the graph their inputs.
        producer: goes into the graphs' metadata.
        merges: by the weight's name, what is added to it before it is rounded.
        threads: for rounding; the bytes do not depend on them.

    Returns:
        The files: the graphs, model.onnx first, and their data.

    Raises:
        CheckpointError: a tensor cannot be read or holds what its type cannot, or a matrix cannot be cut
            into blocks.
        OutputError: a file cannot be written.
    """
    text = config.text
    _check_blocks(source, text, quant)
    infos = {target.name: info for target, info in tensors.text if info is not None}
    with OnnxGraph(directory, MODEL, producer) as graph:
        w = _Writer(
            graph, source, text, infos, quant, bool(tensors.adapters), merges, threads, progress or Silent()
        )
        _model(w)
        ids = helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["b", "s"])
        embeds = helper.make_tensor_value_info("inputs_embeds", _FLOAT, ["b", "s", text.d_model])
        logits = helper.make_tensor_value_info("logits", _FLOAT, ["b", "n", text.vocab_size])
        present = [output for output in graph.outputs if output.name != "logits"]
        parts = [graph.part(EMBEDDING, [ids], [embeds]), graph.part(DECODER, [embeds], [logits, *present])]
        model, *data = graph.finish()
    return [model, *parts, *data]


def _check_blocks(source: Checkpoint, text: TextSpec, quant: DecoderQuant) -> None:
    """Every row of a blocked matrix is whole blocks; so are all of the family's."""
    shapes: dict[Group, tuple[int, ...]] = dict(linear_shapes(text))
    shapes["output"] = (text.vocab_size, text.d_model)
    for group, shape in shapes.items():
        if quant.of(group) in BITS and shape[1] % quant.block:
            raise CheckpointError(
                f"{source.root / 'config.json'}: {group} has rows of {shape[1]} weights, "
                f"expected a multiple of {quant.block} for {quant.of(group)}"
            )


def _model(w: _Writer) -> None:
    """The whole graph."""
    g, t = w.graph, w.text
    ids = g.input("input_ids", "int64", ("b", "s"))
    x, delta = g.named(_embed(w, ids), "inputs_embeds"), ""
    place = _place(w, g.input("attention_mask", "int64", ("b", "total")))
    for n in range(t.n_layers):
        x, normed = _add_norm(w, x, delta, f"blk.{n}.attn_norm")
        attended = _attend(w, w.linear(normed, n, "attn_qkv"), place, n)
        x, normed = _add_norm(w, x, w.linear(attended, n, "attn_output"), f"blk.{n}.ffn_norm")
        delta = w.linear(_gate(w, w.linear(normed, n, "ffn_up")), n, "ffn_down")
    _, normed = _add_norm(w, x, delta, "output_norm")
    n_logits = g.input("n_logits", "int64", (1,), default=np.ones(1, np.int64))
    last = g.op("Slice", normed, g.op("Neg", n_logits), w.ints(np.iinfo(np.int64).max), w.ints(1))
    head = "token_embd"
    if not t.tied_head:
        head = "output"
        w.matrix(head, "output")
    logits = g.named(w.product(last, head, "output"), "logits")
    g.output(logits, "logits", "float32", ("b", 1, t.vocab_size))


def _embed(w: _Writer, ids: str) -> str:
    """Rows of the embedding, [b, s] -> [b, s, d_model]."""
    g, kind, table = w.graph, w.quant.of("token_embd"), "token_embd.weight"
    w.matrix("token_embd", "token_embd")
    if kind in BITS:
        bits = BITS[kind]
        flat = g.reshaped("token_embd.rows", table, (w.text.vocab_size, w.text.d_model * bits // 8))
        return g.op(
            "GatherBlockQuantized",
            flat,
            ids,
            "token_embd.scale",
            domain=MICROSOFT,
            bits=bits,
            block_size=w.quant.block,
            gather_axis=0,
            quantize_axis=1,
        )
    rows = g.op("Gather", table, ids)
    return g.op("Cast", rows, to=_FLOAT) if kind == "fp16" else rows


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the tokens stand, the same for every layer."""

    last: str  # int32 [b]: position of each row's last token
    total: str  # int32 []: columns of the mask
    cos: str  # float32 [≥ total, rope.dims / 2]
    sin: str


def _place(w: _Writer, mask: str) -> _Place:
    g, rope = w.graph, w.text.rope
    lengths = g.op("ReduceSum", mask, w.ints(1), keepdims=0)
    last = g.op("Cast", g.op("Sub", lengths, g.constant(1, "int64")), to=onnx.TensorProto.INT32)
    width = g.op("Shape", mask, start=1, end=2)
    total = g.op("Cast", g.op("Squeeze", width), to=onnx.TensorProto.INT32)
    cos, sin = (
        g.weight(f"rope.{name}", _table(rope, w.text.context_length, function))
        for name, function in (("cos", np.cos), ("sin", np.sin))
    )
    if rope.is_long_rope:
        # A table is chosen by where a slice of both begins, not by `If`: no branch copies more than is used.
        original = w.ints(rope.original_context)
        announced = g.input("rope_tokens", "int64", (1,), default=np.zeros(1, np.int64))
        is_long = g.op("Greater", g.op("Max", g.op("ReduceMax", lengths), announced), original)
        start = g.op("Where", is_long, original, w.ints(0))
        end = g.op("Add", start, width)
        cos, sin = (g.op("Slice", table, start, end, w.ints(0)) for table in (cos, sin))
    return _Place(last, total, cos, sin)


def _table(rope: RopeSpec, context: int, function: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> Float32:
    """cos or sin of position times frequency: float32 [rows, dims / 2].

    With LongRoPE the short table's `original_context` rows, then the long one's `context`. Angles are
    rounded to float32 as in the reference, `Phi3RotaryEmbedding`.
    """
    base = np.float32(rope.theta) ** (np.arange(0, rope.dims, 2, dtype=np.float32) / np.float32(rope.dims))
    parts = []
    for factors, rows in ((rope.short_factor, rope.original_context), (rope.long_factor, context)):
        if factors is None:
            continue
        parts.append((np.array(factors, np.float32), rows))
    tables = []
    for factor, rows in parts or [(np.ones(rope.dims // 2, np.float32), context)]:
        angles = np.outer(np.arange(rows, dtype=np.float32), np.float32(1) / (factor * base))
        tables.append(function(angles.astype(np.float32)) * np.float32(rope.attention_factor))
    return np.concatenate(tables).astype(np.float32)


def _add_norm(w: _Writer, x: str, delta: str, name: str) -> tuple[str, str]:
    """x + delta, and its RMSNorm; no delta in front of the first layer."""
    g, weight, eps = w.graph, w.norm(name), w.text.rms_eps
    if not delta:
        # The operator is ONNX Runtime's, though it stands in ONNX's own domain.
        return x, g.op("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=eps, stash_type=1)
    normed, _, _, total = g.ops(
        "SkipSimplifiedLayerNormalization",
        x,
        delta,
        weight,
        n_outputs=4,
        unused=(1, 2),
        domain=MICROSOFT,
        epsilon=eps,
    )
    return total, normed


def _attend(w: _Writer, qkv: str, place: _Place, n: int) -> str:
    """Rotated, causal, grouped-query attention over the past and the new tokens."""
    g, t = w.graph, w.text
    past, present = (
        [f"{prefix}.{n}.{part}" for part in ("key", "value")] for prefix in ("past_key_values", "present")
    )
    for name in past:
        g.input(name, "float32", ("b", t.n_kv_heads, "past", t.head_dim))
    attended, *now = g.ops(
        "GroupQueryAttention",
        qkv,
        "",
        "",
        *past,
        place.last,
        place.total,
        place.cos,
        place.sin,
        n_outputs=3,
        domain=MICROSOFT,
        num_heads=t.n_heads,
        kv_num_heads=t.n_kv_heads,
        do_rotary=1,
        rotary_interleaved=0,
        scale=float(t.head_dim**-0.5),
    )
    for value, name in zip(now, present, strict=True):
        shape = ("b", t.n_kv_heads, "present", t.head_dim)
        g.output(g.named(value, name), name, "float32", shape)
    return attended


def _gate(w: _Writer, both: str) -> str:
    """up · silu(gate) of [gate; up]."""
    g, d_ff = w.graph, w.text.d_ff
    gate, up = g.ops("Split", both, w.ints(d_ff, d_ff), n_outputs=2, axis=-1)
    return g.op("Mul", g.op("QuickGelu", gate, domain=MICROSOFT, alpha=1.0), up)
