# SPDX-License-Identifier: Apache-2.0
"""What each recipe costs phi4-nano: size, distance from F32, evaluation scores. Prints a Markdown table.

python -m tests.tools.recipes
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from pocketphi import convert as converter
from pocketphi.runtime.engine import Model

from ..scoring import NANO, rows, score

ROWS = (  # recipe, adapters, encoders
    ("F32", "F32", "fp32"),
    ("F16", "F16", "fp16"),
    ("Q8_0", "Q8_0", "int8"),
    ("Q6_K", "Q8_0", "int8"),
    ("Q5_K_M", "Q8_0", "int8"),
    ("Q4_K_M", "Q8_0", "int8"),
    ("Q4_0", "Q8_0", "int8"),
    ("Q4_0", "Q4_0", "int4"),
)
TASKS = ("text", "tools", "ast", "sqa", "vision", "vision_speech")


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
    print("| backbone, adapters, encoders | on disk | mean KL, nats | WER | " + " | ".join(TASKS) + " |")
    print("|---" * (len(TASKS) + 4) + "|")
    with tempfile.TemporaryDirectory() as work:
        truth: Model | None = None
        for recipe, lora, encoders in ROWS:
            out = Path(work) / f"{recipe}-{lora}-{encoders}"
            options = converter.Options(recipe=recipe, lora_quant=lora, encoders=encoders)
            bundle = converter.convert(NANO / "checkpoint", out, options)
            model = Model(out, kv_type="f32" if recipe == "F32" else "f16")
            truth = truth or model
            found = score(model)
            size = sum(f.size for f in bundle.files) / 2**20
            cells = [f"{right}/{items}" for right, items in (found.exact[task] for task in TASKS)]
            kl = divergence(model, truth, prompts)
            row = [
                f"{recipe}, {lora}, {encoders}",
                f"{size:.1f} MiB",
                f"{kl:.1e}",
                f"{found.wer:.1f} %",
                *cells,
            ]
            print("| " + " | ".join(row) + " |", flush=True)
            if model is not truth:
                model.close()


if __name__ == "__main__":
    main()
