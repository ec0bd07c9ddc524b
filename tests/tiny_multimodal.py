# SPDX-License-Identifier: Apache-2.0
"""What only the tiny phi4-multimodal has: encoder tensors, the two name schemes, the two configurations."""

from __future__ import annotations

import re
from typing import Any

Shapes = dict[str, tuple[int, ...]]

LORA = {"vision": (32, 64), "speech": (64, 128)}  # adapter -> (rank, alpha); scale 2 as in the real ones
D_MODEL = 256
IMAGE = "model.embed_tokens_extend.image_embed"
AUDIO = "model.embed_tokens_extend.audio_embed"
IMAGE_TOKEN, AUDIO_TOKEN = 2849, 2850  # phi4-nano's tokenizer

_V, _V_FF, _V_LAYERS = 64, 128, 3  # width, MLP width, layers (the output of the last but one is used)
_A, _A_FF, _A_BLOCKS, _A_HEADS = 64, 96, 2, 4
_BIAS_DISTANCE = 500  # the relative position table has twice as many rows

_LORA_REGEX = {
    "vision": r"layers.*((self_attn\.(qkv_proj|o_proj))|(mlp\.(gate_up|down)_proj))",
    "speech": r"((layers.*self_attn\.(qkv|o)_proj)|(layers.*mlp\.(gate_up|down)_proj))",
}


def _affine(name: str, *weight: int) -> Shapes:
    """A weight and a bias as long as its first axis."""
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def vision_shapes() -> Shapes:
    """The SigLIP tower and its projector under transformers' names."""
    tower = f"{IMAGE}.img_processor"
    found: Shapes = {
        f"{IMAGE}.global_img_feature_extensor": (1, 1, _V),
        f"{IMAGE}.sub_img_feature_extensor": (1, 1, 1, _V),
        f"{tower}.embeddings.position_embedding.weight": (1024, _V),
        f"{tower}.head.probe": (1, 1, _V),
        f"{tower}.head.attention.in_proj_weight": (3 * _V, _V),
        f"{tower}.head.attention.in_proj_bias": (3 * _V,),
        **_affine(f"{tower}.embeddings.patch_embedding", _V, 3, 14, 14),
        **_affine(f"{tower}.head.attention.out_proj", _V, _V),
        **_affine(f"{tower}.head.layernorm", _V),
        **_affine(f"{tower}.head.mlp.fc1", _V_FF, _V),
        **_affine(f"{tower}.head.mlp.fc2", _V, _V_FF),
        **_affine(f"{tower}.post_layernorm", _V),
        **_affine(f"{IMAGE}.img_projection_up", D_MODEL, _V),
        **_affine(f"{IMAGE}.img_projection_down", D_MODEL, D_MODEL),
    }
    for n in range(_V_LAYERS):
        layer = f"{tower}.encoder.layers.{n}"
        for norm in ("layer_norm1", "layer_norm2"):
            found |= _affine(f"{layer}.{norm}", _V)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= _affine(f"{layer}.self_attn.{projection}", _V, _V)
        found |= _affine(f"{layer}.mlp.fc1", _V_FF, _V) | _affine(f"{layer}.mlp.fc2", _V, _V_FF)
    return found


def audio_shapes() -> Shapes:
    """The Conformer and its two projectors under transformers' names."""
    encoder = f"{AUDIO}.encoder"
    found: Shapes = {
        f"{encoder}.encoder_embedding.global_mean": (80,),
        f"{encoder}.encoder_embedding.global_invstd": (80,),
        f"{encoder}.relative_attention_bias_layer.bias_values.weight": (2 * _BIAS_DISTANCE, _A_HEADS),
        **_affine(f"{encoder}.embed.conv.0", _A, 1, 3, 3),
        **_affine(f"{encoder}.embed.conv.2", _A, 1, 3, 3),
        **_affine(f"{encoder}.embed.conv.3", _A, _A, 1, 1),
        **_affine(f"{encoder}.embed.conv.5", _A, 1, 3, 3),
        **_affine(f"{encoder}.embed.conv.6", _A, _A, 1, 1),
        **_affine(f"{encoder}.embed.out", _A, 10 * _A),  # 80 mel bins, halved three times
    }
    for projector in ("speech", "vision_speech"):
        found |= _affine(f"{AUDIO}.up_proj_for_{projector}", D_MODEL, _A)
        found |= _affine(f"{AUDIO}.down_proj_for_{projector}", D_MODEL, D_MODEL)
    for n in range(_A_BLOCKS):
        found |= _conformer_block(f"{encoder}.encoders.{n}")
    return found


