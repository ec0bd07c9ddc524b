# SPDX-License-Identifier: Apache-2.0
"""Writes the vision encoder: the SigLIP tower up to its feature layer, pooled, and the projector.

    vision.onnx            patches float32 [n, p, 588], position_ids int64 [p], keys int64 [k], grid int64 [2]
                           -> features float32 [n · p / 4, d]
    vision-projector.onnx  features float32 [f, d], rows int64 [t] -> embeddings float32 [t, d_model]

The tower takes n crops of which the same p patches are read. A patch is 3 × 14 × 14 numbers, channel by
channel; `grid` is the number of feature rows and columns, half of the patches' each; `keys` names the patches
that are attended to. Leaving padding out is exact: in the reference a masked patch is attended to by none.

The projector's `rows` counts the two learned separators as 0 and 1 and the features from 2 on.

Source: `Phi4MultimodalVisionModel` and `Phi4MultimodalImageEmbedding` in transformers'
modeling_phi4_multimodal.py. The layers after the feature layer, the last norm and the pooling head are
not written: nothing reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from ..runtime.bundle import BundleFile
from ..runtime.errors import CheckpointError
from .checkpoint import Checkpoint
from .config import ModelConfig, VisionSpec
from .encoder_tensors import IMAGE, original_name
from .ggml_types import F16, F32
from .onnx_graph import MICROSOFT, EncoderQuant, Float32, OnnxGraph
from .progress import Progress, Silent
from .quantize import check_values

TOWER, PROJECTOR = "vision", "vision-projector"
GRAPHS = {"tower": f"{TOWER}.onnx", "projector": f"{PROJECTOR}.onnx"}  # as in bundle.ENCODER_GRAPHS
_CROP, _PATCH, _CHANNELS = 448, 14, 3  # what the runtime cuts images into
_SMALLEST_STEP = 1e-20  # of a quantized value: all zeros have no scale of their own
_EMBEDDINGS = "img_processor.embeddings."
_ATTENDED = frozenset({"q_proj", "k_proj", "v_proj"})


@dataclass(frozen=True, slots=True)
class _Writer:
    """A graph, and the checkpoint that its weights come from."""

    graph: OnnxGraph
    source: Checkpoint
    config: ModelConfig
    vision: VisionSpec
    quant: EncoderQuant
    progress: Progress

    @property
    def rounded(self) -> bool:
        """Whether large weights that are not quantized are stored as float16."""
        return self.quant != "fp32"

    def read(self, name: str) -> Float32:
        """One tensor, by its native name within the image part: float32 of its own shape.

        Raises:
            CheckpointError: it cannot be read, or holds what the stored type cannot.
        """
        native = IMAGE + name
        info = self.source.tensors[original_name(native) if self.config.layout == "phi4mm" else native]
        values = self.source.read(info)
        check_values(values, F16 if self.rounded else F32, info.name, info.file)
        self.progress.advance(info.nbytes, info.name)
        return values

    def float(self, name: str) -> str:
        """A weight that stays float32 in every kind of encoder: it is small."""
        return self.graph.weight(name, self.read(name))

    def exact(self, x: str, name: str, weight: Float32 | None = None) -> str:
        """The linear layer `name` in floating point: its weights are float16 at the least."""
        weight = self.read(f"{name}.weight") if weight is None else weight
        kind: EncoderQuant = "fp16" if self.rounded else "fp32"
        return self.graph.linear(x, name, weight, self.read(f"{name}.bias"), quant=kind)

    def layer_norm(self, x: str, name: str) -> str:
        """LayerNorm over the last axis."""
        weight, bias = self.float(f"{name}.weight"), self.float(f"{name}.bias")
        return self.graph.op("LayerNormalization", x, weight, bias, epsilon=self.vision.norm_eps)

    def linear(self, x: str, name: str, *parts: str) -> str:
        """The linear layers `name.part` side by side, as one product in the chosen kind.

        int4 keeps query, key and value at int8: they are a quarter of the weights, and measured on
        phi4-nano they make nine tenths of the error when all are rounded alike.
        """
        weight = np.concatenate([self.read(f"{name}.{part}.weight") for part in parts])
        bias = np.concatenate([self.read(f"{name}.{part}.bias") for part in parts])
        quant = "int8" if self.quant == "int4" and _ATTENDED.intersection(parts) else self.quant
        return self.graph.linear(x, f"{name}.{'+'.join(parts)}", weight, bias, quant=quant)

    def ints(self, *values: int) -> str:
        """A constant int64 vector."""
        return self.graph.constant(values, "int64")


def write_vision(
    directory: Path,
    source: Checkpoint,
    config: ModelConfig,
    quant: EncoderQuant,
    progress: Progress | None = None,
    producer: str = "",
) -> list[BundleFile]:
    """Write the tower and the projector into `directory`; memory is one tensor and the graph.

    Args:
        quant: of the linear layers of the tower; int8 takes attention's two products in as well. Norms,
            softmax and pooling are float32 in every kind. The patch and position embeddings and the
            projector are float16 at the least: the projector's input is a residual stream with
            outliers, and all of them together are a fiftieth of the work.
        producer: goes into the graphs' metadata.

    Raises:
        CheckpointError: a tensor cannot be read or holds what its type cannot, or the model's crops
            and patches are not those that the runtime cuts.
        OutputError: a file cannot be written.
    """
    vision = config.vision
    assert vision is not None, "a text model has no vision encoder"
    sizes = (vision.image_size, vision.patch_size, vision.n_channels)
    if sizes != (_CROP, _PATCH, _CHANNELS):
        raise CheckpointError(
            f"{source.root / 'config.json'}: image size, patch size and channels of the vision encoder "
            f"are {sizes}, expected {(_CROP, _PATCH, _CHANNELS)}"
        )
    files: list[BundleFile] = []
    for name, build in ((TOWER, _tower), (PROJECTOR, _projector)):
        with OnnxGraph(directory, name, producer) as graph:
            build(_Writer(graph, source, config, vision, quant, progress or Silent()))
            files += graph.finish()
    return files


def _tower(w: _Writer) -> None:
    g, v = w.graph, w.vision
    inputs = _CHANNELS * _PATCH * _PATCH
    patches = g.input("patches", "float32", ("n", "p", inputs))
    position_ids = g.input("position_ids", "int64", ("p",))
    keys = g.input("keys", "int64", ("k",))
    grid = g.input("grid", "int64", (2,))
    kernel = w.read(_EMBEDDINGS + "patch_embedding.weight").reshape(v.d_model, inputs)
    x = w.exact(patches, _EMBEDDINGS + "patch_embedding", kernel)
    table = w.read(_EMBEDDINGS + "position_embedding.weight")
    positions = (g.half if w.rounded else g.weight)(_EMBEDDINGS + "position_embedding", table)
    x = g.op("Add", x, g.op("Gather", positions, position_ids))
    average = _average(w, keys) if w.quant == "int8" else ""
    for n in range(v.n_used_layers):
        x = _layer(w, x, keys, average, f"img_processor.encoder.layers.{n}.")
    g.output(_pool(w, x, grid), "features", "float32", ("f", v.d_model))


def _average(w: _Writer, keys: str) -> str:
    """[1, 1, k] of 1 / k: times [n, k, d] it is the mean over the keys."""
    g = w.graph
    count = g.op("Shape", keys)
    ones = g.op(
        "ConstantOfShape",
        g.op("Concat", w.ints(1, 1), count, axis=0),
        value=helper.make_tensor("one", onnx.TensorProto.FLOAT, [1], [1.0]),
    )
    return g.op("Div", ones, g.op("Cast", count, to=onnx.TensorProto.FLOAT))


def _layer(w: _Writer, x: str, keys: str, average: str, layer: str) -> str:
    """x += Attn(LN x); x += MLP(LN x)."""
    g = w.graph
    normed = w.layer_norm(x, layer + "layer_norm1")
    q = w.linear(normed, layer + "self_attn", "q_proj")
    kv = w.linear(normed, layer + "self_attn", "k_proj", "v_proj")
    # Fewer keys instead of a mask: with a mask ONNX Runtime falls back to a slower attention.
    kv = g.op("Gather", kv, keys, axis=1)
    attended = _attend_int8(w, q, kv, average) if w.quant == "int8" else _attend(w, q, kv)
    x = g.op("Add", x, w.linear(attended, layer + "self_attn", "out_proj"))
    inner = w.linear(w.layer_norm(x, layer + "layer_norm2"), layer + "mlp", "fc1")
    inner = g.op("Gelu", inner, approximate="tanh")
    return g.op("Add", x, w.linear(inner, layer + "mlp", "fc2"))


def _attend(w: _Writer, q: str, kv: str) -> str:
    """softmax(q kᵀ / √head) v in float32: ONNX Runtime's fused attention."""
    heads, d = w.vision.n_heads, w.vision.d_model
    k, v = w.graph.ops("Split", kv, w.ints(d, d), n_outputs=2, axis=-1)
    return w.graph.op(
        "MultiHeadAttention", q, k, v, domain=MICROSOFT, num_heads=heads, scale=float((d // heads) ** -0.5)
    )


def _attend_int8(w: _Writer, q: str, kv: str, average: str) -> str:
    """The same with both products in 8 bits and the softmax in float32.

    In float32 attention takes as long as three quarters of the other products in int8. Two heads at a
    time, so that their weights, 4 MB a head, stay in the cache.

    Keys and values lose their means first, which makes the steps of 8 bits smaller and changes nothing
    else: a mean of keys adds the same to every score of a row, and the softmax takes that away; a mean of
    values comes out as it is, since weights sum to 1, and is added at the end.
    """
    g, heads, d = w.graph, w.vision.n_heads, w.vision.d_model
    mean = g.op("MatMul", average, kv)  # ReduceMean over this axis takes longer: 5 % of the tower
    k, v = g.ops("Split", g.op("Sub", kv, mean), w.ints(d, d), n_outputs=2, axis=-1)
    _, mean = g.ops("Split", mean, w.ints(d, d), n_outputs=2, axis=-1)
    q8, q_scale, q_zero = g.ops("DynamicQuantizeLinear", q, n_outputs=3)
    (k8, k_scale), (v8, v_scale) = _quantize(w, k), _quantize(w, v)
    q_scale = g.op("Mul", q_scale, g.constant((d // heads) ** -0.5, "float32"))
    group = 2 if heads % 2 == 0 else 1
    sizes = w.ints(*[group] * (heads // group))
    parts = []
    for x, order in ((q8, (0, 2, 1, 3)), (k8, (0, 2, 3, 1)), (v8, (0, 2, 1, 3))):
        by_head = g.op("Transpose", g.op("Reshape", x, w.ints(0, 0, heads, d // heads)), perm=order)
        parts.append(g.ops("Split", by_head, sizes, axis=1, n_outputs=heads // group))
    mixed = []
    for some_q, some_k, some_v in zip(*parts, strict=True):
        scores = g.op("MatMulIntegerToFloat", some_q, some_k, q_scale, k_scale, q_zero, domain=MICROSOFT)
        mixed.append(_mix_int8(w, g.op("Softmax", scores, axis=-1), some_v, v_scale))
    together = g.op("Transpose", g.op("Concat", *mixed, axis=1), perm=(0, 2, 1, 3))
    return g.op("Add", g.op("Reshape", together, w.ints(0, 0, d)), mean)


def _mix_int8(w: _Writer, weights: str, v8: str, v_scale: str) -> str:
    """weights v, [n, group, ·, ·] by [n, group, ·, head].

    The weights, 0 to 1, have one scale for each query: the largest of a row becomes 255, so that attention
    spread over a thousand patches keeps its 8 bits.
    """
    g = w.graph
    step = g.op("Div", g.op("ReduceMax", weights, w.ints(-1)), g.constant(255, "float32"))
    rows = g.op("Flatten", weights, axis=3)
    rows = g.op("QuantizeLinear", rows, g.op("Reshape", step, w.ints(-1)), axis=0)
    weights8 = g.op("Reshape", rows, g.op("Shape", weights))
    one = g.constant(1, "float32")
    return g.op("Mul", g.op("MatMulIntegerToFloat", weights8, v8, one, v_scale, domain=MICROSOFT), step)


def _quantize(w: _Writer, x: str) -> tuple[str, str]:
    """Signed 8-bit values and their one scale."""
    g = w.graph
    scale = g.op("Div", g.op("ReduceMax", g.op("Abs", x), keepdims=0), g.constant(127, "float32"))
    scale = g.op("Max", scale, g.constant(_SMALLEST_STEP, "float32"))
    return g.op("QuantizeLinear", x, scale, g.constant(0, "int8")), scale


def _pool(w: _Writer, x: str, grid: str) -> str:
    """[n, p, d] -> [n · p / 4, d]: the mean of each 2 × 2 patches."""
    g = w.graph
    rows, columns = g.ops("Split", grid, w.ints(1, 1), n_outputs=2, axis=0)
    shape = g.op("Concat", w.ints(-1), rows, w.ints(2), columns, w.ints(2, w.vision.d_model), axis=0)
    pooled = g.op("ReduceMean", g.op("Reshape", x, shape), w.ints(2, 4), keepdims=0)
    return g.op("Reshape", pooled, w.ints(-1, w.vision.d_model))


def _projector(w: _Writer) -> None:
    g, d = w.graph, w.vision.d_model
    features = g.input("features", "float32", ("f", d))
    rows = g.input("rows", "int64", ("t",))
    separators = np.stack([w.read(f"{which}_img_feature_extensor").reshape(d) for which in ("sub", "global")])
    stacked = g.op("Concat", g.weight("separators", separators), features, axis=0)
    x = w.exact(g.op("Gather", stacked, rows, axis=0), "img_projection_up")
    x = w.exact(g.op("Gelu", x), "img_projection_down")
    g.output(x, "embeddings", "float32", ("t", w.config.text.d_model))
