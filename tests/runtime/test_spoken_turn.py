# SPDX-License-Identifier: Apache-2.0
"""Spoken turns from files that arrive as a microphone's audio would, with the waiting skipped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pocketphi.runtime import audio
from pocketphi.runtime.clock import SkippingClock
from pocketphi.runtime.errors import InputError
from pocketphi.runtime.parts import Float32
from pocketphi.runtime.segments import SegmentRules
from pocketphi.runtime.sources import Paced, Source
from pocketphi.runtime.spoken_turn import MAX_TURN_S, record_turn

AUDIO = Path(__file__).resolve().parents[2] / "nano" / "eval" / "audio"
RATE = 16000
BLOCK = RATE // 10


def quiet(seconds: float) -> Float32:
    """A quiet room: noise at -80 dBFS."""
    return np.random.default_rng(0).normal(0.0, 1e-4, int(seconds * RATE)).astype(np.float32)


def clip(name: str) -> Float32:
    loaded = audio.load(AUDIO / f"{name}.flac")
    assert loaded.sample_rate == RATE
    return loaded.samples


def spoken(*parts: Float32) -> Source:
    """What a microphone would hear."""
    samples = np.concatenate(parts)
    blocks = (samples[i : i + BLOCK] for i in range(0, len(samples), BLOCK))
    return Paced(audio.Sound("test", RATE, blocks), SkippingClock())


def nothing(_line: str) -> None:
    pass


@pytest.mark.parametrize("name", ["sqa-000", "sqa-003", "sqa-005", "sqa-008"])
def test_a_turn_is_what_was_said(name: str) -> None:
    said = clip(name)
    heard = record_turn(spoken(quiet(1.5), said, quiet(3.0)), SegmentRules(), nothing)
    assert heard is not None
    samples, rate = heard
    assert rate == RATE
    # Where in the source it lies, sample by sample: it begins before the first loud sample and ends after
    # the last, and holds only the pre-roll and the tail of silence, and what the detector adds at each side.
    whole = np.concatenate([quiet(1.5), said, quiet(3.0)])
    starts = [
        i for i in np.flatnonzero(whole == samples[0]) if np.array_equal(whole[i : i + len(samples)], samples)
    ]
    assert len(starts) == 1
    loud = np.flatnonzero(np.abs(said) > 0.05) + int(1.5 * RATE)
    assert starts[0] <= loud[0]
    assert starts[0] + len(samples) > loud[-1]
    assert len(samples) < len(said) + 2 * RATE


def test_the_turn_ends_at_the_first_pause() -> None:
    """What follows is not waited for: the source is asked for no more than the pause."""
    asked = 0
    samples = np.concatenate([quiet(1.0), clip("sqa-000"), quiet(30.0), clip("sqa-003")])

    def blocks() -> Iterator[Float32]:
        nonlocal asked
        for i in range(0, len(samples), BLOCK):
            asked = i + BLOCK
            yield samples[i : i + BLOCK]

    source = Paced(audio.Sound("test", RATE, blocks()), SkippingClock())
    assert record_turn(source, SegmentRules(), nothing) is not None
    assert asked < RATE + len(clip("sqa-000")) + 3 * RATE


def test_a_short_pause_does_not_end_it_when_the_rules_say_so() -> None:
    parts = (quiet(1.0), clip("sqa-000"), quiet(1.2), clip("sqa-003"), quiet(6.0))
    short = record_turn(spoken(*parts), SegmentRules(pause_s=0.7), nothing)
    long = record_turn(spoken(*parts), SegmentRules(pause_s=3.0), nothing)
    assert short is not None
    assert long is not None
    assert len(long[0]) > len(short[0]) + len(clip("sqa-003")) // 2


def test_a_long_turn_is_not_cut_like_a_caption() -> None:
    """40 s of speech with pauses too short to end it."""
    parts = [clip(f"sqa-{i:03}") for i in range(10)]
    while sum(map(len, parts)) < 40 * RATE:
        parts += parts
    heard = record_turn(spoken(quiet(1.0), *parts, quiet(6.0)), SegmentRules(pause_s=3.0), nothing)
    assert heard is not None
    assert len(heard[0]) > 35 * RATE


def test_somebody_who_never_pauses_is_sent_after_two_minutes() -> None:
    parts = [clip(f"sqa-{i:03}") for i in range(10)]
    while sum(map(len, parts)) < 170 * RATE:
        parts += parts
    heard = record_turn(spoken(*parts), SegmentRules(pause_s=5.0), nothing)
    assert heard is not None
    assert MAX_TURN_S * RATE <= len(heard[0]) <= (MAX_TURN_S + 30) * RATE


def test_the_end_of_the_source_ends_the_turn() -> None:
    assert record_turn(spoken(quiet(0.5), clip("sqa-000")), None, nothing) is not None


def test_silence_is_no_turn() -> None:
    assert record_turn(spoken(quiet(5.0)), SegmentRules(), nothing) is None
    assert record_turn(spoken(np.zeros(0, np.float32)), SegmentRules(), nothing) is None


def test_it_says_when_to_speak() -> None:
    lines: list[str] = []
    record_turn(spoken(quiet(1.0)), SegmentRules(), lines.append)
    assert len(lines) == 1
    assert "pause" in lines[0]


def test_a_source_that_fails_is_closed() -> None:
    closed = False

    def blocks() -> Iterator[Float32]:
        yield quiet(0.1)
        raise InputError("the device is gone")

    class Watched(Paced):
        def close(self) -> None:
            nonlocal closed
            closed = True
            super().close()

    with pytest.raises(InputError, match="gone"):
        record_turn(Watched(audio.Sound("test", RATE, blocks()), SkippingClock()), SegmentRules(), nothing)
    assert closed
