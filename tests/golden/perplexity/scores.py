# SPDX-License-Identifier: Apache-2.0
"""Perplexity and divergence of phi4-nano's recipes over text.txt, by this project, in a process of its own.

    python -m tests.golden.perplexity.scores '{"F32": "DIR", …}' < /dev/null

The kernels are chosen when the process begins, so stock ones need another than the tests' own.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pocketphi.evaluate.divergence import compare
from pocketphi.evaluate.perplexity import measure
from pocketphi.runtime.engine import Model

from .golden import HERE, KV_TYPE, N_CTX, TEXT


@functools.cache
def scores(directories: tuple[tuple[str, str], ...], kernels: str) -> dict[str, Any]:
    """{"ppl": {recipe: …}, "kld": …} of (recipe, model directory) pairs, F32 first: it is the base.

    `kernels` is for POCKETPHI_KERNELS; other than stock ones have "ppl" of the base only.
    """
    done = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps(dict(directories))],
        cwd=HERE.parents[2],
        env=os.environ | {"POCKETPHI_KERNELS": kernels},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    """Print the object."""
    found: dict[str, Any] = {"ppl": {}, "kld": {}}
    text, stock = TEXT.read_text("utf-8"), os.environ["POCKETPHI_KERNELS"] == "stock"
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        for recipe, directory in json.loads(sys.argv[1]).items():
            with Model(directory, kv_type=KV_TYPE[recipe], n_threads=2) as model:
                if recipe == "F32" or stock:
                    save = base if recipe == "F32" else None
                    ppl = measure(model, text, n_ctx=N_CTX, save_logits=save)
                    found["ppl"][recipe] = ppl.details() | {"ppl": ppl.score, "items": ppl.items}
                kld = compare(model, base)
            found["kld"][recipe] = kld.details() | {"kld": kld.score, "items": kld.items}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
