# SPDX-License-Identifier: Apache-2.0
"""What a conversion costs beside the usual way: write F16, then run llama.cpp's own quantizer on the file.

    python -m tests.tools.bench_convert CHECKPOINT --scratch DIR [--recipes Q4_0 Q4_K_M]

Each step runs in a process of its own, one after the other on the same machine; time is wall time, memory
the process's peak resident set. The F16 file is ours, since llama.cpp's converter needs torch. Results go
to stdout, outputs are deleted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

CONVERT = """
import sys
from pathlib import Path
from pocketphi.convert import Options, convert
convert(Path(sys.argv[1]), Path(sys.argv[2]), Options(recipe=sys.argv[3]))
"""
QUANTIZE = """
import ctypes, os, sys
import llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread = int(sys.argv[3]), len(os.sched_getaffinity(0))
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))
"""
FILE_TYPES = {"Q4_0": 2, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18, "Q8_0": 7}  # enum llama_ftype


@dataclass(frozen=True)
class Cost:
    """Of one process."""

    wall_s: float
    cpu_s: float  # user and system, all threads
    peak_mb: float
    disk_gb: float


def run(script: str, *args: object, output: Path) -> Cost:
    """Run a script to its end; `output` is what it makes."""
    begun = time.perf_counter()
    command = [sys.executable, "-c", script, *map(str, args)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL if script is QUANTIZE else None)
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - begun
    if status:
        raise SystemExit(f"failed: {command[2:]}")
    files = output.iterdir() if output.is_dir() else [output]
    size = sum(f.stat().st_size for f in files)
    per_mb = 1e6 if sys.platform == "darwin" else 1e3  # ru_maxrss is bytes there, KiB elsewhere
    peak_mb = usage.ru_maxrss * (1.0 if sys.platform == "darwin" else 1.024) / per_mb
    return Cost(wall_s, usage.ru_utime + usage.ru_stime, peak_mb, size / 1e9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--scratch", type=Path, required=True, help="room for the F16 file and one more")
    parser.add_argument("--recipes", nargs="+", choices=FILE_TYPES, default=["Q4_0", "Q4_K_M"])
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, Cost]] = []
    ratios = []
    f16_dir = args.scratch / "f16"
    shutil.rmtree(f16_dir, ignore_errors=True)
    f16 = run(CONVERT, args.checkpoint, f16_dir, "F16", output=f16_dir)
    rows.append(("ours, F16", f16))
    for recipe in args.recipes:
        ours_dir, theirs_file = args.scratch / recipe, args.scratch / f"{recipe}.gguf"
        shutil.rmtree(ours_dir, ignore_errors=True)
        ours = run(CONVERT, args.checkpoint, ours_dir, recipe, output=ours_dir)
        shutil.rmtree(ours_dir)
        source = f16_dir / "backbone-F16.gguf"
        theirs = run(QUANTIZE, source, theirs_file, FILE_TYPES[recipe], output=theirs_file)
        theirs_file.unlink()
        rows += [(f"ours, {recipe}", ours), (f"llama_model_quantize, {recipe}", theirs)]
        ratios.append(
            (recipe, ours.wall_s / (f16.wall_s + theirs.wall_s), ours.cpu_s / (f16.cpu_s + theirs.cpu_s))
        )
    shutil.rmtree(f16_dir)
    print(f"{'':32} {'wall':>8} {'CPU':>8} {'peak':>9} {'on disk':>9}")
    for what, c in rows:
        print(f"{what:32} {c.wall_s:6.1f} s {c.cpu_s:6.1f} s {c.peak_mb:6.0f} MB {c.disk_gb:6.2f} GB")
    for recipe, wall, cpu in ratios:
        print(f"{recipe}: ours / (F16 + llama_model_quantize) = {wall:.2f} in time, {cpu:.2f} in CPU time")


if __name__ == "__main__":
    main()