def _conformer_block(block: str) -> Shapes:
    found: Shapes = {f"{block}.conv.glu.b1": (1, _A, 1), f"{block}.conv.glu.b2": (1, _A, 1)}
    for side in ("feed_forward_in", "feed_forward_out"):
        found |= _affine(f"{block}.{side}.layer_norm", _A)
        found |= _affine(f"{block}.{side}.gate_up_proj", 2 * _A_FF, _A)
        found |= _affine(f"{block}.{side}.down_proj", _A, _A_FF)
    for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
        found |= _affine(f"{block}.self_attn.{projection}", _A, _A)
    for norm in ("conv.layer_norm", "layer_norm_att", "layer_norm"):
        found |= _affine(f"{block}.{norm}", _A)
    found |= _affine(f"{block}.conv.glu.ext_pw_conv_1d", 2 * _A, _A, 1)
    found |= _affine(f"{block}.conv.dw_sep_conv_1d.dw_conv", _A, 1, 3)
    found |= _affine(f"{block}.conv.dw_sep_conv_1d.pw_conv", _A, _A, 1)
    return found | _affine(f"{block}.conv.ext_pw_conv_1d", _A, _A, 1)


_DECODER_LINEAR = re.compile(r"^(model\.layers\.\d+\.(?:self_attn|mlp)\.\w+_proj)\.weight$")
_AUDIO_NAMES = (  # transformers' -> Microsoft's, inside the audio part
    (re.compile(r"(\.feed_forward_(?:in|out))\.gate_up_proj\."), r"\1.net.0.linear."),
    (re.compile(r"(\.feed_forward_(?:in|out))\.down_proj\."), r"\1.net.2."),
    (re.compile(r"\.self_attn\.([qkv])_proj\."), r".self_attn.linear_\1."),
    (re.compile(r"\.self_attn\.o_proj\."), r".self_attn.linear_out."),
    (re.compile(r"\.up_proj_for_speech\."), r".audio_projection.speech.0."),
    (re.compile(r"\.down_proj_for_speech\."), r".audio_projection.speech.2."),
    (re.compile(r"\.up_proj_for_vision_speech\."), r".audio_projection.vision.0."),
    (re.compile(r"\.down_proj_for_vision_speech\."), r".audio_projection.vision.2."),
)
_IMAGE_NAMES = (
    (re.compile(r"\.global_img_feature_extensor$"), r".glb_GN"),
    (re.compile(r"\.sub_img_feature_extensor$"), r".sub_GN"),
    (re.compile(r"\.img_projection_up\."), r".img_projection.0."),
    (re.compile(r"\.img_projection_down\."), r".img_projection.2."),
)


def original_name(native: str) -> str:
    """Microsoft's key for a tensor that transformers calls `native`."""
    if match := _DECODER_LINEAR.match(native):
        return f"{match[1]}.base_layer.weight"
    rules = _AUDIO_NAMES if native.startswith(AUDIO) else _IMAGE_NAMES if native.startswith(IMAGE) else ()
    for pattern, replacement in rules:
        native = pattern.sub(replacement, native)
    return native


def original_lora_name(peft: str, adapter: str) -> str:
    """The main shards' key of an adapter's tensor: `….lora_A.vision.weight`, without PEFT's prefix."""
    stem = peft.removeprefix("base_model.model.").removesuffix(".weight")
    return f"{stem}.{adapter}.weight"


def native_config(text: dict[str, Any]) -> dict[str, Any]:
    """transformers' `config.json`: rope under `rope_parameters`, encoders in sub-configurations."""
    moved = ("rope_scaling", "rope_theta", "partial_rotary_factor", "torch_dtype")
    dropped = (*moved, "attention_bias", "full_attn_mod", "interpolate_factor", "lm_head_bias", "mlp_bias")
    return {
        **{k: v for k, v in text.items() if k not in dropped},
        "architectures": ["Phi4MultimodalForCausalLM"],
        "model_type": "phi4_multimodal",
        "dtype": text["torch_dtype"],
        "eos_token_id": [2848, 2853],
        "sliding_window": None,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": text["rope_theta"],
            "partial_rotary_factor": text["partial_rotary_factor"],
            "original_max_position_embeddings": text["original_max_position_embeddings"],
            "short_factor": text["rope_scaling"]["short_factor"],
            "long_factor": text["rope_scaling"]["long_factor"],
        },
        "transformers_version": "5.23.0",
        "vision_config": _vision_config(),
        "audio_config": _audio_config(),
    }


