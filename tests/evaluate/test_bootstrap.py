# SPDX-License-Identifier: Apache-2.0
"""The interval where it is known without drawing anything."""

from __future__ import annotations

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
