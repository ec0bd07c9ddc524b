# SPDX-License-Identifier: Apache-2.0
"""What importances gain on phi4-nano: how far a recipe's logits are from F32's, with and without them.

    python -m tests.tools.imatrix_gain [--recipes Q4_0 Q4_K_M …] [--json]

The items of `nano/eval`, all five sets, are split by parity of their place. Each half is judged with
importances of the other: what is judged was never calibrated on, and every item is judged once. Judged are
the positions that say the reference answer and its end, and all positions of text (of a prompt with media,
those behind them). Prints the mean Kullback-Leibler divergence from F32 in nats, its standard error, and the
paired difference with its own; an item's positions count as one observation.

F32 has an F32 cache, all others an f16 one; pictures and clips are encoded once, in F32. The adapters are
F32, so that only the backbone's types differ, but in the last row, where the backbone is F32 and they are
Q4_0; it counts the items that go through one. "head kept out" quantizes the tied head without importances,
as what `llama-imatrix` writes would have it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketphi import convert as converter
from pocketphi.evaluate.imatrix import collect, item_pieces, write
from pocketphi.evaluate.items import in_order_of_modes, read_items
from pocketphi.runtime.engine import Model
from pocketphi.runtime.parts import Span
from pocketphi.runtime.prompt import parse_raw

from ..scoring import EVAL, NANO, SETS
from .logits_kld import Logits, divergence

RECIPES = ("Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K")
ADAPTERS = "adapters Q4_0"  # the last row
VARIANTS = ("with", "head kept out")
HEAD = "token_embd.weight"  # phi4-nano's head is tied

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Question:
    """An item, encoded."""

    spans: list[Span]
    adapter: str | None
    n_text: int  # positions of text at its end
    n_answer: int  # of these, the last so many say the answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=[*RECIPES, ADAPTERS])
    parser.add_argument("--json", action="store_true", help="one object for each row instead of a table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        found = Gain(Path(work)).rows(args.recipes)
    if args.json:
        print("\n".join(json.dumps(row) for row in found))
    else:
        print_table(found)


class Gain:
    """Both halves, with what F32 says about them and the importances of each."""

    def __init__(self, work: Path) -> None:
        self._work = work
        shutil.copytree(EVAL, work / "eval")  # the halves' media have to lie beside them
        files = [half(work / "eval", parity) for parity in (0, 1)]
        exact = self._model("F32", None)
        self._questions = [questions(exact, path) for path in files]
        self._truth = [logits(exact, asked, "f32") for asked in self._questions]
        self._matrices: dict[str, list[Path]] = {variant: [] for variant in VARIANTS}
        for path in files:
            found = collect(
                lambda observer: Model(exact, kv_type="f32", n_threads=1, observer=observer), path
            )
            headless = replace(found, weights={n: s for n, s in found.weights.items() if n != HEAD})
            for variant, kept in zip(VARIANTS, (found, headless), strict=True):
                self._matrices[variant].append(work / f"{path.stem}-{len(kept.weights)}.gguf")
                write(self._matrices[variant][-1], kept)

    def rows(self, recipes: Sequence[str]) -> list[dict[str, Any]]:
        return [row for recipe in recipes for row in self._rows(recipe)]

    def _rows(self, recipe: str) -> list[dict[str, Any]]:
        plain = self._judged(recipe, [None, None])
        variants = VARIANTS[:1] if recipe == ADAPTERS else VARIANTS
        others = {variant: self._judged(recipe, self._matrices[variant][::-1]) for variant in variants}
        rows = []
        for scope, base in plain.items():
            row: dict[str, Any] = {"recipe": recipe, "judged": scope, "items": len(base)}
            row |= {"positions": int(base[:, 1].sum()), "without": mean_and_error(base)}
            for variant, values in others.items():
                difference = np.stack([values[scope][:, 0] - base[:, 0], base[:, 1]], axis=1)
                row[variant] = {
                    "kld": mean_and_error(values[scope]),
                    "difference": mean_and_error(difference),
                }
            rows.append(row)
        return rows

    def _judged(self, recipe: str, matrices: Sequence[Path | None]) -> dict[str, Values]:
        """Of each item of both halves: the divergences' sum, and its positions: [items, 2]."""
        found: dict[str, list[tuple[float, int]]] = {"answers": [], "all text": []}
        for matrix, asked, truth in zip(matrices, self._questions, self._truth, strict=True):
            ours = logits(self._model(recipe, matrix), asked, "f16")
            for question, a, b in zip(asked, truth, ours, strict=True):
                if recipe != ADAPTERS or question.adapter is not None:
                    values = divergence(a, b)
                    found["answers"].append((values[-question.n_answer :].sum(), question.n_answer))
                    found["all text"].append((values.sum(), question.n_text))
        return {scope: np.array(sums, np.float64) for scope, sums in found.items()}

    def _model(self, recipe: str, imatrix: Path | None) -> Path:
        out = self._work / f"{recipe}-{imatrix.stem if imatrix else 'plain'}"
        if not out.exists():
            types = ("F32", "Q4_0") if recipe == ADAPTERS else (recipe, "F32")
            options = converter.Options(*types, encoders="fp32", imatrix=imatrix)
            converter.convert(NANO / "checkpoint", out, options)
        return out


