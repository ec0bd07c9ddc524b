# SPDX-License-Identifier: Apache-2.0
"""The recipes: the written table is the real one, fallbacks only add bits, names are forgiving."""

from __future__ import annotations

import pytest

from pocketphi.convert import recipe as recipes
from pocketphi.convert.ggml_types import F16, F32, Q4_0, Q4_K, Q5_K, Q6_K, Q8_0, TYPES
from pocketphi.convert.mapping import Group
from pocketphi.convert.recipe import RECIPES, choose, choose_lora, named, named_lora, use_more_bits
from pocketphi.runtime.errors import InputError

COLUMNS: tuple[Group, ...] = ("token_embd", "output", "attn_qkv", "attn_output", "ffn_up", "ffn_down")


def documented() -> dict[str, list[str]]:
    """The rows of the table in recipe.py's docstring."""
    rows = [line.strip("| ").split("|") for line in (recipes.__doc__ or "").splitlines() if line[:1] == "|"]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows[2:]}


@pytest.mark.parametrize("name", RECIPES)
def test_the_written_table_is_the_real_one(name: str) -> None:
    recipe = RECIPES[name]
    cells = dict(zip(COLUMNS, documented()[name], strict=True))
    for group in COLUMNS[:-1]:
        found = choose(recipe, group, 3072, layer=0, n_layers=32)
        assert found.type.name == cells[group] and not found.note
    outer, inner = (choose(recipe, "ffn_down", 8192, layer=n, n_layers=32).type.name for n in (0, 4))
    wanted = cells["ffn_down"]
    assert wanted == (
        inner if outer == inner else f"{outer} in the outer layers and every third, else {inner}"
    )
    assert choose(recipe, "token_embd", 3072, tied_head=True).type.name == cells["output"]


@pytest.mark.parametrize("name", RECIPES)
def test_norms_and_rope_factors_are_exact(name: str) -> None:
    assert choose(RECIPES[name], "norm", 3072).type is F32
    assert choose(RECIPES[name], "rope", 48).type is F32


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K_M"])
def test_ffn_down_never_has_four_bits(name: str) -> None:
    assert all(
        choose(RECIPES[name], "ffn_down", 8192, layer=n, n_layers=32).type.bits >= 5.5 for n in range(32)
    )


def test_more_bits_are_where_llama_cpp_puts_them() -> None:
    # n < 4, n >= 28, and every third from 6 on: worked out by hand for 32 layers.
    want = {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}
    assert {n for n in range(32) if use_more_bits(n, 32)} == want


def test_rows_that_are_not_whole_blocks_fall_back_to_more_bits() -> None:
    for recipe in RECIPES.values():
        for group in COLUMNS:
            for row in (256, 288, 320, 100):
                found = choose(recipe, group, row, layer=0, n_layers=2)
                plain = choose(recipe, group, 256, layer=0, n_layers=2)
                assert row % found.type.block == 0
                assert found.type.bits >= plain.type.bits
                assert bool(found.note) == (found.type is not plain.type)
    note = choose(RECIPES["Q4_K_M"], "attn_output", 288, layer=0, n_layers=2).note
    assert "Q4_K" in note and "256" in note and "288" in note


def test_adapters() -> None:
    assert [choose_lora("Q8_0", n).type for n in (3072, 320, 256, 16, 72)] == [Q8_0, Q8_0, Q8_0, F16, F16]
    assert choose_lora("Q4_0", 320).type is Q4_0
    assert choose_lora("F16", 7).type is F16
    assert "multiple of 32" in choose_lora("Q8_0", 16).note


def test_names() -> None:
    assert named("q4_k_m") is RECIPES["Q4_K_M"] and named_lora("f16") == "F16"
    with pytest.raises(InputError, match="Q4_K_M"):
        named("Q3_K")
    with pytest.raises(InputError, match="Q8_0"):
        named_lora("Q4_K")


def test_types_are_whole_bytes() -> None:
    assert [t.row_bytes(256) for t in TYPES] == [1024, 512, 144, 272, 144, 176, 210]
    assert [t.bits for t in (Q4_K, Q5_K, Q6_K)] == [4.5, 5.5, 6.5625]
