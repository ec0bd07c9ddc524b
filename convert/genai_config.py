# SPDX-License-Identifier: Apache-2.0
"""The JSON files by which onnxruntime-genai opens a model directory. Pure.

Source: onnxruntime-genai's src/config.cpp; onnxruntime-extensions' shared/api (processors, tokenizers).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..runtime.spec import TextSpec
from .vocabulary import Vocabulary

CONFIG, TOKENIZER_CONFIG = "genai_config.json", "tokenizer_config.json"
VISION_PROCESSOR, SPEECH_PROCESSOR = "vision_processor.json", "speech_processor.json"
EMBEDDING, DECODER = "genai-embedding.onnx", "genai-decoder.onnx"  # of the multimodal family
VISION, SPEECH = "genai-vision.onnx", "genai-speech.onnx"
N_FLAGS = (
    2  # columns behind each row of embeddings: 1 in the first for a picture's, in the second for sound's
)
MAX_LENGTH = 4096  # tokens, the default: genai reserves the whole KV cache at the start

_CROP = 448  # pixels
_TOKENIZERS = frozenset(  # those of transformers that genai takes for BPE, without "Fast"
    {
        "CodeGenTokenizer",
        "GPT2Tokenizer",
        "GPTNeoXTokenizer",
        "GemmaTokenizer",
        "LlamaTokenizer",
        "Phi3Tokenizer",
        "PreTrainedTokenizer",
        "Qwen2Tokenizer",
    }
)


def genai_config(
    text: TextSpec, vocabulary: Vocabulary, stop_ids: Sequence[int], *, multimodal: bool
) -> bytes:
    """genai_config.json: type `phi3` over model.onnx, or `phi4mm` over the genai-*.onnx graphs."""
    cache = {part: f"past_key_values.%d.{part}" for part in ("key", "value")}
    present = {part: f"present.%d.{part}" for part in ("key", "value")}
    decoder: dict[str, Any] = {
        "filename": "model.onnx",
        "head_size": text.head_dim,
        "hidden_size": text.d_model,
        "inputs": {
            "attention_mask": "attention_mask",
            "input_ids": "input_ids",
            "past_key_names": cache["key"],
            "past_value_names": cache["value"],
        },
        "num_attention_heads": text.n_heads,
        "num_hidden_layers": text.n_layers,
        "num_key_value_heads": text.n_kv_heads,
        "outputs": {
            "logits": "logits",
            "present_key_names": present["key"],
            "present_value_names": present["value"],
        },
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
    }
    end = stop_ids[0]
    model: dict[str, Any] = {
        "bos_token_id": end if vocabulary.bos is None else vocabulary.bos,
        "context_length": text.context_length,
        "decoder": decoder,
        "eos_token_id": list(stop_ids),
        "pad_token_id": end if vocabulary.pad is None else vocabulary.pad,
        "type": "phi3",
        "vocab_size": text.vocab_size,
    }
    for key, token in (("bot_token_id", "<|tool_call|>"), ("eot_token_id", "<|/tool_call|>")):
        if token in vocabulary.added:
            model[key] = vocabulary.added[token]
    if multimodal:
        _multimodal(model, text)
    search = {
        "do_sample": False,
        "early_stopping": True,
        "length_penalty": 1.0,
        "max_length": min(text.context_length, MAX_LENGTH),
        "min_length": 0,
        "no_repeat_ngram_size": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
    }
    return _json({"model": model, "search": search})


def _multimodal(model: dict[str, Any], text: TextSpec) -> None:
    """Turn a `phi3` configuration into `phi4mm`."""
    decoder = model["decoder"]
    decoder["filename"] = DECODER
    decoder["hidden_size"] = text.d_model + N_FLAGS
    decoder["num_hidden_layers"] = text.n_layers + 1
    decoder["inputs"]["inputs_embeds"] = "inputs_embeds"
    del decoder["inputs"]["input_ids"]
    model["type"] = "phi4mm"
    model["embedding"] = {
        "filename": EMBEDDING,
        "inputs": _same("input_ids", "image_features", "audio_features"),
        "outputs": _same("inputs_embeds"),
    }
    model["vision"] = {
        "config_filename": VISION_PROCESSOR,
        "filename": VISION,
        "inputs": _same("pixel_values", "image_sizes") | {"attention_mask": "image_attention_mask"},
        "outputs": _same("image_features"),
    }
    model["speech"] = {
        "config_filename": SPEECH_PROCESSOR,
        "filename": SPEECH,
        "inputs": _same("audio_embeds", "audio_sizes", "audio_projection_mode")
        | {"attention_mask": "audio_attention_mask"},
        "outputs": _same("audio_features"),
    }


def tokenizer_config(
    vocabulary: Vocabulary, checkpoints: Mapping[str, Any], chat_template: str | None, context: int
) -> bytes:
    """tokenizer_config.json: what genai reads of the checkpoint's own, in forms that it can read."""
    own = checkpoints.get("tokenizer_class")
    name = own if isinstance(own, str) and own.removesuffix("Fast") in _TOKENIZERS else None
    default = "LlamaTokenizer" if vocabulary.model == "llama" else "GPT2Tokenizer"
    made: dict[str, Any] = {
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": False,
        "chat_template": chat_template or "",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "tokenizer_class": name or default,
    }
    for key in ("bos", "eos", "unk", "pad"):
        token = getattr(vocabulary, key)
        if token is not None:
            made[f"{key}_token"] = vocabulary.tokens[token]
    return _json(made)


