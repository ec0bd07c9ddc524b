# SPDX-License-Identifier: Apache-2.0
"""Speed of the ONNX backbone beside onnxruntime-genai's own export of the same checkpoint, in turns.

    python -m tests.tools.bench_onnx MODEL_DIR GENAI_DIR [-p 512 -n 64 -r 5]

Four processes, of which one works at a time: our runtime with our kernels, our runtime with ONNX Runtime's,
onnxruntime-genai on our directory, and onnxruntime-genai on what its model builder made. How both models are
made, eight layers each:

    python -m tests.tools.make_random_checkpoint --shape phi4-mini --layers 8 --out CHECKPOINT
    pocketphi convert CHECKPOINT -o MODEL_DIR --backbone onnx
    python -m venv VENV
    VENV/bin/pip install torch==2.13.0 transformers onnx onnx_ir onnxruntime onnxruntime-genai==0.18.0
    VENV/bin/python -m onnxruntime_genai.models.builder -i CHECKPOINT -o GENAI_DIR -p int4 -e cpu

The builder's has 4 bits everywhere, in blocks of 32, as ours has with `--onnx-quant int4-pure`. By default
ours has 8 in qkv, ffn_down and the head, which the builder comes near to with `--extra_options
matmul_mixed_precision=last_matmul:int8,mixed_layers:int8 shared_embeddings=false`. A prompt of random
tokens is read, then as many tokens as asked for are written, one at a time, whatever they are.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

_SETTLE_S = 0.5  # threads of the one that has just run may spin for a while
_WARM_UP = 64  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="our model directory")
    parser.add_argument("genai", type=Path, nargs="?", help="the model builder's")
    parser.add_argument("-p", "--prompt", type=int, default=512)
    parser.add_argument("-n", "--predict", type=int, default=64)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("--child", choices=("ours", "genai"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        serve(args)
    elif args.genai is None:
        parser.error("GENAI_DIR is needed")
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """Every one in turns, a table at the end."""
    numbers = ["-p", str(args.prompt), "-n", str(args.predict), "-t", str(args.threads)]
    found: dict[str, list[tuple[float, float]]] = {}
    with ExitStack() as stack:
        children = {}
        for name, kind, model, kernels in (
            ("ours", "ours", args.model, "auto"),
            ("ours, ONNX Runtime's kernels", "ours", args.model, "stock"),
            ("ours in genai", "genai", args.model, "auto"),
            ("genai's own", "genai", args.genai, "auto"),
        ):
            command = [sys.executable, "-m", "tests.tools.bench_onnx", str(model), "--child", kind, *numbers]
            env = os.environ | {"POCKETPHI_KERNELS": kernels, "ORT_DISABLE_TELEMETRY": "1"}
            child = stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
            )
            print(f"{name}: {ask(child, name)}", file=sys.stderr)  # loaded and warmed up
            children[name], found[name] = child, []
        for i in range(args.rounds):
            for name, child in children.items():
                time.sleep(_SETTLE_S)
                found[name].append(tuple(ask(child, name)))
            print(f"round {i + 1} of {args.rounds}", file=sys.stderr)
        for child in children.values():
            assert child.stdin is not None
            child.stdin.close()
    print_table(found)


def ask(child: subprocess.Popen[str], name: str) -> Any:
    """What a child says to one line."""
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write("\n")
    child.stdin.flush()
    line = child.stdout.readline()
    if not line:
        raise SystemExit(f"{name}: its process is gone")
    return json.loads(line)


def print_table(found: dict[str, list[tuple[float, float]]]) -> None:
    """Medians, what they lie between, and each one against genai's own."""
    print("| | prefill, tokens/s | decode, tokens/s | to genai's own |\n|---|---|---|---|")
    medians = {n: [statistics.median(c) for c in zip(*rows, strict=True)] for n, rows in found.items()}
    peer = medians["genai's own"]
    for name, rows in found.items():
        spread = [f"{min(c):.1f} to {max(c):.1f}" for c in zip(*rows, strict=True)]
        cells = [f"{m:.1f} ({s})" for m, s in zip(medians[name], spread, strict=True)]
        ratio = " / ".join(f"{a / b:.2f}" for a, b in zip(medians[name], peer, strict=True))
        print(f"| {name} | {cells[0]} | {cells[1]} | {ratio} |")


def serve(args: argparse.Namespace) -> None:
    """The child: says what it has loaded, then gives one repetition for each line on stdin."""
    about, once = (_ours if args.child == "ours" else _genai)(args)
    rng = np.random.default_rng(1)
    sys.stdin.readline()
    once(rng.integers(0, 199_000, _WARM_UP, np.int32))
    print(json.dumps(about), flush=True)
    for _ in sys.stdin:
        prefill_s, decode_s = once(rng.integers(0, 199_000, args.prompt, np.int32))
        print(json.dumps([args.prompt / prefill_s, args.predict / decode_s]), flush=True)


Once = Callable[[Any], tuple[float, float]]


def _ours(args: argparse.Namespace) -> tuple[str, Once]:
    from pocketphi.runtime import bundle as bundles
    from pocketphi.runtime import onnx_kernels
    from pocketphi.runtime.backbone import BackboneOptions, OpenBackbone
    from pocketphi.runtime.parts import TokenSpan

    options = BackboneOptions(backbone="onnx", n_threads=args.threads)
    decoder = OpenBackbone(bundles.load(args.model), options).open()
    capacity = args.prompt + args.predict
    decoder.open(table=decoder.spec.rope.table(capacity), capacity=capacity, adapter=None)

    def once(ids: Any) -> tuple[float, float]:
        decoder.rewind(0)
        began = time.perf_counter()
        decoder.feed(TokenSpan(ids))
        read = time.perf_counter()
        for i in range(args.predict):
            decoder.feed(TokenSpan(ids[i % len(ids) :][:1]))
        return read - began, time.perf_counter() - read

    return onnx_kernels.load().variant or "none of our kernels", once


def _genai(args: argparse.Namespace) -> tuple[str, Once]:
    import onnxruntime_genai as genai

    config = genai.Config(str(args.model))
    config.overlay(
        json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": args.threads}}}})
    )
    model = genai.Model(config)

    def once(ids: Any) -> tuple[float, float]:
        params = genai.GeneratorParams(model)
        params.set_search_options(
            max_length=args.prompt + args.predict + 2, min_length=args.prompt + args.predict + 2
        )
        generator = genai.Generator(model, params)
        began = time.perf_counter()
        generator.append_tokens(ids)
        generator.generate_next_token()
        read = time.perf_counter()
        for _ in range(args.predict):
            generator.generate_next_token()
        return read - began, time.perf_counter() - read

    return f"onnxruntime-genai {genai.__version__}", once


if __name__ == "__main__":
    main()
