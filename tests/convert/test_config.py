# SPDX-License-Identifier: Apache-2.0
"""config.json: the shapes it gives for each member, both spellings of rope, and every value it refuses."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest

from pocketphi.convert.config import LoraSpec, read_config
from pocketphi.runtime.errors import CheckpointError

from .. import tiny
from ..tiny import NANO

# Sizes of the published models; everything else is as in tests/tiny.py.
MINI: dict[str, Any] = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "vocab_size": 200064,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_scaling": {"type": "longrope", "long_factor": [2.0] * 48, "short_factor": [1] * 48},
}


def mini(**changes: Any) -> dict[str, Any]:
    """Phi-4-mini's configuration with some keys changed; None removes a key."""
    raw = tiny.config("phi4-mini") | copy.deepcopy(MINI) | changes
    return {k: v for k, v in raw.items() if v is not None}


def multimodal(**changes: Any) -> dict[str, Any]:
    return tiny.config("phi4-multimodal", layout="original") | changes


def native(**changes: Any) -> dict[str, Any]:
    return tiny.config("phi4-multimodal", layout="native") | changes


def test_phi4_mini() -> None:
    config = read_config(mini(), "config.json")
    text = config.text
    assert (config.layout, config.family, config.sliding_window) == ("phi3", "phi3", 262144)
    assert (text.d_model, text.n_layers, text.n_heads, text.n_kv_heads) == (3072, 32, 24, 8)
    assert (text.head_dim, text.d_ff, text.vocab_size, text.tied_head) == (128, 8192, 200064, True)
    assert (text.context_length, text.rms_eps) == (131072, 1e-5)
    assert (text.rope.dims, text.rope.theta, text.rope.original_context) == (96, 10000.0, 4096)
    # sqrt(1 + ln 32 / ln 4096), as transformers' _compute_longrope_parameters gives it
    assert text.rope.attention_factor == pytest.approx(1.1902380714238083, abs=1e-15)
    assert text.rope.short_factor == (1.0,) * 48 and text.rope.long_factor == (2.0,) * 48
    assert config.lora == {} and config.vision is None and config.audio is None


def test_phi4_14b_has_plain_rope() -> None:
    rope = read_config(tiny.config("phi4-14b"), "config.json").text.rope
    assert not rope.is_long_rope and rope.attention_factor == 1.0 and rope.theta == 250000.0


def test_phi35_turns_the_whole_head() -> None:
    text = read_config(tiny.config("phi35-mini"), "config.json").text
    assert text.rope.dims == text.head_dim and not text.tied_head


def test_the_published_vision_tower_is_not_in_the_file() -> None:
    vision = read_config(multimodal(img_processor=None), "config.json").vision
    assert vision is not None
    assert (vision.d_model, vision.d_ff, vision.n_layers, vision.n_positions) == (1152, 4304, 27, 1024)


def test_adapters_of_the_original_layout_are_in_the_file() -> None:
    raw = multimodal(vision_lora={"r": 256, "lora_alpha": 512}, speech_lora={"r": 320, "lora_alpha": 640})
    assert read_config(raw, "c").lora == {"vision": LoraSpec(256, 512.0), "speech": LoraSpec(320, 640.0)}
    assert read_config(native(), "c").lora == {}


def test_both_layouts_of_nano_are_one_model() -> None:
    ours = read_config(json.loads((NANO / "config.json").read_text("utf-8")), "c")
    theirs_raw = json.loads((tiny.GOLDEN / "nano-original" / "config.json").read_text("utf-8"))
    theirs = read_config(theirs_raw, "c")
    assert (ours.text, ours.vision, ours.audio) == (theirs.text, theirs.vision, theirs.audio)


def test_rope_parameters_is_rope_scaling_with_the_rest_inside() -> None:
    old = mini()
    new = mini(rope_theta=None, partial_rotary_factor=None, original_max_position_embeddings=None)
    scaling = new.pop("rope_scaling")
    new["rope_parameters"] = {
        "rope_type": "longrope",
        "rope_theta": old["rope_theta"],
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 4096,
        "long_factor": scaling["long_factor"],
        "short_factor": scaling["short_factor"],
    }
    assert read_config(new, "c").text == read_config(old, "c").text


def test_attention_factor() -> None:
    def factor(**scaling: Any) -> float:
        raw = mini(rope_scaling=MINI["rope_scaling"] | scaling)
        return read_config(raw, "c").text.rope.attention_factor

    assert factor(type="su") == factor(type="longrope")
    assert factor(type="yarn") == pytest.approx(0.1 * math.log(32) + 1)
    assert factor(attention_factor=1.5) == 1.5
    assert factor(factor=32.0) == factor(factor=32) == factor()
    shorter = mini(max_position_embeddings=4096)
    assert read_config(shorter, "c").text.rope.attention_factor == 1.0


def test_as_many_kv_heads_as_heads_when_not_said() -> None:
    assert read_config(mini(num_key_value_heads=None), "c").text.n_kv_heads == 24
    assert read_config(mini() | {"num_key_value_heads": None}, "c").text.n_kv_heads == 24


