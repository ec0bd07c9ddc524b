# SPDX-License-Identifier: Apache-2.0
"""What both decoders do alike: one suite over one directory with both backbones."""

from __future__ import annotations

import _thread
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pocketphi.runtime import bundle as bundles
from pocketphi.runtime.decoder import Decoder
from pocketphi.runtime.errors import InputError, KernelError
from pocketphi.runtime.parts import EmbedSpan, TokenSpan

from ..conftest import OPEN

IDS = TokenSpan(np.arange(100, 160, dtype=np.int32))
ONE = TokenSpan(np.array([7], np.int32))
ROWS = np.random.default_rng(3).normal(0, 0.05, (12, 256)).astype(np.float32)
SAME = 2e-3  # two orders of summing the same float32 terms, as in test_session.py


@pytest.fixture(scope="module", params=OPEN)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def d(kind: str, exact_both: Path) -> Iterator[Decoder]:
    loaded = OPEN[kind](bundles.load(exact_both))
    yield loaded
    loaded.close()


@pytest.mark.parametrize("adapter", [None, "vision", "speech"])
@pytest.mark.parametrize("table", ["short", "long"])
def test_both_give_the_same_logits(adapter: str | None, table: str, exact_both: Path) -> None:
    """Same numbers, same arithmetic: what differs is the order of sums, once in each of two engines."""
    found = []
    for opened in OPEN.values():
        one = opened(bundles.load(exact_both))
        one.open(table=table, capacity=800, adapter=adapter)
        found.append(one.feed_each(TokenSpan(np.resize(IDS.ids, 700)), 600))
        one.close()
    assert abs(found[0] - found[1]).max() < SAME


def test_the_table_is_the_one_that_was_asked_for(d: Decoder) -> None:
    """A few tokens of a sequence that will be long are rotated as the long one, in whatever pieces."""
    logits = {}
    for table in ("short", "long"):
        d.open(table=table, capacity=100, adapter=None)
        assert (d.table, d.length) == (table, 0)
        logits[table] = d.feed(IDS)
        d.rewind(0)
        d.feed(TokenSpan(IDS.ids[:20]))
        assert abs(d.feed(TokenSpan(IDS.ids[20:])) - logits[table]).max() < SAME
    assert abs(logits["short"] - logits["long"]).max() > 0.1


def test_the_short_table_has_no_room_for_more_than_it_serves(d: Decoder) -> None:
    d.open(table="short", capacity=1024, adapter=None)
    assert d.capacity == 1024
    with pytest.raises(KernelError, match="short RoPE table"):
        d.open(table="short", capacity=1025, adapter=None)
    d.open(table="short", capacity=100, adapter=None)
    with pytest.raises(KernelError, match="short RoPE table"):
        d.grow(1025)


def test_growth_keeps_the_cache_bit_for_bit(d: Decoder) -> None:
    d.open(table="short", capacity=256, adapter="speech")
    d.feed(IDS)
    state = d.save_state()
    wanted = d.feed(ONE)
    d.rewind(len(IDS))
    d.grow(600)
    assert d.capacity >= 600 and d.length == len(IDS) and d.adapter == "speech"
    assert d.save_state() == state
    assert abs(d.feed(ONE) - wanted).max() < SAME
    d.grow(10)
    assert d.capacity >= 600, "never less"


