# SPDX-License-Identifier: Apache-2.0
"""Whether the decoder's threads and the encoders' get in each other's way: each alone, then taking turns.

    python -m tests.tools.bench_pools MODEL_DIR [--rounds N]

Alone: a process that only decodes, and one that only encodes. Together: one process that encodes and decodes
in turns, as a conversation does. Prints the medians and their ratios; 1.0 means that they do not meet.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from pocketphi.runtime import bundle as bundles
from pocketphi.runtime.engine import Model
from pocketphi.runtime.media import MediaEncoder
from pocketphi.runtime.parts import Media
from pocketphi.runtime.sampler import Sampling
from pocketphi.runtime.threads import default_threads

_CLIP = (np.random.default_rng(1).normal(0, 0.1, 160_000).astype(np.float32), 16_000)
_PICTURE = np.random.default_rng(1).integers(0, 256, (448, 448, 3), np.uint8)
_ENDLESS = Sampling(grammar='root ::= "x" root')
_TOKENS = 16


def decode_s(model: Model) -> float:
    """Seconds for one written token."""
    model.forget()
    reply = model.chat([{"role": "user", "content": "Say x."}], max_tokens=_TOKENS, sampling=_ENDLESS)
    return 1 / reply.timings.predicted_per_second


def encode_s(media: MediaEncoder) -> tuple[float, float]:
    """Seconds for a picture, and for ten seconds of speech."""
    media.forget()
    start = time.perf_counter()
    media.embed(Media("image", _PICTURE), None)
    middle = time.perf_counter()
    media.embed(Media("audio", _CLIP), "speech")
    return middle - start, time.perf_counter() - middle


def measure(what: str, directory: Path, rounds: int) -> dict[str, float]:
    found: dict[str, list[float]] = {"decode": [], "image": [], "speech": []}
    media = MediaEncoder(bundles.load(directory), n_threads=default_threads())
    model = Model(directory) if what != "encode" else None
    for i in range(rounds + 1):  # the first one loads and warms up
        if what != "decode":
            image, speech = encode_s(media)
            if i:
                found["image"].append(image)
                found["speech"].append(speech)
        if model is not None:
            seconds = decode_s(model)
            if i:
                found["decode"].append(seconds)
    if model is not None:
        model.close()
    return {name: statistics.median(values) for name, values in found.items() if values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("decode", "encode", "both"), help="one process's part, as JSON")
    a = parser.parse_args()
    if a.only:
        print(json.dumps(measure(a.only, a.directory, a.rounds)))
        return
    results = {}
    for what in ("decode", "encode", "both"):
        command = [sys.executable, "-m", "tests.tools.bench_pools", str(a.directory)]
        command += ["--rounds", str(a.rounds), "--only", what]
        results[what] = json.loads(subprocess.check_output(command, stderr=subprocess.DEVNULL))
    print("| work | alone, ms | taking turns, ms | ratio |\n|---|---|---|---|")
    for name in ("decode", "image", "speech"):
        alone = results["decode" if name == "decode" else "encode"][name]
        turns = results["both"][name]
        print(f"| {name} | {alone * 1e3:.1f} | {turns * 1e3:.1f} | {turns / alone:.2f} |")


if __name__ == "__main__":
    main()
