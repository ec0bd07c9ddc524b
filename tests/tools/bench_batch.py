# SPDX-License-Identifier: Apache-2.0
"""What `batch` costs beside the model: a plain loop over the Python API, workers here, and workers on Ray.

    python -m tests.tools.bench_batch [MODEL] [--items 200] [--rounds 5] [--workers 1,2] [--no-ray] [--json]

MODEL is a model directory; without it the built-in phi4-nano, whose short answers make the rest visible.
Every way answers the same questions in turns, one thread a worker, and is timed from a fifth of the items on:
models are loaded by then. The overhead of a way with one worker is what an item takes more than in the loop;
medians of the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pocketphi.bulk.lines import LineFile
from pocketphi.bulk.output import Output
from pocketphi.bulk.performer import ItemSettings, ModelSettings, manifest_sha256
from pocketphi.bulk.pool import Pool
from pocketphi.bulk.run import work
from pocketphi.convert.builtin import builtin_bundle
from pocketphi.runtime import bundle as bundles
from pocketphi.runtime.engine import Model

QUESTIONS = ("What is the capital of France?", "How do you spell tea?", "What is 3 plus 4?", "Hello!")
WARM = 5  # one of so many items is not counted


class Ticks:
    """A `Progress` that notes when items are done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def start(self, total: int, what: str) -> None:
        """Nothing yet."""

    def advance(self, n: int, what: str) -> None:
        """One more."""
        self.times.append(time.perf_counter())

    def finish(self) -> None:
        """All."""

    @property
    def item_ms(self) -> float:
        """Milliseconds an item, by the wall clock."""
        counted = self.times[len(self.times) // WARM :]
        return 1e3 * (counted[-1] - counted[0]) / (len(counted) - 1)


def questions(n: int) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]}] for i in range(n)]


def plain_loop(model: Model, n: int) -> float:
    ticks = Ticks()
    for turns in questions(n):
        model.forget()
        model.chat(turns)
        ticks.advance(1, "")
    return ticks.item_ms


def batch(file: LineFile, workers: Any, folder: Path) -> float:
    ticks = Ticks()
    with Output(folder / "out.jsonl", {}, restart=True) as output:
        work(file, output, workers, file.entries, model_name="model", progress=ticks)
    return ticks.item_ms


def ways(
    stack: ExitStack, directory: Path, file: LineFile, folder: Path, counts: list[int], ray: bool
) -> Iterator[tuple[str, Callable[[], float]]]:
    """Name, and what measures it once."""
    sha256 = manifest_sha256(bundles.load(directory))
    settings = ModelSettings(str(directory), sha256, n_threads=1)
    items = ItemSettings(str(folder))
    model = stack.enter_context(Model(directory, n_threads=1))
    yield "loop", lambda: plain_loop(model, len(file.entries))

    def local(n: int) -> float:
        with Pool(file, settings, items, n) as pool:
            return batch(file, pool, folder)

    for n in counts:
        yield f"batch, {n}", lambda n=n: local(n)  # type: ignore[misc]
    if ray:
        from pocketphi.bulk.ray_pool import RayOptions, RayPool

        cluster = stack.enter_context(RayPool(file, settings, items, RayOptions(n_workers=max(counts))))

        def on_ray(n: int) -> float:
            cluster._n = n
            return batch(file, cluster, folder)

        for n in counts:
            yield f"ray, {n}", lambda n=n: on_ray(n)  # type: ignore[misc]


def measure(directory: Path, n_items: int, rounds: int, counts: list[int], ray: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        path = Path(name) / "in.jsonl"
        path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in questions(n_items)))
        file = stack.enter_context(LineFile(path))
        found: dict[str, list[float]] = {}
        measured = list(ways(stack, directory, file, Path(name), counts, ray))
        for i in range(rounds):
            for way, once in measured:
                found.setdefault(way, []).append(once())
                print(f"round {i + 1}: {way} {found[way][-1]:.2f} ms", file=sys.stderr)
    loop = statistics.median(found["loop"])
    return {
        way: {
            "item_ms": statistics.median(times),
            "over_loop_ms": statistics.median(times) - loop,
            "least_ms": min(times),
        }
        for way, times in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--no-ray", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    counts = [int(n) for n in args.workers.split(",")]
    directory = (args.model or builtin_bundle()).resolve()
    found = measure(directory, args.items, args.rounds, counts, not args.no_ray)
    if args.json:
        print(json.dumps(found))
        return
    print("| way, workers | ms an item | over the loop | least |\n|---|---|---|---|")
    for way, row in found.items():
        print(f"| {way} | {row['item_ms']:.2f} | {row['over_loop_ms']:+.2f} | {row['least_ms']:.2f} |")


if __name__ == "__main__":
    main()
