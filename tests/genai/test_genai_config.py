# SPDX-License-Identifier: Apache-2.0
"""The JSON files for onnxruntime-genai: names and numbers, and forms that its readers stand."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from pocketphi.convert import genai_config as configs
from pocketphi.convert.vocabulary import Vocabulary
from pocketphi.runtime.spec import RopeSpec, TextSpec

from .. import tiny

TEXT = TextSpec(
    n_layers=4,
    n_heads=4,
    n_kv_heads=2,
    d_model=256,
    d_ff=768,
    vocab_size=4096,
    head_dim=64,
    rms_eps=1e-5,
    tied_head=True,
    context_length=8192,
    rope=RopeSpec(48, 10000.0, 1024, 1.0, None, None),
)
VOCABULARY = Vocabulary(
    model="gpt2",
    pre="gpt-4o",
    tokens=["a", "b", "<|endoftext|>", "<|end|>", "<|tool_call|>"],
    types=[],
    merges=[],
    scores=None,
    bos=2,
    eos=2,
    unk=2,
    pad=2,
    add_bos=False,
    chat_template=None,
    added={"<|endoftext|>": 2, "<|end|>": 3, "<|tool_call|>": 4},
)


def made(multimodal: bool = False, vocabulary: Vocabulary = VOCABULARY, **changes: Any) -> Any:
    text = dataclasses.replace(TEXT, **changes)
    return json.loads(configs.genai_config(text, vocabulary, (3, 2), multimodal=multimodal))


def tokenizer(
    own: dict[str, Any], template: str | None = "{}", vocabulary: Vocabulary = VOCABULARY
) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(configs.tokenizer_config(vocabulary, own, template, 8192))
    return found


def test_text() -> None:
    found = made()
    model, decoder = found["model"], found["model"]["decoder"]
    assert (model["type"], decoder["filename"]) == ("phi3", "model.onnx")
    assert (decoder["hidden_size"], decoder["head_size"], decoder["num_hidden_layers"]) == (256, 64, 4)
    assert (decoder["num_attention_heads"], decoder["num_key_value_heads"]) == (4, 2)
    assert (model["eos_token_id"], model["bos_token_id"], model["pad_token_id"]) == ([3, 2], 2, 2)
    assert (model["bot_token_id"], model["context_length"], model["vocab_size"]) == (4, 8192, 4096)
    assert "eot_token_id" not in model
    assert not {"vision", "speech", "embedding"} & model.keys()
    assert not found["search"]["do_sample"]
    assert found["search"]["past_present_share_buffer"]


def test_the_cache_that_is_reserved_is_not_the_whole_context() -> None:
    """genai takes memory for max_length tokens at the start: 131,072 of Phi-4-mini's are 34 GB."""
    assert made()["search"]["max_length"] == 4096
    assert made(context_length=1000)["search"]["max_length"] == 1000


def test_ids_that_a_vocabulary_lacks() -> None:
    model = made(vocabulary=dataclasses.replace(VOCABULARY, bos=None, pad=None, added={}))["model"]
    assert (model["bos_token_id"], model["pad_token_id"]) == (3, 3)
    assert "bot_token_id" not in model


def test_multimodal() -> None:
    """One layer more, for what is remembered, and two columns more, for what a row is of."""
    model = made(multimodal=True)["model"]
    decoder = model["decoder"]
    assert model["type"] == "phi4mm"
    assert (decoder["hidden_size"], decoder["num_hidden_layers"]) == (258, 5)
    assert "input_ids" not in decoder["inputs"]
    files = {name: model[name]["filename"] for name in ("decoder", "embedding", "vision", "speech")}
    assert files == {name: f"genai-{name}.onnx" for name in files}
    assert model["vision"]["config_filename"] == "vision_processor.json"
    assert model["speech"]["config_filename"] == "speech_processor.json"
    # genai would load them and then not use them: the decoder chooses itself.
    assert "adapter_filename" not in model["vision"]


@pytest.mark.parametrize("multimodal", [False, True])
def test_the_same_bytes_every_time(multimodal: bool) -> None:
    data = configs.genai_config(TEXT, VOCABULARY, (3, 2), multimodal=multimodal)
    assert data == configs.genai_config(TEXT, VOCABULARY, (3, 2), multimodal=multimodal)
    assert data.decode("ascii") == json.dumps(json.loads(data), indent=2, sort_keys=True) + "\n"


@pytest.mark.parametrize(
    ("own", "kind", "want"),
    [
        ("GPT2TokenizerFast", "gpt2", "GPT2TokenizerFast"),
        ("LlamaTokenizer", "llama", "LlamaTokenizer"),
        ("TokenizersBackend", "gpt2", "GPT2Tokenizer"),
        ("SomethingNew", "llama", "LlamaTokenizer"),
        (None, "gpt2", "GPT2Tokenizer"),
        (7, "gpt2", "GPT2Tokenizer"),
    ],
)
def test_a_tokenizer_class_that_genai_knows(own: Any, kind: Any, want: str) -> None:
    found = tokenizer({"tokenizer_class": own}, vocabulary=dataclasses.replace(VOCABULARY, model=kind))
    assert found["tokenizer_class"] == want


def test_only_what_genai_reads_and_as_it_reads_it() -> None:
    """It calls for text where a checkpoint may have a list, or an object, and ends the process otherwise."""
    own = {"chat_template": [{"name": "default"}], "bos_token": {"content": "x"}, "added_tokens_decoder": 3}
    found = tokenizer(own, "{{ messages }}")
    assert found == {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<|endoftext|>",
        "chat_template": "{{ messages }}",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "model_max_length": 8192,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": "<|endoftext|>",
    }
    assert tokenizer({}, None)["chat_template"] == ""


def test_processors() -> None:
    """Numbers of the published processors."""
    published = json.loads((tiny.NANO / "processor_config.json").read_text("utf-8"))
    vision = json.loads(configs.vision_processor(36))["processor"]
    steps = {t["operation"]["type"]: t["operation"].get("attrs", {}) for t in vision["transforms"]}
    assert steps["Phi4VisionDynamicPreprocess"]["dynamic_hd"] == published["image_processor"]["dynamic_hd"]
    assert steps["Normalize"]["mean"] == published["image_processor"]["image_mean"]
    assert steps["Normalize"]["std"] == published["image_processor"]["image_std"]
    speech = json.loads(configs.speech_processor())["feature_extraction"]["sequence"]
    features, audio = speech[1]["operation"]["attrs"], published["audio_processor"]
    assert features["audio_compression_rate"] == audio["audio_compression_rate"]
    assert features["stft_normal/frame_length"] == audio["win_length"]
    assert features["stft_normal/hop_length"] == features["logmel/hop_length"] == audio["hop_length"]
    assert features["stft_normal/n_fft"] == audio["n_fft"]
    assert features["logmel/n_mel"] == audio["feature_size"]
    assert speech[0]["operation"]["attrs"]["target_sample_rates"] == [8000, audio["sampling_rate"]]
