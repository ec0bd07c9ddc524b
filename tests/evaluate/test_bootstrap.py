# SPDX-License-Identifier: Apache-2.0
"""The interval where it is known without drawing anything."""

from __future__ import annotations

import tracemalloc

import numpy as np
import numpy.typing as npt
import pytest

from pocketphi.evaluate import bootstrap
from pocketphi.evaluate.bootstrap import interval

Float64 = npt.NDArray[np.float64]


def ratio(sums: Float64) -> Float64:
    found: Float64 = sums[:, 0] / sums[:, 1]
    return found


def test_a_share_is_binomial() -> None:
    """50 of 100: P(X <= 39) = 0.0176 and P(X <= 40) = 0.0284, so 40 is the percentile, and 60 by symmetry.

    With 10^5 resamples a frequency is 0.0005 off (one sigma): 0.025 is 6 sigma from either.
    """
    rows = np.array([[i % 2, 1.0] for i in range(100)])
    assert interval(rows, ratio, resamples=100_000) == (0.4, 0.6)


def test_weights_are_drawn_with_their_items() -> None:
    """Two items, 0 of 1 and 9 of 9: the resamples are 0, 9/10 and 1, with 1/4, 1/2 and 1/4."""
    assert interval(np.array([[0.0, 1.0], [9.0, 9.0]]), ratio) == (0.0, 1.0)
    seen: list[Float64] = []

    def spy(sums: Float64) -> Float64:
        seen.append(ratio(sums))
        return seen[0]

    interval(np.array([[0.0, 1.0], [9.0, 9.0]]), spy)
    values, counts = np.unique(seen[0], return_counts=True)
    assert values.tolist() == [0.0, 0.9, 1.0]
    # Binomial(1000, 1/2) has sigma 16, Binomial(1000, 1/4) 14: five of them.
    assert (abs(counts - [250, 500, 250]) < [70, 80, 70]).all()


@pytest.mark.parametrize("n", [1, 7])
def test_without_variance_it_is_the_score(n: int) -> None:
    assert interval(np.array([[1.0, 4.0]] * n), ratio) == (0.25, 0.25)


def test_it_is_the_same_every_time_and_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).integers(0, 9, (50, 2)) + 1.0
    whole = interval(rows, ratio)
    assert interval(rows, ratio) == whole
    monkeypatch.setattr(bootstrap, "_CHUNK", 300)
    assert interval(rows, ratio) == whole


def test_sums_are_of_the_items_drawn() -> None:
    """Drawn one by one and added up, as it is defined: whole numbers, so the sums are exact."""
    rows = np.random.default_rng(1).integers(0, 1000, (41, 3)).astype(np.float64)
    seen: list[Float64] = []

    def spy(sums: Float64) -> Float64:
        seen.append(sums.copy())
        return sums[:, 0]

    interval(rows, spy, resamples=7)
    drawn = np.random.default_rng(bootstrap._SEED).integers(41, size=(7, 41))
    np.testing.assert_array_equal(seen[0], [sum(rows[i] for i in one) for one in drawn])


def test_many_items_take_little_memory() -> None:
    """100,000 items with 18 numbers each, as chrF has them: weights of 32 MiB at a time, and one draw."""
    rows = np.ones((100_000, 18))
    tracemalloc.start()
    try:
        interval(rows, ratio, resamples=60)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The draw and its counts are 8 bytes an item each, and bincount's own copy.
    assert peak < 8 * bootstrap._CHUNK + 4 * 8 * 100_000
