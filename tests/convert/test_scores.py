# SPDX-License-Identifier: Apache-2.0
"""Scores from merges; that llama.cpp merges by them as Hugging Face does is in test_vocabulary.py."""

from __future__ import annotations

import pytest

from pocketphi.convert.scores import scores_from_merges
from pocketphi.runtime.errors import CheckpointError

Merges = list[tuple[str, str]]


def scores(merges: Merges) -> dict[str, float]:
    tokens = sorted({part for pair in merges for part in (*pair, "".join(pair))})
    ids = {token: i for i, token in enumerate(tokens)}
    found = scores_from_merges(merges, ids, (), len(ids), "x")
    return {token: found[i] for token, i in ids.items()}


def test_the_first_merge_to_a_token_gives_its_score() -> None:
    found = scores([("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c"), ("abc", "d")])
    assert found["ab"] > found["bc"] > found["abc"] > found["abcd"]
    assert max(found[token] for token in "abcd") < found["abcd"]  # nothing merges to a letter
    assert scores([]) == {}


def test_runs_of_one_character_share_a_score() -> None:
    """Longest left part first: a run grows from its left end, as when all of them are equal."""
    parts = sorted(((a, n - a) for n in range(2, 17) for a in range(1, n)), reverse=True)
    found = scores([("x", "y"), *(("_" * a, "_" * b) for a, b in parts), ("y", "z")])
    assert {found["_" * n] for n in range(3, 17)} == {-1.0}
    assert found["xy"] == 0.0 and found["__"] == -120.0 and found["yz"] == -121.0  # 120 merges make the runs


@pytest.mark.parametrize(
    "merges",
    [
        # xxxxx is xx xx x, then xx xxx by place; with one score for xxx and xxxx it would be xxxx x
        [("x", "x"), ("xx", "x"), ("xx", "xx"), ("x", "xx"), ("xxx", "x"), ("x", "xxx")],
        [("a", "b"), ("b", "c"), ("ab", "c"), ("c", "d"), ("a", "bc")],  # abc apart, and no run
        [("a", "b"), ("b", "c"), ("ab", "c")],  # a + bc is no merge
    ],
)
def test_what_scores_cannot_say_is_refused(merges: Merges) -> None:
    with pytest.raises(CheckpointError, match=r"\Ax: [^\n]+\Z"):
        scores(merges)
