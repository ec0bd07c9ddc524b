# SPDX-License-Identifier: Apache-2.0
"""Writes the speech encoder: subsampling, one Conformer trunk, and two small projectors.

    speech-front.onnx               features float32 [1, t, 80] -> tokens float32 [ceil(t / 8), d]
    speech.onnx                     tokens float32 [n, d] -> hidden float32 [n, d]
    speech-projector.onnx           hidden float32 [n, d] -> rows float32 [n, d_model], without a picture
    speech-vision-projector.onnx    the same for a request with pictures

The front may be run piece by piece, which keeps its large intermediate values (164 kB for a frame of 10 ms)
in the cache: a piece that does not begin a clip brings the 8 frames before it, for the convolutions look
back, and its first token is dropped. A token looks 7 frames past its first one and no further, so nothing is
needed after a piece of whole tokens. The trunk takes one block: attention sees all n tokens.

Source: `Phi4MultimodalAudioModel` and `Phi4MultimodalAudioEmbedding` in transformers'
modeling_phi4_multimodal.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..runtime.bundle import BundleFile
from .checkpoint import Checkpoint
from .config import AudioSpec, ModelConfig
from .encoder_tensors import AUDIO, original_name
from .ggml_types import F16, F32
from .onnx_graph import MICROSOFT, EncoderQuant, Float32, OnnxGraph
from .progress import Progress, Silent
from .quantize import check_values

GRAPHS = {  # as in bundle.ENCODER_GRAPHS
    "front": "speech-front.onnx",
    "trunk": "speech.onnx",
    "speech-projector": "speech-projector.onnx",
    "vision-projector": "speech-vision-projector.onnx",
}
_SMALLEST = 1e-20  # stands in for the largest value of a row of zeros
_EPSILON = 1e-5  # torch.nn.LayerNorm's default, which the reference uses throughout


@dataclass(frozen=True, slots=True)
class _Writer:
    """A graph, and the checkpoint that its weights come from."""

    graph: OnnxGraph
    source: Checkpoint
    config: ModelConfig
    audio: AudioSpec
    quant: EncoderQuant
    progress: Progress

    def read(self, name: str) -> Float32:
        """One tensor, by its native name within the audio part: float32 of its own shape.

        Raises:
            CheckpointError: it cannot be read, or holds what the stored type cannot.
        """
        native = AUDIO + name
        info = self.source.tensors[original_name(native) if self.config.layout == "phi4mm" else native]
        values = self.source.read(info)
        check_values(values, F16 if self.quant in ("fp16", "int4") else F32, info.name, info.file)
        self.progress.advance(info.nbytes, info.name)
        return values

    def single(self, name: str, values: Float32 | None = None) -> str:
        """A weight that stays float32 in every kind of encoder: it is small, or does not bear rounding."""
        return self.graph.weight(name, self.read(name) if values is None else values)

    def linear(self, x: str, name: str, *, scale: float = 1.0, uneven: bool = False) -> str:
        """The linear layer `name`, or a convolution of one tap, times a power of two."""
        weight, bias = (self.read(f"{name}.{part}") * np.float32(scale) for part in ("weight", "bias"))
        return self.product(x, name, weight.reshape(weight.shape[:2]), bias, uneven=uneven)

    def product(self, x: str, name: str, weight: Float32, bias: Float32, *, uneven: bool = False) -> str:
        """x Wᵀ + b in the chosen kind.

        `uneven` says that some rows of x may be far larger than others. int8 has one range for all of x,
        which would leave the small rows a few steps: there each row is first divided by its largest value.
        """
        g = self.graph
        if not uneven or self.quant != "int8":
            return g.linear(x, name, weight, bias, quant=self.quant)
        largest = g.op("ReduceMax", g.op("Abs", x), self.ints(-1), keepdims=1)
        largest = g.op("Max", largest, g.constant(_SMALLEST, "float32"))
        y = g.linear(g.op("Div", x, largest), name, weight, quant=self.quant)
        return g.op("Add", g.op("Mul", y, largest), self.single(f"{name}.bias", bias))

    def layer_norm(self, x: str, name: str) -> str:
        """LayerNorm over the last axis."""
        weight, bias = self.single(f"{name}.weight"), self.single(f"{name}.bias")
        return self.graph.op("LayerNormalization", x, weight, bias, epsilon=_EPSILON)

    def swish(self, x: str) -> str:
        """x · sigmoid(x)."""
        return self.graph.op("QuickGelu", x, domain=MICROSOFT, alpha=1.0)

    def ints(self, *values: int) -> str:
        """A constant int64 vector."""
        return self.graph.constant(values, "int64")


def write_speech(
    directory: Path,
    source: Checkpoint,
    config: ModelConfig,
    quant: EncoderQuant,
    progress: Progress | None = None,
    producer: str = "",
) -> list[BundleFile]:
    """Write the four graphs into `directory`; memory is one tensor and a graph.

    Args:
        quant: of the linear layers and the convolutions of one tap. What is left is float32 in every
            kind: the other convolutions, norms, softmax and the relative position table. With int4 the
            front and the projectors are int8: they are a twelfth of the weights and the most sensitive.
        progress: told the checkpoint bytes of each tensor as it is written.

    Raises:
        CheckpointError: a tensor cannot be read, or holds a value that its type cannot.
        OutputError: a file cannot be written.
    """
    assert config.audio is not None, "the caller has seen that there is a speech encoder"
    builders: dict[str, Callable[[_Writer], None]] = {
        "front": _front,
        "trunk": _trunk,
        "speech-projector": functools.partial(_projector, use="speech"),
        "vision-projector": functools.partial(_projector, use="vision_speech"),
    }
    files: list[BundleFile] = []
    for part, build in builders.items():
        kind: EncoderQuant = "int8" if quant == "int4" and part != "trunk" else quant
        with OnnxGraph(directory, GRAPHS[part].removesuffix(".onnx"), producer) as graph:
            build(_Writer(graph, source, config, config.audio, kind, progress or Silent()))
            files += graph.finish()
    return files


def _front(w: _Writer) -> None:
    """Normalised frames through three convolutions, each of which halves time and frequency."""
    g, conv, channels = w.graph, "encoder.embed.conv.", w.audio.d_conv
    x = g.input("features", "float32", (1, "frames", w.audio.n_mels))
    x = g.op("Sub", x, w.single("encoder.encoder_embedding.global_mean"))
    x = g.op("Mul", x, w.single("encoder.encoder_embedding.global_invstd"))
    x = _halve(w, f"{conv}0", g.op("Unsqueeze", x, w.ints(1)), 1)
    x = g.op("Relu", x)
    for depthwise, pointwise in ((2, 3), (5, 6)):
        x = _halve(w, f"{conv}{depthwise}", x, channels)
        # Channels last, so that one tap is a plain product, in any of the kinds.
        x = g.op("Transpose", x, perm=[0, 2, 3, 1])
        x = g.op("Relu", w.linear(x, f"{conv}{pointwise}", uneven=True))
        if pointwise == 3:
            x = g.op("Transpose", x, perm=[0, 3, 1, 2])
    # The reference flattens [channel, frequency]; here it is [frequency, channel], so the columns move.
    weight, bias = w.read("encoder.embed.out.weight"), w.read("encoder.embed.out.bias")
    by_channel = weight.reshape(len(weight), channels, -1)
    columns = np.ascontiguousarray(by_channel.transpose(0, 2, 1)).reshape(len(weight), -1)
    x = g.op("Reshape", g.op("Squeeze", x, w.ints(0)), w.ints(0, -1))
    x = w.product(x, "encoder.embed.out", columns, bias, uneven=True)
    g.output(x, "tokens", "float32", ("tokens", w.audio.d_model))


def _halve(w: _Writer, name: str, x: str, groups: int) -> str:
    """A 3 x 3 convolution of stride 2: [1, c, i, j] -> [1, channels, ceil(i / 2), ceil(j / 2)]."""
    weight, bias = w.single(f"{name}.weight"), w.single(f"{name}.bias")
    return w.graph.op("Conv", x, weight, bias, strides=[2, 2], pads=[1, 1, 1, 1], group=groups)


def _trunk(w: _Writer) -> None:
    """The Conformer blocks over one block of tokens."""
    g, a = w.graph, w.audio
    x = g.op("Unsqueeze", g.input("tokens", "float32", ("tokens", a.d_model)), w.ints(0))
    bias = _relative_bias(w, g.op("Shape", x, start=1, end=2))
    for n in range(a.n_blocks):
        x = _block(w, f"encoder.encoders.{n}.", x, bias)
    g.output(g.op("Squeeze", x, w.ints(0)), "hidden", "float32", ("tokens", a.d_model))


def _relative_bias(w: _Writer, length: str) -> str:
    """What attention adds to its logits: float32 [1, heads, length, length], the same in every block.

    Row i, column j is the table's row clamp(j - i, -D, D - 1) + D: linear, without T5's logarithm.
    """
    g, d = w.graph, w.audio.max_distance
    values = w.read("encoder.relative_attention_bias_layer.bias_values.weight")
    table = w.single("relative_bias", np.ascontiguousarray(values.T))
    positions = g.op("Range", *(g.constant(0, "int64"), g.op("Squeeze", length), g.constant(1, "int64")))
    distance = g.op("Sub", g.op("Unsqueeze", positions, w.ints(0)), g.op("Unsqueeze", positions, w.ints(1)))
    distance = g.op("Clip", distance, g.constant(-d, "int64"), g.constant(d - 1, "int64"))
    index = g.op("Add", distance, g.constant(d, "int64"))
    return g.op("Unsqueeze", g.op("Gather", table, index, axis=1), w.ints(0))


def _block(w: _Writer, block: str, x: str, bias: str) -> str:
    """One Conformer block, float32 [1, n, d] to the same."""
    g = w.graph
    x = g.op("Add", x, _feed_forward(w, f"{block}feed_forward_in.", x))
    x = g.op("Add", x, _attention(w, block, x, bias))
    x = g.op("Add", x, _convolution(w, f"{block}conv.", x))
    x = g.op("Add", x, _feed_forward(w, f"{block}feed_forward_out.", x))
    return w.layer_norm(x, f"{block}layer_norm")


def _feed_forward(w: _Writer, part: str, x: str) -> str:
    """Half of FF(x): the reference's factor 0.5 goes into the last layer, where it is exact."""
    x = w.linear(w.layer_norm(x, f"{part}layer_norm"), f"{part}gate_up_proj")
    value, gate = w.graph.ops("Split", x, n_outputs=2, axis=-1, num_outputs=2)
    return w.linear(w.graph.op("Mul", value, w.swish(gate)), f"{part}down_proj", scale=0.5, uneven=True)