def test_state_goes_into_another_cache(kind: str, exact_both: Path) -> None:
    a, b = (OPEN[kind](bundles.load(exact_both)) for _ in range(2))
    a.open(table="short", capacity=256, adapter="speech")
    a.feed(IDS)
    state = a.save_state()
    b.open(table="short", capacity=512, adapter="speech")
    b.load_state(state, len(IDS))
    assert b.length == len(IDS)
    assert a.feed(ONE).tobytes() == b.feed(ONE).tobytes()
    for bad, length in ((state, len(IDS) + 1), (state[: len(state) // 2], len(IDS)), (b"", 5)):
        with pytest.raises(KernelError, match="refused"):
            b.load_state(bad, length)
        assert b.length == 0
    a.close()
    b.close()
    b.close()


def test_rewind_then_the_same_tokens_give_the_same_logits(d: Decoder) -> None:
    d.open(table="short", capacity=256, adapter=None)
    d.feed(IDS)
    first = d.feed(ONE)
    d.rewind(len(IDS))
    assert d.feed(ONE).tobytes() == first.tobytes()


@pytest.mark.parametrize(("n", "wanted"), [(60, 60), (60, 7), (60, 1), (600, 100), (600, 88), (600, 600)])
def test_the_logits_after_each_row(n: int, wanted: int, d: Decoder) -> None:
    """Also where the rows lie on both sides of a cut: a batch holds 512."""
    d.open(table="short", capacity=n, adapter="speech")
    ids = np.resize(IDS.ids, n)
    found = d.feed_each(TokenSpan(ids), wanted)
    assert found.shape == (wanted, d.spec.vocab_size)
    assert d.length == n
    first = n - wanted
    d.rewind(0)
    rows = [d.feed(TokenSpan(ids[: first + 1]))]
    rows += [d.feed(TokenSpan(ids[i : i + 1])) for i in range(first + 1, n)]
    assert abs(found - np.stack(rows)).max() < SAME


def test_the_logits_after_each_embedded_row(d: Decoder) -> None:
    d.open(table="short", capacity=256, adapter="speech")
    found = d.feed_each(EmbedSpan(ROWS, "clip"), 12)
    d.rewind(0)
    one_by_one = [d.feed(EmbedSpan(ROWS[i : i + 1], "row")) for i in range(12)]
    assert abs(found - np.stack(one_by_one)).max() < SAME
    for n in (0, 13):
        with pytest.raises(KernelError, match=f"logits of {n} rows"):
            d.feed_each(EmbedSpan(ROWS, "clip"), n)
    assert d.length == 12


def test_logits_are_the_callers_to_keep(d: Decoder) -> None:
    d.open(table="short", capacity=256, adapter=None)
    first = d.feed(IDS)
    kept = first.copy()
    d.feed(ONE)
    assert first.tobytes() == kept.tobytes()
    first[:] = 0


def test_adapters_come_when_they_are_needed(kind: str, exact_both: Path) -> None:
    one = OPEN[kind](bundles.load(exact_both))
    assert set(one.adapters) == {"vision", "speech"} and one.resident_adapters == ()
    logits = {}
    for name in (None, "speech", "vision", "speech", None):
        one.open(table="short", capacity=256, adapter=name)
        assert one.adapter == name
        found = one.feed(IDS)
        assert logits.setdefault(name, found).tobytes() == found.tobytes()
    assert one.resident_adapters == ("speech", "vision")
    assert (
        abs(logits[None] - logits["vision"]).max() > 1 and abs(logits["speech"] - logits["vision"]).max() > 1
    )
    with pytest.raises(InputError, match="it has: "):
        one.open(table="short", capacity=256, adapter="smell")
    one.close()


def test_what_does_not_fit(d: Decoder) -> None:
    d.open(table="short", capacity=256, adapter=None)
    with pytest.raises(KernelError, match="expected \\[n, 256\\]"):
        d.feed(EmbedSpan(np.zeros((3, 128), np.float32), "x"))
    with pytest.raises(KernelError, match="do not fit"):
        d.feed(TokenSpan(np.zeros(257, np.int32)))
    for bad in (-1, d.spec.vocab_size):
        with pytest.raises(InputError, match="token ids must be"):
            d.feed(TokenSpan(np.array([3, bad], np.int32)))
    assert d.length == 0


def test_ctrl_c_stops_a_long_prefill_and_the_decoder_goes_on(kind: str, exact_both: Path) -> None:
    """A real interrupt of the main thread while native code runs; what was half read is dropped."""
    d = OPEN[kind](bundles.load(exact_both))
    d.open(table="long", capacity=8192, adapter=None)
    d.feed(IDS)
    long = TokenSpan(np.resize(IDS.ids, 8000))
    timer = threading.Timer(0.05, _thread.interrupt_main)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        for _ in range(100):  # far more work than the timer waits
            d.feed(long)
            d.rewind(len(IDS))
    assert d.length in (len(IDS), 0) or d.length == len(IDS) + len(long)
    d.rewind(min(d.length, len(IDS)))
    after = d.feed(ONE)
    d.rewind(0)
    d.feed(IDS)
    assert abs(d.feed(ONE) - after).max() < SAME
    d.close()


# In a process of its own. The handler raises for the first interrupt, and again and again while the
# decoder waits for its native code to stop; outside it never does, so that the script itself cannot be hit.
IMPATIENT = """
import os, signal, sys, threading, time
from pathlib import Path
import numpy as np
from pocketphi.runtime import bundle as bundles
from pocketphi.runtime.backbone import BackboneOptions, OpenBackbone
from pocketphi.runtime.parts import TokenSpan

bundle = bundles.load(Path(sys.argv[1]))
d = OpenBackbone(bundle, BackboneOptions(sys.argv[2], n_threads=2)).open()
d.open(table="long", capacity=8192, adapter=None)
raised = 0

def waits(frame):
    while frame is not None:
        if frame.f_code.co_name == "_settle":
            return True
        frame = frame.f_back
    return False

def handler(_, frame):
    global raised
    if raised == 0 or waits(frame):
        raised += 1
        raise KeyboardInterrupt

def pester():
    time.sleep(0.05)
    for _ in range(200):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.0002)

signal.signal(signal.SIGINT, handler)
thread = threading.Thread(target=pester)
thread.start()
try:
    d.feed(TokenSpan(np.resize(np.arange(100, 160, dtype=np.int32), 8000)))
    print("not interrupted")
except KeyboardInterrupt:
    pass
thread.join()
d.rewind(0)
print(bool(np.isfinite(d.feed(TokenSpan(np.array([7], np.int32)))).all()), raised >= 1, d.length)
d.close()
"""


def test_a_second_ctrl_c_does_not_break_the_decoder(kind: str, exact_both: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPATIENT, str(exact_both), kind],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("True True 1\n", "")
