# SPDX-License-Identifier: Apache-2.0
"""The multimodal family's embedding and decoder as onnxruntime-genai's `phi4mm` wants them.

    genai-embedding.onnx  input_ids int64 [1, s], image_features float32 [i, d_model + 2],
                          audio_features float32 [a, d_model + 2] -> inputs_embeds float32 [1, s, d_model + 2]
    genai-decoder.onnx    inputs_embeds, attention_mask and past_key_values.N.key/value
                          -> logits, present.N.key/value

They are embedding.onnx and decoder.onnx with two things of their own, which genai 0.18 does not do:

* It names no adapter when it runs. So both adapters are weights of this graph, the very numbers of their
  files, and the graph chooses: the vision adapter where pictures were seen, else the speech adapter where
  sound was, else none. Two columns behind each row of embeddings say what a row is of; sizes are genai's
  `hidden_size`, so they pass unseen.
* It does not read a sequence again that crosses LongRoPE's original context. So this graph does. That needs
  a KV cache whose past and present are one buffer: ONNX Runtime refuses it, by an error, for one that grows.

Both need memory of earlier steps, and the KV cache is all that genai carries from one to the next. So it has
one more layer. Embeddings are its keys and values, half of each row in either, cut into heads as large as
all others; the two columns stand behind. Its queries are zero, so it gives the mean of all values so far,
and that is more than zero in a column if any was.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from ..runtime.spec import ADAPTER_NAMES, RopeSpec, TextSpec
from .genai_config import DECODER, EMBEDDING, N_FLAGS
from .onnx_compose import FLOAT, Composition, Scope, read_part

_MICROSOFT = "com.microsoft"
_END = np.iinfo(np.int64).max
_KINDS = ("lora_A", "lora_B", "lora_scale")

Tensors = Mapping[str, onnx.TensorProto]


def embedding(directory: Path, text: TextSpec, image_token: int, audio_token: int) -> Composition:
    """genai-embedding.onnx over the embedding.onnx of `directory`."""
    whole = Composition(EMBEDDING.removesuffix(".onnx"))
    g, width = whole.main, text.d_model + N_FLAGS
    ids = whole.input("input_ids", "int64", (1, "s"))
    (x,) = g.inline(read_part(directory / "embedding.onnx"), "embedding", input_ids=ids)
    x = g.op("Pad", x, g.ints(0, 0, 0, 0, 0, N_FLAGS))
    for name, token in (("image_features", image_token), ("audio_features", audio_token)):
        rows = whole.input(name, "float32", (name, width))
        places = g.op("Transpose", g.op("NonZero", g.op("Equal", ids, g.number(token))), perm=[1, 0])
        # None are given after the prompt, and a generated token may be a placeholder all the same.
        count = g.op("Min", g.size(places, 0), g.size(rows, 0))
        start = g.ints(0)
        x = g.op("ScatterND", x, g.slice(places, start, count, 0), g.slice(rows, start, count, 0))
    whole.output(x, "inputs_embeds", "float32", (1, "s", width))
    return whole


def decoder(directory: Path, text: TextSpec, adapters: Mapping[str, Tensors]) -> Composition:
    """genai-decoder.onnx over the decoder.onnx of `directory`.

    Args:
        adapters: by name, "vision" and "speech", what their files hold; empty if one is merged.
    """
    whole = Composition(DECODER.removesuffix(".onnx"))
    g = whole.main
    part = read_part(directory / "decoder.onnx")
    embeds = whole.input("inputs_embeds", "float32", ("b", "s", text.d_model + N_FLAGS))
    mask = whole.input("attention_mask", "int64", ("b", "total"))
    x, seen = _remembered(g, text, embeds, mask)
    inputs = {"inputs_embeds": x, "attention_mask": mask}
    for n in range(text.n_layers):
        inputs |= _past(whole, n, text.n_kv_heads, text.head_dim)
    given = {t.name for t in part.initializer} | set(inputs)
    lora = [i.name for i in part.input if i.name.rpartition(".")[2] in _KINDS]
    assert {i.name for i in part.input} <= given, "decoder.onnx takes what genai does not give"
    tensors = [t for t in part.initializer if t.name not in lora]
    names = {t.name: f"decoder/{t.name}" for t in tensors} | inputs
    for tensor in tensors:
        renamed = onnx.TensorProto()
        renamed.CopyFrom(tensor)
        renamed.name = names[tensor.name]
        whole.tensors[renamed.name] = renamed
    weights = _declared(whole, adapters)
    for node in _grouped(part.node, lora):
        if isinstance(node, onnx.NodeProto):
            g.copy([node], names, [])
        else:
            _with_adapter(g, node, names, weights, seen)
    for o in part.output:
        shape = [d.dim_param or d.dim_value for d in o.type.tensor_type.shape.dim]
        # genai would reserve room for a row of logits of every position otherwise.
        whole.output(names[o.name], o.name, "float32", ("b", 1, shape[2]) if o.name == "logits" else shape)
    return whole


def _past(whole: Composition, layer: int, n_heads: int, size: int) -> dict[str, str]:
    """Declare a layer's inputs from the KV cache."""
    names = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
    return {name: whole.input(name, "float32", ("b", n_heads, "past", size)) for name in names}


