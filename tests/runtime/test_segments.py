# SPDX-License-Identifier: Apache-2.0
"""Cuts of long audio: complete, in order, bounded, and where it is quiet."""

from __future__ import annotations

import numpy as np
import pytest

from pocketphi.runtime.segments import MAX_PASS_S, cut

RATE = 8000


def noise(seconds: float) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.random.default_rng(1).uniform(-0.5, 0.5, int(seconds * RATE)).astype(np.float32)


@pytest.mark.parametrize("seconds", [0.025, 1, 39.9, 40, 40.1, 61, 125.4])
def test_the_passes_are_the_clip(seconds: float) -> None:
    samples = noise(seconds)
    passes = list(cut(samples, RATE))
    assert [p[0] for p in passes] == [0, *[p[1] for p in passes[:-1]]]
    assert passes[-1][1] == len(samples)
    assert len(passes) == 1 or all(0 < b - a <= MAX_PASS_S * RATE for a, b in passes)
    assert (len(passes) == 1) == (seconds <= 40)


def test_a_cut_falls_into_the_pause() -> None:
    samples = noise(50)
    pause = slice(int(23.0 * RATE), int(23.4 * RATE))
    samples[pause] *= 0.01
    (_, stop), *_ = cut(samples, RATE)
    assert pause.start < stop < pause.stop
