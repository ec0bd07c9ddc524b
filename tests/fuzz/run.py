# SPDX-License-Identifier: Apache-2.0
"""`make fuzz`: every target in turn, for --seconds each. Findings and grown corpora stay in build/fuzz.

Exit 1 if any target has found something; the others are run all the same.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

from . import kernels
from .target import SEEDS
from .targets import NAMES

ARTIFACTS = kernels.FOLDER / "findings"


def reader(name: str, seconds: int, number: int) -> list[str]:
    """The command for one of the readers."""
    command = [sys.executable, "-m", "tests.fuzz.campaign", name, "--seconds", str(seconds)]
    command += ["--number", str(number), "--artifacts", str(ARTIFACTS)]
    if importlib.util.find_spec("atheris") is not None:
        command += ["--coverage", "--corpus", str(kernels.FOLDER / "corpus" / name)]
    return command


def native(program: Path, seconds: int, number: int) -> list[str]:
    """The command for the kernels."""
    corpus = kernels.FOLDER / "corpus" / "kernels"
    corpus.mkdir(parents=True, exist_ok=True)
    limits = [f"-max_total_time={seconds}"] if kernels.has_libfuzzer(program) else [f"-runs={seconds * 200}"]
    limits += [f"-seed={number}", "-max_len=512", "-timeout=20", "-print_final_stats=1"]
    return [
        str(program),
        *limits,
        f"-artifact_prefix={ARTIFACTS}/kernels-",
        str(corpus),
        str(SEEDS / "kernels"),
    ]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--number", type=int, default=1, help="of the random generators")
    parser.add_argument("targets", nargs="*", help=f"of kernels, {', '.join(NAMES)}; default: all")
    a = parser.parse_args()
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in a.targets or ("kernels", *NAMES):
        if name == "kernels":
            program = kernels.build()
            command = None if program is None else native(program, a.seconds, a.number)
        else:
            command = reader(name, a.seconds, a.number)
        if command is None:
            print(f"{name}: skipped, no CMake or no C compiler", flush=True)
            continue
        log = kernels.FOLDER / f"{name}.log"
        with log.open("wb") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
        last = [line for line in log.read_text("utf-8", "replace").splitlines() if _counts(line)]
        found = f"exit {code}, see {log} and {ARTIFACTS}" if code else "no findings"
        print(f"{name}: {found}; {''.join(last[-1:])}", flush=True)
        failed += [name] if code else []
    return 1 if failed else 0


def _counts(line: str) -> bool:
    return "number_of_executed_units" in line or " inputs " in line


if __name__ == "__main__":
    sys.exit(main())
