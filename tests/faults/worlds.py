# SPDX-License-Identifier: Apache-2.0
"""Starts the program in forked processes, in a world prepared for it, and ends it at any moment."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from pocketphi.runtime import bundle as bundles

from ..bite.zygote import PROGRAM, Child, Limits, Outcome, Zygote
from ..tiny import NANO

HERE = Path(__file__).resolve().parent
EVAL = NANO.parent / "eval"
CLIP = EVAL / "audio" / "asr-003.flac"
LIMITS = Limits(120, 1200)
TEXT = "Tell me where a lion lives. A lion lives in the savanna. " * 30
ONE = ("-t", "1")  # a thread: two of a busy machine's wait for each other


@dataclass
class World:
    """A folder in which the program runs, and how it is started."""

    zygote: Zygote
    env: Mapping[str, str]
    path: Path
    extra: dict[str, str] = field(default_factory=dict)

    def start(self, args: Sequence[str], *prepare: tuple[object, ...], stdin: bytes | int = b"") -> Child:
        """Start it; `prepare` holds calls of `sandbox` as (name, argument, …)."""
        code = PROGRAM
        if prepare:
            code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import sandbox; sys.path.pop(0)\n"
            for name, *arguments in prepare:
                code += f"sandbox.{name}({', '.join(map(repr, arguments))})\n"
            code += PROGRAM
        env = {**self.env, **self.extra}
        return self.zygote.start(list(args), env=env, cwd=self.path, stdin=stdin, limits=LIMITS, code=code)

    def run(self, args: Sequence[str], *prepare: tuple[object, ...], stdin: bytes | int = b"") -> Outcome:
        """Start it and wait for its end."""
        return self.start(args, *prepare, stdin=stdin).wait()

    def done(self, args: Sequence[str], stdin: bytes = b"") -> Outcome:
        """Run it; it has to succeed."""
        outcome = self.run(args, stdin=stdin)
        assert (outcome.code, outcome.timed_out) == (0, False), outcome.err[-2000:]
        return outcome

    def names(self, folder: str = ".") -> list[str]:
        """What lies in a folder, hidden files included."""
        place = self.path / folder
        return sorted(p.name for p in place.iterdir()) if place.is_dir() else []


def one_error(outcome: Outcome, code: int, said: str = "") -> None:
    """It ended with this code and one line about it, below notes on how far it came."""
    text = outcome.err.decode("utf-8")
    assert (outcome.code, outcome.timed_out) == (code, False), text[-2000:]
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and text.endswith(errors[0] + "\n"), text[-2000:]
    assert "Traceback" not in text
    assert said in errors[0], errors[0]


def fractions(n: int, seed: int) -> list[float]:
    """n moments of a life from 0 to 1, the same in every run, one in each n-th part of it."""
    rng = random.Random(seed)
    return [(i + rng.random()) / n for i in range(n)]


def seconds_of(world: World, args: Sequence[str], stdin: bytes = b"") -> float:
    """How long it takes now, undisturbed."""
    began = time.monotonic()
    world.done(args, stdin)
    return time.monotonic() - began


def killed(child: Child, after_s: float) -> bool:
    """Whether SIGKILL so much later found it alive."""
    time.sleep(after_s)
    with suppress(ProcessLookupError):
        child.send(signal.SIGKILL)
    outcome = child.wait()
    assert outcome.code in (0, -signal.SIGKILL), outcome.err[-2000:]
    return outcome.code != 0


def whole_model(path: Path) -> bool:
    """Whether a model directory is there; damaged ones raise."""
    return path.exists() and len(list(bundles.load(path).check_hashes())) > 0


@contextmanager
def preloaded(source: Path, folder: Path) -> Iterator[Zygote]:
    """A zygote into which a library made of one C file is loaded before anything else."""
    library = folder / f"{source.stem}.so"
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([os.environ.get("CC", "cc"), *flags, "-o", library, source, "-ldl"], check=True)
    before = os.environ.get("LD_PRELOAD")
    os.environ["LD_PRELOAD"] = str(library)
    try:
        zygote = Zygote()
    finally:
        if before is None:
            del os.environ["LD_PRELOAD"]
        else:
            os.environ["LD_PRELOAD"] = before
    with zygote:
        yield zygote


def steady(path: Path) -> object:
    """A report, or its items, without what differs between runs."""
    found = (
        [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        if path.suffix == ".jsonl"
        else [json.loads(path.read_text("utf-8"))]
    )
    for row in found:
        row.pop("timings", None)
    return found
