# SPDX-License-Identifier: Apache-2.0
"""`pocketphi plan` as a user runs it: on model directories, checkpoints, and what is neither."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from pocketphi import convert as converter
from pocketphi.convert.recipe import RECIPES
from pocketphi.convert.survey import survey
from pocketphi.runtime import bundle as bundles
from pocketphi.runtime import kernels, ram_model

from . import tiny
from .conftest import Converted
from .test_cli import call, failed

MODES = ["language", "vision", "speech", "vision_speech"]


def plan(env: dict[str, str], *arguments: str | Path) -> Any:
    code, out, err = call(env, "plan", *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_a_model_directory_says_what_each_mode_takes_and_how_fast_it_is(
    env: dict[str, str], nano: Path
) -> None:
    found = plan(env, nano, "--ram", "1G", "--ctx", "512", "--image", "448x448", "--audio", "5")
    assert (found["ram"], found["context"], list(found["modes"])) == (1 << 30, 512, MODES)
    for mode in found["modes"].values():
        parts = (
            mode[n] for n in ("program", "weights", "adapter", "kv", "encoder", "compute", "mapped", "margin")
        )
        assert mode["total"] >= sum(parts)
        assert mode["fits"] is True
    assert found["modes"]["language"]["largest_context"] == 8192
    assert found["modes"]["vision"]["context"] == 768  # 545 tokens of the picture, and the question's
    if kernels.is_available():
        assert found["speed"]["machine"]["int8_gops"] > 0
        assert min(s["write_per_second"] for s in found["speed"]["modes"].values()) > 0


def test_the_flags_it_names_make_it_fit(env: dict[str, str], nano: Path) -> None:
    sizes = ram_model.sizes_of(bundles.load(nano))

    def total(**changes: Any) -> int:
        use = ram_model.Use("vision", **({"n_ctx": 8192, "grown": True} | changes))
        return ram_model.estimate(sizes, use).wanted

    ram = (total() + total(max_crops=1, kv_type="q8_0", n_ctx=512)) // 2
    found = plan(env, nano, "--ram", str(ram), "--ctx", "8192")["modes"]["vision"]
    assert (found["fits"], found["total"]) == (False, total())
    flags = dict(zip(found["flags"][::2], found["flags"][1::2], strict=True))
    names = {"-c": "n_ctx", "--max-crops": "max_crops", "--cache-type": "kv_type"}
    changes = {names[k]: v if k == "--cache-type" else int(v) for k, v in flags.items()}
    assert changes and total(**changes) <= ram
    assert 0 < found["largest_context"] < 8192
    nothing = plan(env, nano, "--ram", "1M")["modes"]["language"]
    assert (nothing["fits"], nothing["flags"], nothing["largest_context"]) == (False, [], 0)


def test_a_checkpoint_gets_every_recipe_and_the_command_of_the_best(env: dict[str, str]) -> None:
    found = plan(env, tiny.NANO, "--ram", "10G")
    assert {row["recipe"] for row in found["recipes"]} == set(RECIPES)
    assert all(row["fits"] and list(row["modes"]) == MODES for row in found["recipes"])
    words = shlex.split(found["convert"])
    assert words[:3] == ["pocketphi", "convert", str(tiny.NANO)]
    assert words[-6:] == ["--quant", "F16", "--lora-quant", "F16", "--encoders", "fp16"]
    assert plan(env, tiny.NANO, "--ram", "1M")["convert"] is None


def test_the_onnx_backbone_has_a_plan_of_its_own(env: dict[str, str], exact_both: Path) -> None:
    ask = (exact_both, "--ram", "1G", "--ctx", "2048", "--cache-type", "q8_0")
    gguf, onnx = plan(env, *ask)["modes"], plan(env, *ask, "--backbone", "onnx")["modes"]
    assert list(onnx) == MODES
    assert onnx["language"]["kv"] == 4 * ram_model.kv_bytes(bundles.load(exact_both).text, 2048, "f16") // 2
    assert onnx["language"]["kv"] > 3 * gguf["language"]["kv"]  # float32, whatever is asked for
    assert onnx["speech"]["adapter"] == 0 < gguf["speech"]["adapter"]


def test_a_checkpoint_is_planned_for_onnx_too(env: dict[str, str], tmp_path: Path) -> None:
    found = plan(env, tiny.NANO, "--backbone", "onnx", "--ram", "10G")
    assert {row["recipe"] for row in found["recipes"]} == {"int4", "int8", "fp16"}
    assert all(row["fits"] and list(row["modes"]) == MODES for row in found["recipes"])
    words = shlex.split(found["convert"])
    assert words[-8:] == [
        "--backbone", "onnx", "--onnx-quant", "fp16", "--onnx-lora", "fp16", "--encoders", "fp16"
    ]  # fmt: skip
    one = next(c for c in survey(tiny.NANO, "onnx").candidates if (c.recipe, c.encoders) == ("int4", "int8"))
    options = converter.Options(backbone="onnx", encoders="int8")
    made = ram_model.sizes_of(converter.convert(tiny.NANO, tmp_path / "made", options))
    assert (one.engine, dict(one.quant)) == (made.engine, dict(made.quant))
    assert one.backbone == pytest.approx(made.backbone, rel=0.01)
    for name, adapter in made.adapters.items():
        assert (adapter.quant, one.adapter_bytes[name]) == ("fp16", pytest.approx(adapter.n_bytes, rel=0.01))
    code, err = failed(env, "plan", tmp_path / "made", "--backbone", "gguf")
    assert (code, "has no GGUF backbone" in err) == (2, True)


def test_people_get_a_table_and_the_word_estimated(env: dict[str, str], nano: Path) -> None:
    code, out, err = call(env, "plan", nano, "--ram", "60M")
    assert (code, err) == (0, "")
    assert out.startswith("phi4-nano: 60.0 MiB of memory; 4096 tokens, picture 1344×896, clip 30 s")
    for word in ("weights", "adapter", "KV", "encoder", "program", "margin", "peak RSS"):
        assert word in out.splitlines()[1]
    assert out.splitlines()[1].startswith("MiB ")
    assert "language: nothing fits" in out
    assert "estimated speed" in out or "no speed: " in out


def test_a_surveyed_size_is_near_what_convert_writes(converted: Converted) -> None:
    """At full size, encoders are within 2 %; phi4-nano's graphs weigh as much as its small weights."""
    made = ram_model.sizes_of(
        bundles.load(converted("phi4-nano", "Q8_0", lora_quant="Q8_0", encoders="int8"))
    )
    found = survey(tiny.NANO)
    one = next(c for c in found.candidates if (c.recipe, c.lora_quant) == ("Q8_0", "Q8_0"))
    planned = converter.plan(tiny.NANO, converter.Options("Q8_0", "Q8_0", "int8"))
    assert one.disk == planned.total_bytes
    assert found.tokenizer == made.tokenizer
    assert dict(one.quant) == dict(made.quant)
    assert made.backbone - planned.metadata_bytes <= one.backbone <= made.backbone
    assert {n: b <= made.adapters[n].n_bytes < b + 65536 for n, b in one.adapter_bytes.items()} == {
        "vision": True, "speech": True
    }  # fmt: skip
    assert list(one.encoder_bytes) == ["vision", "speech"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ram", "much"], "--ram is 'much', expected a size such as 8G, 7.5GiB, 512M or 8000000000"),
        (["--image", "wide"], "--image is 'wide', expected WxH"),
        (["--image", "0x5"], "--image is '0x5', expected WxH"),
        (["--image", "99999x99999"], "at most 100,000,000 pixels"),
        (["--image", "90000x10"], "--image: 90000 × 10 pixels is too long and thin"),
        (["--audio", "0"], "--audio is 0 seconds, expected 0.025 to 14400"),
        (["--audio", "nan"], "--audio is nan seconds"),
        (["--ctx", "8193"], "context is 8193 tokens, this model takes 1 to 8192"),
        (["--cache-type", "q2"], "--cache-type is 'q2', expected one of f32, f16, q8_0, q4_0"),
        (["--max-crops", "37"], "--max-crops is 37, expected 1 to 36"),
        (["--threads", "0"], "threads is 0, expected 1 to 512"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_what_it_cannot_plan_for_is_one_line(
    arguments: list[str], said: str, env: dict[str, str], nano: Path
) -> None:
    code, err = failed(env, "plan", nano, *arguments)
    assert code == 2
    assert said in err


def test_a_place_that_holds_no_model_is_one_line(env: dict[str, str], tmp_path: Path) -> None:
    assert failed(env, "plan", tmp_path / "gone")[0] == 3
    assert failed(env, "plan", tmp_path)[0] == 5
