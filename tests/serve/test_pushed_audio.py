# SPDX-License-Identifier: Apache-2.0
"""A client's audio buffer alone: samples, stretches, times, bounds, threads."""

from __future__ import annotations

import math
import threading
import tracemalloc

import numpy as np
import pytest

from pocketphi.runtime import audio
from pocketphi.runtime.segments import SegmentRules
from pocketphi.serve.errors import Refusal
from pocketphi.serve.pushed_audio import AudioBuffer, Dropped

from ..clocks import MadeTime

RULES = SegmentRules()


def noise(n: int) -> np.ndarray:
    return np.random.default_rng(7).integers(-20_000, 20_000, n).astype("<i2")


@pytest.mark.parametrize("rate", [16000, 24000])
@pytest.mark.parametrize("piece", [1, 77, 50_000])
def test_samples_are_those_of_a_file(rate: int, piece: int) -> None:
    """However they are cut, and whoever waits for whom."""
    sound = noise(rate // 4 if piece == 1 else 3 * rate)
    buffer = AudioBuffer(MadeTime(), 60.0)

    def append() -> None:
        for i in range(0, len(sound), piece):
            buffer.append(sound[i : i + piece].tobytes(), rate, RULES)
        buffer.end()

    thread = threading.Thread(target=append)
    thread.start()
    blocks = [block for stretch in buffer.stretches() for block in stretch.blocks]
    thread.join()
    assert max(map(len, blocks)) <= 2 * 1600  # about 0.1 s; the resampler's last is what it held back
    assert np.array_equal(np.concatenate(blocks), audio.from_samples(sound, rate).samples)
    assert buffer.held_s == pytest.approx(0.0, abs=1e-9)  # sums of float64 seconds


def test_stretches() -> None:
    """Each ends where it was committed or cleared; one without rules comes when it is complete."""
    buffer = AudioBuffer(MadeTime(), 60.0)
    second = bytes(2 * 16000)
    buffer.append(second, 16000, None)
    buffer.commit("one", "a")
    buffer.append(second * 2, 16000, None)
    assert buffer.clear().cleared
    buffer.append(second, 16000, RULES)
    buffer.commit("", None)
    buffer.append(second, 16000, None)  # never committed
    buffer.end()
    buffer.append(second, 16000, RULES)  # too late
    found = []
    for stretch in buffer.stretches():
        if stretch.cleared:
            with pytest.raises(Dropped):
                next(stretch.blocks)
        else:
            assert sum(map(len, stretch.blocks)) == 16000 and stretch.exhausted
        found.append(
            (stretch.item_id, stretch.commit_id, stretch.start_s, stretch.cleared, stretch.committed)
        )
    assert found == [
        ("one", "a", 0.0, False, True),
        ("", None, 1.0, True, False),
        ("", None, 3.0, False, True),
    ]


def test_a_bound() -> None:
    """On what nobody has looked at: what is taken or cleared makes room."""
    buffer = AudioBuffer(MadeTime(), 2.0)
    second = bytes(2 * 16000)
    for _ in range(2):
        buffer.append(second, 16000, RULES)
    with pytest.raises(Refusal) as found:
        buffer.append(second, 16000, RULES)
    assert found.value.code == "input_audio_buffer_full" and buffer.held_s == 2.0
    stretch = next(buffer.stretches())
    for _ in range(10):
        next(stretch.blocks)
    buffer.append(second, 16000, RULES)
    buffer.clear()
    assert buffer.held_s == pytest.approx(0.0, abs=1e-9)  # sums of float64 seconds
    with pytest.raises(Dropped):
        next(stretch.blocks)


def test_stretches_that_wait_are_few_and_small() -> None:
    """Cleared ones hold no audio, but each waits for its turn: a flood of them is refused."""
    buffer = AudioBuffer(MadeTime(), 2.0)

    def flood() -> None:
        for _ in range(10_000):
            buffer.append(bytes(2 * 16000), 16000, None)
            buffer.clear()

    tracemalloc.start()
    try:
        with pytest.raises(Refusal) as found:
            flood()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.value.code == "input_audio_buffer_full"
    assert held < 32 << 20  # one second each would be four times as much
    assert next(buffer.stretches()).cleared


def test_figures() -> None:
    """Backlog, level, and when sample 0 was spoken: a client that pauses is not behind."""
    clock = MadeTime(100.0)
    buffer = AudioBuffer(clock, 60.0)
    buffer.append(bytes(2 * 16000), 16000, RULES)
    stretch = buffer.open
    assert stretch is not None
    assert (stretch.started, stretch.seconds, stretch.backlog_s()) == (99.0, 1.0, 1.0)
    assert stretch.level_dbfs == -math.inf
    next(stretch.blocks)
    assert stretch.backlog_s() == pytest.approx(0.9) and stretch.given_s == pytest.approx(0.1)
    clock.time = 110.0
    buffer.append(np.full(16000, 32767, "<i2").tobytes(), 16000, RULES)
    assert stretch.started == 108.0 and stretch.level_dbfs == pytest.approx(0.0, abs=0.001)


def test_who_waits_is_let_go() -> None:
    """By `close`, from another thread, in a stretch and between two."""
    for begun in (False, True):
        buffer = AudioBuffer(MadeTime(), 60.0)
        if begun:
            buffer.append(bytes(320), 16000, RULES)
        ended: list[str] = []

        def listen(buffer: AudioBuffer = buffer, ended: list[str] = ended) -> None:
            try:
                for stretch in buffer.stretches():
                    for _ in stretch.blocks:
                        pass
            except Dropped:
                ended.append("dropped")
            ended.append("end")

        thread = threading.Thread(target=listen)
        thread.start()
        while begun and buffer.held_s > 1e-9:
            pass
        buffer.close()
        thread.join(60)
        assert ended == (["dropped", "end"] if begun else ["end"])
