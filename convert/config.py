# SPDX-License-Identifier: Apache-2.0
"""`config.json` of every family member, checked field by field, as the shapes the converter works with.

Three kinds are known by `model_type`: "phi4mm" (microsoft/Phi-4-multimodal-instruct as published),
"phi4_multimodal" (the same model in transformers' own layout) and "phi3" (Phi-4-mini, Phi-4, Phi-3.5).
Field meanings: transformers' configuration_phi3.py, configuration_phi4_multimodal.py and the published
configuration_phi4mm.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..runtime.errors import CheckpointError
from ..runtime.spec import AdapterName, Family, RopeSpec, TextSpec
from .fields import Fields

Layout = Literal["phi4mm", "phi4_multimodal", "phi3"]

ARCHITECTURES: Mapping[str, str] = {
    "phi4mm": "Phi4MMForCausalLM",
    "phi4_multimodal": "Phi4MultimodalForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
MAX_WIDTH = 1 << 17  # far above 14B's 17,920; keeps every product of two widths inside 64 bits
MAX_LAYERS = 512  # LLAMA_MAX_LAYERS: llama.cpp refuses more
MAX_TOKENS = 1 << 24
MAX_RANK = 4096


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """Rank and alpha of one adapter: it adds (alpha / rank) · B (A x)."""

    rank: int
    alpha: float


@dataclass(frozen=True, slots=True)
class VisionSpec:
    """The SigLIP tower's tensor shapes."""

    d_model: int
    d_ff: int
    n_layers: int
    n_heads: int
    n_channels: int
    image_size: int  # pixels
    patch_size: int  # pixels
    norm_eps: float
    feature_layer: int  # negative: -2 is the output of the last layer but one

    @property
    def n_used_layers(self) -> int:
        """Layers that run: hidden_states[-1] is the last one's output."""
        return self.n_layers + 1 + self.feature_layer

    @property
    def n_positions(self) -> int:
        """Rows of the position embedding."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, slots=True)
class AudioSpec:
    """The Conformer's tensor shapes."""

    d_model: int
    d_ff: int
    n_blocks: int
    n_heads: int
    n_mels: int
    d_conv: int  # channels of the three stride-2 convolutions in front
    kernel: int  # taps of each block's depthwise convolution
    max_distance: int  # frames; the relative position table has twice as many rows


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What a checkpoint must contain."""

    layout: Layout
    text: TextSpec
    sliding_window: int  # 0: none. Never below the context length
    vision: VisionSpec | None
    audio: AudioSpec | None
    lora: Mapping[AdapterName, LoraSpec]  # adapters whose tensors are in the main files ("phi4mm" only)

    @property
    def family(self) -> Family:
        """Which kind of bundle this becomes."""
        return "phi3" if self.layout == "phi3" else "phi4-multimodal"


def read_config(raw: Mapping[str, Any], where: str) -> ModelConfig:
    """Check `config.json` and derive the model's shapes.

    Args:
        raw: the parsed file.
        where: the file's path, for messages.

    Raises:
        CheckpointError: an unknown model type, a missing or impossible value, or a feature that a
            converted model would not have (attention bias, an active sliding window, …).
    """
    top = Fields(raw, where)
    layout = top.text("model_type")
    if layout not in ARCHITECTURES:
        raise top.error("model_type", layout, " or ".join(repr(k) for k in ARCHITECTURES))
    wanted = ARCHITECTURES[layout]
    if top.get("architectures") not in (None, [wanted]):
        raise top.error("architectures", top.get("architectures"), f"[{wanted!r}] for model_type {layout!r}")
    _refuse_unsupported(top)
    text = _text(top)
    window = top.count("sliding_window", 0, 1 << 31) if top.has("sliding_window") else 0
    if 0 < window < text.context_length:
        raise top.error(
            "sliding_window", window, f"null, 0 or at least {text.context_length}: llama.cpp would ignore it"
        )
    if layout == "phi4mm":
        lora: dict[AdapterName, LoraSpec] = {"vision": _lora(top, "vision"), "speech": _lora(top, "speech")}
        return ModelConfig("phi4mm", text, window, _original_vision(top), _original_audio(top), lora)
    if layout == "phi4_multimodal":
        return ModelConfig("phi4_multimodal", text, window, _native_vision(top), _native_audio(top), {})
    return ModelConfig("phi3", text, window, None, None, {})


def _refuse_unsupported(top: Fields) -> None:
    for bias in ("attention_bias", "mlp_bias", "lm_head_bias"):
        top.only(bias, False)
    top.only("hidden_act", "silu")
    top.only("full_attn_mod", 1)
    top.only("interpolate_factor", 1)
    if top.has("quantization_config"):
        raise CheckpointError(
            f"{top.where}: field 'quantization_config' is set, expected plain weights (bf16, f16 or f32)"
        )


def _text(top: Fields) -> TextSpec:
    d_model = top.count("hidden_size", 1, MAX_WIDTH)
    n_heads = top.count("num_attention_heads", 1, MAX_WIDTH)
    n_kv_heads = n_heads  # what null and absent mean
    if top.has("num_key_value_heads"):
        n_kv_heads = top.count("num_key_value_heads", 1, MAX_WIDTH)
    if d_model % n_heads:
        raise top.error("hidden_size", d_model, f"a multiple of num_attention_heads ({n_heads})")
    if n_heads % n_kv_heads:
        raise top.error("num_key_value_heads", n_kv_heads, f"a divisor of num_attention_heads ({n_heads})")
    head_dim = d_model // n_heads
    top.only("head_dim", head_dim)
    context = top.count("max_position_embeddings", 1, MAX_TOKENS)
    return TextSpec(
        d_model=d_model,
        n_layers=top.count("num_hidden_layers", 1, MAX_LAYERS),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        d_ff=top.count("intermediate_size", 1, MAX_WIDTH),
        vocab_size=top.count("vocab_size", 1, MAX_TOKENS),
        context_length=context,
        rms_eps=top.positive("rms_norm_eps"),
        tied_head=top.flag("tie_word_embeddings", default=False),
        rope=_rope(top, head_dim, context),
    )


def _rope(top: Fields, head_dim: int, context: int) -> RopeSpec:
    """Both spellings: `rope_scaling` with the rest at the top, and transformers 5's `rope_parameters`."""
    if top.has("rope_parameters") and top.has("rope_scaling"):
        raise top.error("rope_scaling", top.get("rope_scaling"), "null, as 'rope_parameters' is there too")
    own = next((top.fields(k) for k in ("rope_parameters", "rope_scaling") if top.has(k)), None)

    def holder(key: str) -> Fields:
        return own if own is not None and own.has(key) else top

    theta = holder("rope_theta").positive("rope_theta")
    at = holder("partial_rotary_factor")
    fraction = at.positive("partial_rotary_factor") if at.has("partial_rotary_factor") else 1.0
    dims = int(head_dim * fraction)
    if fraction > 1 or dims < 2 or dims % 2:
        raise at.error("partial_rotary_factor", fraction, f"a share of {head_dim} that is even and not zero")
    kind = None if own is None else own.get("rope_type" if own.has("rope_type") else "type")
    if own is None or kind == "default":
        return RopeSpec(dims, theta, context, 1.0, None, None)
    if kind not in ("longrope", "su", "yarn"):
        raise own.error("rope_type", kind, "'longrope', 'su', 'yarn' or 'default'")
    original = holder("original_max_position_embeddings").count(
        "original_max_position_embeddings", 2, MAX_TOKENS
    )
    own.absent(("short_mscale", "long_mscale"))
    own.only("factor", context / original, context // original)
    return RopeSpec(
        dims=dims,
        theta=theta,
        original_context=original,
        attention_factor=_attention_factor(own, str(kind), context / original, original),
        short_factor=own.positives("short_factor", dims // 2),
        long_factor=own.positives("long_factor", dims // 2),
    )


def _attention_factor(own: Fields, kind: str, scale: float, original: int) -> float:
    """Source: `_compute_longrope_parameters` (transformers) and llama.cpp's conversion/phi.py for "yarn"."""
    if own.has("attention_factor"):
        return own.positive("attention_factor")
    if scale <= 1:
        return 1.0
    if kind == "yarn":
        return 0.1 * math.log(scale) + 1.0
    return math.sqrt(1 + math.log(scale) / math.log(original))


def _lora(top: Fields, name: str) -> LoraSpec:
    own = top.fields(f"{name}_lora")
    return LoraSpec(own.count("r", 1, MAX_RANK), own.positive("lora_alpha"))


def _vision(own: Fields) -> VisionSpec:
    """Defaults: SigLIP so400m patch14 448, which the published model code carries as constants."""
    spec = VisionSpec(
        d_model=own.count("hidden_size", 1, MAX_WIDTH, default=1152),
        d_ff=own.count("intermediate_size", 1, MAX_WIDTH, default=4304),
        n_layers=own.count("num_hidden_layers", 1, MAX_LAYERS, default=27),
        n_heads=own.count("num_attention_heads", 1, MAX_WIDTH, default=16),
        n_channels=own.count("num_channels", 1, 16, default=3),
        image_size=own.count("image_size", 1, 1 << 14, default=448),
        patch_size=own.count("patch_size", 1, 1 << 14, default=14),
        norm_eps=own.positive("layer_norm_eps", default=1e-6),
        feature_layer=own.count("feature_layer", -MAX_LAYERS, -1, default=-2),
    )
    own.only("hidden_act", "gelu_pytorch_tanh")
    if spec.d_model % spec.n_heads:
        raise own.error("num_attention_heads", spec.n_heads, f"a divisor of {spec.d_model}")
    if spec.n_used_layers < 1:
        raise own.error("feature_layer", spec.feature_layer, f"-{spec.n_layers} to -1")
    if spec.image_size % spec.patch_size:
        raise own.error("image_size", spec.image_size, f"a multiple of patch_size ({spec.patch_size})")
    return spec


def _original_vision(top: Fields) -> VisionSpec:
    if top.has("img_processor"):
        return _vision(top.fields("img_processor"))
    return _vision(Fields({}, top.where))


def _native_vision(top: Fields) -> VisionSpec:
    return _vision(top.fields("vision_config"))


def _original_audio(top: Fields) -> AudioSpec:
    own = top.fields("audio_processor").fields("config")
    own.only("input_layer", "nemo_conv")
    for key in ("bias_in_glu", "causal"):
        own.only(key, True)
    own.only("batch_norm", False)
    bias = own.fields("relative_attention_bias_args")
    bias.only("type", "t5")
    bias.only("t5_bias_symmetric", False)
    d_model = own.count("attention_dim", 1, MAX_WIDTH)
    own.only("depthwise_seperable_out_channel", d_model)  # the published file's own spelling
    return _audio(
        own,
        d_model,
        own.count("linear_units", 1, MAX_WIDTH),
        own.count("attention_heads", 1, MAX_WIDTH),
        own.fields("nemo_conv_settings").count("conv_channels", 1, MAX_WIDTH),
        bias.count("t5_bias_max_distance", 1, 1 << 20),
    )


def _native_audio(top: Fields) -> AudioSpec:
    """Defaults are those of transformers' Phi4MultimodalAudioConfig: a saved file may leave them out."""
    own = top.fields("audio_config")
    own.only("bias_symmetric", False)
    d_model = own.count("hidden_size", 1, MAX_WIDTH, default=1024)
    own.only("depthwise_separable_out_channel", d_model)
    return _audio(
        own,
        d_model,
        own.count("intermediate_size", 1, MAX_WIDTH, default=1536),
        own.count("num_attention_heads", 1, MAX_WIDTH, default=16),
        own.count("nemo_conv_channels", 1, MAX_WIDTH, default=1024),
        own.count("bias_max_distance", 1, 1 << 20, default=1000),
    )


def _audio(own: Fields, d_model: int, d_ff: int, n_heads: int, d_conv: int, distance: int) -> AudioSpec:
    """What both spellings have under the same name."""
    own.only("ext_pw_out_channel", d_model)
    own.only("ext_pw_kernel_size", 1)
    own.only("depthwise_multiplier", 1)
    own.only("time_reduction", 8)
    if d_model % n_heads:
        raise own.error("num_attention_heads", n_heads, f"a divisor of {d_model}")
    return AudioSpec(
        d_model=d_model,
        d_ff=d_ff,
        n_blocks=own.count("num_blocks", 1, MAX_LAYERS, default=24),
        n_heads=n_heads,
        n_mels=own.count("input_size", 8, 4096, default=80),
        d_conv=d_conv,
        kernel=own.count("kernel_size", 1, 1024, default=3),
        max_distance=distance,
    )
