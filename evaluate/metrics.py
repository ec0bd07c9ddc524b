# SPDX-License-Identifier: Apache-2.0
"""How right answers are: word and character error rates, BLEU, chrF, exact matches and tool calls.

jiwer counts the errors, sacrebleu scores BLEU and chrF. Every metric also gives what an item adds to the sums
that its score is made of, so that the scores of resampled items are a few divisions away.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np

from ..runtime.errors import InputError
from ..runtime.tools import parse_calls
from .bootstrap import Float64
from .normalizers import NormalizerName

MetricName = Literal["wer", "cer", "bleu", "chrf", "exact", "tool-call"]
METRICS: tuple[MetricName, ...] = get_args(MetricName)
Unit = Literal["fraction", "points", "perplexity", "nats"]  # 1 is all; 100 is all; 1 is best; 0 is best

_BLEU_ORDERS = 4
_CHRF_ORDERS = 6
_CHRF_BETA2 = 4.0  # beta squared: recall counts twice as much as precision


@dataclass(frozen=True, slots=True)
class Judged:
    """One answer beside its reference."""

    score: float  # of this item alone, in the metric's unit
    statistics: tuple[float, ...]  # what it adds to the sums


class Metric(Protocol):
    """A way to score answers. Texts are normalized before they come here."""

    name: MetricName
    unit: Unit
    best: Literal["low", "high"]

    def check(self, reference: str) -> str | None:
        """Why a reference cannot be scored against; None: it can."""

    def judge(self, hypothesis: str, reference: str) -> Judged:
        """One item."""

    def score(self, sums: Float64) -> Float64:
        """float64 [m, k] of summed statistics to float64 [m] of scores."""

    def signature(self) -> str:
        """Who scored it, in which version and how."""


def metric(name: MetricName) -> Metric:
    """A metric by name.

    Raises:
        InputError: what it needs is not installed.
    """
    if name in ("wer", "cer"):
        return _ErrorRate(name)
    if name == "bleu":
        return _Bleu()
    if name == "chrf":
        return _Chrf()
    return _Exact() if name == "exact" else _ToolCalls()


def default_normalizer(name: MetricName) -> NormalizerName:
    """English for error rates, as Whisper's are reported; nothing is changed for the others."""
    return "english" if name in ("wer", "cer") else "none"


def _missing(name: str, package: str) -> InputError:
    return InputError(f"--metric {name} needs {package}: pip install 'pocketphi[eval]'")


def _not_empty(reference: str) -> str | None:
    return None if reference.strip() else "is empty once normalized, expected words to compare with"


class _ErrorRate:
    """Substitutions, insertions and deletions, of words or characters of the reference.

    Runs of white space are one space, which is no word and one character.
    """

    unit: Unit = "fraction"
    best: Literal["low", "high"] = "low"

    def __init__(self, name: Literal["wer", "cer"]) -> None:
        try:
            import jiwer
        except ImportError:
            raise _missing(name, "jiwer") from None
        self.name: MetricName = name
        self._process: Any = jiwer.process_words if name == "wer" else jiwer.process_characters

    def check(self, reference: str) -> str | None:
        return _not_empty(reference)

    def judge(self, hypothesis: str, reference: str) -> Judged:
        found = self._process([" ".join(reference.split())], [" ".join(hypothesis.split())])
        errors = found.substitutions + found.insertions + found.deletions
        length = found.hits + found.substitutions + found.deletions
        return Judged(errors / length, (float(errors), float(length)))

    def score(self, sums: Float64) -> Float64:
        found: Float64 = sums[:, 0] / sums[:, 1]
        return found

    def signature(self) -> str:
        from importlib.metadata import version

        return f"jiwer {version('jiwer')}"