def vision_processor(max_crops: int) -> bytes:
    """How genai cuts a picture: `dynamic_hd` crops at most, of 448 pixels."""
    return _json(
        {
            "processor": {
                "name": "phi_4_vision_processor",
                "output_aligner": "phi4-vision-aligner",
                "transforms": [
                    _operation("decode_image", "DecodeImage", {"color_space": "RGB"}),
                    _operation(
                        "phi4_vision_dynamic_preprocess",
                        "Phi4VisionDynamicPreprocess",
                        {"dyhd_base_resolution": _CROP, "dynamic_hd": max_crops},
                    ),
                    _operation("rescale", "Rescale", inputs=[":0"]),
                    _operation("normalize", "Normalize", {"mean": [0.5] * 3, "std": [0.5] * 3}),
                    _operation(
                        "phi4_vision_processor",
                        "Phi4VisionProcessor",
                        {"dyhd_base_resolution": _CROP, "interpolation": "CUBIC"},
                        inputs=[":0", "phi4_vision_dynamic_preprocess:1"],
                    ),
                ],
            }
        }
    )


def speech_processor() -> bytes:
    """How genai makes log-mel features of a recording: of 16 kHz, or of 8 kHz where it has so few."""
    attributes: dict[str, Any] = {"audio_compression_rate": 8}
    for rate, (window, hop) in {"": (400, 160), "_8k": (200, 80)}.items():
        attributes |= {
            f"logmel{rate}/chunk_size": 30,
            f"logmel{rate}/feature_first": 0,
            f"logmel{rate}/hop_length": hop,
            f"logmel{rate}/n_fft": 512,
            f"logmel{rate}/n_mel": 80,
            f"logmel{rate}/no_padding": 1,
            f"stft_normal{rate}/frame_length": window,
            f"stft_normal{rate}/hop_length": hop,
            f"stft_normal{rate}/n_fft": 512 if rate == "" else 256,
            f"stft_normal{rate}/win_fn": "hamming",
        }
    return _json(
        {
            "feature_extraction": {
                "output_aligner": "phi4-audio-aligner",
                "sequence": [
                    _operation("audio_decoder", "AudioDecoderEx", {"target_sample_rates": [8000, 16000]}),
                    _operation("phi_4_audio_embed", "Phi4AudioEmbed", attributes),
                ],
            }
        }
    )


def _operation(
    name: str, kind: str, attributes: Mapping[str, Any] | None = None, inputs: Sequence[str] = ()
) -> dict[str, Any]:
    made: dict[str, Any] = {"name": name, "type": kind}
    if attributes:
        made["attrs"] = dict(attributes)
    if inputs:
        made["inputs"] = list(inputs)
    return {"operation": made}


def _same(*names: str) -> dict[str, str]:
    """Names of the configuration that the graphs have as well."""
    return {name: name for name in names}


def _json(value: Mapping[str, Any]) -> bytes:
    """Sorted and readable; ASCII, for readers that know nothing else."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode("ascii")
