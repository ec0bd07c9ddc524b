# SPDX-License-Identifier: Apache-2.0
"""A thousand changes of the adapter and two hundred turns of one chat: memory is what the conversation needs.

One process lives all of it. What it holds is compared after as many rounds as the allocator needs to have
seen every size of block, and at the end: by what malloc has given out, Python's objects included. Resident
memory would count what is mapped without malloc too, but moves by megabytes with the order in which blocks
were freed: it is asked where what could be lost is far more than that.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pocketphi.runtime import bundle as bundles
from pocketphi.runtime.decoder_ggml import KV_BYTES

from .conftest import needs_linux

pytestmark = needs_linux

MEASURE = """
import ctypes, gc, json, logging, resource, sys
from pathlib import Path
from pocketphi import Model

class Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
        "keepcost",
    )]

def held():
    gc.collect()  # bytes that were asked of malloc: no page counts for the few of it that are held
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Mallinfo2
    found = mallinfo2()
    return found.uordblks + found.hblkhd

def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back: what is left is held
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * resource.getpagesize()

"""
LIFE = """
logging.disable(logging.CRITICAL)
ADAPTERS = (None, "vision", "speech")
folder, found = Path(sys.argv[1]), {}
with Model(folder, n_threads=1) as model:
    def ask(i):
        return model.complete("<|user|>Hi<|end|><|assistant|>", adapter=ADAPTERS[i % 3], max_tokens=1)

    said = [ask(i).token_ids for i in range(3)]
    for name in ("speech", "vision"):  # both are in memory by now: their files are not needed any more
        (folder / model.bundle.adapters[name].file).unlink()
    found["switched"] = []
    for i in range(3, 1303):
        assert ask(i).token_ids == said[i % 3], i
        if i in (201, 1302):  # both without an adapter
            found["switched"].append((held(), resident()))
    again = [ask(1) for _ in range(2)]
    found["cached"] = [reply.usage.cached_tokens for reply in again]

    turns = []
    def turn(n_most):
        turns.append({"role": "user", "content": "What is the capital of France?"})
        reply = model.chat(turns, max_tokens=n_most)
        turns.append({"role": "assistant", "content": reply.text})
        return reply

    replies = [turn(12) for _ in range(200)]
    used = [reply.usage for reply in replies]
    found["cold_turns"] = [n for n, u in enumerate(used) if u.cached_tokens < u.prompt_tokens // 2]
    found["turned"], found["tokens"] = held(), model.context_used
    last = turns[:-1]
    for n in range(200):
        turns.clear()
        turn(12)
        if n == 20:
            found["short"] = [held()]
    found["short"].append(held())
print(json.dumps(found | {"last": last}))
"""

FRESH = """
with Model(sys.argv[1], n_threads=1) as model:
    for adapter in ("vision", "speech"):
        model.complete("<|user|>Hi<|end|><|assistant|>", adapter=adapter, max_tokens=1)
    model.chat(json.load(sys.stdin), max_tokens=12)
    print(held())
"""


def run(code: str, model: Path, env: dict[str, str], stdin: str = "") -> Any:
    counted = env | {"PYTHONMALLOC": "malloc"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE + code, str(model)], env=counted, input=stdin, capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def copy(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory whose adapters are removed on the way."""
    return shutil.copytree(model, tmp_path_factory.mktemp("life") / "model")


@pytest.fixture(scope="module")
def life(copy: Path, user: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = run(LIFE, copy, user)
    return found


@pytest.fixture(scope="module")
def step(model: Path) -> int:
    """Bytes by which a cache grows at once: 512 tokens of f16."""
    return int(512 * bundles.load(model).text.kv_values_per_token * KV_BYTES["f16"])


def test_a_thousand_switches_take_no_memory(life: dict[str, Any], step: int) -> None:
    """1 KiB lost at each switch would be one step of the cache. A context that is not freed has that step
    mapped: a thousand of them are more than two orders of magnitude over what resident memory moves by."""
    (before, resident_before), (after, resident_after) = life["switched"]
    assert step == 1 << 20
    assert after - before <= step, (before, after)
    assert resident_after - resident_before <= 8 * step, (resident_before, resident_after)


def test_the_same_adapter_again_reads_nothing_again(life: dict[str, Any]) -> None:
    """The second question takes all but its last token from the cache."""
    first, again = life["cached"]
    assert first < again


def test_two_hundred_turns_take_what_their_length_takes(
    life: dict[str, Any], model: Path, user: dict[str, str], step: int
) -> None:
    """As much as a process that reads the last of them at once, and one growth step where the two have
    rounded the cache's size differently. Only where RoPE's table changes is everything read again."""
    assert life["tokens"] > 3000
    fresh = run(FRESH, model, user, json.dumps(life["last"]))
    assert life["turned"] - fresh <= step, (life["turned"], fresh)
    assert len(life["cold_turns"]) <= 2, life["cold_turns"]


def test_two_hundred_new_conversations_take_no_memory(life: dict[str, Any], step: int) -> None:
    before, after = life["short"]
    assert after - before <= step, (before, after)
