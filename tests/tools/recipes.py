# SPDX-License-Identifier: Apache-2.0
"""What each recipe costs phi4-nano: size, memory, divergence from F32, word errors, right answers, speed.

    python -m tests.tools.recipes [--only Q4_0 F16 …] [-o docs] [--rounds 100] [--threads 1]

Writes recipes.json, recipes.md and recipes.png. Each recipe is measured in a process of its own (see
`recipe_child`), one after the other; for speed all of them take turns, so that a busy moment slows all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import pocketphi
from pocketphi import convert as converter
from pocketphi.convert import conversion
from pocketphi.evaluate import imatrix
from pocketphi.evaluate.perplexity import measure
from pocketphi.runtime.bundle import MANIFEST
from pocketphi.runtime.cache import CACHE_VARIABLE
from pocketphi.runtime.engine import Model
from pocketphi.runtime.spec import Backbone

from ..golden.perplexity.golden import N_CTX, TEXT
from ..scoring import NANO
from .recipe_child import KV_TYPE, N_PREDICT, N_PROMPT
from .recipe_table import markdown, to_json

ROOT = NANO.parent


@dataclass(frozen=True)
class Combination:
    """What `convert` is told."""

    quant: str
    lora_quant: str
    encoders: str
    imatrix: bool = False
    backbone: Backbone = "gguf"

    @property
    def name(self) -> str:
        engine = "ONNX " if self.backbone == "onnx" else ""
        importances = " + imatrix" if self.imatrix else ""
        return f"{engine}{self.quant}{importances}, {self.lora_quant}, {self.encoders}"

    def options(self, matrix: Path | None) -> converter.Options:
        rest = {"encoders": self.encoders, "name": "phi4-nano", "backbone": self.backbone}
        if self.backbone == "onnx":
            return converter.Options(onnx_quant=self.quant, onnx_lora=self.lora_quant, **rest)
        path = matrix if self.imatrix else None
        return converter.Options(self.quant, self.lora_quant, imatrix=path, **rest)


COMBINATIONS = (
    Combination("F32", "F32", "fp32"),
    Combination("F16", "F16", "fp16"),
    Combination("Q8_0", "Q8_0", "int8"),
    Combination("Q6_K", "Q8_0", "int8"),
    Combination("Q5_K_M", "Q8_0", "int8"),
    Combination("Q5_K_M", "Q8_0", "int8", imatrix=True),
    Combination("Q4_K_M", "F16", "fp32"),  # what is left of the loss when only the backbone is small
    Combination("Q4_K_M", "Q8_0", "int8"),  # the default
    Combination("Q4_K_M", "Q8_0", "int8", imatrix=True),
    Combination("Q4_K_M", "Q4_0", "int8"),  # the loss of smaller adapters alone
    Combination("Q4_K_M", "Q8_0", "int4"),  # and of smaller encoders
    Combination("Q4_0", "Q8_0", "int8"),
    Combination("Q4_0", "Q8_0", "int8", imatrix=True),
    Combination("Q4_0", "Q4_0", "int4"),  # the smallest
    Combination("int8", "fp16", "int8", backbone="onnx"),
    Combination("int4", "fp16", "int8", backbone="onnx"),  # the default there
    Combination("int4", "int8", "int4", backbone="onnx"),  # what --target phone writes
    Combination("int4-pure", "int8", "int4", backbone="onnx"),  # the smallest there
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [c.name for c in COMBINATIONS]
    parser.add_argument("--only", nargs="+", metavar="TEXT", help=f"those whose name begins so: {names}")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs")
    parser.add_argument("--rounds", type=int, default=100, help="of the speeds")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    chosen = [c for c in COMBINATIONS if args.only is None or c.name.startswith(tuple(args.only))]
    if not chosen:
        parser.error(f"no recipe's name begins so, expected one of {names}")
    found = head(args.threads, args.rounds) | {"recipes": measured(chosen, args.threads, args.rounds)}
    args.output.mkdir(exist_ok=True)
    (args.output / "recipes.json").write_text(to_json(found), "utf-8", newline="\n")
    (args.output / "recipes.md").write_text(markdown(found), "utf-8", newline="\n")
    from .recipe_plot import draw  # matplotlib is only for this

    draw(args.output / "recipes.json", args.output / "recipes.png")


def head(n_threads: int, rounds: int) -> dict[str, Any]:
    """Where, when and with what."""
    packages = ("llama-cpp-python", "onnxruntime", "numpy", "jiwer", "whisper-normalizer")
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain")),  # since that commit
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.system()},
        "load_average": os.getloadavg()[0],  # of the minute before; where it is high the speeds are too low
        "versions": {"pocketphi": pocketphi.__version__, "python": platform.python_version()}
        | {name: version(name) for name in packages},
        "settings": {
            "threads": n_threads,
            "cache_type": KV_TYPE["gguf"],
            "rounds": rounds,
            "prompt_tokens": N_PROMPT,
            "written_tokens": N_PREDICT,
            "normalizer": "basic",
        },
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )


def measured(chosen: Sequence[Combination], n_threads: int, rounds: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        work = Path(name)
        base, matrix = prepare(work)
        found = []
        children = []
        for i, combination in enumerate(chosen):
            print(combination.name, file=sys.stderr, flush=True)
            directory = work / str(i)
            converter.convert(NANO / "checkpoint", directory, combination.options(matrix))
            child = stack.enter_context(Talk([str(directory), str(base), "--threads", str(n_threads)], work))
            found.append(
                {"name": combination.name, "options": asdict(combination)}
                | {"disk_bytes": size_of(directory), "plan": planned(combination, matrix)}
                | child.ask("memory")
                | child.ask("quality")
            )
            children.append(child)
        print("speeds", file=sys.stderr, flush=True)
        for row, speed in zip(found, speeds(children, rounds), strict=True):
            row["speed"] = speed
    return found


class Talk:
    """A child, as a context."""

    def __init__(self, arguments: Sequence[str], work: Path) -> None:
        environment = os.environ | {CACHE_VARIABLE: str(work / "cache"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.tools.recipe_child", *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def ask(self, what: str) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the process ended while it measured {what}"
        found: dict[str, Any] = json.loads(line)
        return found


def prepare(work: Path) -> tuple[Path, Path]:
    """F32's log-probabilities of the text that is judged, and importances of another text."""
    exact, base, matrix = work / "exact", work / "base", work / "imatrix.gguf"
    converter.convert(NANO / "checkpoint", exact, converter.Options("F32", "F32", "fp32", name="phi4-nano"))
    calibration = work / "calibration.txt"
    with Model(exact, kv_type="f32", n_threads=1) as model:
        measure(model, TEXT.read_text("utf-8"), n_ctx=N_CTX, save_logits=base)
        calibration.write_text(said(model), "utf-8", newline="\n")
    found = imatrix.collect(
        lambda observer: Model(exact, kv_type="f32", n_threads=1, observer=observer), calibration
    )
    imatrix.write(matrix, found)
    return base, matrix


