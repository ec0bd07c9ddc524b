# SPDX-License-Identifier: Apache-2.0
"""Makes text.txt: what phi4-nano says when it is left to talk without markup, at temperature 1.

    python -m tests.golden.perplexity.make_text

Its training scored answers only, after control tokens, so any text of people surprises it beyond measure: the
perplexity of its own evaluation set as plain text is above 50,000. Of what it says itself the perplexity is
of the usual size. Another CPU may round one probability otherwise and so say something else.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from pocketphi import convert as converter
from pocketphi.runtime.engine import Model

from .golden import HERE, TEXT

CHECKPOINT = HERE.parents[2] / "nano" / "checkpoint"
TOKENS = 2600
FIRST = "What is the month after August?\n"


def said(model: Model) -> str:
    """A sample, in windows of 256 to 511 tokens."""
    rng, tokenizer = np.random.default_rng(8), model.tokenizer
    silent = np.concatenate([tokenizer.unassigned_ids, list(tokenizer.control_tokens.values())])
    ids = tokenizer.encode_text(FIRST).tolist()
    while len(ids) < TOKENS:
        start = max(len(ids) // 256 - 1, 0) * 256
        logits = model.token_logits(ids[start:], 1)[0].astype(np.float64)
        logits[silent] = -np.inf
        p = np.exp(logits - logits.max())
        ids.append(int(rng.choice(len(p), p=p / p.sum())))
    return tokenizer.decode(ids)


def main() -> None:
    """Write it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "F32"
        converter.convert(CHECKPOINT, out, converter.Options(recipe="F32", name="phi4-nano"))
        with Model(out, kv_type="f32", n_threads=1) as model:
            TEXT.write_bytes(said(model).encode("utf-8"))


if __name__ == "__main__":
    main()
