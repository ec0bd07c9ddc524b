# SPDX-License-Identifier: Apache-2.0
"""The plug-in's table in SPEED.md: ours and stock ggml in turns, on GGUFs of the real width.

    python -m tests.tools.make_random_gguf --plain --quant Q4_0 --out q4_0.gguf      (see its own help)
    python -m tests.tools.bench_kernels q4_0.gguf q4_k_m.gguf --lora lora320.gguf [-r 5] [--only NAME]

Prints a row for each case: prompts of 512, 4,096, 16 and 64 tokens, writing at depth 0 and 4,096, and what
the adapter costs each path: its time with the adapter over its time without, less one. Medians of interleaved
repetitions; the rate's share is of what the machine itself reached just before.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from pocketphi.runtime import bench_gguf
from pocketphi.runtime.bench_decoder import SpeedPlan
from pocketphi.runtime.bench_gguf import Speed, SpeedResult
from pocketphi.runtime.threads import default_threads


@dataclass(frozen=True, slots=True)
class Case:
    """What to read and to write."""

    name: str
    n_prompt: int
    n_predict: int
    depth: int = 0


CASES = (
    Case("512", 512, 64),
    Case("16", 16, 1),
    Case("64", 64, 1),
    Case("4096", 4096, 32, 4096),
)


def measure(model: str, case: Case, lora: str | None, repetitions: int) -> SpeedResult:
    """One case, ours and stock."""
    plan = SpeedPlan(model, lora, case.n_prompt, case.n_predict, case.depth, 0, default_threads(), 0, "f16")
    return bench_gguf.run(
        plan, repetitions=repetitions, compare=True, note=lambda line: print(line, file=sys.stderr)
    )


def row(model: str, what: str, ours: float, stock: float, share: str) -> str:
    """A line of the table."""
    return f"| {Path(model).stem} | {what} | {ours:.1f} | {stock:.1f} | **{ours / stock:.2f}** | {share} |"


def rows(model: str, case: Case, result: SpeedResult) -> list[str]:
    """Reading, and writing where the case writes enough to time."""
    assert result.peer is not None
    share = f"{result.gops:.0f} GOPS, {100 * result.gops / result.machine.int8_gops:.0f} %"
    found = [row(model, f"read {case.n_prompt}", result.speed.prefill_tps, result.peer.prefill_tps, share)]
    if case.n_predict > 1:
        share = f"{result.gbps:.1f} GB/s, {100 * result.gbps / result.machine.read_gbps:.0f} %"
        what = f"write at {case.depth}"
        found.append(row(model, what, result.speed.decode_tps, result.peer.decode_tps, share))
    return found


def costs(model: str, plain: SpeedResult, adapted: SpeedResult) -> list[str]:
    """What the adapter costs each path."""
    assert plain.peer is not None and adapted.peer is not None

    def cost(without: Speed, with_it: Speed) -> str:
        prefill = without.prefill_tps / with_it.prefill_tps - 1
        decode = without.decode_tps / with_it.decode_tps - 1
        return f"read {100 * prefill:.1f} %, write {100 * decode:.1f} %"

    name = Path(model).stem
    return [
        f"{name}: the adapter costs ours {cost(plain.speed, adapted.speed)}; "
        f"stock {cost(plain.peer, adapted.peer)}"
    ]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--lora")
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("--only", choices=[case.name for case in CASES])
    args = parser.parse_args()
    print("| model | test | ours, tok/s | stock, tok/s | ratio | rate and share of the machine |")
    print("|---|---|---|---|---|---|")
    after: list[str] = []
    for model in args.models:
        for case in CASES:
            if args.only not in (None, case.name):
                continue
            plain = measure(model, case, None, args.repetitions)
            print("\n".join(rows(model, case, plain)), flush=True)
            if args.lora and case.name == "512":
                adapted = measure(model, case, args.lora, args.repetitions)
                name = f"{Path(model).stem} + {Path(args.lora).stem}"
                print("\n".join(rows(name, case, adapted)), flush=True)
                after += costs(model, plain, adapted)
    print("\n" + "\n".join(after))
    machine = plain.machine
    print(
        f"machine: int8 {machine.int8_gops:.0f} GOPS, fp32 {machine.fp32_gflops:.0f} GFLOPS, "
        f"read {machine.read_gbps:.1f} GB/s on {machine.threads} threads"
    )


if __name__ == "__main__":
    main()
