# SPDX-License-Identifier: Apache-2.0
"""Which tensor gets which ggml type: the named recipes, and the reason for every choice.

| recipe | token_embd | output, or tied token_embd | attn_qkv | attn_output | ffn_up | ffn_down |
|---|---|---|---|---|---|---|
| Q4_0   | Q4_0 | Q6_K | Q6_K | Q4_0 | Q4_0 | Q6_K |
| Q4_K_M | Q4_K | Q6_K | Q6_K | Q4_K | Q4_K | Q6_K in the outer layers and every third, else Q5_K |
| Q5_K_M | Q5_K | Q6_K | Q6_K | Q5_K | Q5_K | Q6_K in the outer layers and every third, else Q5_K |
| Q6_K   | Q6_K | Q6_K | Q6_K | Q6_K | Q6_K | Q6_K |
| Q8_0   | Q8_0 | Q8_0 | Q8_0 | Q8_0 | Q8_0 | Q8_0 |
| F16    | F16 | F16 | F16 | F16 | F16 | F16 |
| F32    | F32 | F32 | F32 | F32 | F32 | F32 |

Why:

* Norms and rope factors are always F32: a few thousand numbers that llama.cpp wants in F32.
* The output head decides between tokens directly, so no later layer averages its error away; Q6_K is
  llama.cpp's own choice. A tied embedding is the head. An untied one is only looked up.
* attn_qkv is a seventh of a layer and the most sensitive part of it: on phi4-nano (mean KL divergence
  from F32 over all its text and tool prompts) Q4_0 gives 0.035 with attn_qkv in Q4_0, 0.015 in Q5_K and
  0.011 in Q6_K; Q4_K_M gives 0.014 in Q5_K, llama.cpp's choice, and 0.009 in Q6_K.
* ffn_down sums 8,192 products of a gated, heavy-tailed input into the residual stream. Uniform 4-bit is
  reported to break Phi-4-mini there, so it never has fewer than 5 bits (phi4-nano: 0.017 to 0.015).
  In Q4_0 it is Q6_K, which phi4-nano cannot tell from Q5_K: 4 % more bytes, but two kinds of blocks are
  all that a fast kernel must know, and ggml quantizes Q6_K in 60 % of the time of Q5_K.
* "Outer layers and every third" is llama.cpp's `use_more_bits`.
* Q5_K_M is llama.cpp's mixture.

A type whose blocks do not divide a row falls back, see `_FALLBACK`: always to more bits, never fewer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

from ..runtime.errors import InputError
from .ggml_types import F16, F32, Q4_0, Q4_K, Q5_K, Q6_K, Q8_0, GgmlType
from .mapping import Group

LoraQuant = Literal["Q8_0", "F16", "Q4_0", "F32"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """One row of the table above."""

    name: str
    file_type: int  # enum llama_ftype, for general.file_type; informative only
    base: GgmlType  # attn_output, ffn_up and an untied token_embd
    head: GgmlType  # output, or a tied token_embd
    qkv: GgmlType
    down: GgmlType
    down_more: GgmlType  # ffn_down where `use_more_bits`


RECIPES: Mapping[str, Recipe] = {
    r.name: r
    for r in (
        Recipe("Q4_0", 2, base=Q4_0, head=Q6_K, qkv=Q6_K, down=Q6_K, down_more=Q6_K),
        Recipe("Q4_K_M", 15, base=Q4_K, head=Q6_K, qkv=Q6_K, down=Q5_K, down_more=Q6_K),
        Recipe("Q5_K_M", 17, base=Q5_K, head=Q6_K, qkv=Q6_K, down=Q5_K, down_more=Q6_K),
        Recipe("Q6_K", 18, base=Q6_K, head=Q6_K, qkv=Q6_K, down=Q6_K, down_more=Q6_K),
        Recipe("Q8_0", 7, base=Q8_0, head=Q8_0, qkv=Q8_0, down=Q8_0, down_more=Q8_0),
        Recipe("F16", 1, base=F16, head=F16, qkv=F16, down=F16, down_more=F16),
        Recipe("F32", 0, base=F32, head=F32, qkv=F32, down=F32, down_more=F32),
    )
}
# F32 is for tests that want the adapter exact; bf16 values fit F16 but for its subnormals.
LORA_TYPES: Mapping[str, GgmlType] = {"Q8_0": Q8_0, "F16": F16, "Q4_0": Q4_0, "F32": F32}

# When a row is not whole blocks: K-quants (256) give way to Q8_0 (32), and that to F16.
_FALLBACK: Mapping[str, GgmlType] = {"Q4_K": Q8_0, "Q5_K": Q8_0, "Q6_K": Q8_0, "Q4_0": F16, "Q8_0": F16}


@dataclass(frozen=True, slots=True)
class Choice:
    """A type, and why it is not the recipe's own when it is not."""

    type: GgmlType
    note: str = ""


def named(name: str) -> Recipe:
    """A recipe by name, in upper or lower case.

    Raises:
        InputError: no such recipe.
    """
    recipe = RECIPES.get(name.upper())
    if recipe is None:
        raise InputError(f"recipe {name[:40]!r} is not known, expected one of {', '.join(RECIPES)}")
    return recipe


def named_lora(name: str) -> LoraQuant:
    """An adapter type by name, in upper or lower case.

    Raises:
        InputError: no such type.
    """
    if name.upper() not in LORA_TYPES:
        raise InputError(f"adapter type {name[:40]!r} is not known, expected one of {', '.join(LORA_TYPES)}")
    return cast(LoraQuant, name.upper())


def use_more_bits(layer: int, n_layers: int) -> bool:
    """The first and last eighth of the layers, and every third between, as llama-quant.cpp does."""
    return layer < n_layers // 8 or layer >= 7 * n_layers // 8 or (layer - n_layers // 8) % 3 == 2


def choose(
    recipe: Recipe,
    group: Group,
    row_length: int,
    *,
    layer: int | None = None,
    n_layers: int = 0,
    tied_head: bool = False,
) -> Choice:
    """The type of one backbone tensor whose rows hold `row_length` values."""
    if group in ("norm", "rope"):
        return Choice(F32)
    if group == "output" or (group == "token_embd" and tied_head):
        wanted = recipe.head
    elif group == "attn_qkv":
        wanted = recipe.qkv
    elif group == "ffn_down":
        assert layer is not None
        wanted = recipe.down_more if use_more_bits(layer, n_layers) else recipe.down
    else:
        wanted = recipe.base
    return _fit(wanted, row_length)


def choose_lora(quant: LoraQuant, row_length: int) -> Choice:
    """The type of one adapter matrix. B's rows are as long as the rank: 256 and 320 are whole blocks of 32.

    K-quants are not offered: their blocks of 256 cannot hold B of rank 320.
    """
    return _fit(LORA_TYPES[quant], row_length)


def _fit(wanted: GgmlType, row_length: int) -> Choice:
    fitting = wanted
    while row_length % fitting.block:
        fitting = _FALLBACK[fitting.name]
    if fitting is wanted:
        return Choice(wanted)
    return Choice(
        fitting, f"{wanted.name} needs rows of a multiple of {wanted.block}, these have {row_length}"
    )
