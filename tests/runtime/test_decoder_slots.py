# SPDX-License-Identifier: Apache-2.0
"""Slots: each one is a decoder, alone bit for bit; together they share passes and nothing else."""

from __future__ import annotations

import _thread
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pocketphi.runtime import bundle as bundles
from pocketphi.runtime.decoder import Decoder
from pocketphi.runtime.decoder_ggml import GgmlDecoder, GgmlOptions
from pocketphi.runtime.decoder_slots import MAX_SLOTS, Slot, SlotPool
from pocketphi.runtime.errors import BundleError, InputError, KernelError, MemoryShortError
from pocketphi.runtime.gguf_check import AdapterFile
from pocketphi.runtime.parts import EmbedSpan, Float32, TokenSpan
from pocketphi.runtime.session import Session
from pocketphi.runtime.slot_worker import Feed, Lane
from pocketphi.runtime.spec import RopeTable

from ..conftest import Converted, load_decoder
from ..golden import cases
from ..test_reference import spans_of

# The protocol's suite, on a slot: these tests ask for nothing but a decoder `d`.
from .test_decoders import (  # noqa: F401
    test_growth_keeps_the_cache_bit_for_bit,
    test_logits_are_the_callers_to_keep,
    test_rewind_then_the_same_tokens_give_the_same_logits,
    test_the_logits_after_each_embedded_row,
    test_the_logits_after_each_row,
    test_the_short_table_has_no_room_for_more_than_it_serves,
    test_the_table_is_the_one_that_was_asked_for,
)

IDS = TokenSpan(np.arange(100, 160, dtype=np.int32))
ONE = TokenSpan(np.array([7], np.int32))
ROWS = EmbedSpan(np.random.default_rng(3).normal(0, 0.05, (12, 256)).astype(np.float32), "clip")
SAME = 2e-3  # two orders of summing the same float32 terms, as in test_session.py
WAIT_S = 60  # for what takes milliseconds: it is a failure, not a measurement
MODES: list[tuple[RopeTable, str | None]] = [
    ("short", None), ("short", "speech"), ("long", "vision"), ("short", "vision"), ("long", None),
]  # fmt: skip


def load_pool(directory: Path, kv_type: str = "f32", n_slots: int = 4, capacity: int = 2048) -> SlotPool:
    bundle = bundles.load(directory)
    adapters = {n: AdapterFile(bundle.path(a.file), a.alpha, a.rank) for n, a in bundle.adapters.items()}
    options = GgmlOptions(n_threads=2, kv_type=kv_type)
    path = bundle.path(bundle.decoder)
    return SlotPool(path, bundle.text, adapters, options, n_slots=n_slots, capacity=capacity)


@pytest.fixture(scope="module")
def pool(nano: Path) -> Iterator[SlotPool]:
    loaded = load_pool(nano)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def decoder(nano: Path) -> Iterator[GgmlDecoder]:
    loaded = load_decoder(nano)
    yield loaded
    loaded.close()


@pytest.fixture
def slots(pool: SlotPool) -> Iterator[list[Slot]]:
    yield [pool.slot(i) for i in range(len(pool))]
    for i in range(len(pool)):
        pool.slot(i).close()


@pytest.fixture(scope="module")
def d(pool: SlotPool) -> Slot:
    """One slot beside another that holds something."""
    pool.slot(1).open(table="short", capacity=256, adapter="vision")
    pool.slot(1).feed(IDS)
    return pool.slot(2)


@contextmanager
def held(pool: SlotPool) -> Iterator[None]:
    """The worker does something else meanwhile, so that what is fed waits."""
    begun, release = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        assert release.wait(WAIT_S)

    pool._worker._thread.submit(hold)
    assert begun.wait(WAIT_S)
    try:
        yield
    finally:
        release.set()


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not done():
        assert time.monotonic() < end
        time.sleep(0.001)


def all_at_once(pool: SlotPool, jobs: Sequence[Callable[[], Float32]]) -> list[Float32]:
    """Each job feeds once; all of them wait when the first is taken."""
    with ThreadPoolExecutor(len(jobs)) as threads:
        with held(pool):
            asked = [threads.submit(job) for job in jobs]
            until(lambda: pool._worker._incoming.qsize() == len(jobs))
        return [one.result(WAIT_S) for one in asked]


