# SPDX-License-Identifier: Apache-2.0
"""Metrics on cases worked out by hand, and beside the libraries' own scores of many sentences."""

from __future__ import annotations

import math
import sys

import jiwer
import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from pocketphi.evaluate.metrics import METRICS, MetricName, default_normalizer, metric
from pocketphi.runtime.errors import InputError

CALL = '<|tool_call|>[{"name": "alarm", "arguments": {"hour": 9, "on": true}}]<|/tool_call|>'
BY_HAND: list[tuple[MetricName, str, str, float]] = [
    ("wer", "a x c", "a b c d", 2 / 4),
    ("wer", "a b c", "a", 2.0),
    ("wer", "", "a b", 1.0),
    ("wer", "a\nb  c", "a b c", 0.0),
    ("cer", "abd", "abc", 1 / 3),
    ("cer", "a  b", "a bc", 1 / 4),
    # Right n-grams 5/5, 3/4, 2/3, 1/2; five words where six are wanted.
    ("bleu", "the cat sat on mat", "the cat sat on the mat", 100 * math.exp(1 - 6 / 5) * 0.25**0.25),
    ("bleu", "", "the cat", 0.0),
    # Single characters: 2 right of 2 said and 3 wanted; pairs: 1, 1, 2; precision 1, recall 7/12.
    ("chrf", "ab", "abc", 100 * 5 * (7 / 12) / (4 + 7 / 12)),
    ("chrf", "xy", "abc", 0.0),
    ("exact", "Paris.", "Paris.", 1.0),
    ("exact", "paris.", "Paris.", 0.0),
    ("tool-call", CALL, CALL, 1.0),
    ("tool-call", '[{"arguments": {"on": true, "hour": 9.0}, "name": "alarm"}]', CALL, 1.0),
    ("tool-call", '[{"name": "alarm", "arguments": {"hour": 9, "on": 1}}]', CALL, 0.0),
    ("tool-call", '[{"name": "alarms", "arguments": {"hour": 9, "on": true}}]', CALL, 0.0),
    ("tool-call", f"{CALL}{CALL}", CALL, 0.0),
    ("tool-call", "At nine.", CALL, 0.0),
]


@pytest.mark.parametrize(("name", "hypothesis", "reference", "wanted"), BY_HAND)
def test_by_hand(name: MetricName, hypothesis: str, reference: str, wanted: float) -> None:
    one = metric(name)
    found = one.judge(hypothesis, reference)
    assert found.score == pytest.approx(wanted, rel=1e-14)
    assert one.check(reference) is None


@pytest.mark.parametrize("name", METRICS)
def test_an_empty_reference_is_refused_where_nothing_can_be_scored(name: MetricName) -> None:
    assert (metric(name).check("  ") is None) == (name == "exact")


def sentences(rng: np.random.Generator, n: int) -> tuple[list[str], list[str]]:
    """References of 1 to 12 words, and what somebody made of them; the first is heard as nothing."""
    words = ["the", "cat", "sat", "on", "a", "mat.", "dog", "red", "ran", "to", "house,", "big"]
    wanted = [" ".join(rng.choice(words, rng.integers(1, 13))) for _ in range(n)]
    found = [" ".join(w for w in one.split() if rng.random() > 0.15) for one in wanted]
    found = [one if rng.random() > 0.4 else f"{one} {rng.choice(words)}".strip() for one in found]
    return ["", *found[1:]], wanted


def theirs(name: MetricName, hypotheses: list[str], references: list[str]) -> float:
    if name == "wer":
        return float(jiwer.wer(references, hypotheses))
    if name == "cer":
        return float(jiwer.cer(references, hypotheses))
    of = BLEU(force=True) if name == "bleu" else CHRF()
    return float(of.corpus_score(hypotheses, [references]).score)


@pytest.mark.parametrize("name", ["wer", "cer", "bleu", "chrf"])
def test_sums_score_any_resample_as_the_library_does(name: MetricName) -> None:
    """A score is some 40 float64 operations on counts and logarithms below 8: 40 · 8 · 1.1e-16 < 1e-12."""
    rng = np.random.default_rng(5)
    hypotheses, references = sentences(rng, 30)
    one = metric(name)
    rows = np.array([one.judge(*pair).statistics for pair in zip(hypotheses, references, strict=True)])
    picks = [
        np.arange(30),
        np.zeros(30, int),
        np.array([1]),
        *(rng.integers(30, size=size) for size in [1, 2, 3, 5, 30, 30, 30]),
    ]
    sums = np.array([rows[pick].sum(axis=0) for pick in picks])
    wanted = [theirs(name, [hypotheses[i] for i in p], [references[i] for i in p]) for p in picks]
    np.testing.assert_allclose(one.score(sums), wanted, rtol=1e-12, atol=1e-12)


def test_who_scored_it() -> None:
    assert metric("wer").signature().startswith("jiwer ")
    assert "tok:13a" in metric("bleu").signature()
    assert "nc:6" in metric("chrf").signature()


def test_error_rates_are_of_normalized_text() -> None:
    assert {name: default_normalizer(name) for name in METRICS} == {
        **dict.fromkeys(["wer", "cer"], "english"),
        **dict.fromkeys(["bleu", "chrf", "exact", "tool-call"], "none"),
    }


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("wer", "jiwer", "jiwer"),
        ("cer", "jiwer", "jiwer"),
        ("bleu", "sacrebleu.metrics.bleu", "sacrebleu"),
        ("chrf", "sacrebleu.metrics.chrf", "sacrebleu"),
    ],
)
def test_what_is_not_installed_is_said(
    name: MetricName, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        InputError, match=rf"^--metric {name} needs {package}: pip install 'pocketphi\[eval\]'$"
    ):
        metric(name)
