# SPDX-License-Identifier: Apache-2.0
"""Builds kernels/fuzz under the sanitizers: with libFuzzer where a clang has it, else with our own driver."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "fuzz"
_TARGET = "#include <stddef.h>\nint LLVMFuzzerTestOneInput(const char *p, size_t n) { return !p && n; }\n"


def tool(name: str) -> str | None:
    """A program of this environment or of the system."""
    own = Path(sys.executable).with_name(name)
    return str(own) if own.exists() else shutil.which(name)


def compiler() -> str | None:
    """clang, if it has libFuzzer."""
    clang = shutil.which("clang")
    if clang is None:
        return None
    FOLDER.mkdir(parents=True, exist_ok=True)
    command = [
        clang,
        "-x",
        "c",
        "-",
        "-fsanitize=fuzzer,address,undefined",
        "-o",
        os.fspath(FOLDER / "probe"),
    ]
    made = subprocess.run(command, input=_TARGET, text=True, capture_output=True, check=False)
    return clang if made.returncode == 0 else None


def build() -> Path | None:
    """The program, built anew where a source has changed; None without CMake or a C compiler."""
    cmake, clang = tool("cmake"), compiler()
    if cmake is None or (clang is None and shutil.which("cc") is None):
        return None
    directory = FOLDER / ("clang" if clang else "cc")
    settings = ["-DPK_FUZZ=ON", "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_C_FLAGS_DEBUG=-g -O1"]
    settings += [f"-DCMAKE_C_COMPILER={clang}"] if clang else []
    for command in (
        [cmake, "-S", os.fspath(ROOT), "-B", os.fspath(directory), *settings],
        [cmake, "--build", os.fspath(directory), "--target", "pk_fuzz", "--parallel", "2"],
    ):
        made = subprocess.run(command, text=True, capture_output=True, check=False)
        if made.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{made.stdout[-4000:]}{made.stderr[-4000:]}")
    return directory / "pk_fuzz"


def has_libfuzzer(program: Path) -> bool:
    """Whether coverage leads its inputs."""
    return program.parent.name == "clang"