def script(d: Decoder, table: RopeTable, adapter: str | None, seed: int = 0) -> list[Float32]:
    """A bit of everything; long enough for two batches."""
    ids = np.random.default_rng(seed).integers(0, 2800, 700, dtype=np.int32)
    d.open(table=table, capacity=900, adapter=adapter)
    found = [d.feed_each(TokenSpan(ids), 250), d.feed(ROWS)]
    d.rewind(600)
    found += [d.feed(TokenSpan(ids[i : i + 1])) for i in range(8)]
    state, length = d.save_state(), d.length
    found.append(d.feed_each(ROWS, 3))
    d.load_state(state, length)
    found.append(d.feed(ONE))
    return found


@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
def test_alone_a_slot_is_a_decoder_bit_for_bit(kv_type: str, nano: Path) -> None:
    """Also beside sequences that wait, in a context that others have used."""
    alone, pool = load_decoder(nano, kv_type), load_pool(nano, kv_type)
    pool.slot(1).open(table="short", capacity=256, adapter="speech")
    pool.slot(1).feed(IDS)
    for table, adapter in MODES:
        pairs = zip(script(alone, table, adapter), script(pool.slot(2), table, adapter), strict=True)
        assert all(a.tobytes() == b.tobytes() for a, b in pairs), (table, adapter)
    alone.close()
    pool.close()


def test_rows_that_wait_together_are_one_pass(
    pool: SlotPool, slots: list[Slot], decoder: GgmlDecoder
) -> None:
    for i, slot in enumerate(slots):
        slot.open(table="short", capacity=256, adapter="speech")
        slot.feed(TokenSpan(IDS.ids[: 20 + 7 * i]))
    passes, rows = pool.passes
    found = all_at_once(pool, [lambda slot=slot: slot.feed(ONE) for slot in slots])  # type: ignore[misc]
    assert pool.passes == (passes + 1, rows + len(slots))
    for i, logits in enumerate(found):
        decoder.open(table="short", capacity=256, adapter="speech")
        decoder.feed(TokenSpan(IDS.ids[: 20 + 7 * i]))
        assert abs(decoder.feed(ONE) - logits).max() < SAME
        assert slots[i].length == 21 + 7 * i


def test_prompts_share_passes_too_and_embedded_rows_have_their_own(
    pool: SlotPool, slots: list[Slot], decoder: GgmlDecoder
) -> None:
    for slot in slots:
        slot.open(table="short", capacity=256, adapter=None)
    passes, rows = pool.passes
    spans = [IDS, ROWS, TokenSpan(IDS.ids[:31]), ROWS]
    jobs = [lambda slot=slot, span=span: slot.feed(span) for slot, span in zip(slots, spans, strict=True)]  # type: ignore[misc]
    found = all_at_once(pool, jobs)
    assert pool.passes == (passes + 2, rows + sum(map(len, spans)))
    for span, logits in zip(spans, found, strict=True):
        decoder.open(table="short", capacity=256, adapter=None)
        assert abs(decoder.feed(span) - logits).max() < SAME


def test_threads_of_all_modes_at_once_are_as_each_alone(slots: list[Slot], decoder: GgmlDecoder) -> None:
    jobs = [(mode, seed) for seed, mode in enumerate(MODES * 3)]
    with ThreadPoolExecutor(len(slots)) as threads:
        free = list(slots)

        def run(job: tuple[tuple[RopeTable, str | None], int]) -> list[Float32]:
            slot = free.pop()
            try:
                return script(slot, *job[0], seed=job[1])
            finally:
                free.append(slot)

        together = list(threads.map(run, jobs))
    for (mode, seed), found in zip(jobs, together, strict=True):
        for a, b in zip(script(decoder, *mode, seed=seed), found, strict=True):
            assert abs(a - b).max() < SAME, (mode, seed)


@pytest.mark.parametrize("recipe", ["F32", "F16"])
def test_golden_cases_four_at_a_time(recipe: str, converted: Converted) -> None:
    """Transformers' logits and greedy tokens, adapters and both RoPE tables side by side."""
    pool = load_pool(converted("phi4-nano", recipe, lora_quant=recipe), "f32" if recipe == "F32" else "f16")
    free = [pool.slot(i) for i in range(4)]

    def run(case: cases.Case) -> tuple[float, list[int]]:
        slot = free.pop()
        session = Session(slot, limit=2048, note=lambda _: None)
        logits, _ = session.read(spans_of(case), adapter=case.adapter)
        off, tokens = float(abs(logits - case.logits).max()), []
        for _ in case.greedy:
            tokens.append(int(logits.argmax()))
            logits = session.step(tokens[-1])
        free.append(slot)
        return off, tokens

    asked = [case for case in cases.load("phi4-nano") if len(case.ids) + len(case.greedy) < 2048]
    assert {case.adapter for case in asked} == {None, "vision", "speech"}
    with ThreadPoolExecutor(4) as threads:
        for case, (off, tokens) in zip(asked, threads.map(run, asked), strict=True):
            assert recipe == "F16" or off <= case.bound, case.name
            assert tokens == case.greedy.tolist(), case.name
    pool.close()


