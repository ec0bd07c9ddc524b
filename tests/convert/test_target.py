# SPDX-License-Identifier: Apache-2.0
"""`convert --target phone`: its choices, its directory, and that its README.md's lines run as they stand."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pocketphi.convert import Options, convert, plan, with_target
from pocketphi.convert.phone_readme import README, README_BYTES, readme
from pocketphi.runtime import bundle as bundles
from pocketphi.runtime import ram_model
from pocketphi.runtime.errors import InputError, OutputError

from ..test_cli import call, failed
from ..tiny import NANO
from .test_convert import contents

PHONE = with_target(Options(name="phi4-nano", target="phone"))
ANSWER = "The capital of France is Paris."


@pytest.fixture(scope="module")
def phone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """phi4-nano for phones."""
    return convert(NANO, tmp_path_factory.mktemp("phone") / "phone", PHONE).root


def blocks(text: str, language: str) -> list[str]:
    """The code of a language in Markdown."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def said(program: str, where: Path) -> str:
    """What Python lines print in a process of their own, in a directory."""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=where, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_target_chooses_what_nobody_gave() -> None:
    assert (PHONE.backbone, PHONE.encoders) == ("both", "int4")
    assert (PHONE.recipe, PHONE.lora_quant) == ("Q4_K_M", "Q4_0")
    assert (PHONE.onnx_quant, PHONE.onnx_lora) == ("int4", "int8")
    kept = with_target(Options(recipe="Q8_0", backbone="gguf", target="phone"), {"recipe", "backbone"})
    assert (kept.recipe, kept.backbone, kept.encoders) == ("Q8_0", "gguf", "int4")
    assert with_target(Options(recipe="Q6_K"), {"recipe"}) == Options(recipe="Q6_K")
    for use in (with_target, lambda options: plan(NANO, options)):
        with pytest.raises(InputError, match=r"^--target 'fridge': expected one of phone$"):
            use(Options(target="fridge"))


def test_it_is_smaller_than_the_default_of_each_backbone(phone: Path, tmp_path: Path) -> None:
    size = {f.path: f.size for f in bundles.load(phone).files}
    made = convert(NANO, tmp_path / "default", Options(name="phi4-nano", backbone="both"))
    default = {f.path: f.size for f in made.files}
    assert sum(size.values()) - size.pop(README) < sum(default.values())
    for name in size.keys() & default.keys():
        if name.endswith(".data") or name.startswith("adapter-"):
            assert size[name] <= default[name], name


def test_the_readme_is_one_of_its_files_and_the_same_every_time(phone: Path, tmp_path: Path) -> None:
    bundle = bundles.load(phone)
    entry = next(f for f in bundle.files if f.path == README)
    text = (phone / README).read_bytes()
    assert entry.sha256 == hashlib.sha256(text).hexdigest()
    assert len(text) < README_BYTES
    again = convert(NANO, tmp_path / "again", PHONE)
    assert contents(again.root) == contents(phone)
    assert any(name == README and n == README_BYTES for name, n in plan(NANO, PHONE).other_files.items())


def test_it_may_be_overwritten_and_a_stranger_in_it_is_kept(phone: Path, tmp_path: Path) -> None:
    out = shutil.copytree(phone, tmp_path / "out")
    convert(NANO, out, replace(PHONE, overwrite=True))
    convert(NANO, out, Options(overwrite=True))  # for no target now, and without its README
    assert not (out / README).exists()
    (out / README).write_text("mine", "ascii")
    with pytest.raises(OutputError, match=r"README\.md: no conversion wrote it"):
        convert(NANO, out, replace(PHONE, overwrite=True))


def test_its_hashes_are_those_of_the_files(phone: Path) -> None:
    lines = re.findall(r"^([0-9a-f]{64})  (.+)$", (phone / README).read_text("utf-8"), re.MULTILINE)
    assert {name for _, name in lines} == {p.name for p in phone.iterdir()} - {README, bundles.MANIFEST}
    for digest, name in lines:
        assert hashlib.sha256((phone / name).read_bytes()).hexdigest() == digest, name


def test_its_memory_is_the_models(phone: Path) -> None:
    bundle, text = bundles.load(phone), (phone / README).read_text("utf-8")
    for engine, name in (("gguf", "GGUF"), ("onnx", "ONNX")):
        found = ram_model.overview(bundle, engine, packed=False)  # type: ignore[arg-type]
        assert list(found) == ["language", "vision", "speech", "vision_speech"]
        for sizes in found.values():
            assert " | ".join(f"{n / 1e6:,.0f}" for n in sizes.values()) in text
        assert text.count(f"\n| {name} | ") == 4