def _vision_config() -> dict[str, Any]:
    return {
        "attention_dropout": 0.0,
        "crop_size": 448,
        "feature_layer": -2,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": _V,
        "image_size": 448,
        "image_token_id": IMAGE_TOKEN,
        "intermediate_size": _V_FF,
        "layer_norm_eps": 1e-06,
        "model_type": "phi4_multimodal_vision",
        "num_attention_heads": 4,
        "num_channels": 3,
        "num_hidden_layers": _V_LAYERS,
        "patch_size": 14,
    }


def _audio_config() -> dict[str, Any]:
    return {
        "activation": "swish",
        "audio_token_id": AUDIO_TOKEN,
        "bias_max_distance": _BIAS_DISTANCE,
        "bias_symmetric": False,
        "chunk_size": -1,
        "conv_activation": "swish",
        "conv_glu_type": "swish",
        "depthwise_multiplier": 1,
        "depthwise_separable_out_channel": _A,
        "downsample_rate": 1,
        "dropout_rate": 0.0,
        "ext_pw_out_channel": _A,
        "feature_layer": -2,
        "hidden_size": _A,
        "initializer_range": 0.02,
        "input_size": 80,
        "intermediate_size": _A_FF,
        "kernel_size": 3,
        "left_chunk": 18,
        "model_type": "phi4_multimodal_audio",
        "nemo_activation": "relu",
        "nemo_conv_channels": _A,
        "nemo_final_size": 10,
        "num_attention_heads": _A_HEADS,
        "num_blocks": _A_BLOCKS,
        "time_reduction": 8,
    }


def original_config(text: dict[str, Any]) -> dict[str, Any]:
    """Microsoft's `config.json`; in the published one `img_processor` is null (sizes in its code)."""
    audio = {
        "activation": "swish",
        "activation_checkpointing": {"interval": 1, "module": "transformer", "offload": False},
        "attention_dim": _A,
        "attention_heads": _A_HEADS,
        "batch_norm": False,
        "bias_in_glu": True,
        "causal": True,
        "chunk_size": -1,
        "cnn_layer_norm": True,
        "conv_activation": "swish",
        "conv_glu_type": "swish",
        "depthwise_multiplier": 1,
        "depthwise_seperable_out_channel": _A,  # sic
        "dropout_rate": 0.0,
        "encoder_embedding_config": {"input_size": 80},
        "ext_pw_kernel_size": 1,
        "ext_pw_out_channel": _A,
        "input_layer": "nemo_conv",
        "input_size": 80,
        "kernel_size": 3,
        "left_chunk": 18,
        "linear_units": _A_FF,
        "nemo_conv_settings": {"conv_channels": _A},
        "num_blocks": _A_BLOCKS,
        "relative_attention_bias_args": {"t5_bias_max_distance": _BIAS_DISTANCE, "type": "t5"},
        "time_reduction": 8,
    }
    image_embd = {
        "crop_size": 448,
        "embedding_cls": "tune_image",
        "enable_gradient_checkpointing": True,
        "hd_transform_order": "sub_glb",
        "image_token_compression_cls": "avg_pool_2d",
        "projection_cls": "mlp",
        "use_hd_transform": True,
        "with_learnable_separator": True,
    }
    audio_embd = {
        "compression_rate": 8,
        "downsample_rate": 1,
        "embedding_cls": "audio",
        "enable_gradient_checkpointing": True,
        "projection_cls": "mlp",
        "use_conv_downsample": False,
        "use_qformer": False,
    }
    vision = {k: v for k, v in _vision_config().items() if k not in ("model_type", "image_token_id")}
    return {
        **text,
        "_attn_implementation": "flash_attention_2",
        "architectures": ["Phi4MMForCausalLM"],
        "model_type": "phi4mm",
        "image_token_id": IMAGE_TOKEN,
        "audio_token_id": AUDIO_TOKEN,
        "audio_processor": {"name": "cascades", "config": audio},
        "embd_layer": {
            "audio_embd_layer": audio_embd,
            "embedding_cls": "image_audio",
            "image_embd_layer": image_embd,
        },
        "img_processor": {**vision, "layer_idx": vision.pop("feature_layer")},
        **{
            f"{name}_lora": {"dp": 0.0, "layer": _LORA_REGEX[name], "lora_alpha": alpha, "r": rank}
            for name, (rank, alpha) in LORA.items()
        },
    }