def _remembered(g: Scope, text: TextSpec, embeds: str, mask: str) -> tuple[str, dict[str, str]]:
    """The rows that the decoder has to read, float32 [b, n, d_model], and by adapter whether it is on."""
    whole, d = g.whole, text.d_model
    n_heads = -(-(d + N_FLAGS) // (2 * text.head_dim))
    size = n_heads * text.head_dim
    key, value = _past(whole, text.n_layers, n_heads, text.head_dim).values()
    zero, cut, end = g.ints(0), g.ints(d), g.ints(_END)
    rows = g.slice(embeds, zero, cut, 2)
    # A row's adapter is the whole request's: what one row of a prompt is of, all of them say.
    flags = g.op("ReduceMax", g.slice(embeds, cut, end, 2), g.ints(1))
    each = g.op("Concat", g.ints(1), g.size(embeds, 1), g.ints(1), axis=0)
    flags = g.op("Expand", flags, each)
    half = g.ints(size)
    keys, values = g.slice(rows, zero, half, 2), g.slice(rows, half, end, 2)
    values = g.op("Concat", values, flags, axis=2)
    values = g.op("Pad", values, g.ints(0, 0, 0, 0, 0, 2 * size - d - N_FLAGS))
    lengths = g.op("ReduceSum", mask, g.ints(1), keepdims=0)
    last = g.op("Cast", g.op("Sub", lengths, g.number(1)), to=onnx.TensorProto.INT32)
    total = g.op("Cast", g.op("Squeeze", g.size(mask, 1)), to=onnx.TensorProto.INT32)
    queries = g.op("Mul", keys, g.constant(0, "float32"))
    mean, *present = g.ops(
        "GroupQueryAttention",
        g.op("Concat", queries, keys, values, axis=2),
        "",
        "",
        key,
        value,
        last,
        total,
        n_outputs=3,
        domain=_MICROSOFT,
        num_heads=n_heads,
        kv_num_heads=n_heads,
    )
    for name, made in zip(("key", "value"), present, strict=True):
        shape = ("b", n_heads, "present", text.head_dim)
        whole.output(made, f"present.{text.n_layers}.{name}", "float32", shape)
    at = d - size
    seen = g.slice(g.slice(mean, g.ints(-1), end, 1), g.ints(at), g.ints(at + N_FLAGS), 2)
    seen = g.op("Greater", g.op("ReduceMax", seen, g.ints(0, 1), keepdims=0), g.constant(0, "float32"))
    if text.rope.is_long_rope:
        rows = _again(g, text.rope, rows, lengths, (key, value, size, at))
    return rows, {name: g.op("Gather", seen, g.number(n)) for n, name in enumerate(ADAPTER_NAMES)}


def _again(g: Scope, rope: RopeSpec, rows: str, lengths: str, cached: tuple[str, str, int, int]) -> str:
    """All rows so far before the new ones, if these cross the original context; else the new ones alone."""
    key, value, n_key, n_value = cached
    now = g.op("Reshape", g.op("ReduceMax", lengths), g.ints(1))
    before = g.op("Sub", now, g.size(rows, 1))
    original = g.ints(rope.original_context)
    crosses = g.op("And", g.op("Greater", now, original), g.op("LessOrEqual", before, original))
    count = g.op("Where", crosses, before, g.ints(0))
    # Heads side by side again. No dimension is left to be worked out: there may be no row.
    shape = g.op("Concat", g.size(rows, 0), count, g.ints(n_key), axis=0)
    parts = [g.op("Transpose", g.slice(x, g.ints(0), count, 2), perm=[0, 2, 1, 3]) for x in (key, value)]
    parts = [g.op("Reshape", x, shape) for x in parts]
    parts[1] = g.slice(parts[1], g.ints(0), g.ints(n_value), 2)
    return g.op("Concat", g.op("Concat", *parts, axis=2), rows, axis=1)


def _declared(whole: Composition, adapters: Mapping[str, Tensors]) -> dict[str, dict[str, str]]:
    """The adapters' weights by name. They stay in the stored type: widened, they are twice as large."""
    found: dict[str, dict[str, str]] = {}
    for adapter, tensors in adapters.items():
        found[adapter] = {}
        for name, tensor in tensors.items():
            renamed = onnx.TensorProto()
            renamed.CopyFrom(tensor)
            renamed.name = f"{adapter}/{name}"
            found[adapter][name] = whole.replaceable(renamed)
    return found


def _grouped(
    nodes: Sequence[onnx.NodeProto], lora: Sequence[str]
) -> list[onnx.NodeProto | list[onnx.NodeProto]]:
    """The nodes in order, those that add one linear layer's adapter together as a list.

    onnx_lora.py writes them: everything that A and B lead to, up to and with the sum.
    """
    owner = {name: name.rpartition(".")[0] for name in lora}
    open_: dict[str, list[onnx.NodeProto]] = {}
    found: list[onnx.NodeProto | list[onnx.NodeProto]] = []
    for node in nodes:
        layer = next((owner[i] for i in node.input if i in owner), None)
        if layer is None:
            found.append(node)
            continue
        open_.setdefault(layer, []).append(node)
        if node.op_type == "Add":
            found.append(open_.pop(layer))
        else:
            owner |= {o: layer for o in node.output}
    assert not open_, "an adapter's product is added to nothing"
    return found


def _with_adapter(
    g: Scope,
    group: Sequence[onnx.NodeProto],
    names: dict[str, str],
    weights: Mapping[str, Mapping[str, str]],
    seen: Mapping[str, str],
) -> None:
    """A linear layer's result with one adapter added, or another, or none: a group's sum under its name."""
    total = group[-1]
    made = {o for node in group for o in node.output}
    (plain,) = (i for i in total.input if i not in made)
    layer = next(i.rpartition(".")[0] for node in group for i in node.input if i.endswith(".lora_A"))

    def add(adapter: str, inner: Scope) -> str:
        own = {name: value for name, value in weights[adapter].items() if name.rpartition(".")[0] == layer}
        return inner.copy(group, names | own, total.output)[0]

    def choose(adapters: Sequence[str], scope: Scope) -> str:
        if not adapters:
            return names[plain]
        first, *others = adapters
        width = scope.whole.tensors[weights[first][f"{layer}.lora_B"]].dims[1]
        return scope.choose(
            seen[first],
            functools.partial(add, first),
            functools.partial(choose, others),
            FLOAT,
            ("b", "rows", width),
        )

    names[total.output[0]] = choose([a for a in ADAPTER_NAMES if f"{layer}.lora_A" in weights.get(a, {})], g)
