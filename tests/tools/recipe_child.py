# SPDX-License-Identifier: Apache-2.0
"""One recipe in a process of its own, which `recipes` tells line by line what to measure.

    python -m tests.tools.recipe_child DIR BASE --threads 1     (on stdin: memory, quality, speed)

`memory` comes first: what is loaded for the others is no part of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pocketphi.runtime import ggml_plugin
from pocketphi.runtime.bench_decoder import SpeedPlan, SpeedRunner, open_runner
from pocketphi.runtime.engine import Model
from pocketphi.runtime.gguf_check import read_model
from pocketphi.runtime.report import peak_rss

from .. import scoring

KV_TYPE = "f16"  # as users have it, F32 weights too
N_PROMPT, N_PREDICT = 256, 64
ASKED = ("text", "vision", "speech")  # one item of each: every adapter and encoder is loaded then


class Child:
    """A model directory, opened for what is measured."""

    def __init__(self, directory: Path, base: Path, n_threads: int) -> None:
        self._directory, self._base, self._n_threads = directory, base, n_threads
        self._runner: SpeedRunner | None = None
        self._open = ExitStack()

    def close(self) -> None:
        self._open.close()

    def memory(self) -> dict[str, Any]:
        """Peak resident memory, in bytes, of answering an item of text, a picture and speech."""
        with self._model() as model:
            for name in ASKED:
                model.forget()
                row = scoring.rows(name)[0]
                model.complete(row["prompt"], media=scoring.media_of(row), **scoring.OPTIONS)
            return {
                "peak_rss_bytes": own_peak_rss(),
                "resident": model.resident,
                "kernels": ggml_plugin.load().active,
            }

    def quality(self) -> dict[str, Any]:
        """How far from the base on its text, and how right on the evaluation set."""
        from pocketphi.evaluate.divergence import compare

        with self._model() as model:
            found = compare(model, self._base)
            scores = scoring.score(model)
        return {
            "kld": {"kld": found.score, "positions": found.items, **found.details()},
            "wer": asdict(scores.wer),
            "exact": asdict(scores.exact) | {"right": scores.right},
            "tasks": scores.tasks,
        }

    def speed(self) -> dict[str, Any]:
        """One round: tokens a second read into an empty cache, and written after them; the decoder alone."""
        if self._runner is None:
            path = next(self._directory.glob("backbone-*.gguf"))
            sizes = {"n_prompt": N_PROMPT, "n_predict": N_PREDICT, "depth": N_PROMPT, "n_ctx": 0}
            how = {"n_threads": self._n_threads, "n_gpu_layers": 0}
            plan = SpeedPlan(model=str(path), lora=None, kv_type=KV_TYPE, **sizes, **how)
            self._runner = self._open.enter_context(open_runner(plan, read_model(path, None), None))
        took = self._runner.sample()
        return {"read": N_PROMPT / took.prefill_s, "written": N_PREDICT / took.decode_s}

    def _model(self) -> Model:
        return Model(self._directory, kv_type=KV_TYPE, n_threads=self._n_threads)


def own_peak_rss() -> int | None:
    """Of this program alone: what getrusage says includes, on Linux, the parent as it was at the fork."""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_rss()
    line = next(line for line in status.read_text("ascii").splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("base", type=Path, help="F32's log-probabilities")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    child = Child(args.directory, args.base, args.threads)
    work = {"memory": child.memory, "quality": child.quality, "speed": child.speed}
    try:
        for line in _lines():
            print(json.dumps(work[line]()), flush=True)
    finally:
        child.close()


def _lines() -> Iterator[str]:
    while line := sys.stdin.readline():
        yield line.strip()


if __name__ == "__main__":
    main()
