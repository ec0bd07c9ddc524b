# SPDX-License-Identifier: Apache-2.0
"""What each recipe costs phi4-nano: size, agreement with F32, evaluation scores. Prints a Markdown table.

python tests/tools/recipes.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from pocketphi import convert as converter
from pocketphi.convert.recipe import RECIPES
from pocketphi.runtime.engine import Model
from pocketphi.runtime.parts import Reply

NANO = Path(__file__).resolve().parents[2] / "nano"


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (NANO / "eval" / f"{name}.jsonl").read_text("utf-8").splitlines()]


def answers(model: Model) -> dict[str, Reply]:
    return {r["id"]: model.complete(r["prompt"], max_tokens=80) for r in [*rows("text"), *rows("tools")]}


def exact(found: dict[str, Reply]) -> tuple[int, int]:
    """Text answers equal to the reference, and tool calls with its names and arguments."""
    text = sum(found[r["id"]].text == r["reference"] for r in rows("text"))
    tools = 0
    for r in rows("tools"):
        wanted = json.loads(r["reference"].removeprefix("<|tool_call|>").removesuffix("<|/tool_call|>"))
        tools += [{"name": c.name, "arguments": c.arguments} for c in found[r["id"]].tool_calls] == wanted
    return text, tools


def same_tokens(found: dict[str, Reply], truth: dict[str, Reply]) -> int:
    return sum(found[k].token_ids == truth[k].token_ids for k in truth)


def divergence(model: Model, truth: Model, prompts: list[str]) -> float:
    """Mean KL divergence in nats of the first token's distribution from the F32 model's."""
    total = 0.0
    for prompt in prompts:
        p, q = (_log_softmax(m.next_token_logits(prompt)) for m in (truth, model))
        total += float((np.exp(p) * (p - q)).sum())
    return total / len(prompts)


def _log_softmax(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    y = x.astype(np.float64) - x.max()
    return np.asarray(y - np.log(np.exp(y).sum()))


def main() -> None:
    prompts = [r["prompt"] for r in [*rows("text"), *rows("tools")]]
    with tempfile.TemporaryDirectory() as work:
        made = {}
        for recipe in ("F32", *[r for r in RECIPES if r != "F32"]):
            out = Path(work) / recipe
            made[recipe] = converter.convert(NANO / "checkpoint", out, converter.Options(recipe=recipe))
        print("| recipe | backbone | text exact | tools exact | same tokens as F32 | mean KL, nats |")
        print("|---|---|---|---|---|---|")
        with Model(Path(work) / "F32") as truth:
            reference = answers(truth)
            for recipe, bundle in made.items():
                with Model(bundle.root) as model:
                    found = answers(model)
                    text, tools = exact(found)
                    size = bundle.path(bundle.decoder).stat().st_size / 2**20
                    print(
                        f"| {recipe} | {size:.1f} MiB | {text} / {len(rows('text'))} | {tools} / {len(rows('tools'))} "
                        f"| {same_tokens(found, reference)} / {len(reference)} "
                        f"| {divergence(model, truth, prompts):.2e} |"
                    )


if __name__ == "__main__":
    main()
