# SPDX-License-Identifier: Apache-2.0
"""Text models through onnxruntime-genai, as converted, against transformers and our own runtime."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from pocketphi import convert as converter
from pocketphi.runtime import bundle as bundles
from pocketphi.runtime.engine import Model

from .. import tiny
from ..conftest import Converted
from ..golden import cases
from ..tiny_files import read_safetensors, write_safetensors
from . import client

pytestmark = client.needs_genai

TEXT_MEMBERS = [m for m in tiny.MEMBERS if m != "phi4-multimodal"]
REREAD = 4097  # tokens; when genai's phi3 reads a sequence again, whatever the model's original context
TEXTS = [
    "Hello, world! Some numbers: 12345, 3.14.",
    "<|user|>How many legs does a spider have?<|end|><|assistant|>",
    "<|system|>Be brief.<|end|><|user|> two  spaces\n\nand lines <|end|><|assistant|>",
    "naïve façade, Straße, ¿qué?",
]


def text_only(out: Path, original_context: int = 1024, **changes: Any) -> Path:
    """phi4-nano's decoder alone, as a checkpoint of type `phi3`."""
    out.mkdir()
    tensors = read_safetensors(tiny.NANO / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if "embed_tokens_extend" not in name}
    write_safetensors(out / "model.safetensors", kept)
    config = json.loads((tiny.NANO / "config.json").read_text("utf-8"))
    rope = config.pop("rope_parameters")
    del config["audio_config"], config["vision_config"]
    config |= {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "original_max_position_embeddings": original_context,
        "partial_rotary_factor": rope["partial_rotary_factor"],
        "rope_scaling": {"type": "longrope", **{k: rope[k] for k in ("long_factor", "short_factor")}},
        "rope_theta": rope["rope_theta"],
        **changes,
    }
    (out / "config.json").write_text(json.dumps(config), "utf-8")
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny.NANO / name, out)
    return out


@pytest.fixture(scope="module")
def nano_text(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`nano_text(onnx_quant, original_context)`: a model directory with an ONNX backbone."""
    root, made = tmp_path_factory.mktemp("text"), {}

    def get(onnx_quant: str, original_context: int = 1024) -> Path:
        key = f"{onnx_quant}-{original_context}"
        if key not in made:
            checkpoint = text_only(root / f"from-{key}", original_context)
            made[key] = root / key
            options = converter.Options(name="phi4-nano-text", backbone="onnx", onnx_quant=onnx_quant)
            converter.convert(checkpoint, made[key], options)
        return made[key]

    return get


@pytest.mark.parametrize("member", TEXT_MEMBERS)
def test_greedy_tokens_of_every_member(member: str, converted: Converted) -> None:
    """As transformers; but for a crossing of 256 tokens, which genai does not know: see test_limits.py."""
    directory = converted(member, "F32", backbone="onnx")
    config = json.loads((directory / "genai_config.json").read_text("utf-8"))
    stop = set(config["model"]["eos_token_id"])
    context = bundles.load(directory).text.rope.original_context or 1 << 30
    asked = [
        case
        for case in cases.load(member)
        if len(case.greedy) and (len(case.ids) > context or len(case.ids) + len(case.greedy) <= context)
    ]
    jobs = [{"kind": "text", "ids": case.ids.tolist(), "new": len(case.greedy)} for case in asked]
    assert len(jobs) >= 2
    for case, tokens in zip(asked, client.ask(directory, jobs), strict=True):
        want = case.greedy.tolist()
        last = next((n for n, token in enumerate(want) if token in stop), len(want))
        assert tokens == want[: last + 1], case.name


def test_ids_and_chat_template(nano_text: Callable[..., Path]) -> None:
    directory = nano_text("int4")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Again."},
    ]
    jobs = [{"kind": "ids"}, {"kind": "template", "messages": messages}]
    ids, rendered = client.ask(directory, jobs)
    assert ids == {"type": "phi3", "stop": [2848, 2853], "bos": 2848, "pad": 2848}
    assert rendered == (
        "<|system|>Be brief.<|end|><|user|>Hello!<|end|>"
        "<|assistant|>Hi.<|end|><|user|>Again.<|end|><|assistant|>"
    )


@pytest.mark.parametrize("member", ["phi4-mini", "phi4-14b"])
def test_its_tokenizer_reads_as_ours(member: str, converted: Converted) -> None:
    directory = converted(member, "F32", backbone="onnx")
    ours = Tokenizer.from_file(str(directory / "tokenizer.json"))
    (found,) = client.ask(directory, [{"kind": "encode", "texts": TEXTS}])
    assert found == [ours.encode(text, add_special_tokens=False).ids for text in TEXTS]


@pytest.mark.parametrize("onnx_quant", ["fp32", "int4"])
def test_answers_are_our_own(onnx_quant: str, nano_text: Callable[..., Path]) -> None:
    """Token for token what our runtime answers over the same directory, and the reference at fp32."""
    directory = nano_text(onnx_quant)
    items = [i for i in client.ITEMS if i["mode"] == "text"]
    texts = [i["prompt"] for i in items]
    (prompts,) = client.ask(directory, [{"kind": "encode", "texts": texts}])
    jobs = [{"kind": "text", "ids": prompt, "new": 64} for prompt in prompts]
    found = client.ask(directory, jobs)
    with Model(directory) as model:
        ours = [list(model.complete(prompt, max_tokens=64).token_ids) for prompt in texts]
    assert found == ours
    if onnx_quant == "fp32":
        assert found == [i["output_ids"] for i in items]


@pytest.mark.parametrize("adapter", ["vision", "speech"])
def test_adapters(adapter: str, converted: Converted) -> None:
    """Of the multimodal directory's model.onnx, which genai opens as a text model when told to."""
    directory = converted("phi4-nano", "F32", lora_quant="F32", backbone="both")
    overlay = {
        "model": {"type": "phi3", "decoder": {"filename": "model.onnx"}, "embedding": {"filename": ""}}
    }
    (case,) = (c for c in cases.load("phi4-nano") if c.name == f"{adapter}-text")
    job = {"kind": "text", "ids": case.ids.tolist(), "new": len(case.greedy)}
    loaded = job | {"adapter": [str(directory / f"adapter-{adapter}.onnx_adapter"), adapter]}
    jobs = [loaded, loaded | {"logits": True}, job | {"logits": True}]
    tokens, adapted, plain = client.ask(directory, jobs, overlay)
    want = case.greedy.tolist()
    last = next((n for n, token in enumerate(want) if token in (2848, 2853)), len(want))
    assert tokens == want[: last + 1]
    assert abs(np.array(adapted) - case.logits).max() <= case.bound
    assert abs(np.array(plain) - case.logits).max() > 100 * case.bound


def test_a_crossing_at_4097_is_read_again(nano_text: Callable[..., Path]) -> None:
    """The family's original context. A fresh read of the whole sequence is the truth that needs no cache."""
    directory = nano_text("fp32", 4096)
    prompt = [300 + n * 7 % 2000 for n in range(REREAD - 4)]
    job = {"kind": "text", "ids": prompt, "new": 8, "search": {"min_length": REREAD + 20}}  # no stop token
    (crossed,) = client.ask(directory, [job])
    (fresh,) = client.ask(directory, [job | {"ids": prompt + crossed[:5], "new": 3}])
    assert crossed[5:] == fresh
