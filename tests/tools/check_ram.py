# SPDX-License-Identifier: Apache-2.0
"""Predictions of memory against what a run takes: `runtime/ram_model.py` beside peak resident memory.

    python -m tests.tools.check_ram MODEL_DIR [--only TEXT] [--cache-type f16,q8_0] [--backbone onnx]

Two processes for each shape. `pocketphi run --json` gives the peak of the whole run, which is often that of
loading. The other loads the model, sets the kernel's mark back, and asks the same: what asking takes. Linux.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import soundfile

from pocketphi.runtime import bundle as bundles
from pocketphi.runtime import ggml_plugin, onnx_kernels, ram_model
from pocketphi.runtime.engine import Model
from pocketphi.runtime.parts import Media, Message, Mode
from pocketphi.runtime.spec import Backbone

_ANSWER = 4  # tokens
_RATE = 16_000


@dataclass(frozen=True, slots=True)
class Shape:
    """One question: so many words, and media."""

    words: int = 2
    image: tuple[int, int] | None = None
    seconds: int = 0

    @property
    def name(self) -> str:
        parts = [f"{self.words} words"] if self.image is None and not self.seconds else []
        parts += ["{}×{}".format(*self.image)] if self.image else []
        return ", ".join([*parts, *([f"{self.seconds} s"] if self.seconds else [])])

    @property
    def mode(self) -> Mode:
        kinds = [name for name, there in (("vision", self.image), ("speech", self.seconds)) if there]
        return cast(Mode, "_".join(kinds) or "language")


SHAPES = (
    Shape(500),
    Shape(4050),
    Shape(image=(448, 448)),
    Shape(image=(1344, 896)),
    Shape(seconds=10),
    Shape(seconds=60),
    Shape(image=(448, 448), seconds=10),
    Shape(image=(1344, 896), seconds=60),
)


def arguments(shape: Shape, folder: Path) -> list[str]:
    """The question as `run` takes it; its files are written."""
    rng = np.random.default_rng(1)
    found = ["-p", "one " * shape.words]
    if shape.image:
        width, height = shape.image
        cv2.imwrite(str(folder / "picture.png"), rng.integers(0, 256, (height, width, 3), np.uint8))
        found += ["--image", str(folder / "picture.png")]
    if shape.seconds:
        soundfile.write(folder / "clip.wav", rng.normal(0, 0.1, shape.seconds * _RATE), _RATE)
        found += ["--audio", str(folder / "clip.wav")]
    return found


def whole_run(directory: Path, question: list[str], kv_type: str, backbone: Backbone) -> dict[str, Any]:
    """What `pocketphi run --json` says."""
    program = "import sys; sys.argv[0] = 'pocketphi'; from pocketphi.cli import main; main()"
    command = [sys.executable, "-c", program, "run", "-m", str(directory), "-n", str(_ANSWER), "--json"]
    command += ["--cache-type", kv_type, "--backbone", backbone]
    done = subprocess.run([*command, *question], check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def asking(directory: Path, question: list[str], kv_type: str, backbone: Backbone) -> int:
    """This process's peak, in bytes, from when the model is loaded."""
    named = dict(zip(question[::2], question[1::2], strict=True))
    media = [Media("image", Path(named["--image"]))] if "--image" in named else []
    media += [Media("audio", Path(named["--audio"]))] if "--audio" in named else []
    with Model(directory, kv_type=kv_type, backbone=backbone) as model:
        Path("/proc/self/clear_refs").write_text("5", "ascii")  # VmHWM becomes what is resident now
        model.chat([Message("user", named["-p"], media=tuple(media))], max_tokens=_ANSWER)
        status = Path("/proc/self/status").read_text("ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def asked(directory: Path, question: list[str], kv_type: str, backbone: Backbone) -> int:
    """`asking` in a process of its own."""
    command = [sys.executable, "-m", "tests.tools.check_ram", str(directory), "--cache-type", kv_type]
    command += ["--backbone", backbone, "--ask", json.dumps(question)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout)


def row(directory: Path, shape: Shape, kv_type: str, backbone: Backbone) -> str:
    """One line of the table."""
    with tempfile.TemporaryDirectory() as folder:
        question = arguments(shape, Path(folder))
        reply = whole_run(directory, question, kv_type, backbone)
        ask = asked(directory, question, kv_type, backbone)
    use = ram_model.Use(
        shape.mode,
        n_ctx=reply["usage"]["prompt_tokens"] + _ANSWER,
        kv_type=kv_type,
        image=shape.image or (448, 448),
        seconds=shape.seconds,
        packed=(ggml_plugin if backbone == "gguf" else onnx_kernels).load().active,
    )
    found = ram_model.estimate(ram_model.sizes_of(bundles.load(directory), backbone), use)
    cells = [shape.name, kv_type, str(reply["usage"]["prompt_tokens"])]
    for predicted, measured in ((found.peak, reply["peak_rss_bytes"]), (found.asking, ask)):
        cells += [f"{n / 1e6:,.0f}" for n in (predicted, measured)] + [f"{predicted / measured:.3f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--only", default="", help="shapes whose name holds this")
    parser.add_argument("--cache-type", help="[default: f16, of ONNX f32]")
    parser.add_argument("--backbone", choices=["gguf", "onnx"], default="gguf")
    parser.add_argument("--ask", help="one process's part: a question as JSON")
    a = parser.parse_args()
    kv_types = a.cache_type or ("f16" if a.backbone == "gguf" else "f32")
    if a.ask:
        print(asking(a.directory, json.loads(a.ask), kv_types, a.backbone))
        return
    print("| shape | KV | n | run, MB: predicted | measured | ratio | asking: predicted | measured | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for kv_type in kv_types.split(","):
        for shape in SHAPES:
            if a.only in shape.name:
                print(row(a.directory, shape, kv_type, a.backbone), flush=True)


if __name__ == "__main__":
    main()
