# SPDX-License-Identifier: Apache-2.0
"""How many tokens a second several slots of one model read and write in all, beside one decoder alone.

    python -m tests.tools.bench_slots MODEL [--slots 1,4] [--prompt N] [--tokens N] [--adapters none,speech]

MODEL is a model directory or a GGUF. Each slot is a thread: it reads a prompt of its own and writes greedily.
Rounds are interleaved, so that a busy moment meets all of them; the table has medians. With several adapters
slots differ in them, and rows cannot share a pass.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pocketphi.runtime import bundle as bundles
from pocketphi.runtime.decoder import Decoder
from pocketphi.runtime.decoder_ggml import GgmlDecoder, GgmlOptions
from pocketphi.runtime.decoder_slots import SlotPool
from pocketphi.runtime.gguf_check import AdapterFile, read_model
from pocketphi.runtime.gguf_header import text_spec
from pocketphi.runtime.parts import TokenSpan
from pocketphi.runtime.spec import TextSpec


class Work:
    """What every slot does: read, meet the others, write."""

    def __init__(
        self, decoders: Sequence[Decoder], adapters: Sequence[str | None], n_prompt: int, n: int
    ) -> None:
        self._decoders, self._adapters, self._n_prompt, self._n = decoders, adapters, n_prompt, n
        self._marks: list[float] = []
        mark = lambda: self._marks.append(time.perf_counter())  # noqa: E731
        self._barrier = threading.Barrier(len(decoders), action=mark)

    def run(self) -> tuple[float, float]:
        """Seconds for all prompts, and for all tokens after them."""
        self._marks.clear()
        threads = [threading.Thread(target=self._one, args=(i,)) for i in range(len(self._decoders))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        began, read, written = self._marks
        return read - began, written - read

    def _one(self, i: int) -> None:
        decoder = self._decoders[i]
        ids = np.random.default_rng(i).integers(0, decoder.spec.vocab_size, self._n_prompt, dtype=np.int32)
        capacity = self._n_prompt + self._n
        decoder.open(
            table=decoder.spec.rope.table(capacity), capacity=capacity,
            adapter=self._adapters[i % len(self._adapters)],
        )  # fmt: skip
        decoder.feed(TokenSpan(ids[:64]))  # every weight is touched once
        decoder.rewind(0)
        self._barrier.wait()
        logits = decoder.feed(TokenSpan(ids))
        self._barrier.wait()
        for _ in range(self._n):
            logits = decoder.feed(TokenSpan(np.array([logits.argmax()], np.int32)))
        self._barrier.wait()


def open_model(path: Path) -> tuple[Path, TextSpec, dict[str, AdapterFile]]:
    if path.is_file():
        header = read_model(path, None)
        return path, text_spec(header), {}
    bundle = bundles.load(path)
    files = {name: AdapterFile(bundle.path(a.file), a.alpha, a.rank) for name, a in bundle.adapters.items()}
    return bundle.path(bundle.decoder), bundle.text, files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--slots", default="1,2,4,8")
    parser.add_argument("--prompt", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--adapters", default="none")
    a = parser.parse_args()
    path, spec, files = open_model(a.model)
    adapters = [None if name == "none" else name for name in a.adapters.split(",")]
    capacity = a.prompt + a.tokens
    works: dict[str, Work] = {}
    alone = GgmlDecoder(path, spec, files, GgmlOptions(), foreign=a.model.is_file())
    works["decoder"] = Work([alone], adapters[:1], a.prompt, a.tokens)
    pools = {}
    for n in map(int, a.slots.split(",")):
        pool = pools[n] = SlotPool(
            path, spec, files, GgmlOptions(), n_slots=n, capacity=capacity, foreign=a.model.is_file()
        )
        works[f"{n} slots"] = Work([pool.slot(i) for i in range(n)], adapters, a.prompt, a.tokens)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for i in range(a.rounds + 1):  # the first one warms up
        for name, work in works.items():
            seconds = work.run()
            if i:
                found[name].append(seconds)
    print("| | prompts, tokens/s | answers, tokens/s |\n|---|---|---|")
    for name, seconds_of in found.items():
        n = 1 if name == "decoder" else int(name.split()[0])
        read, written = (statistics.median(one) for one in zip(*seconds_of, strict=True))
        print(f"| {name} | {n * a.prompt / read:.1f} | {n * a.tokens / written:.1f} |")
    for n, pool in pools.items():
        passes, rows = pool.passes
        print(f"{n} slots: {rows / passes:.2f} rows a pass")
        pool.close()
    alone.close()


if __name__ == "__main__":
    main()
