# SPDX-License-Identifier: Apache-2.0
"""How far a score is to be trusted: the percentile bootstrap over items, on what each adds to the score."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

RESAMPLES = 1000
_SEED = 20240229
_CHUNK = 1 << 22  # weights in memory at once: 32 MiB


def interval(
    statistics: Float64, score: Callable[[Float64], Float64], *, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """The 95 % confidence interval of a score over items.

    As many items are drawn as there are, with replacement, `resamples` times; the 2.5th and the 97.5th
    percentile of their scores are the interval. The same statistics give the same interval.

    Args:
        statistics: float64 [n, k], n >= 1: what each item adds to the sums that the score is made of.
        score: float64 [m, k] of sums to float64 [m] of scores.
        resamples: at least 1.

    Returns:
        low and high; of one item, or of equal ones, both are the score.

    Source: Efron, "Bootstrap methods: another look at the jackknife" (1979); numpy's linear percentiles.
    """
    n, k = statistics.shape
    rng = np.random.default_rng(_SEED)
    sums = np.empty((resamples, k), np.float64)
    step = min(resamples, max(1, _CHUNK // n))
    times = np.empty((step, n), np.float64)  # how often each item was drawn
    for start in range(0, resamples, step):
        rows = times[: min(step, resamples - start)]
        for row in rows:
            row[:] = np.bincount(rng.integers(n, size=n), minlength=n)
        np.matmul(rows, statistics, out=sums[start : start + len(rows)])
    low, high = np.quantile(score(sums), (0.025, 0.975))
    return float(low), float(high)
