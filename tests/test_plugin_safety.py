# SPDX-License-Identifier: Apache-2.0
"""The plug-in under the real decoder: memory and threads come back, and contexts do not disturb each other.

Each test runs in a child, this file as a program: memory and threads are a process's.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pocketphi.runtime import ggml_plugin
from pocketphi.runtime.decoder_ggml import GgmlDecoder
from pocketphi.runtime.parts import TokenSpan

from .conftest import Converted, load_decoder

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 30  # of load and free
# One heap, and large pieces apart from it: else memory that is free stays between pieces that are not.
STEADY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
PROMPT = np.arange(100, 137, dtype=np.int32)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc says what a process has")


# ---- in the child ----


def resident() -> int:
    """Bytes in memory, without what malloc keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def decode(decoder: GgmlDecoder, adapter: str | None, tokens: npt.NDArray[np.int32], steps: int) -> list[Any]:
    """Logits after a prompt and after each of some tokens."""
    decoder.open(table="short", capacity=256, adapter=adapter)
    found = [decoder.feed(TokenSpan(tokens))]
    for i in range(steps):
        found.append(decoder.feed(TokenSpan(tokens[i : i + 1])))
    return found


def rounds(directories: list[Path]) -> dict[str, Any]:
    """Load a model, two contexts and two adapters, decode, free everything; again and again."""
    at_start = threads()
    memory, packed = [], 0
    for i in range(ROUNDS):
        before = ggml_plugin.counts(ggml_plugin.load())["packed_bytes"]
        decoder = load_decoder(directories[0], "f16")
        decode(decoder, "speech" if i % 2 else "vision", PROMPT, 2)
        decode(decoder, None, PROMPT, 2)
        decoder.close()
        packed = ggml_plugin.counts(ggml_plugin.load())["packed_bytes"] - before
        memory.append(resident())
    return {"memory": memory, "packed": packed, "threads": [at_start, threads()]}


def together(directories: list[Path]) -> dict[str, Any]:
    """Models, prompts and adapters, one after the other and at once: whether the bits are the same."""
    jobs = [(directories[0], "speech"), (directories[0], None), (directories[1], "vision")]
    decoders = [load_decoder(directory, "f16") for directory, _ in jobs]

    def work(i: int) -> list[Any]:
        return decode(decoders[i], jobs[i][1], PROMPT[i:], 12)

    alone = [work(i) for i in range(len(jobs))]
    with ThreadPoolExecutor(len(jobs)) as pool:
        at_once = [list(pool.map(work, range(len(jobs)))) for _ in range(3)]
    for decoder in decoders:
        decoder.close()
    return {
        "same": [
            all(np.array_equal(a, b) for a, b in zip(alone[i], found[i], strict=True))
            for found in at_once
            for i in range(len(jobs))
        ],
        "matmuls": ggml_plugin.counts(ggml_plugin.load())["matmuls"],
    }


# ---- in the test ----


def child(what: str, *directories: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", f"{__package__ or 'tests'}.{Path(__file__).stem}", what]
    done = subprocess.run(
        [*command, *map(str, directories)],
        cwd=ROOT,
        env=os.environ | STEADY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module", autouse=True)
def plug_in() -> None:
    if not ggml_plugin.load().active:
        pytest.skip("the plug-in is not in use here")


def test_models_contexts_and_adapters_leave_nothing(converted: Converted) -> None:
    """Fifteen rounds lie between the two medians: one that keeps 10 KB, of 9 MB of weights, is found."""
    found = child("rounds", converted("phi4-nano", "F16"))
    assert found["packed"] > 1 << 20
    before, after = (np.median(found["memory"][part]) for part in (slice(5, 15), slice(20, 30)))
    assert after - before < 10_000 * 15, found["memory"]
    assert found["threads"][0] == found["threads"][1]


def test_decoders_at_once_are_decoders_one_by_one(converted: Converted) -> None:
    """Three threads with two copies of one model and another model, each with an adapter of its own."""
    found = child("together", converted("phi4-nano", "F16"), converted("phi4-nano", "Q8_0"))
    assert found["same"] == [True] * 9
    assert found["matmuls"] > 0


if __name__ == "__main__":
    print(json.dumps({"rounds": rounds, "together": together}[sys.argv[1]]([Path(a) for a in sys.argv[2:]])))
