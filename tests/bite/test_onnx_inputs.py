# SPDX-License-Identifier: Apache-2.0
"""Encoder graphs that name other files, hold what the converter never writes, or are damaged."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import soundfile

from .conftest import Bitten
from .spoilt_onnx import SPOILT
from .table import Case, Place, seal

Make = Callable[[Place], list[str]]
GRAPH, DATA = "speech.onnx", "speech.onnx.data"


def heard(place: Place, model: Path) -> list[str]:
    """A question about a tenth of a second of silence: the speech encoder has to be there."""
    clip = place.path / "clip.wav"
    soundfile.write(clip, np.zeros(1600, np.float32), 16000)
    return ["run", "-m", str(seal(model)), "--audio", str(clip), "-p", "Hi", "-n", "1"]


def spoilt(what: str) -> Make:
    def make(place: Place) -> list[str]:
        model = place.model()
        graph = onnx.load(model / GRAPH, load_external_data=False)
        SPOILT[what][0](graph)
        (model / GRAPH).write_bytes(graph.SerializeToString())
        return heard(place, model)

    return make


def changed(change: Callable[[Path], object]) -> Make:
    """A model directory after `change(directory)`."""

    def make(place: Place) -> list[str]:
        model = place.model()
        change(model)
        return heard(place, model)

    return make


def cut(numerator: int) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        raw = (model / GRAPH).read_bytes()
        (model / GRAPH).write_bytes(raw[: len(raw) * numerator // 10])

    return change


def hard_link(model: Path) -> None:
    os.link(model / DATA, model / "weights")
    (model / DATA).unlink()
    os.link(model / "weights", model / DATA)


def link_inside(model: Path) -> None:
    (model / DATA).rename(model / "weights")
    (model / DATA).symlink_to("weights")


def link_outside(model: Path) -> None:
    (model / DATA).rename(model.parent / "weights")
    (model / DATA).symlink_to("../weights")


def shorter(model: Path) -> None:
    (model / DATA).write_bytes((model / DATA).read_bytes()[:-4096])


def not_finite(model: Path) -> None:
    (model / DATA).write_bytes(b"\xff" * (model / DATA).stat().st_size)


def swapped(model: Path) -> None:
    (model / GRAPH).write_bytes((model / "vision.onnx").read_bytes())


CASES = [
    *(Case(what, spoilt(what), 3, rf"speech\.onnx: .*({line})") for what, (_, line) in SPOILT.items()),
    Case("empty", changed(lambda m: (m / GRAPH).write_bytes(b"")), 3, "is not an ONNX graph"),
    Case("text", changed(lambda m: (m / GRAPH).write_bytes(b"hello " * 99)), 3, r"speech\.onnx: holds field"),
    *(Case(f"{n} tenths", changed(cut(n)), 3, r"speech\.onnx: ends within") for n in range(1, 10)),
    Case(
        "16 MiB of nothing",
        changed(lambda m: (m / GRAPH).write_bytes(b"\x08\x0a" * (8 << 20))),
        3,
        "too many",
    ),
    Case("another graph", changed(swapped), 3, r"refers to a file other than speech\.onnx\.data"),
    Case("data shorter", changed(shorter), 3, r"its shape needs \d+ of the \d+ that speech\.onnx\.data has"),
    Case("data not finite", changed(not_finite), 3, "not finite: it is damaged"),
    Case("data through a link outside", changed(link_outside), 3, "points outside the model directory"),
    Case("data through a link inside", changed(link_inside), 0, ""),
    Case("data through a hard link", changed(hard_link), 0, ""),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_onnx(case: Case, bitten: Bitten) -> None:
    bitten(case)
