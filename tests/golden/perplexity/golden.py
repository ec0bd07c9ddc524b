# SPDX-License-Identifier: Apache-2.0
"""Reads the golden perplexities: what llama.cpp's tool printed, and with which settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TEXT = HERE / "text.txt"
BASE = HERE / "base.logits.gz"  # as llama.cpp wrote it, F32 over the first chunks of the text

RECIPES = ("F32", "F16", "Q8_0", "Q4_0", "Q4_K_M")
KV_TYPE = {recipe: "f32" if recipe == "F32" else "f16" for recipe in RECIPES}
N_CTX = 512
SMALL_N_CTX, SMALL_CHUNKS = 32, 2  # of BASE

# How far ln p of two engines may be apart that compute in float32: each logit, and each ln Σ exp, is within
# 2.2e-5 of exact ones on short sequences (measured of llama.cpp: tests/golden/README.md).
FLOAT32 = 4 * 2.2e-5

# What `DivergenceResult.details` and the tool call the same thing. Δp and same top are printed in per cent.
STATISTICS = {
    "ppl": "Mean PPL(Q)",
    "ppl_base": "Mean PPL(base)",
    "ln_ppl_ratio": "Mean ln(PPL(Q)/PPL(base))",
    "ppl_ratio": "Mean PPL(Q)/PPL(base)",
    "kld": "Mean    KLD",
    "kld_max": "Maximum KLD",
    "kld_p999": "99.9%   KLD",
    "kld_p99": "99.0%   KLD",
    "kld_p95": "95.0%   KLD",
    "kld_p90": "90.0%   KLD",
    "kld_median": "Median  KLD",
    "kld_p10": "10.0%   KLD",
    "kld_p5": "5.0%   KLD",
    "kld_p1": "1.0%   KLD",
    "kld_min": "Minimum KLD",
    "delta_p_mean": "Mean    Δp",
    "delta_p_rms": "RMS Δp",
    "same_top": "Same top p",
}
PER_CENT = ("delta_p_mean", "delta_p_rms", "same_top")


def load() -> dict[str, Any]:
    """perplexity.json."""
    found: dict[str, Any] = json.loads((HERE / "perplexity.json").read_text("utf-8"))
    return found
