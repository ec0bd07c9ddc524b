# SPDX-License-Identifier: Apache-2.0
"""What readings have in common is committed: never the last two words, never half of one, never too soon."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from pocketphi.runtime.agreement import CONFIDENCE, SPAN_S, Agreement

SURE = math.log(0.99)


def starts_word(token: int) -> bool:
    """In these tests a token of ten or more begins a word and a smaller one goes on with it."""
    return token >= 10


def read(agreement: Agreement, ids: Sequence[int], stop_s: float, logprob: float = SURE) -> tuple[int, ...]:
    agreement.add(ids, [logprob] * len(ids), stop_s)
    return agreement.committed


def test_one_reading_commits_nothing() -> None:
    assert read(Agreement(starts_word), [10, 11, 12], 1.0) == ()


def test_two_readings_commit_what_they_share_but_the_last_two_words() -> None:
    agreement = Agreement(starts_word)
    read(agreement, [10, 11, 12, 13, 14], 1.0)
    assert read(agreement, [10, 11, 12, 15, 16], 2.0) == (10, 11, 12)
    same = Agreement(starts_word)
    read(same, [10, 11, 12, 13], 1.0)
    assert read(same, [10, 11, 12, 13], 2.0) == (10, 11)  # speech may have been cut within the last one
    short = Agreement(starts_word)
    read(short, [10, 1], 1.0)
    assert read(short, [10, 1, 11], 2.0) == ()


def test_a_word_is_committed_whole() -> None:
    agreement = Agreement(starts_word)
    read(agreement, [10, 11, 1, 2, 12, 13], 1.0)
    assert read(agreement, [10, 11, 1, 3, 12, 13], 2.0) == (10,)  # 11 1 … is one word, and it differs
    agreement = Agreement(starts_word)
    read(agreement, [10, 11, 1, 12, 13], 1.0)
    assert read(agreement, [10, 11, 12, 13, 14], 2.0) == (10,)  # once "Americans,", once "Americans"


def test_readings_closer_than_the_span_do_not_agree_yet() -> None:
    agreement = Agreement(starts_word)
    read(agreement, [10, 11, 12, 13], 1.0)
    assert read(agreement, [10, 11, 12, 13], 1.0 + SPAN_S / 2) == ()
    assert read(agreement, [10, 11, 14, 15], 1.0 + SPAN_S) == (10, 11)  # and the one between has a say
    agreement = Agreement(starts_word)
    read(agreement, [10, 11, 12, 13], 1.0)
    read(agreement, [20, 11, 12, 13], 1.0 + SPAN_S / 2)
    assert read(agreement, [10, 11, 12, 13], 1.0 + SPAN_S) == ()


def test_a_doubtful_word_waits() -> None:
    agreement = Agreement(starts_word)
    ids = [10, 11, 12, 13, 14]
    agreement.add(ids, [SURE, SURE, math.log(CONFIDENCE) - 1e-6, SURE, SURE], 1.0)
    assert read(agreement, ids, 2.0) == (10, 11)
    assert read(agreement, ids, 3.0) == (10, 11, 12)  # two sure readings since


def test_a_shorter_reading_takes_nothing_back() -> None:
    agreement = Agreement(starts_word)
    read(agreement, [10, 11, 12, 13], 1.0)
    read(agreement, [10, 11, 12, 13], 2.0)
    assert read(agreement, [10, 11], 3.0) == (10, 11)


@pytest.mark.parametrize("seed", range(50))
def test_commits_only_grow_and_are_how_every_reading_begins(seed: int) -> None:
    rng = random.Random(seed)
    agreement = Agreement(starts_word)
    committed: tuple[int, ...] = ()
    stop_s = 0.0
    for _ in range(30):
        stop_s += rng.choice([0.3, 0.5, 1.0, 1.5])
        ids = [*committed, *(rng.choice([10, 11, 1]) for _ in range(rng.randrange(6)))]
        agreement.add(ids, [rng.choice([SURE, math.log(0.5)]) for _ in ids], stop_s)
        assert agreement.committed[: len(committed)] == committed
        assert tuple(ids[: len(agreement.committed)]) == agreement.committed
        committed = agreement.committed


def test_a_reading_that_ignores_what_is_committed_is_a_bug() -> None:
    agreement = Agreement(starts_word)
    read(agreement, [10, 11, 12, 13], 1.0)
    read(agreement, [10, 11, 12, 13], 2.0)
    with pytest.raises(AssertionError):
        read(agreement, [20], 3.0)
