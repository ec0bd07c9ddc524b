# SPDX-License-Identifier: Apache-2.0
"""One target in a process of its own: `python -m tests.fuzz.campaign TARGET --runs N --artifacts FOLDER`.

Memory and the time of an input are bounded. What breaks a promise is written to the folder, and the end is 1.
With --coverage, atheris makes the inputs and keeps those that reach new code under --corpus.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

MEMORY_BYTES = 2 << 30  # more than any reader needs for what a small file says
INPUT_S = 20.0  # of this process's own time: a reader takes milliseconds
_SHOWN_BYTES = 200


class _Hang(BaseException):
    """An input took too long; no reader may catch it."""


def _on_timer(_: int, __: FrameType | None) -> None:
    raise _Hang(f"no answer in {INPUT_S:g} s")


def _limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.RLIM_INFINITY))


def save(data: bytes, target: str, artifacts: Path) -> Path:
    """Keep an input; say where it is and what is in it."""
    artifacts.mkdir(parents=True, exist_ok=True)
    path = artifacts / f"{target}-{hashlib.sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    more = "…" if len(data) > _SHOWN_BYTES else ""
    print(f"input of {len(data)} bytes in {path}: {data[:_SHOWN_BYTES].hex()}{more}", flush=True)
    return path


def _made(seeds: list[bytes], number: int, runs: int, seconds: float) -> Iterator[bytes]:
    from . import mutate

    end = time.monotonic() + seconds
    for i, data in enumerate(mutate.inputs(seeds, number)):
        if (i >= runs if runs else True) and time.monotonic() >= end:
            return
        yield data


def run(name: str, *, runs: int, seconds: float, number: int, artifacts: Path) -> int:
    """Inputs from the seeds alone. Returns the exit code."""
    from .target import remove_scratch
    from .targets import find

    target = find(name)
    seeds = [path.read_bytes() for path in sorted(target.folder.iterdir())]
    artifacts.mkdir(parents=True, exist_ok=True)
    last = os.open(artifacts / f"{name}-last", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    target.one_input(b"")  # imports what it needs
    _limit_memory()
    signal.signal(signal.SIGVTALRM, _on_timer)
    done = 0
    try:
        for data in _made(seeds, number, runs, seconds):
            os.ftruncate(last, 0)
            os.pwrite(last, data, 0)  # stays there if native code ends the process
            try:
                signal.setitimer(signal.ITIMER_VIRTUAL, INPUT_S)
                target.one_input(data)
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            except BaseException:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
                traceback.print_exc()
                save(data, name, artifacts)
                return 1
            done += 1
    finally:
        remove_scratch()
        print(f"{name}: {done} inputs from {len(seeds)} seeds", flush=True)
    (artifacts / f"{name}-last").unlink()
    return 0


def cover(name: str, *, runs: int, seconds: float, number: int, artifacts: Path, corpus: Path) -> None:
    """Inputs by atheris, which follows the code they reach. Does not return: libFuzzer ends the process."""
    import atheris

    os.environ["POCKETPHI_FUZZ_SCRATCH"] = os.fspath(artifacts / "scratch")
    with atheris.instrument_imports(include=["pocketphi"]):
        from .targets import find

        target = find(name)
        target.one_input(b"")
    artifacts.mkdir(parents=True, exist_ok=True)
    corpus.mkdir(parents=True, exist_ok=True)
    arguments = [
        f"-seed={number}",
        f"-artifact_prefix={artifacts}/{name}-",
        f"-timeout={INPUT_S:.0f}",
        "-max_len=20000",
    ]
    arguments += [f"-runs={runs}"] if runs else [f"-max_total_time={seconds:.0f}"]
    arguments += [f"-rss_limit_mb={MEMORY_BYTES >> 20}", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *arguments, str(corpus), str(target.folder)], target.one_input)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("--runs", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--number", type=int, default=1, help="of the random generator")
    parser.add_argument("--artifacts", type=Path, required=True)
    parser.add_argument("--coverage", action="store_true")
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--input", type=Path, help="run this one alone, without limits")
    a = parser.parse_args()
    if a.input is not None:
        targets = importlib.import_module("tests.fuzz.targets")
        targets.find(a.target).one_input(a.input.read_bytes())
        return 0
    common = {"runs": a.runs, "seconds": a.seconds, "number": a.number, "artifacts": a.artifacts}
    if a.coverage:
        cover(a.target, **common, corpus=a.corpus or a.artifacts / "corpus" / a.target)
    return run(a.target, **common)


if __name__ == "__main__":
    sys.exit(main())
