# SPDX-License-Identifier: Apache-2.0
"""`pocketphi info` as a user runs it: what a directory has, and what memory each backbone and mode needs."""

from __future__ import annotations

import json
from pathlib import Path

from pocketphi.runtime import bundle as bundles
from pocketphi.runtime import ggml_plugin, onnx_kernels, ram_model

from .conftest import Converted
from .test_cli import call, failed


def test_the_memory_of_both_backbones_for_programs(env: dict[str, str], exact_both: Path) -> None:
    code, out, err = call(env, "info", "-m", exact_both, "--json")
    assert (code, err) == (0, "")
    found, bundle = json.loads(out), bundles.load(exact_both)
    assert set(found["memory"]) == {"gguf", "onnx"}
    for engine, kernels in (("gguf", ggml_plugin.load()), ("onnx", onnx_kernels.load())):
        packed = kernels.active  # type: ignore[attr-defined]
        expected = ram_model.overview(bundle, engine, packed=packed)  # type: ignore[arg-type]
        assert list(expected["language"]) == [1024, 4096]  # 16,384 are more than phi4-nano takes
        assert found["memory"][engine] == {m: {str(n): b for n, b in e.items()} for m, e in expected.items()}
    assert found["onnx"]["lora_quant"] == "fp32"
    assert "active" in found["onnx_kernels"]


def test_the_same_for_people(env: dict[str, str], exact_both: Path) -> None:
    code, out, err = call(env, "info", exact_both)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert "backbones       GGUF and ONNX" in lines
    assert "ONNX backbone   down fp32, head fp32, linear fp32, qkv fp32" in lines
    assert "ONNX adapters   speech, vision: fp32" in lines
    rows = [line.split() for line in lines[lines.index(_table(lines)) + 1 :]]
    modes = ["language", "vision", "speech", "vision_speech"]
    assert [row[:2] for row in rows] == [[engine, mode] for engine in ("GGUF", "ONNX") for mode in modes]
    assert all(row[2] == "1,024:" and row[4] == "MiB" for row in rows)


def test_one_backbone_has_its_rows_alone(env: dict[str, str], nano: Path, converted: Converted) -> None:
    onnx = converted("phi4-nano", "F32", lora_quant="F32", backbone="onnx")
    for directory, name, other in ((nano, "GGUF", "ONNX"), (onnx, "ONNX", "GGUF")):
        _, out, _ = call(env, "info", directory)
        assert f"backbones       {name}\n" in out
        assert not any(line.startswith(f"  {other} ") for line in out.splitlines())
    assert "onnx_kernels" not in json.loads(call(env, "info", nano, "--json")[1])


def test_a_place_without_a_model_is_one_line(env: dict[str, str], tmp_path: Path) -> None:
    code, err = failed(env, "info", "-m", tmp_path)
    assert (code, "has no bundle.json" in err) == (3, True)


def _table(lines: list[str]) -> str:
    return next(line for line in lines if line.startswith("memory needed, estimated"))
