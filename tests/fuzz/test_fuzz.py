# SPDX-License-Identifier: Apache-2.0
"""A short run of every fuzz target, from the seeds: a finding fails with the input that led to it.

The number of inputs is fixed, and so are the inputs where no coverage leads them. `make fuzz` runs longer.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import kernels
from .documents import Source, changed, text
from .mutate import inputs
from .target import SEEDS
from .targets import NAMES, find

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300  # a run takes a few; one that never ends would otherwise hold everything up
COVERED = (
    "gguf",
    "image-header",
    "onnx",
)  # starting atheris takes longer than its few inputs: `make fuzz` has all
COVERED_RUNS = 1000
KERNEL_RUNS = 4000


def campaign(name: str, artifacts: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "tests.fuzz.campaign", name, "--artifacts", str(artifacts), *arguments]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        text=True,
        errors="replace",
        capture_output=True,
        timeout=SECONDS,
        check=False,
    )
    if done.returncode:
        kept = [f"{p}: {p.read_bytes()[:200].hex()}" for p in sorted(artifacts.glob(f"{name}-*"))]
        pytest.fail("\n".join([f"exit {done.returncode}", *kept, done.stdout[-1000:], done.stderr[-3000:]]))


@pytest.mark.parametrize("name", NAMES)
def test_readers_of_hostile_bytes(name: str, tmp_path: Path) -> None:
    campaign(name, tmp_path, "--runs", str(find(name).runs))


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris has no wheel here")
@pytest.mark.parametrize("name", COVERED)
def test_readers_with_coverage(name: str, tmp_path: Path) -> None:
    campaign(name, tmp_path, "--coverage", "--runs", str(COVERED_RUNS))


def test_kernels(tmp_path: Path) -> None:
    program = kernels.build()
    if program is None:
        pytest.skip("no CMake or no C compiler")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    limits = [f"-runs={KERNEL_RUNS}", "-seed=1", "-max_len=512", f"-artifact_prefix={tmp_path}/"]
    command = [str(program), *limits, str(corpus), str(SEEDS / "kernels")]
    done = subprocess.run(
        command, text=True, errors="replace", capture_output=True, timeout=SECONDS, check=False
    )
    kept = [f"{p}: {p.read_bytes()[:200].hex()}" for p in sorted(tmp_path.glob("*-*"))]
    assert done.returncode == 0, "\n".join([*kept, done.stderr[-4000:]])


def test_the_seeds_are_small_and_there() -> None:
    sizes = [path.stat().st_size for path in SEEDS.rglob("*") if path.is_file()]
    assert sum(sizes) < 300_000
    assert all(any(find(name).folder.iterdir()) for name in NAMES)


def test_a_finding_is_kept_and_fails(tmp_path: Path) -> None:
    """The harness itself: a reader that loses its temper is noticed, and its input saved."""
    code = (
        "import sys; from pathlib import Path\n"
        "import tests.fuzz.targets as t; from tests.fuzz import campaign\n"
        "from tests.fuzz.target import Target\n"
        "def angry(data):\n"
        "    if b'\\xff' in data: raise KeyError('bug')\n"
        "t.find = lambda name: Target('mpeg', angry, seeds='sound')\n"
        f"sys.exit(campaign.run('mpeg', runs=500, seconds=0, number=1, artifacts=Path({str(tmp_path)!r})))"
    )
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        text=True,
        capture_output=True,
        timeout=SECONDS,
        check=False,
    )
    (kept,) = (p for p in tmp_path.glob("mpeg-*") if not p.name.endswith("-last"))
    assert done.returncode == 1 and b"\xff" in kept.read_bytes() and kept.name in done.stdout


def test_changes_are_reproducible_and_reach_everything() -> None:
    base = json.loads((SEEDS / "documents" / "config-mm.json").read_text("utf-8"))
    made = [
        text(changed(base, Source(bytes([i % 256, i // 256, 7 * i % 256, 3, i % 200, 9] * 4))))
        for i in range(500)
    ]
    assert made == [
        text(changed(base, Source(bytes([i % 256, i // 256, 7 * i % 256, 3, i % 200, 9] * 4))))
        for i in range(500)
    ]
    assert len(set(made)) > 100
    some, same = inputs([b"abcdefgh"], 1), inputs([b"abcdefgh"], 1)
    assert [next(some) for _ in range(300)] == [next(same) for _ in range(300)]