def test_the_lines_for_onnxruntime_genai_answer(phone: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    program = blocks((phone / README).read_text("utf-8"), "python")[0]
    assert "import onnxruntime_genai" in program and 'ORT_DISABLE_TELEMETRY"] = "1"' in program
    assert said(program, phone).strip() == ANSWER


def test_its_line_about_a_picture_is_a_call_that_there_is(phone: Path) -> None:
    """phi4-nano lacks the two ids that genai's processor has for media: it says so, and so does README.md."""
    pytest.importorskip("onnxruntime_genai")
    bundle, text = bundles.load(phone), (phone / README).read_text("utf-8")
    program = blocks(text, "python")[0]
    line = next(one for one in program.splitlines() if one.startswith("# answer("))
    picture = NANO.parent / "eval" / "images" / "img-000.png"
    looks = line[2:].replace('"photo.jpg"', repr(str(picture)))
    tried = f"{program}try:\n    {looks}\nexcept RuntimeError as exc:\n    print(exc)\n"
    assert "Number of image tokens does not match" in said(tried, phone)
    assert "200011" in text
    whole = replace(bundle, text=replace(bundle.text, vocab_size=200_064))
    assert "200011" not in readme(whole, "phi4mm")


def test_the_lines_for_llama_cpp_answer(phone: Path) -> None:
    text = (phone / README).read_text("utf-8")
    program = blocks(text, "python")[-1]
    assert "from llama_cpp import Llama" in program
    assert said(program, phone).strip() == ANSWER
    named = {word for line in blocks(text, "sh") for word in line.split() if word.endswith(".gguf")}
    assert named <= {p.name for p in phone.iterdir()} and len(named) == 2


def test_the_adapter_of_its_line_loads_and_changes_the_logits(phone: Path) -> None:
    """`--lora` as llama.cpp's programs load it; what they lack is what the adapter is for."""
    text = (phone / README).read_text("utf-8")
    model, lora = re.search(r"^llama-cli -m (\S+) --lora (\S+)$", text, re.MULTILINE).groups()  # type: ignore[union-attr]
    program = """
import numpy as np
from llama_cpp import Llama
found = []
for lora in (None, LORA):
    llama = Llama(MODEL, lora_path=lora, n_ctx=256, logits_all=True, verbose=False)
    llama.eval([1, 2, 3])
    found.append(np.array(llama.scores[2], copy=True))
print(bool(np.isfinite(found).all()), bool(np.abs(found[0] - found[1]).max() > 1e-3))
""".replace("MODEL", repr(model)).replace("LORA", repr(lora))
    assert said(program, phone).split() == ["True", "True"]


def test_flags_that_are_given_win_over_the_target(env: dict[str, str], tmp_path: Path) -> None:
    ask = ("convert", NANO, "--target", "phone", "--dry-run", "--json")
    code, out, err = call(env, *ask)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["recipe"], found["backbones"], found["encoders"]["type"]) == (
        "Q4_K_M",
        ["gguf", "onnx"],
        "int4",
    )
    # Even where what is given is the default of a conversion for no target.
    code, out, _ = call(env, *ask, "--encoders", "int8", "--quant", "Q8_0", "--backbone", "gguf")
    given = json.loads(out)
    assert (given["recipe"], given["backbones"], given["encoders"]["type"]) == ("Q8_0", ["gguf"], "int8")
    assert any(tensor["type"] == "Q4_0" for tensor in given["tensors"])  # adapters, which nobody chose
    code, err = failed(env, "convert", NANO, "-o", tmp_path / "out", "--target", "tablet")
    assert (code, "--target 'tablet': expected one of phone" in err) == (2, True)
    code, err = failed(
        env, "convert", NANO, "--dry-run", "--target", "phone", "--backbone", "gguf", "--onnx-lora", "fp16"
    )
    assert (code, "--onnx-lora has no meaning with --backbone gguf" in err) == (2, True)


@pytest.mark.parametrize("backbone", ["gguf", "onnx"])
def test_one_backbone_has_its_lines_alone(backbone: str, tmp_path: Path) -> None:
    options = with_target(Options(backbone=backbone, target="phone"), {"backbone"})
    text = (convert(NANO, tmp_path / backbone, options).root / README).read_text("utf-8")
    assert ("llama_cpp" in text) == (backbone == "gguf") == ("onnxruntime_genai" not in text)
    assert "one backbone" not in text


def test_a_text_model_has_neither_routing_nor_media(phone: Path) -> None:
    """Of a family without adapters; the lines of genai's `phi3` go through its tokenizer."""
    bundle = replace(bundles.load(phone), adapters={}, encoders={}, chat_format="phi3.5")
    text = readme(replace(bundle, onnx=replace(bundle.onnx, adapters={})), "phi3")  # type: ignore[type-var]
    assert "adapter" not in text.split("## Prompts")[1].lower()
    assert not re.search(r"--lora|embd", text)
    prompt = json.dumps("<|user|>\nWhat is the capital of France?<|end|>\n<|assistant|>\n")
    assert f"generator.append_tokens(tokenizer.encode({prompt}))" in text
    assert f"appendTokenSequences(tokenizer.encode({prompt}))" in text
    assert f"[tokenizer encode:@{prompt} error:&error]" in text
    assert "MultiModalProcessor" not in text
