# SPDX-License-Identifier: Apache-2.0
"""docs/recipes.md from docs/recipes.json: the same object always gives the same bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

HEAD = (
    "backbone, adapters, encoders",
    "disk, MB",
    "RAM, MB",
    "KLD, 10⁻³ nats",
    "same top token",
    "WER",
    "exact match",
    "read, tokens/s",
    "written, tokens/s",
)

_PAGE = """\
# What recipes cost phi4-nano

Written by `python -m tests.tools.recipes`; [recipes.json](recipes.json) has more of each, by task too.

{table}

![Size against quality](recipes.png)

- **Disk**: the whole model directory. **RAM**: the peak of a process that answers an item of text, one with a
  picture and one with speech, Python and its libraries included.
- **KLD**: mean Kullback-Leibler divergence from F32 weights with an F32 cache, over {positions} positions of
  `tests/golden/perplexity/text.txt`, ± its standard error; and the share of positions with the same most
  probable token. What the F32 row has is of its f16 cache, and of the 16 bits that the probabilities compared
  with are kept in. No adapter and no encoder has a part in it.
- **WER**: the {n_wer} asr items, by Whisper's {normalizer} normalizer. **Exact match**: all {n_exact} other
  items, equal texts or equal tool calls. In brackets 95 % confidence intervals, of 1,000 resamples of the
  items: so small a set does not tell neighbours apart. The KLD does where it differs by more than its errors.
- **Speed**: medians of {rounds} rounds in which all recipes take turns, {kernels} our kernels: the decoder
  reads {prompt_tokens} tokens of text and writes {written_tokens} after them. Recipes that differ in adapters
  and encoders only do the same there. So small a model lives in the processor's caches: this says nothing
  about big ones, of which [SPEED.md](../SPEED.md) tells.
- The KV cache is {cache_type}, with the ONNX backbones f32. Those are named by `--onnx-quant`; ONNX Runtime
  runs them with our kernels. Importances (`+ imatrix`) are of text that F32 said, of none that is judged.
- {date}, {commit}. {cpu}, {cores} cores, {threads} used. {versions}.
"""


def to_json(found: Mapping[str, Any]) -> str:
    """recipes.json."""
    return json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def markdown(found: Mapping[str, Any]) -> str:
    """recipes.md."""
    rows = found["recipes"]
    return _PAGE.format(
        **found["settings"],
        **found["machine"],
        table="\n".join(table(found)),
        positions=f"{rows[0]['kld']['positions']:,}",
        n_wer=rows[0]["wer"]["items"],
        n_exact=rows[0]["exact"]["items"],
        kernels="with" if all(row["kernels"] for row in rows) else "without",
        date=found["date"],
        commit=f"{(found['commit'] or 'no commit')[:12]}{' with changes' if found['changed'] else ''}",
        versions=", ".join(f"{name} {number}" for name, number in found["versions"].items()),
    )


def table(found: Mapping[str, Any]) -> list[str]:
    """The lines of the table, which the README has too."""
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    return lines + [f"| {' | '.join(_cells(row))} |" for row in found["recipes"]]


def _cells(row: Mapping[str, Any]) -> list[str]:
    wer, exact, kld, ram = (row[name] for name in ("wer", "exact", "kld", "peak_rss_bytes"))
    return [
        row["name"],
        f"{row['disk_bytes'] / 1e6:.1f}",
        "?" if ram is None else f"{ram / 1e6:.0f}",
        _with_error(1e3 * kld["kld"], 1e3 * kld["kld_error"]),
        f"{100 * kld['same_top']:.1f} %",
        f"{100 * wer['score']:.1f} % ({_interval(wer, 1)})",
        f"{exact['right']}/{exact['items']} ({_interval(exact, 0)} %)",
        *(f"{row['speed'][what]['median']:,.0f}" for what in ("read", "written")),
    ]


def _with_error(value: float, error: float) -> str:
    """To the error's first digit: "43 ± 4", "0.004 ± 0.001"."""
    digits = max(0, -math.floor(math.log10(error))) if error > 0 else 0
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _interval(score: Mapping[str, Any], digits: int) -> str:
    low, high = score["ci95"]
    return f"{100 * low:.{digits}f}–{100 * high:.{digits}f}"