def half(folder: Path, parity: int) -> Path:
    path = folder / f"half-{parity}.jsonl"
    lines = [line for name in SETS for line in (EVAL / f"{name}.jsonl").read_text("utf-8").splitlines()]
    path.write_text("\n".join(lines[parity::2]) + "\n", "utf-8")
    return path


def questions(path: Path, data: Path) -> list[Question]:
    """The items in the order of modes, so that every adapter is set once."""
    found = []
    with Model(path, n_threads=1) as model:
        controls = model.tokenizer.control_tokens
        for item in in_order_of_modes(read_items(data).items):
            # Public calls give all logits of tokens, but of what is seen and heard only those of the answer.
            request = model._request(item_pieces(model, item), {}, with_tools=False)
            n = len(model.tokenizer.encode(parse_raw(item.reference, controls))) + 1
            found.append(Question(request.spans, request.adapter, len(request.spans[-1]), n))
    return found


def logits(path: Path, asked: Sequence[Question], kv_type: str) -> list[Logits]:
    """Of each item, float32 [n_text, vocabulary]: after each of its last tokens."""
    found = []
    with Model(path, kv_type=kv_type, n_threads=1) as model:
        for question in asked:
            model.forget()
            found.append(model._session.read_each(question.spans, question.n_text, adapter=question.adapter))
    return found


def mean_and_error(values: Values) -> tuple[float, float]:
    """The mean over positions, and its standard error, with items as the independent observations."""
    sums, counts = values.T
    mean = sums.sum() / counts.sum()
    return float(mean), float(np.sqrt(np.square(sums - mean * counts).sum()) / counts.sum())


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    print("KLD from F32 in 1e-3 nats\n")
    print("| recipe | judged | positions | without | with | difference | | head kept out | difference |")
    print("|---" * 9 + "|")
    for row in rows:
        cells = [row["recipe"], row["judged"], str(row["positions"]), figure(row["without"])]
        for variant in VARIANTS:
            if variant not in row:
                cells += ["", ""]
                continue
            kld, difference = row[variant]["kld"], row[variant]["difference"]
            cells += [figure(kld), figure(difference)]
            if variant == VARIANTS[0]:
                cells.append(f"{100 * difference[0] / row['without'][0]:+.0f} %")
        print("| " + " | ".join(cells) + " |")


def figure(value: tuple[float, float]) -> str:
    return f"{1e3 * value[0]:.3f} ± {1e3 * value[1]:.3f}"


if __name__ == "__main__":
    main()
