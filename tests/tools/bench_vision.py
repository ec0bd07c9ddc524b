# SPDX-License-Identifier: Apache-2.0
"""The vision encoder at full size with random weights: time, tokens, memory, and how far each kind is off.

    python -m tests.tools.bench_vision [--kinds fp32,int8] [--threads N] [--runs N] [--out DIR]

SigLIP so400m's shape (1152 wide, 4304, 26 layers used, 16 heads) into a decoder 3072 wide. The kinds are
timed in turn within each run, so that a busy machine slows them alike; the fastest run counts. Memory is the
peak of a process of its own that converts, or loads and encodes, one kind.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from pocketphi.convert.checkpoint import Checkpoint
from pocketphi.convert.config import ModelConfig, read_config
from pocketphi.convert.mapping import encoder_names
from pocketphi.convert.onnx_graph import ENCODER_QUANTS, named_quant
from pocketphi.convert.safetensors_file import TensorInfo
from pocketphi.convert.write_onnx_vision import write_vision
from pocketphi.runtime.image import ImageInput, prepare
from pocketphi.runtime.vision_encoder import VisionEncoder, VisionFiles

from .. import tiny
from ..golden.vision.pictures import picture

SIZES = ((448, 448), (1344, 896))
OUTLIERS = 1e-3  # share of input channels whose weights are larger, as trained encoders have them
OUTLIER_GAIN = 8


class RandomSource:
    """Stands in for a checkpoint: each tensor is made when it is read, the same for the same name."""

    root = Path("random")

    def __init__(self, config: ModelConfig) -> None:
        self.tensors = {
            name: TensorInfo(name, "BF16", shape, self.root, 0, 2 * int(np.prod(shape)))
            for name, shape in encoder_names(config).items()
        }

    def read(self, info: TensorInfo) -> npt.NDArray[np.float32]:
        """Matrices keep the size of what they multiply; norms are near 1, with a few large channels."""
        rng = np.random.Generator(np.random.PCG64(list(info.name.encode())))
        values = rng.standard_normal(info.shape, np.float32)
        if "norm" in info.name and info.name.endswith("weight"):
            large = rng.random(info.shape) < OUTLIERS * 10
            return (1 + np.float32(0.1) * values) * np.where(large, np.float32(OUTLIER_GAIN), np.float32(1))
        if len(info.shape) < 2 or "position" in info.name:
            return values * np.float32(0.02)
        return values * np.float32(np.prod(info.shape[1:]) ** -0.5)


def full_size() -> ModelConfig:
    """phi4-nano's configuration with the published encoder sizes and decoder width."""
    raw = tiny.config("phi4-multimodal")
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}
    raw["vision_config"] = {**raw["vision_config"], **vision, "num_attention_heads": 16}
    heads = {"num_attention_heads": 24, "num_key_value_heads": 8}
    return read_config({**raw, "hidden_size": 3072, **heads, **_rope(raw, 48)}, "bench")


def _rope(raw: Mapping[str, Any], n: int) -> dict[str, Any]:
    factors = {"short_factor": [1.0] * n, "long_factor": [2.0] * n}
    return {"rope_parameters": {**raw["rope_parameters"], **factors}}


def convert(directory: Path, kind: str) -> None:
    """Write one kind of encoder."""
    config = full_size()
    directory.mkdir(parents=True)
    write_vision(directory, cast(Checkpoint, RandomSource(config)), config, named_quant(kind))


def open_encoder(directory: Path, threads: int) -> VisionEncoder:
    """Load what `convert` wrote."""
    files = VisionFiles(directory / "vision.onnx", directory / "vision-projector.onnx")
    return VisionEncoder(files, n_threads=threads)


def _encode(directory: Path, threads: int, image: ImageInput) -> None:
    open_encoder(directory, threads).encode(image)


def _measured(connection: Any, work: Callable[..., None], *arguments: Any) -> None:
    work(*arguments)
    connection.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def peak_mib(work: Callable[..., None], *arguments: Any) -> float:
    """MiB of a fresh process that does this and nothing else."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(there, work, *arguments))
    process.start()
    there.close()
    peak: float = here.recv()
    process.join()
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--kinds", default="fp32,int8", help=f"of {', '.join(ENCODER_QUANTS)}; the first is the yardstick"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, help="keep the encoders here, and reuse those that are there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        bench(arguments.out or Path(temporary), arguments.kinds.split(","), arguments.threads, arguments.runs)


def bench(out: Path, kinds: list[str], threads: int, runs: int) -> None:
    """Print one line for each kind and size."""
    images = [prepare(picture(*size)) for size in SIZES]
    for kind in kinds:
        if not (out / kind).exists():
            started = time.perf_counter()
            peak = peak_mib(convert, out / kind, kind)
            took = time.perf_counter() - started
            size = sum(f.stat().st_size for f in (out / kind).iterdir()) / 2**20
            print(f"{kind}: {size:.0f} MiB written in {took:.1f} s, peak {peak:.0f} MiB")
        print(f"{kind}: {peak_mib(_encode, out / kind, threads, images[-1]):.0f} MiB to encode {SIZES[-1]}")
    encoders = {kind: open_encoder(out / kind, threads) for kind in kinds}
    for image, (width, height) in zip(images, SIZES, strict=True):
        best = dict.fromkeys(kinds, float("inf"))
        rows = {}
        for _ in range(runs):
            for kind, encoder in encoders.items():
                started = time.perf_counter()
                rows[kind] = encoder.encode(image)
                best[kind] = min(best[kind], time.perf_counter() - started)
        want = rows[kinds[0]]
        for kind in kinds:
            cosine = float((rows[kind] * want).sum() / np.linalg.norm(rows[kind]) / np.linalg.norm(want))
            print(
                f"{width}x{height} {kind}: {image.n_tokens} tokens, {image.layout.n_crops} crops, "
                f"{best[kind]:.2f} s, {best[kinds[0]] / best[kind]:.2f} x {kinds[0]}, cosine {cosine:.5f}"
            )


if __name__ == "__main__":
    main()
