# SPDX-License-Identifier: Apache-2.0
"""Asks a model every item, and scores what it says: the answers of each item do not depend on the others'."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..runtime.engine import ChatOptions, CompleteOptions, Model
from ..runtime.errors import InputError
from ..runtime.parts import Reply
from .bootstrap import Float64, interval
from .items import Item, in_order_of_modes
from .journal import Answered, answered
from .metrics import MetricName, default_normalizer, metric
from .normalizers import NormalizerName, normalizer


@dataclass(frozen=True, slots=True)
class Scored:
    """An item, what was said to it, and how right that is."""

    item: Item
    answer: Answered
    hypothesis: str  # normalized
    reference: str  # normalized
    score: float  # of this item alone
    statistics: tuple[float, ...]

    def details(self) -> dict[str, Any]:
        """What a line of items.jsonl has beside the answer."""
        return {
            "task": self.item.task,
            "mode": self.item.mode,
            "reference": self.item.reference,
            "normalized": {"hypothesis": self.hypothesis, "reference": self.reference},
            "score": self.score,
        }


@dataclass(frozen=True, slots=True)
class Score:
    """A score over items, and the 95 % confidence interval of it."""

    score: float
    ci95: tuple[float, float]
    items: int


class Judge:
    """A metric and a normalizer."""

    def __init__(self, name: MetricName, normalizer_name: NormalizerName | None = None) -> None:
        """
        Args:
            name: which metric.
            normalizer_name: None: the metric's own.

        Raises:
            InputError: something is not installed.
        """
        self.metric = metric(name)
        self.normalizer: NormalizerName = normalizer_name or default_normalizer(name)
        self._normalize = normalizer(self.normalizer)

    def check(self, items: Sequence[Item]) -> None:
        """Find out before any work that an item cannot be scored.

        Raises:
            InputError: names the item.
        """
        for item in items:
            wrong = self.metric.check(self._normalized(item, "reference", item.reference))
            if wrong is not None:
                raise InputError(f"{item.where}: reference {wrong}")

    def judge(self, item: Item, answer: Answered) -> Scored:
        """One answer.

        Raises:
            InputError: the normalizer cannot take it.
        """
        hypothesis = self._normalized(item, "answer", answer.hypothesis)
        reference = self._normalized(item, "reference", item.reference)
        found = self.metric.judge(hypothesis, reference)
        return Scored(item, answer, hypothesis, reference, found.score, found.statistics)

    def score(self, rows: Sequence[Scored]) -> Score:
        """All of them together, at least one."""
        statistics: Float64 = np.array([row.statistics for row in rows], np.float64)
        total = float(self.metric.score(statistics.sum(axis=0, keepdims=True))[0])
        return Score(total, interval(statistics, self.metric.score), len(rows))

    def details(self, rows: Sequence[Scored]) -> dict[str, Any]:
        """What a report has beside the score: nothing."""
        return {}

    def _normalized(self, item: Item, what: str, text: str) -> str:
        try:
            return self._normalize(text)
        except InputError as exc:
            raise InputError(f"{item.where}: {what}: {exc}") from None


def answers(
    model: Model,
    items: Sequence[Item],
    *,
    options: CompleteOptions,
    done: Mapping[str, Answered] | None = None,
) -> Iterator[tuple[Item, Answered]]:
    """Ask what is not done yet, by mode, so that every adapter is switched to once.

    Raises:
        InputError: an item that the model cannot take, or whose medium is damaged; names it.
        KernelError: llama.cpp failed.
    """
    for item in in_order_of_modes(items):
        if done is None or item.id not in done:
            yield item, answered(item.id, _ask(model, item, options))


def _ask(model: Model, item: Item, options: CompleteOptions) -> Reply:
    """One item, as if it were the only one: what is shared with the one before would round differently."""
    model.forget()
    try:
        if item.prompt is not None:
            with_media: CompleteOptions = {**options, "media": item.media}
            return model.complete(item.prompt, **with_media)
        with_tools: ChatOptions = {**options, "tools": item.tools}
        return model.chat(item.messages, **with_tools)
    except InputError as exc:
        raise InputError(f"{item.where}: {exc}") from None