class _Bleu:
    """sacrebleu's BLEU with its own defaults: 13a tokens, exponential smoothing."""

    name: MetricName = "bleu"
    unit: Unit = "points"
    best: Literal["low", "high"] = "high"

    def __init__(self) -> None:
        try:
            from sacrebleu.metrics.bleu import BLEU
        except ImportError:
            raise _missing("bleu", "sacrebleu") from None
        self._corpus: Any = BLEU(force=True)
        self._sentence: Any = BLEU(effective_order=True)

    def check(self, reference: str) -> str | None:
        return _not_empty(reference)

    def judge(self, hypothesis: str, reference: str) -> Judged:
        found = self._sentence.sentence_score(hypothesis, [reference])
        counts = [found.sys_len, found.ref_len, *found.counts, *found.totals]
        return Judged(float(found.score), tuple(map(float, counts)))

    def score(self, sums: Float64) -> Float64:
        n_found, n_wanted = sums[:, 0], sums[:, 1]
        right, all_ = sums[:, 2 : 2 + _BLEU_ORDERS], sums[:, 2 + _BLEU_ORDERS :]
        smooth, logs = np.ones(len(sums)), np.zeros(len(sums))
        with np.errstate(divide="ignore", invalid="ignore"):
            for n in range(_BLEU_ORDERS):
                smooth = np.where(right[:, n] == 0, 2 * smooth, smooth)
                precision = np.where(right[:, n] == 0, 1 / smooth, right[:, n]) / all_[:, n]
                logs += np.where(all_[:, n] > 0, np.log(precision), -np.inf)
            brevity = np.where(n_found < n_wanted, np.exp(1 - n_wanted / n_found), 1.0)
        found: Float64 = np.where(right.any(axis=1), 100 * brevity * np.exp(logs / _BLEU_ORDERS), 0.0)
        return found

    def signature(self) -> str:
        self._corpus.corpus_score(["a"], [["a"]])  # it signs only what it has scored
        return f"sacrebleu {self._corpus.get_signature()}"


class _Chrf:
    """sacrebleu's chrF with its own defaults: characters up to 6 in a row, without white space."""

    name: MetricName = "chrf"
    unit: Unit = "points"
    best: Literal["low", "high"] = "high"

    def __init__(self) -> None:
        try:
            from sacrebleu.metrics.chrf import CHRF
        except ImportError:
            raise _missing("chrf", "sacrebleu") from None
        self._metric: Any = CHRF()

    def check(self, reference: str) -> str | None:
        return _not_empty(reference)

    def judge(self, hypothesis: str, reference: str) -> Judged:
        """sacrebleu keeps its counts to itself: they are counted here too."""
        score = float(self._metric.sentence_score(hypothesis, [reference]).score)
        found, wanted = ("".join(text.split()) for text in (hypothesis, reference))
        counts: list[float] = []
        for n in range(1, _CHRF_ORDERS + 1):
            a, b = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in (found, wanted))
            counts += [float(a.total() if b else 0), float(b.total()), float((a & b).total())]
        return Judged(score, tuple(counts))

    def score(self, sums: Float64) -> Float64:
        found, wanted, same = sums[:, 0::3], sums[:, 1::3], sums[:, 2::3]
        counted = (found > 0) & (wanted > 0)
        orders = np.maximum(counted.sum(axis=1), 1)
        precision = (np.where(counted, same, 0) / np.maximum(found, 1)).sum(axis=1) / orders
        recall = (np.where(counted, same, 0) / np.maximum(wanted, 1)).sum(axis=1) / orders
        below = _CHRF_BETA2 * precision + recall
        found_score: Float64 = 100 * (1 + _CHRF_BETA2) * precision * recall / np.where(below > 0, below, 1)
        return found_score

    def signature(self) -> str:
        self._metric.corpus_score(["a"], [["a"]])
        return f"sacrebleu {self._metric.get_signature()}"


class _Share(ABC):
    """How many items are right, of all."""

    unit: Unit = "fraction"
    best: Literal["low", "high"] = "high"

    @abstractmethod
    def is_right(self, hypothesis: str, reference: str) -> bool:
        """Whether one answer is."""

    def check(self, reference: str) -> str | None:
        return None

    def judge(self, hypothesis: str, reference: str) -> Judged:
        right = float(self.is_right(hypothesis, reference))
        return Judged(right, (right, 1.0))

    def score(self, sums: Float64) -> Float64:
        found: Float64 = sums[:, 0] / sums[:, 1]
        return found

    def signature(self) -> str:
        return ""


class _Exact(_Share):
    """The same text."""

    name: MetricName = "exact"

    def is_right(self, hypothesis: str, reference: str) -> bool:
        return hypothesis == reference


class _ToolCalls(_Share):
    """The same calls in the same order: names, and arguments as JSON values."""

    name: MetricName = "tool-call"

    def check(self, reference: str) -> str | None:
        return (
            None if parse_calls(reference) else 'holds no tool call, expected [{"name": …, "arguments": {…}}]'
        )

    def is_right(self, hypothesis: str, reference: str) -> bool:
        found, wanted = parse_calls(hypothesis), parse_calls(reference)
        if found is None or wanted is None:
            return False
        return [(c.name, _plain(c.arguments)) for c in found] == [
            (c.name, _plain(c.arguments)) for c in wanted
        ]


def _plain(value: object) -> str:
    """JSON in one spelling: keys in order, 9.0 as 9; true is not 1."""

    def number(text: str) -> float | int:
        found = float(text)
        return int(found) if found.is_integer() else found

    return json.dumps(json.loads(json.dumps(value), parse_float=number), sort_keys=True)