def test_state_goes_from_slot_to_slot(slots: list[Slot]) -> None:
    a, b = slots[0], slots[3]
    for one in (a, b):
        one.open(table="short", capacity=256, adapter="speech")
    a.feed(IDS)
    a.feed(ONE)
    a.rewind(len(IDS))  # what was taken back is not saved
    state = a.save_state()
    b.load_state(state, len(IDS))
    assert b.length == len(IDS)
    wanted = a.feed(ONE)
    assert b.feed(ONE).tobytes() == wanted.tobytes()
    for bad, length in ((state, len(IDS) + 1), (state[: len(state) // 2], len(IDS)), (b"", 5)):
        with pytest.raises(KernelError, match="refused"):
            b.load_state(bad, length)
        assert b.length == 0
    a.rewind(len(IDS))
    assert a.feed(ONE).tobytes() == wanted.tobytes()


def test_a_slot_has_the_room_it_has(slots: list[Slot]) -> None:
    slot = slots[0]
    slot.open(table="short", capacity=10, adapter=None)
    assert slot.capacity == 1024  # phi4-nano's short table serves no more
    slot.open(table="long", capacity=1500, adapter=None)
    assert slot.capacity == 2048
    slot.feed(IDS)
    slot.grow(2048)
    with pytest.raises(InputError, match="2049 tokens are asked for, a slot has room for 2048"):
        slot.grow(2049)
    assert (slot.length, slot.capacity) == (len(IDS), 2048)
    with pytest.raises(InputError, match="a slot has room for 2048"):
        slot.open(table="long", capacity=2049, adapter=None)
    with pytest.raises(KernelError, match="expected \\[n, 256\\]"):
        slot.feed(EmbedSpan(np.zeros((3, 128), np.float32), "x"))
    with pytest.raises(KernelError, match="do not fit"):
        slot.feed(TokenSpan(np.zeros(2000, np.int32)))
    with pytest.raises(InputError, match="token ids must be"):
        slot.feed(TokenSpan(np.array([-1], np.int32)))
    with pytest.raises(InputError, match="it has: "):
        slot.open(table="short", capacity=256, adapter="smell")
    assert slot.length == len(IDS)


@pytest.mark.parametrize(
    ("n_slots", "capacity", "want"),
    [
        (0, 100, "slots is 0"),
        (MAX_SLOTS + 1, 100, "1 to 64"),
        (2, 0, "is 0 tokens"),
        (2, 1 << 30, "expected 1 to"),
    ],
)
def test_numbers_out_of_range(n_slots: int, capacity: int, want: str, nano: Path) -> None:
    with pytest.raises(InputError, match=want):
        load_pool(nano, n_slots=n_slots, capacity=capacity)


def test_a_model_file_that_is_none(tmp_path: Path, nano: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(BundleError):
        SlotPool(path, bundles.load(nano).text, {}, GgmlOptions(), n_slots=2, capacity=256)


def test_a_context_lives_as_long_as_a_slot_needs_it(pool: SlotPool, slots: list[Slot]) -> None:
    lanes = pool._worker._lanes
    slots[0].open(table="short", capacity=256, adapter=None)
    slots[1].open(table="long", capacity=256, adapter=None)
    assert set(lanes) == {"short", "long"}
    slots[0].open(table="long", capacity=256, adapter=None)
    assert set(lanes) == {"long"}
    slots[0].close()
    slots[0].close()
    slots[1].close()
    assert set(lanes) == set()
    for use in (lambda: slots[0].feed(ONE), lambda: slots[0].rewind(0), slots[0].save_state):
        with pytest.raises(KernelError, match="no cache is open"):
            use()
    slots[0].open(table="short", capacity=256, adapter=None)
    assert slots[0].feed(ONE).shape == (4096,)


def test_memory_is_asked_for_all_slots_at_once(nano: Path) -> None:
    asked: list[tuple[int, int, int]] = []

    def refuse(*tokens: int) -> None:
        asked.append(tokens)  # type: ignore[arg-type]
        raise MemoryShortError("no")

    bundle = bundles.load(nano)
    pool = SlotPool(
        bundle.path(bundle.decoder),
        bundle.text,
        {},
        GgmlOptions(before_cache=refuse),
        n_slots=3,
        capacity=500,
    )
    with pytest.raises(MemoryShortError):
        pool.slot(0).open(table="short", capacity=100, adapter=None)
    assert asked == [(0, 3 * 512, 0)]
    pool.close()


def test_a_cancelled_prompt_is_taken_back_and_others_go_on(slots: list[Slot], decoder: GgmlDecoder) -> None:
    for slot in slots[:2]:
        slot.open(table="long", capacity=2048, adapter=None)
        slot.feed(IDS)
    decoder.open(table="long", capacity=2048, adapter=None)
    decoder.feed(IDS)
    long = TokenSpan(np.resize(IDS.ids, 1900))
    stop = threading.Event()
    outcomes: list[bool] = []

    def reader() -> None:
        while not stop.is_set():
            try:
                slots[0].feed(long)
                slots[0].rewind(len(IDS))
            except CancelledError:
                outcomes.append(slots[0].length == len(IDS))

    thread = threading.Thread(target=reader)
    thread.start()
    for i in range(40):
        time.sleep(0.001 * (i % 5))
        slots[0].cancel()
        assert abs(slots[1].feed(ONE) - decoder.feed(ONE)).max() < SAME
    until(lambda: slots[0].cancel() or len(outcomes) > 3)  # type: ignore[func-returns-value]
    stop.set()
    slots[0].cancel()
    thread.join(WAIT_S)
    assert not thread.is_alive() and all(outcomes)
    decoder.rewind(len(IDS))
    assert abs(slots[0].feed(ONE) - decoder.feed(ONE)).max() < SAME


def test_a_pass_that_nobody_wants_is_stopped(pool: SlotPool, slots: list[Slot]) -> None:
    slots[0].open(table="long", capacity=2048, adapter=None)
    long = TokenSpan(np.resize(IDS.ids, 2000))
    with ThreadPoolExecutor(1) as threads:
        for _ in range(100):
            asked = threads.submit(slots[0].feed, long)
            until(lambda: bool(pool._worker._running) or asked.done())  # noqa: B023
            slots[0].cancel()
            if isinstance(asked.exception(WAIT_S), CancelledError):
                break
            slots[0].rewind(0)
        else:
            pytest.fail("no feed was caught")
    assert slots[0].length == 0
    after = slots[0].feed(ONE)
    slots[0].open(table="long", capacity=2048, adapter=None)
    assert slots[0].feed(ONE).tobytes() == after.tobytes()


def test_what_was_taken_back_is_in_no_pass(pool: SlotPool, slots: list[Slot]) -> None:
    """A slot that cancels and feeds again while a pass waits for another: only the second feed is read."""
    for slot in slots[:2]:
        slot.open(table="short", capacity=256, adapter=None)
        slot.feed(IDS)
    wanted = slots[1].feed(ONE)
    slots[1].rewind(len(IDS))
    worker, rows = pool._worker, pool.passes[1]
    with ThreadPoolExecutor(2) as threads:
        with held(pool):
            worker._patience_s, worker._coming = WAIT_S, {9: (None,)}  # the pass is to wait: set below
            first = threads.submit(slots[0].feed, IDS)
            until(lambda: worker._incoming.qsize() == 1)
            assert slots[0]._pending is not None
            worker._coming = {1: slots[0]._pending.group}
        until(lambda: worker._incoming.qsize() == 0)  # it waits for slot 1
        slots[0].cancel()
        assert isinstance(first.exception(WAIT_S), CancelledError)
        second = threads.submit(slots[0].feed, ONE)
        until(lambda: len(worker._waiting) == 2)
        for logits in (slots[1].feed(ONE), second.result(WAIT_S)):
            assert abs(logits - wanted).max() < SAME
    assert pool.passes[1] == rows + 2
    assert slots[0].length == slots[1].length == len(IDS) + 1


def test_ctrl_c_in_one_thread_leaves_the_others(slots: list[Slot], decoder: GgmlDecoder) -> None:
    """A real interrupt of the main thread while it waits for a prompt."""
    for slot in slots[:2]:
        slot.open(table="long", capacity=2048, adapter=None)
        slot.feed(IDS)
    long = TokenSpan(np.resize(IDS.ids, 1900))
    steps: list[Float32] = []
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set() and slots[1].length < 1000:
            steps.append(slots[1].feed(ONE))

    thread = threading.Thread(target=write)
    thread.start()
    timer = threading.Timer(0.05, _thread.interrupt_main)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        for _ in range(1000):  # far more work than the timer waits
            slots[0].feed(long)
            slots[0].rewind(len(IDS))
    stop.set()
    thread.join(WAIT_S)
    assert not thread.is_alive() and steps
    slots[0].rewind(len(IDS))
    decoder.open(table="long", capacity=2048, adapter=None)
    decoder.feed(IDS)
    for logits in steps:
        assert abs(decoder.feed(ONE) - logits).max() < SAME
    decoder.rewind(len(IDS))
    assert abs(slots[0].feed(ONE) - decoder.feed(ONE)).max() < SAME


# In a process of its own: interrupts again and again while the main thread waits for its slot.
IMPATIENT = """
import os, signal, sys, threading, time
from pathlib import Path
import numpy as np
from pocketphi.runtime import bundle as bundles
from pocketphi.runtime.decoder_ggml import GgmlOptions
from pocketphi.runtime.decoder_slots import SlotPool
from pocketphi.runtime.parts import TokenSpan

bundle = bundles.load(Path(sys.argv[1]))
pool = SlotPool(bundle.path(bundle.decoder), bundle.text, {}, GgmlOptions(2), n_slots=2, capacity=8192)
for i in range(2):
    pool.slot(i).open(table="long", capacity=8192, adapter=None)
ids = np.resize(np.arange(100, 160, dtype=np.int32), 8000)
other = threading.Thread(target=lambda: [pool.slot(1).feed(TokenSpan(ids[:1])) for _ in range(50)])
raised, hits = 0, True

def handler(*_):
    global raised
    raised += 1
    if hits:
        raise KeyboardInterrupt

def pester():
    time.sleep(0.05)
    for _ in range(60):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.001)

signal.signal(signal.SIGINT, handler)
thread = threading.Thread(target=pester)
other.start()
thread.start()
while thread.is_alive():
    try:
        pool.slot(0).rewind(0)
        pool.slot(0).feed(TokenSpan(ids))
    except KeyboardInterrupt:
        pass
hits = False
other.join(60)
pool.slot(0).rewind(0)
finite = np.isfinite(pool.slot(0).feed(TokenSpan(ids[:1]))).all()
print(finite, raised >= 2, [pool.slot(i).length for i in (0, 1)])
pool.close()
"""


def test_many_interrupts_do_not_break_the_pool(nano: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPATIENT, str(nano)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.stdout, done.stderr) == ("True True [1, 50]\n", "")


def test_closing_the_pool_frees_who_waits(nano: Path) -> None:
    pool = load_pool(nano)
    slots = [pool.slot(i) for i in range(4)]
    for i, slot in enumerate(slots):
        slot.open(table="long", capacity=2048, adapter=(None, "speech")[i % 2])
    errors: list[str] = []

    def read(slot: Slot) -> None:
        try:
            while True:
                slot.feed(TokenSpan(np.resize(IDS.ids, 2000)))
                slot.rewind(0)
        except KernelError as exc:
            errors.append(str(exc))

    threads = [threading.Thread(target=read, args=(slot,)) for slot in slots]
    for thread in threads:
        thread.start()
    until(lambda: pool.passes[0] > 5)
    pool.close()
    for thread in threads:
        thread.join(WAIT_S)
    assert errors == ["the model has been closed"] * 4
    pool.close()
    slots[0].close()
    for use in (
        lambda: slots[1].feed(ONE), slots[1].save_state,
        lambda: slots[1].open(table="short", capacity=1, adapter=None),
    ):  # fmt: skip
        with pytest.raises(KernelError, match="has been closed"):
            use()


def test_a_worker_that_fails_frees_who_waits(
    pool: SlotPool, slots: list[Slot], monkeypatch: pytest.MonkeyPatch
) -> None:
    for slot in slots:
        slot.open(table="short", capacity=256, adapter=None)
    wanted = slots[0].feed(IDS)
    for where in ("_chosen", "_hand_out"):
        with monkeypatch.context() as patch:
            patch.setattr(pool._worker, where, lambda *_: 1 / 0)
            with ThreadPoolExecutor(4) as threads:
                asked = [threads.submit(slot.feed, ONE) for slot in slots]
                for one in asked:
                    assert "the decoder failed: division by zero" in str(one.exception(WAIT_S))
    slots[0].rewind(0)
    assert slots[0].feed(IDS).tobytes() == wanted.tobytes()


def test_closing_a_slot_that_another_thread_uses(slots: list[Slot]) -> None:
    slots[0].open(table="long", capacity=2048, adapter=None)
    began = threading.Event()

    def read() -> None:
        while True:
            began.set()
            slots[0].feed(ONE)

    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(read)
        assert began.wait(WAIT_S)
        slots[0].close()
        assert isinstance(asked.exception(WAIT_S), (KernelError, CancelledError))


def chosen(pool: SlotPool, feeds: list[Feed]) -> list[tuple[int, int]]:
    """What the next pass would take of these, in the order in which they came: slot and rows."""
    worker = pool._worker
    for turn, feed in enumerate(feeds):
        feed.turn = turn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "_waiting", feeds)
        return [(feed.slot, n) for feed, n in worker._chosen()]


def test_steps_go_first_and_prompts_fill_the_rest(pool: SlotPool) -> None:
    short, long = (Lane(None, table, 512, 8) for table in ("short", "long"))  # type: ignore[arg-type]

    def feed(
        slot: int, n: int, lane: Lane = short, adapter: str | None = None, embedded: bool = False
    ) -> Feed:
        rows = np.zeros((n, 4), np.float32) if embedded else np.zeros(n, np.int32)
        return Feed(slot, lane, adapter, rows, 0, np.empty((1, 4), np.float32))

    assert chosen(pool, [feed(0, 2000)]) == [(0, 512)], "alone: as a decoder cuts it"
    assert chosen(pool, [feed(0, 2000), feed(2, 1), feed(1, 5)]) == [(0, 128), (1, 5), (2, 1)]
    assert chosen(pool, [feed(3, 300), feed(1, 2000)]) == [(1, 212), (3, 300)]
    others = [feed(1, 1, long), feed(2, 1, adapter="speech"), feed(3, 1, embedded=True)]
    assert chosen(pool, [feed(0, 1), *others]) == [(0, 1)]
    for one in others:
        assert chosen(pool, [one, feed(0, 1)]) == [(one.slot, 1)], "who has waited longest"
    assert sum(n for _, n in chosen(pool, [feed(i % 8, 16) for i in range(40)])) == 512


def test_random_work_at_random_times(pool: SlotPool, slots: list[Slot], decoder: GgmlDecoder) -> None:
    """Four threads for some seconds; then a decoder alone reads what was read, where it was looked at."""
    end = time.monotonic() + 4
    samples: list[tuple[RopeTable, str | None, list[int], Float32]] = []

    def work(slot: Slot, seed: int) -> None:
        dice = random.Random(seed)
        ids: list[int] = []
        table: RopeTable = "short"
        adapter: str | None = None
        slot.open(table=table, capacity=1000, adapter=adapter)
        while time.monotonic() < end:
            more = [dice.randrange(2800) for _ in range(dice.choice((1, 1, 1, 3, 40, 300)))]
            what = dice.randrange(12)
            if what == 0 or len(ids) + len(more) > slot.capacity:
                table, adapter = dice.choice(MODES)
                slot.open(table=table, capacity=1000, adapter=adapter)
                ids = []
            elif what == 1:
                ids = ids[: dice.randrange(len(ids) + 1)]
                slot.rewind(len(ids))
            elif what == 2:
                slot.load_state(slot.save_state(), len(ids)) if ids else None
            elif what == 3:
                timer = threading.Timer(dice.random() * 0.01, slot.cancel)
                timer.start()
                try:
                    slot.feed(TokenSpan(np.array(more, np.int32)))
                    ids = ids + more
                except CancelledError:
                    pass
                timer.join()
            elif what == 4:
                time.sleep(dice.random() * 0.01)
            else:
                logits = slot.feed(TokenSpan(np.array(more, np.int32)))
                ids = ids + more
                if dice.random() < 0.05:
                    samples.append((table, adapter, ids, logits))
            assert slot.length == len(ids)

    with ThreadPoolExecutor(4) as threads:
        for one in [threads.submit(work, slot, seed) for seed, slot in enumerate(slots)]:
            one.result(WAIT_S)
    assert len({(table, adapter) for table, adapter, *_ in samples}) > 1
    for table, adapter, ids, logits in samples[:60]:
        decoder.open(table=table, capacity=1024, adapter=adapter)
        assert abs(decoder.feed(TokenSpan(np.array(ids, np.int32))) - logits).max() < SAME
