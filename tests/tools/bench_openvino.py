# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode speed beside OpenVINO's int4 of the same shape, in turns.

    python -m tests.tools.bench_openvino MODEL.gguf OPENVINO_DIR --python VENV/bin/python [-p 512 -n 64 -r 5]

OpenVINO runs in a virtual environment of its own and in a process of its own, through openvino-genai with its
defaults (an 8-bit cache, activations quantized per group). How both models are made, eight layers each:

    python -m venv VENV
    VENV/bin/pip install torch==2.13.0 optimum-intel openvino openvino-genai openvino-tokenizers nncf
    VENV/bin/pip uninstall -y torchvision    # if pip brought one that is not for this torch
    python -m tests.tools.make_random_checkpoint --shape phi4-mini --layers 8 --out CHECKPOINT
    VENV/bin/optimum-cli export openvino -m CHECKPOINT --task text-generation-with-past \
        --weight-format int4 --group-size 128 --ratio 1.0 OPENVINO_DIR
    python -m tests.tools.make_random_gguf --out MODEL.gguf --quant Q4_0 --layers 8

The exporter keeps embedding and head, which are tied, at 8 bits. Its time to the first token is taken for
prefill, its mean time for each token after that for decode; both include choosing a token, which is
microseconds. POCKETPHI_KERNELS=stock compares stock ggml instead.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

_SETTLE_S = 0.5  # threads of the one that has just run may spin for a while


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="our GGUF; with --child OpenVINO's directory")
    parser.add_argument("openvino", type=Path, nargs="?")
    parser.add_argument("--python", type=Path, help="the interpreter that has openvino-genai")
    parser.add_argument("-p", "--prompt", type=int, default=512)
    parser.add_argument("-n", "--predict", type=int, default=64)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        serve(args)
    elif args.openvino is None or args.python is None:
        parser.error("OPENVINO_DIR and --python are needed")
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    from pocketphi.runtime.bench_decoder import SpeedPlan, open_runner
    from pocketphi.runtime.gguf_header import read_header

    plan = SpeedPlan(
        model=str(args.model),
        lora=None,
        n_prompt=args.prompt,
        n_predict=args.predict,
        depth=args.prompt,
        n_ctx=0,
        n_threads=args.threads,
        n_gpu_layers=0,
        kv_type="f16",
    )
    numbers = ["-p", str(args.prompt), "-n", str(args.predict), "-t", str(args.threads)]
    command = [str(args.python), str(Path(__file__).resolve()), str(args.openvino), "--child", *numbers]
    found: dict[str, list[tuple[float, float]]] = {"ours": [], "openvino": []}
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child,
        open_runner(plan, read_header(args.model), None) as runner,
    ):
        ask(child)  # it has loaded its model and warmed up
        for i in range(args.rounds):
            time.sleep(_SETTLE_S)
            sample = runner.sample()
            found["ours"].append((args.prompt / sample.prefill_s, args.predict / sample.decode_s))
            time.sleep(_SETTLE_S)
            found["openvino"].append(ask(child))
            print(f"round {i + 1} of {args.rounds}", file=sys.stderr)
        assert child.stdin is not None
        child.stdin.close()
    print_table(found)


def ask(child: subprocess.Popen[str]) -> tuple[float, float]:
    """Tokens a second of one repetition there, prefill and decode."""
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write("\n")
    child.stdin.flush()
    line = child.stdout.readline()
    if not line:
        raise SystemExit("OpenVINO's process is gone")
    prefill, decode = json.loads(line)
    return prefill, decode


def print_table(found: dict[str, list[tuple[float, float]]]) -> None:
    print("| | prefill, tokens/s | decode, tokens/s |\n|---|---|---|")
    medians = {
        name: [statistics.median(column) for column in zip(*rows, strict=True)]
        for name, rows in found.items()
    }
    for name, rows in found.items():
        spread = [f"{min(c):.1f} to {max(c):.1f}" for c in zip(*rows, strict=True)]
        cells = [f"{m:.1f} ({s})" for m, s in zip(medians[name], spread, strict=True)]
        print(f"| {name} | {cells[0]} | {cells[1]} |")
    ratio = [a / b for a, b in zip(medians["ours"], medians["openvino"], strict=True)]
    print(f"| ours / openvino | {ratio[0]:.2f} | {ratio[1]:.2f} |")


def serve(args: argparse.Namespace) -> None:
    """The child: one repetition for each line on stdin. Nothing of pocketphi is there."""
    import openvino as ov
    import openvino_genai as genai

    pipeline: Any = genai.LLMPipeline(str(args.model), "CPU", INFERENCE_NUM_THREADS=args.threads)
    config = genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos = args.predict + 1, True  # the first one is prefill's
    rng = np.random.default_rng(1)
    for _ in sys.stdin:
        # Other tokens each time, so that no cache of prefixes can help.
        ids = ov.Tensor(rng.integers(0, 199_000, (1, args.prompt), np.int64))
        mask = ov.Tensor(np.ones((1, args.prompt), np.int64))
        metrics = pipeline.generate(genai.TokenizedInputs(ids, mask), config).perf_metrics
        prefill = 1e3 * args.prompt / metrics.get_ttft().mean
        print(json.dumps([prefill, 1e3 / metrics.get_tpot().mean]), flush=True)


if __name__ == "__main__":
    main()
