# SPDX-License-Identifier: Apache-2.0
"""docs/recipes.*, written by `python -m tests.tools.recipes`: of one run, and of `convert` as it is today."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import asdict
from typing import Any

import pytest

from . import scoring
from .conftest import Converted
from .tools.recipe_table import markdown, table, to_json
from .tools.recipes import COMBINATIONS, Combination, planned, size_of

DOCS = scoring.NANO.parent / "docs"
AGAIN = "run `python -m tests.tools.recipes`"


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    measured: dict[str, Any] = json.loads((DOCS / "recipes.json").read_text("utf-8"))
    return measured


def test_the_page_is_written_from_the_measurement(found: dict[str, Any]) -> None:
    assert (DOCS / "recipes.json").read_bytes() == to_json(found).encode("utf-8")
    assert (DOCS / "recipes.md").read_bytes() == markdown(found).encode("utf-8"), AGAIN


def test_the_readme_has_its_rows(found: dict[str, Any]) -> None:
    lines = (DOCS.parent / "README.md").read_text("utf-8").splitlines()
    first = lines.index(table(found)[0])
    assert lines[first : first + len(table(found))] == table(found)
    assert lines[first + len(table(found))] == ""


def test_the_picture_is_drawn_from_it() -> None:
    """Not drawn again: another matplotlib draws other pixels."""
    picture = (DOCS / "recipes.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">I", picture[16:20]) == (1200,)
    assert len(picture) < 150_000
    digest = hashlib.sha256((DOCS / "recipes.json").read_bytes()).hexdigest()
    assert digest.encode("ascii") in picture, AGAIN


def test_it_has_every_recipe(found: dict[str, Any]) -> None:
    assert [row["options"] for row in found["recipes"]] == [asdict(c) for c in COMBINATIONS], AGAIN


@pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda c: c.name)
def test_sizes_are_what_the_converter_plans_today(combination: Combination, found: dict[str, Any]) -> None:
    """What importances change is bits, not types: without them the plan is the same."""
    row = next(row for row in found["recipes"] if row["name"] == combination.name)
    assert row["plan"] == planned(combination), AGAIN
    assert row["plan"]["tensor_bytes"] < row["disk_bytes"]


def test_the_built_in_default_is_as_large_as_it_says(converted: Converted, found: dict[str, Any]) -> None:
    size = size_of(converted("phi4-nano", "Q8_0", lora_quant="Q8_0", encoders="int8"))
    row = next(row for row in found["recipes"] if row["name"] == "Q8_0, Q8_0, int8")
    assert f"{size / 1e6:.1f}" == f"{row['disk_bytes'] / 1e6:.1f}", AGAIN


def test_f32_is_scored_as_its_card_says(found: dict[str, Any]) -> None:
    """The same answers with an f16 cache; the rest of the card's rows is in evaluate/test_runner.py."""
    row = found["recipes"][0]
    assert row["tasks"] == {task: list(counts) for task, counts in scoring.CARD.items()}
    assert row["wer"]["score"] == scoring.CARD_WORDS[0] / scoring.CARD_WORDS[1]
