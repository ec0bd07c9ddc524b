# SPDX-License-Identifier: Apache-2.0
"""Cost and exactness of a full-size speech encoder with random weights, in each kind asked for.

    python -m tests.tools.bench_speech [--quants fp32,int8] [--seconds 10,30] [--threads 2] [--rounds 5]

The kinds take turns inside each round, so that a busy machine slows all of them. Peak memory is that of
a process of its own for each kind.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from pocketphi.convert.checkpoint import Checkpoint
from pocketphi.convert.config import ModelConfig, read_config
from pocketphi.convert.encoder_quant import named_quant
from pocketphi.convert.encoder_tensors import encoder_shapes, original_name
from pocketphi.convert.safetensors_file import TensorInfo
from pocketphi.convert.write_onnx_speech import GRAPHS, write_speech
from pocketphi.runtime.logmel import log_mel
from pocketphi.runtime.parts import AudioProjector
from pocketphi.runtime.speech_encoder import SpeechEncoder, SpeechFiles

from ..golden.speech.cases import CLIPS
from . import make_random_checkpoint

RATE = 16000
Float32 = npt.NDArray[np.float32]


class RandomWeights:
    """Stands in for a checkpoint: the tensors of an encoder, made when they are read.

    As transformers initialises them: products normal with standard deviation 0.02, norms 1, shifts 0. The
    convolutions of nine and three taps keep the size of what they are given.
    """

    def __init__(self, config: ModelConfig) -> None:
        assert config.vision is not None and config.audio is not None
        shapes = encoder_shapes(config.vision, config.audio, config.text.d_model)
        here = Path("random")
        self.tensors: Mapping[str, TensorInfo] = {
            (name := original_name(native)): TensorInfo(name, "BF16", shape, here, 0, 2 * int(np.prod(shape)))
            for native, shape in shapes.items()
        }

    def read(self, info: TensorInfo) -> Float32:
        shape = info.shape
        if info.name.endswith("global_mean"):
            return np.full(shape, 12, np.float32)
        if info.name.endswith("global_invstd"):
            return np.full(shape, 0.25, np.float32)
        if len(shape) == 1 or info.name.endswith((".b1", ".b2")):
            return np.full(shape, float("norm" in info.name and info.name.endswith("weight")), np.float32)
        rng = np.random.Generator(np.random.SFC64(zlib.crc32(info.name.encode())))
        taps = int(np.prod(shape[1:]))
        return rng.standard_normal(shape, np.float32) * np.float32(0.02 if taps > 9 else taps**-0.5)


def full_config() -> ModelConfig:
    return read_config(make_random_checkpoint._config("phi4-multimodal", None), "config.json")


def write(quant: str, directory: Path) -> None:
    """The graphs of one kind, and what writing them took."""
    config = full_config()
    begin = time.perf_counter()
    files = write_speech(directory, cast(Checkpoint, RandomWeights(config)), config, named_quant(quant))
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    size = sum(f.size for f in files) / 1e6
    print(f"{quant:5} written in {seconds:.1f} s, {size:.0f} MB, peak memory {peak:.0f} MB", flush=True)


def load(directory: Path, threads: int) -> SpeechEncoder:
    at = {part: directory / name for part, name in GRAPHS.items()}
    heads: dict[AudioProjector, Path] = {"speech": at["speech-projector"], "vision": at["vision-projector"]}
    files = SpeechFiles(at["front"], at["trunk"], heads)
    return SpeechEncoder(files, n_threads=threads)


def speech(seconds: float) -> Float32:
    """Log-mel of recorded voices, repeated as often as needed."""
    import soundfile

    parts = [soundfile.read(p, dtype="float32")[0] for p in sorted(CLIPS.glob("asr-*.flac"))]
    return log_mel(np.resize(np.concatenate(parts), int(seconds * RATE)))


def alone(directory: Path, threads: int, seconds: list[float]) -> None:
    """Peak memory of one kind by itself, as JSON; run in a process of its own."""
    begin = time.perf_counter()
    encoder = load(directory, threads)
    found: dict[str, Any] = {"load_s": time.perf_counter() - begin}
    for s in seconds:
        encoder.encode(speech(s), "speech")
        found[f"{s:g}"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(found))


def _children(
    quants: list[str], root: Path, args: argparse.Namespace
) -> Iterator[tuple[str, dict[str, Any]]]:
    me = [sys.executable, "-m", "tests.tools.bench_speech", "--threads", str(args.threads)]
    for quant in quants:
        directory = root / quant
        directory.mkdir()
        subprocess.run([*me, "--write", quant, str(directory)], check=True)
        out = subprocess.run(
            [*me, "--seconds", args.seconds, "--alone", str(directory)], check=True, capture_output=True
        )
        yield quant, json.loads(out.stdout)


def compare(args: argparse.Namespace) -> None:
    quants = args.quants.split(",")
    lengths = [float(s) for s in args.seconds.split(",")]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        peaks = dict(_children(quants, root, args))
        encoders = {q: load(root / q, args.threads) for q in quants}
        for s in lengths:
            features = speech(s)
            rows = {q: e.encode(features, "speech") for q, e in encoders.items()}  # and warm-up
            times: dict[str, list[float]] = {q: [] for q in quants}
            for _ in range(args.rounds):
                for q, encoder in encoders.items():
                    begin = time.perf_counter()
                    encoder.encode(features, "speech")
                    times[q].append(time.perf_counter() - begin)
            for q in quants:
                best, median = min(times[q]), float(np.median(times[q]))
                ratio = [a / b for a, b in zip(times[quants[0]], times[q], strict=True)]
                print(
                    f"{q:5} {s:g} s: {len(rows[q])} tokens, encode best {best:.3f} median {median:.3f} s, "
                    f"real-time factor {median / s:.3f}, {quants[0]} takes {np.median(ratio):.2f} x, "
                    f"cosine {_cosine(rows[q], rows[quants[0]]):.6f}, load {peaks[q]['load_s']:.1f} s, "
                    f"peak memory {peaks[q][f'{s:g}']:.0f} MB"
                )


def _cosine(a: Float32, b: Float32) -> float:
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quants", default="fp32,int8")
    parser.add_argument("--seconds", default="10,30")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", nargs=2, metavar=("QUANT", "DIR"), help=argparse.SUPPRESS)
    parser.add_argument("--alone", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        write(args.write[0], Path(args.write[1]))
    elif args.alone:
        alone(args.alone, args.threads, [float(s) for s in args.seconds.split(",")])
    else:
        compare(args)


if __name__ == "__main__":
    main()
