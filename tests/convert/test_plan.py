# SPDX-License-Identifier: Apache-2.0
"""The plan says what will be written: every tensor, and sizes that come true."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pocketphi.convert import Options, convert, plan
from pocketphi.convert.config import read_config
from pocketphi.convert.mapping import expected, map_tensors
from pocketphi.convert.recipe import RECIPES
from pocketphi.convert.work_plan import Choices, Plan, make_plan
from pocketphi.runtime.errors import InputError
from pocketphi.runtime.gguf_header import read_header

from .. import tiny
from ..tiny import NANO
from .test_config import mini
from .test_mapping import infos


def full_size(recipe: str) -> Plan:
    """Phi-4-mini at its real size, without files."""
    config = read_config(mini(), "config.json")
    tensors = map_tensors(config, infos(expected(config)), {}, Path("checkpoint"))
    sizes = {"tokenizer.json": 13_000_000}
    return make_plan("Phi-4-mini", config, tensors, Choices(RECIPES[recipe], "Q8_0", None, 2), sizes, ())


def test_the_files_are_as_planned(tmp_path: Path) -> None:
    planned = plan(NANO, Options())
    bundle = convert(NANO, tmp_path / "out", Options())
    for file in dict.fromkeys(s.file for s in planned.steps):
        found = read_header(bundle.path(file))
        steps = planned.steps_of(file)
        assert list(found.tensors) == [s.tensor for s in steps]
        for step in steps:
            tensor = found.tensors[step.tensor]
            assert (tensor.shape[::-1], tensor.type_id) == (step.shape, step.type.id)
        last = steps[-1]
        assert found.size - found.tensors[last.tensor].offset == -(-last.nbytes // 32) * 32
    assert planned.quant() == bundle.quant
    assert sum(p.stat().st_size for p in bundle.root.iterdir()) <= planned.total_bytes


def test_the_total_is_an_upper_estimate_and_near(tmp_path: Path) -> None:
    """Of a model without encoders only the headers and the manifest are estimated."""
    source = tiny.write("phi4-mini", tmp_path / "mini")
    planned = plan(source, Options())
    root = convert(source, tmp_path / "out", Options()).root
    total = sum(p.stat().st_size for p in root.iterdir())
    assert planned.total_bytes - planned.metadata_bytes - (16 << 10) < total < planned.total_bytes


def test_a_real_model_at_its_size() -> None:
    q4, f32 = full_size("Q4_K_M"), full_size("F32")
    assert len(q4.steps) == 194 + 2  # the checkpoint's and the rope factors
    n_weights = 3_836_021_760
    assert f32.tensor_bytes == 4 * (n_weights + 2 * 48)
    assert 5.3 < 8 * q4.tensor_bytes / n_weights < 5.7  # bits a weight
    kv = 2 * 2 * 32 * 8 * 128 * 4096  # K and V, float16, layers, heads, width, tokens
    assert q4.load_ram_bytes == q4.tensor_bytes + kv
    assert q4.ram_bytes < 1_500_000_000


def test_every_tensor_is_shown() -> None:
    planned = plan(NANO, Options(recipe="Q4_K_M"))
    text = planned.format()
    for step in planned.steps:
        assert any(step.tensor in line and step.type.name in line for line in text.splitlines())
    assert "encoders: 325 tensors" in text
    assert "total: " in text and "MB on disk" in text and "to convert" in text
    raw = json.loads(planned.to_json())
    assert [t["tensor"] for t in raw["tensors"]] == [s.tensor for s in planned.steps]
    assert sum(t["bytes"] for t in raw["tensors"]) <= raw["total_bytes"] == planned.total_bytes
    assert raw["encoders"]["count"] == 325


def test_a_merged_backbone_has_no_adapters() -> None:
    planned = plan(NANO, Options(merge="speech"))
    assert {s.file for s in planned.steps} == {planned.backbone}
    assert planned.merged == "speech" and planned.adapters == ()
    linear = next(s for s in planned.steps if s.tensor == "blk.3.ffn_down.weight")
    assert len(linear.sources) == 3 and "speech" not in linear.sources[0]
    assert linear.merge is not None and linear.merge.scale == 2.0  # alpha 128, rank 64
    assert all(s.merge is None for s in planned.steps if s.group in ("norm", "rope", "token_embd"))


def test_merging_what_is_not_there(tmp_path: Path) -> None:
    source = tiny.write("phi4-mini", tmp_path / "mini")
    with pytest.raises(InputError, match="no vision adapter"):
        plan(source, Options(merge="vision"))


def test_fallbacks_are_shown(tmp_path: Path) -> None:
    """A width of 288 is nine blocks of 32 and no whole one of 256."""
    config = read_config(mini(hidden_size=24 * 96, intermediate_size=288, rope_scaling=None), "c")
    tensors = map_tensors(config, infos(expected(config)), {}, Path("checkpoint"))
    choices = Choices(RECIPES["Q4_K_M"], "Q8_0", None, 1)
    planned = make_plan("x", config, tensors, choices, {"tokenizer.json": 1}, ())
    down = next(s for s in planned.steps if s.tensor == "blk.0.ffn_down.weight")
    assert down.type.name == "Q8_0" and down.note in planned.format()