def test_a_window_that_never_acts_is_fine() -> None:
    assert read_config(mini(sliding_window=None), "c").sliding_window == 0
    assert read_config(mini(sliding_window=0), "c").sliding_window == 0
    assert read_config(mini(sliding_window=131072), "c").sliding_window == 131072


LONG = MINI["rope_scaling"]
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "other type": (mini(model_type="llama"), "model_type"),
    "no type": (mini(model_type=None), "model_type"),
    "other class": (mini(architectures=["LlamaForCausalLM"]), "architectures"),
    "two classes": (mini(architectures=["Phi3ForCausalLM", "X"]), "architectures"),
    "attention bias": (mini(attention_bias=True), "attention_bias"),
    "mlp bias": (mini(mlp_bias=True), "mlp_bias"),
    "head bias": (mini(lm_head_bias=True), "lm_head_bias"),
    "gelu": (mini(hidden_act="gelu"), "hidden_act"),
    "quantized": (mini(quantization_config={"bits": 4}), "quantization_config"),
    "no width": (mini(hidden_size=None), "hidden_size"),
    "width as text": (mini(hidden_size="3072"), "hidden_size"),
    "width as float": (mini(hidden_size=3072.0), "hidden_size"),
    "width true": (mini(hidden_size=True), "hidden_size"),
    "width zero": (mini(hidden_size=0), "hidden_size"),
    "width negative": (mini(hidden_size=-3072), "hidden_size"),
    "width huge": (mini(hidden_size=10**30), "hidden_size"),
    "heads do not divide": (mini(num_attention_heads=25), "num_attention_heads"),
    "kv heads do not divide": (mini(num_key_value_heads=7), "num_key_value_heads"),
    "own head size": (mini(head_dim=64), "head_dim"),
    "no layers": (mini(num_hidden_layers=0), "num_hidden_layers"),
    "513 layers": (mini(num_hidden_layers=513), "num_hidden_layers"),
    "no vocabulary": (mini(vocab_size=0), "vocab_size"),
    "no context": (mini(max_position_embeddings=0), "max_position_embeddings"),
    "eps zero": (mini(rms_norm_eps=0), "rms_norm_eps"),
    "eps nan": (mini(rms_norm_eps=math.nan), "rms_norm_eps"),
    "eps inf": (mini(rms_norm_eps=math.inf), "rms_norm_eps"),
    "eps huge int": (mini(rms_norm_eps=10**400), "rms_norm_eps"),
    "tied as text": (mini(tie_word_embeddings="yes"), "tie_word_embeddings"),
    "active window": (mini(sliding_window=2047), "sliding_window"),
    "theta zero": (mini(rope_theta=0), "rope_theta"),
    "no theta": (mini(rope_theta=None), "rope_theta"),
    "odd rotation": (mini(partial_rotary_factor=0.7578125), "partial_rotary_factor"),
    "more than all": (mini(partial_rotary_factor=1.5), "partial_rotary_factor"),
    "other rope": (mini(rope_scaling=LONG | {"type": "linear"}), "rope_type"),
    "rope as list": (mini(rope_scaling=[1]), "rope_scaling"),
    "no rope type": (mini(rope_scaling={"factor": 2.0}), "rope_type"),
    "no original context": (mini(original_max_position_embeddings=None), "original_max_position"),
    "both spellings": (mini(rope_parameters={"rope_type": "default"}), "rope_scaling"),
    "64 factors": (mini(rope_scaling=LONG | {"long_factor": [1.0] * 64}), "long_factor"),
    "no short": (mini(rope_scaling={"type": "longrope", "long_factor": [1.0] * 48}), "short_factor"),
    "factor nan": (mini(rope_scaling=LONG | {"short_factor": [1.0] * 47 + [math.nan]}), "short_factor[47]"),
    "factor zero": (mini(rope_scaling=LONG | {"short_factor": [0.0] + [1.0] * 47}), "short_factor[0]"),
    "factor negative": (mini(rope_scaling=LONG | {"long_factor": [-1.0] * 48}), "long_factor[0]"),
    "factor as text": (mini(rope_scaling=LONG | {"long_factor": ["1"] * 48}), "long_factor[0]"),
    "mscale": (mini(rope_scaling=LONG | {"long_mscale": 1.2}), "long_mscale"),
    "other factor": (mini(rope_scaling=LONG | {"factor": 4.0}), "factor"),
    "no vision lora": (multimodal(vision_lora=None), "vision_lora"),
    "rank zero": (multimodal(speech_lora={"r": 0, "lora_alpha": 1}), "speech_lora.r"),
    "alpha nan": (multimodal(speech_lora={"r": 4, "lora_alpha": math.nan}), "speech_lora.lora_alpha"),
    "no audio": (multimodal(audio_processor=None), "audio_processor"),
    "no native audio": (native(audio_config=None), "audio_config"),
    "no native vision": (native(vision_config=3), "vision_config"),
    "patches do not divide": (native(vision_config={"image_size": 448, "patch_size": 15}), "image_size"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_file_and_field(case: str) -> None:
    raw, field = REFUSED[case]
    with pytest.raises(CheckpointError) as caught:
        read_config(raw, "some/config.json")
    message = str(caught.value)
    assert message.startswith("some/config.json: ") and field in message and "expected" in message
    assert "\n" not in message and len(message) < 300
