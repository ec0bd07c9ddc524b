# SPDX-License-Identifier: Apache-2.0
"""Importance matrices: read as llama.cpp reads them, used where they belong, refused when unfit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from pocketphi.convert import Options, convert, plan
from pocketphi.convert.checkpoint import Checkpoint
from pocketphi.convert.ggml_types import Q4_K
from pocketphi.convert.imatrix import read_imatrix
from pocketphi.convert.quantize import Quantizer
from pocketphi.convert.work_plan import Step
from pocketphi.runtime.errors import CheckpointError

from ..tiny import NANO

Float32 = npt.NDArray[np.float32]


def write(path: Path, entries: Mapping[str, tuple[Float32, float | None]], kind: str = "imatrix") -> Path:
    """An importance matrix as tools/imatrix writes it: name -> (sums, count)."""
    writer = gguf.GGUFWriter(path, "phi3")
    writer.add_type(kind)
    for name, (sums, count) in entries.items():
        writer.add_tensor(f"{name}.in_sum2", sums.reshape(1, -1))
        if count is not None:
            writer.add_tensor(f"{name}.counts", np.array([[count]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def steps() -> list[Step]:
    made = plan(NANO, Options(recipe="Q4_K_M"))
    return made.steps_of(made.backbone)


def sums(n: int, seed: int = 1) -> Float32:
    return np.random.default_rng(seed).random(n, np.float32)


def test_values_are_mean_squares(tmp_path: Path, steps: list[Step]) -> None:
    entries = {"blk.0.ffn_up.weight": (sums(256), 8.0), "blk.1.ffn_down.weight": (sums(768), 0.0)}
    found, notes = read_imatrix(write(tmp_path / "i.gguf", entries), steps)
    assert set(found) == set(entries)
    assert np.array_equal(found["blk.0.ffn_up.weight"], sums(256) / np.float32(8))
    assert (found["blk.1.ffn_down.weight"] == 1).all()  # no token came by
    assert len(notes) == 1 and "token_embd.weight and 14 more" in notes[0]


def test_conversion_uses_them(tmp_path: Path) -> None:
    name = "blk.2.attn_output.weight"
    path = write(tmp_path / "i.gguf", {name: (sums(256) * 50, 3.0)})
    bundle = convert(NANO, tmp_path / "out", Options(imatrix=path))
    data = {t.name: t.data for t in gguf.GGUFReader(bundle.path(bundle.decoder)).tensors}[name]
    with Checkpoint.open(NANO) as source:
        rows = source.read(source.tensors["model.layers.2.self_attn.o_proj.weight"])
    importance = sums(256) * 50 / np.float32(3)
    assert np.array_equal(data, Quantizer().quantize(rows, Q4_K, importance))
    assert not np.array_equal(data, Quantizer().quantize(rows, Q4_K))


def test_exact_types_ask_for_nothing(tmp_path: Path, steps: list[Step]) -> None:
    exact = [s for s in steps if s.group in ("norm", "rope")]
    assert read_imatrix(write(tmp_path / "i.gguf", {"x": (sums(4), 1.0)}), exact) == ({}, ())


NAME = "blk.0.ffn_up.weight"
BAD: dict[str, tuple[dict[str, tuple[Float32, float | None]], str]] = {
    "short": ({NAME: (sums(255), 1.0)}, NAME),
    "long": ({NAME: (sums(512), 1.0)}, NAME),
    "no count": ({NAME: (sums(256), None)}, "counts"),
    "negative": ({NAME: (sums(256) - 1, 1.0)}, NAME),
    "nan": ({NAME: (sums(256) * np.float32(np.nan), 1.0)}, NAME),
    "inf": ({NAME: (sums(256) * np.float32(np.inf), 1.0)}, NAME),
    "count nan": ({NAME: (sums(256), float("nan"))}, NAME),
    "count negative": ({NAME: (sums(256), -1.0)}, NAME),
    "another model": ({"blk.99.ffn_up.weight": (sums(256), 1.0)}, "covers none"),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals_name_the_tensor(case: str, tmp_path: Path, steps: list[Step]) -> None:
    entries, match = BAD[case]
    path = write(tmp_path / "i.gguf", entries)
    with pytest.raises(CheckpointError, match=match) as caught:
        read_imatrix(path, steps)
    assert str(caught.value).startswith(f"{path}: ")


def test_another_kind_of_file(tmp_path: Path) -> None:
    path = write(tmp_path / "i.gguf", {NAME: (sums(256), 1.0)}, kind="model")
    with pytest.raises(CheckpointError, match="imatrix"):
        plan(NANO, dataclasses.replace(Options(), imatrix=path))
    with pytest.raises(CheckpointError, match="no such file"):
        plan(NANO, dataclasses.replace(Options(), imatrix=tmp_path / "none"))
