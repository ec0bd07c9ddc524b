# SPDX-License-Identifier: Apache-2.0
"""Perplexity and KL divergence over items as scores with intervals, in the form that reports ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from ..runtime.errors import InputError
from .bootstrap import Float64, interval
from .items import Item
from .journal import Answered
from .metrics import Unit
from .perplexity import exp
from .runner import Score, Scored

LikelihoodName = Literal["ppl", "kld"]
# What `Answered.positions` has of an item; `item_likelihood.figures` makes it.
COLUMNS: Mapping[LikelihoodName, tuple[str, ...]] = {
    "ppl": ("nll",),
    "kld": ("nll", "nll_base", "kld", "same_top"),
}


@dataclass(frozen=True, slots=True)
class Likelihood:
    """A metric of likelihoods; has of `metrics.Metric` what reports ask for."""

    name: LikelihoodName
    best: ClassVar[Literal["low"]] = "low"

    @property
    def unit(self) -> Unit:
        """What its score is in."""
        return "perplexity" if self.name == "ppl" else "nats"

    def score(self, sums: Float64) -> Float64:
        """float64 [m, 2], sums and positions, to float64 [m] of scores."""
        means: Float64 = sums[:, 0] / sums[:, 1]
        return np.exp(means) if self.name == "ppl" else means

    def signature(self) -> str:
        """How it is made."""
        what = "exp of the mean -ln p" if self.name == "ppl" else "mean KL divergence"
        return f"{what} of the reference's tokens and the end of the turn"


class LikelihoodJudge:
    """In a report's eyes a `runner.Judge`, whose answers are what was found at each position."""

    normalizer: ClassVar[str] = "none"

    def __init__(self, name: LikelihoodName) -> None:
        """
        Args:
            name: which metric.
        """
        self.metric = Likelihood(name)

    def judge(self, item: Item, answer: Answered) -> Scored:
        """One item.

        Raises:
            InputError: what a journal has of it is not of this metric.
            KernelError: see `perplexity.exp`.
        """
        if set(answer.positions) != set(COLUMNS[self.metric.name]):
            found = ", ".join(sorted(answer.positions)) or "nothing"
            raise InputError(
                f"{item.where}: its journal has {found:.100}, expected {COLUMNS[self.metric.name]}"
            )
        values = answer.positions["nll" if self.metric.name == "ppl" else "kld"]
        statistics = (float(np.sum(values)), float(len(values)))
        mean = statistics[0] / statistics[1]
        score = exp(mean) if self.metric.name == "ppl" else mean
        return Scored(item, answer, answer.hypothesis, item.reference, score, statistics)

    def score(self, rows: Sequence[Scored]) -> Score:
        """All of them together, at least one."""
        statistics: Float64 = np.array([row.statistics for row in rows], np.float64)
        total = float(self.metric.score(statistics.sum(0, keepdims=True))[0])
        return Score(total, interval(statistics, self.metric.score), len(rows))

    def details(self, rows: Sequence[Scored]) -> dict[str, Any]:
        """What a report has beside the score; names as in `divergence.DivergenceResult.details`."""
        of = {
            name: np.concatenate([row.answer.positions[name] for row in rows]).astype(np.float64)
            for name in COLUMNS[self.metric.name]
        }
        found: dict[str, Any] = {"positions": len(of["nll"]), "mean_nll": float(of["nll"].mean())}
        if self.metric.name == "ppl":
            return found
        same = np.array([(np.sum(row.answer.positions["same_top"]), row.statistics[1]) for row in rows])
        return {
            **found,
            "kld_median": float(np.median(of["kld"])),
            "kld_p99": float(np.percentile(of["kld"], 99)),
            "kld_max": float(of["kld"].max()),
            "same_top": float(of["same_top"].mean()),
            "same_top_ci95": list(interval(same, lambda sums: sums[:, 0] / sums[:, 1])),
            "ppl": exp(found["mean_nll"]),
            "ppl_base": exp(float(of["nll_base"].mean())),
        }
