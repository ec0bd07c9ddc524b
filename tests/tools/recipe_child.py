# SPDX-License-Identifier: Apache-2.0
"""One recipe in a process of its own, which `recipes` tells line by line what to measure.

    python -m tests.tools.recipe_child DIR BASE --threads 1     (on stdin: memory, quality, speed)

`memory` comes first: what is loaded for the others is no part of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pocketphi.runtime import bundle as bundles
from pocketphi.runtime import ggml_plugin, onnx_kernels
from pocketphi.runtime.backbone import BackboneOptions, OpenBackbone
from pocketphi.runtime.bench_decoder import SpeedPlan, SpeedRunner
from pocketphi.runtime.engine import Model
from pocketphi.runtime.report import peak_rss
from pocketphi.runtime.spec import Backbone

from .. import scoring

KV_TYPE: Mapping[Backbone, str] = {"gguf": "f16", "onnx": "f32"}  # as users have it, F32 weights too
N_PROMPT, N_PREDICT = 256, 64
ASKED = ("text", "vision", "speech")  # one item of each: every adapter and encoder is loaded then


class Child:
    """A model directory, opened for what is measured."""

    def __init__(self, directory: Path, base: Path, n_threads: int) -> None:
        self._directory, self._base, self._n_threads = directory, base, n_threads
        self._bundle = bundles.load(directory)
        self._kv_type = KV_TYPE[self._bundle.backbones[0]]
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
                "kernels": (ggml_plugin if self._bundle.decoder is not None else onnx_kernels).load().active,
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
            self._runner = self._open.enter_context(self._opened())
        took = self._runner.sample()
        return {"read": N_PROMPT / took.prefill_s, "written": N_PREDICT / took.decode_s}

    @contextmanager
    def _opened(self) -> Iterator[SpeedRunner]:
        options = BackboneOptions(n_threads=self._n_threads, kv_type=self._kv_type)
        decoder = OpenBackbone(self._bundle, options).open()
        capacity, text = N_PROMPT + N_PREDICT, self._bundle.text
        decoder.open(table=text.rope.table(capacity), capacity=capacity, adapter=None)
        sizes = {"n_prompt": N_PROMPT, "n_predict": N_PREDICT, "depth": N_PROMPT, "n_ctx": 0}
        how = {"n_threads": self._n_threads, "n_gpu_layers": 0, "kv_type": self._kv_type}
        try:
            runner = SpeedRunner(decoder, SpeedPlan(model=str(self._directory), lora=None, **sizes, **how))
            runner.warm_up()
            yield runner
        finally:
            decoder.close()

    def _model(self) -> Model:
        return Model(self._directory, kv_type=self._kv_type, n_threads=self._n_threads)


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
