# SPDX-License-Identifier: Apache-2.0
"""Writes `imatrix/llama-imatrix.gguf`: what llama.cpp's own tool makes of `imatrix/text.txt` on phi4-nano.

    python -m tests.golden.make_imatrix PATH/TO/llama-imatrix

All in float32, the cache too, and without flash attention, which rounds to float16. `-b` as long as a chunk
reads chunks one by one; by default llama-imatrix reads several side by side, with sums in another order.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from pocketphi import convert as converter

HERE = Path(__file__).resolve().parent / "imatrix"
NANO = Path(__file__).resolve().parents[2] / "nano" / "checkpoint"
CHUNK = 128


def main() -> None:
    program = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as work:
        bundle = converter.convert(NANO, Path(work) / "nano", converter.Options(recipe="F32"))
        model = bundle.path(bundle.decoder)
        command = f"{program} -m {model} -f text.txt -o llama-imatrix.gguf --no-ppl -t 1"
        exact = f"-c {CHUNK} -b {CHUNK} -ctk f32 -ctv f32 -fa off"
        subprocess.run([*command.split(), *exact.split()], cwd=HERE, check=True)


if __name__ == "__main__":
    main()
