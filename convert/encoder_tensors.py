# SPDX-License-Identifier: Apache-2.0
"""Names and shapes of Phi-4-multimodal's encoder tensors, in both layouts.

Shapes are PyTorch's. The native names come from transformers' modeling_phi4_multimodal.py; the
original ones from its conversion script's renames, `ORIGINAL_NAMES` below. Layers and heads that
inference never uses (the last vision layer, its pooling head) are in the files and so are listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from .config import AudioSpec, VisionSpec

Shapes = Iterator[tuple[str, tuple[int, ...]]]

IMAGE = "model.embed_tokens_extend.image_embed."
AUDIO = "model.embed_tokens_extend.audio_embed."

# Native name -> original name, applied in order to the whole name.
_ORIGINAL_NAMES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(native), original)
    for native, original in (
        (r"\.global_img_feature_extensor$", ".glb_GN"),
        (r"\.sub_img_feature_extensor$", ".sub_GN"),
        (r"\.img_projection_up\.", ".img_projection.0."),
        (r"\.img_projection_down\.", ".img_projection.2."),
        (r"(\.feed_forward_(?:in|out))\.gate_up_proj\.", r"\1.net.0.linear."),
        (r"(\.feed_forward_(?:in|out))\.down_proj\.", r"\1.net.2."),
        (r"(\.encoders\.\d+\.self_attn)\.([qkv])_proj\.", r"\1.linear_\2."),
        (r"(\.encoders\.\d+\.self_attn)\.o_proj\.", r"\1.linear_out."),
        (r"\.up_proj_for_speech\.", ".audio_projection.speech.0."),
        (r"\.down_proj_for_speech\.", ".audio_projection.speech.2."),
        (r"\.up_proj_for_vision_speech\.", ".audio_projection.vision.0."),
        (r"\.down_proj_for_vision_speech\.", ".audio_projection.vision.2."),
    )
)


def original_name(native: str) -> str:
    """The name that microsoft/Phi-4-multimodal-instruct gives an encoder tensor."""
    for pattern, replacement in _ORIGINAL_NAMES:
        native = pattern.sub(replacement, native)
    return native


def encoder_shapes(vision: VisionSpec, audio: AudioSpec, d_text: int) -> dict[str, tuple[int, ...]]:
    """Every encoder and projector tensor, by native name; `d_text` is the decoder's width."""
    shapes: dict[str, tuple[int, ...]] = {}
    shapes.update((IMAGE + name, shape) for name, shape in _vision(vision, d_text))
    shapes.update((AUDIO + name, shape) for name, shape in _audio(audio, d_text))
    return shapes


def _linear(name: str, out: int, *inner: int) -> Shapes:
    """A weight [out, *inner] and its bias [out]."""
    yield f"{name}.weight", (out, *inner)
    yield f"{name}.bias", (out,)


def _vision(v: VisionSpec, d_text: int) -> Shapes:
    d, tower = v.d_model, "img_processor."
    yield "global_img_feature_extensor", (1, 1, d)
    yield "sub_img_feature_extensor", (1, 1, 1, d)
    yield from _linear("img_projection_up", d_text, d)
    yield from _linear("img_projection_down", d_text, d_text)
    yield from _linear(tower + "embeddings.patch_embedding", d, v.n_channels, v.patch_size, v.patch_size)
    yield tower + "embeddings.position_embedding.weight", (v.n_positions, d)
    for n in range(v.n_layers):
        layer = f"{tower}encoder.layers.{n}."
        yield from _linear(layer + "layer_norm1", d)
        yield from _linear(layer + "layer_norm2", d)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{layer}self_attn.{part}", d, d)
        yield from _linear(layer + "mlp.fc1", v.d_ff, d)
        yield from _linear(layer + "mlp.fc2", d, v.d_ff)
    yield from _linear(tower + "post_layernorm", d)
    head = tower + "head."
    yield head + "probe", (1, 1, d)
    yield head + "attention.in_proj_weight", (3 * d, d)  # torch.nn.MultiheadAttention's own naming
    yield head + "attention.in_proj_bias", (3 * d,)
    yield from _linear(head + "attention.out_proj", d, d)
    yield from _linear(head + "layernorm", d)
    yield from _linear(head + "mlp.fc1", v.d_ff, d)
    yield from _linear(head + "mlp.fc2", d, v.d_ff)


def _audio(a: AudioSpec, d_text: int) -> Shapes:
    yield "encoder.encoder_embedding.global_mean", (a.n_mels,)
    yield "encoder.encoder_embedding.global_invstd", (a.n_mels,)
    conv = "encoder.embed.conv."
    yield from _linear(conv + "0", a.d_conv, 1, 3, 3)
    for depthwise, pointwise in ((2, 3), (5, 6)):  # 1 and 4 are activations
        yield from _linear(f"{conv}{depthwise}", a.d_conv, 1, 3, 3)
        yield from _linear(f"{conv}{pointwise}", a.d_conv, a.d_conv, 1, 1)
    n_freqs = a.n_mels
    for _ in range(3):  # three convolutions of stride 2 with padding: each halves, rounding up
        n_freqs = (n_freqs + 1) // 2
    yield from _linear("encoder.embed.out", a.d_model, a.d_conv * n_freqs)
    yield "encoder.relative_attention_bias_layer.bias_values.weight", (2 * a.max_distance, a.n_heads)
    for n in range(a.n_blocks):
        yield from _conformer(f"encoder.encoders.{n}.", a)
    for use in ("speech", "vision_speech"):
        yield from _linear(f"up_proj_for_{use}", d_text, a.d_model)
        yield from _linear(f"down_proj_for_{use}", d_text, d_text)


def _conformer(block: str, a: AudioSpec) -> Shapes:
    d = a.d_model
    for half in ("feed_forward_in", "feed_forward_out"):
        yield from _linear(f"{block}{half}.layer_norm", d)
        yield from _linear(f"{block}{half}.gate_up_proj", 2 * a.d_ff, d)
        yield from _linear(f"{block}{half}.down_proj", d, a.d_ff)
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield from _linear(f"{block}self_attn.{part}", d, d)
    conv = block + "conv."
    yield from _linear(conv + "layer_norm", d)
    yield from _linear(conv + "glu.ext_pw_conv_1d", 2 * d, d, 1)
    yield conv + "glu.b1", (1, d, 1)
    yield conv + "glu.b2", (1, d, 1)
    yield from _linear(conv + "dw_sep_conv_1d.dw_conv", d, 1, a.kernel)
    yield from _linear(conv + "dw_sep_conv_1d.pw_conv", d, d, 1)
    yield from _linear(conv + "ext_pw_conv_1d", d, d, 1)
    yield from _linear(block + "layer_norm_att", d)
    yield from _linear(block + "layer_norm", d)