def _attention(w: _Writer, block: str, x: str, bias: str) -> str:
    """Full attention inside the block of tokens; no mask, and positions only by `bias`."""
    x = w.layer_norm(x, f"{block}layer_norm_att")
    q, k, v = (w.linear(x, f"{block}self_attn.{part}_proj") for part in "qkv")
    mixed = w.graph.op(
        "MultiHeadAttention", q, k, v, "", "", bias, domain=MICROSOFT, num_heads=w.audio.n_heads
    )
    return w.linear(mixed, f"{block}self_attn.o_proj")


def _convolution(w: _Writer, conv: str, x: str) -> str:
    """Gated product, causal depthwise convolution, two more products."""
    g = w.graph
    # The gate's own shifts b1 and b2 [1, d, 1] join the bias of the product before them.
    weight, bias = (w.read(f"{conv}glu.ext_pw_conv_1d.{part}") for part in ("weight", "bias"))
    bias = bias + np.concatenate([w.read(f"{conv}glu.b1").reshape(-1), w.read(f"{conv}glu.b2").reshape(-1)])
    x = w.product(w.layer_norm(x, f"{conv}layer_norm"), f"{conv}glu", weight.reshape(weight.shape[:2]), bias)
    value, gate = g.ops("Split", x, n_outputs=2, axis=-1, num_outputs=2)
    x = g.op("Transpose", g.op("Mul", value, w.swish(gate)), perm=[0, 2, 1])
    name = f"{conv}dw_sep_conv_1d.dw_conv"
    # The reference pads both ends by kernel - 1 and drops as many outputs at the end: no look ahead.
    pads = [w.audio.kernel - 1, 0]
    x = g.op(
        "Conv", x, w.single(f"{name}.weight"), w.single(f"{name}.bias"), pads=pads, group=w.audio.d_model
    )
    x = w.linear(g.op("Transpose", x, perm=[0, 2, 1]), f"{conv}dw_sep_conv_1d.pw_conv", uneven=True)
    return w.linear(w.swish(x), f"{conv}ext_pw_conv_1d")


def _projector(w: _Writer, use: str) -> None:
    """Linear, GELU with erf, linear."""
    g = w.graph
    x = g.input("hidden", "float32", ("tokens", w.audio.d_model))
    x = g.op("Gelu", w.linear(x, f"up_proj_for_{use}"))
    x = w.linear(x, f"down_proj_for_{use}")
    g.output(x, "rows", "float32", ("tokens", w.config.text.d_model))