def said(model: Model) -> str:
    """What F32 says left to itself, in windows of 512 tokens: the judged text's kind, and none of it."""
    rng, tokenizer = np.random.default_rng(9), model.tokenizer
    silent = np.concatenate([tokenizer.unassigned_ids, list(tokenizer.control_tokens.values())])
    pieces = []
    for _ in range(5):
        ids = tokenizer.encode_text("The small dog").tolist()
        while len(ids) < N_CTX + 16:  # what is cut may be read as fewer tokens than were drawn
            logits = model.token_logits(ids, 1)[0].astype(np.float64)
            logits[silent] = -np.inf
            p = np.exp(logits - logits.max())
            ids.append(int(rng.choice(len(p), p=p / p.sum())))
        pieces.append(tokenizer.decode(ids))
    return "\n".join(pieces)


def size_of(directory: Path) -> int:
    assert (directory / MANIFEST).exists()
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def planned(combination: Combination, matrix: Path | None = None) -> dict[str, int]:
    """What the converter says before it writes, in bytes: tensors exactly, encoders at most."""
    with conversion.prepare(NANO / "checkpoint", combination.options(matrix)) as work:
        plan = work.plan
        onnx = 0 if plan.onnx is None else plan.onnx.nbytes
        return {"tensor_bytes": plan.tensor_bytes + onnx, "encoder_bytes": plan.encoders.nbytes}


def speeds(children: Sequence[Talk], rounds: int) -> list[dict[str, Any]]:
    """Of each child the median of its rounds, and where the middle half of them is. The first warms up."""
    samples: list[list[dict[str, Any]]] = [[] for _ in children]
    turns = list(zip(children, samples, strict=True))
    for number in range(rounds + 1):
        for child, own in turns if number % 2 else turns[::-1]:
            own.append(child.ask("speed"))
    return [
        {what: _middle([sample[what] for sample in own[1:]]) for what in ("read", "written")}
        for own in samples
    ]


def _middle(values: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "middle_half": np.quantile(values, (0.25, 0.75)).tolist()}


if __name__ == "__main__":
    main()
