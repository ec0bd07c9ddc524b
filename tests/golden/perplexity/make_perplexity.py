# SPDX-License-Identifier: Apache-2.0
"""Makes perplexity.json and base.logits.gz: what llama.cpp's perplexity tool says of phi4-nano over text.txt.

    python -m tests.golden.perplexity.make_perplexity LLAMA_PERPLEXITY

LLAMA_PERPLEXITY is the program, built from the llama.cpp that llama-cpp-python brings. Run it with
POCKETPHI_KERNELS=stock. The program also reads a file that `evaluate.perplexity` wrote, and must say of it
what it says of its own: `Q4_K_M_with_our_base`.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from pocketphi import convert as converter
from pocketphi.evaluate.perplexity import measure
from pocketphi.runtime.engine import Model

from .golden import BASE, HERE, KV_TYPE, N_CTX, RECIPES, SMALL_CHUNKS, SMALL_N_CTX, STATISTICS, TEXT

CHECKPOINT = HERE.parents[2] / "nano" / "checkpoint"
# Every other way to batch the same tokens takes other kernels and orders of summation.
MICRO_BATCHES = (512, 128, 16)
_VALUE = r"(-?[0-9.]+)%?(?: ± +(-?[0-9.]+))?"
_PATTERNS = {
    name: re.compile(rf"^ *{re.escape(printed)} *: *{_VALUE}", re.M) for name, printed in STATISTICS.items()
}
_PPL = re.compile(r"Final estimate: PPL = ([0-9.]+) \+/- ([0-9.]+)")


def run(program: Path, gguf: Path, kv: str, last_line: str, *flags: str) -> str:
    """What the program prints. The cache and the attention are those that `Model` chooses for `kv`.

    It may end before its log is written out (its logger is never flushed): then it is run again.
    """
    command = [str(program), "-m", str(gguf), "-t", "2", "-b", "512"]
    command += ["-ctk", kv, "-ctv", kv, "-fa", "off" if kv == "f32" else "on", *flags]
    for _ in range(30):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        printed = done.stdout + done.stderr
        if last_line in printed:
            return printed
    raise SystemExit(f"{program} never printed {last_line!r}: {printed[-2000:]}")


def perplexity(program: Path, gguf: Path, kv: str, *flags: str) -> dict[str, float]:
    """The perplexity and its ±."""
    printed = run(program, gguf, kv, "Final estimate", "-f", str(TEXT), "-ub", "512", *flags)
    found = _PPL.search(printed)
    assert found, printed[-2000:]
    return {"ppl": float(found[1]), "ppl_error": float(found[2])}


def divergence(program: Path, gguf: Path, kv: str, micro_batch: int, base: Path) -> dict[str, float]:
    """Every statistic; percentages as printed."""
    flags = "-c", str(N_CTX), "-ub", str(micro_batch), "--kl-divergence", "--kl-divergence-base", str(base)
    printed = run(program, gguf, kv, "Same top p:", *flags)
    found: dict[str, float] = {}
    for name, pattern in _PATTERNS.items():
        match = pattern.search(printed)
        assert match, (name, printed[-3000:])
        found[name] = float(match[1])
        if match[2] is not None:
            found[f"{name}_error"] = float(match[2])
    return found


def spread(rows: list[dict[str, float]]) -> dict[str, float]:
    """How far the others are from the first, at most."""
    return {name: max(abs(row[name] - rows[0][name]) for row in rows) for name in rows[0]}


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", type=Path)
    program = parser.parse_args().program
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    found: dict[str, Any] = {
        "llama_cpp": (version.stdout + version.stderr).strip().splitlines()[-2:],
        "text_sha256": hashlib.sha256(TEXT.read_bytes()).hexdigest(),
        "ppl": {},
        "kld": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for recipe in RECIPES:
            options = converter.Options(recipe=recipe, lora_quant="F16", name="phi4-nano")
            bundle = converter.convert(CHECKPOINT, work / recipe, options)
            gguf, kv = bundle.path(bundle.decoder), KV_TYPE[recipe]
            sha256 = hashlib.sha256(gguf.read_bytes()).hexdigest()
            found["ppl"][recipe] = perplexity(program, gguf, kv, "-c", str(N_CTX)) | {"gguf_sha256": sha256}
        base, gguf = work / "base", work / "F32" / "backbone-F32.gguf"
        perplexity(program, gguf, "f32", "-c", str(N_CTX), "--kl-divergence-base", str(base))
        raw = base.read_bytes()
        n_chunks = int.from_bytes(raw[16:20], "little")
        found["chunks"] = n_chunks
        found["tokens_sha256"] = hashlib.sha256(raw[20 : 20 + 4 * n_chunks * N_CTX]).hexdigest()
        with Model(work / "F32", kv_type="f32", n_threads=2) as model:
            measure(model, TEXT.read_text("utf-8"), n_ctx=N_CTX, save_logits=work / "ours")
        for recipe in RECIPES:
            other = work / recipe / f"backbone-{recipe}.gguf"
            rows = [divergence(program, other, KV_TYPE[recipe], size, base) for size in MICRO_BATCHES]
            found["kld"][recipe] = rows[0] | {"spread": spread(rows)}
            found["ppl"][recipe]["spread"] = found["kld"][recipe]["spread"]["ppl"]
        with_ours = divergence(program, work / "Q4_K_M" / "backbone-Q4_K_M.gguf", "f16", 512, work / "ours")
        found["Q4_K_M_with_our_base"] = with_ours
        for name in ("ppl_base", "kld"):  # a stored ln p is another step where a rounding falls the other way
            assert abs(with_ours[name] / found["kld"]["Q4_K_M"][name] - 1) < 16 / 65535, (name, with_ours)
        small = ["-c", str(SMALL_N_CTX), "-b", str(SMALL_N_CTX), "--chunks", str(SMALL_CHUNKS)]
        perplexity(program, gguf, "f32", *small, "--kl-divergence-base", str(work / "small"))
        BASE.write_bytes(gzip.compress((work / "small").read_bytes(), 9, mtime=0))
    (HERE / "perplexity.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
