# SPDX-License-Identifier: Apache-2.0
"""The merges of a SentencePiece vocabulary as the token scores that llama.cpp merges by."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from ..runtime.errors import CheckpointError

_NO_SCORE = -1e9  # of what no merge makes: below every merge's place
_MAX_RUN = 32  # of one character in a token, where scores tie; Phi-3.5 has 16


class _RunMerge(NamedTuple):
    """Two runs of one character that join to a token."""

    left: int  # characters
    right: int
    rank: int  # place among the merges
    cost: float  # minus the score of the joined token


def scores_from_merges(
    merges: list[tuple[str, str]],
    ordinary: Mapping[str, int],
    added: Collection[int],
    vocab_size: int,
    where: str,
) -> list[float]:
    """One score for each token: minus the place of the first merge that makes it.

    Hugging Face merges the best *pair*, llama.cpp the two neighbours whose joined *token* has the best
    score; among equals both take the leftmost. These agree when every way to join two tokens to a token is
    a merge, and all merges to one token stand together: then pairs are in the order of the tokens they
    make. Merges converted from a SentencePiece model are like that, but for the runs of spaces: those have
    one score there and mixed places here, and get one score again.

    Args:
        merges: pairs of tokens, best first, each of which joins to a token.
        ordinary: token -> id.
        added: ids of the added tokens, which text never becomes.
        vocab_size: rows of the embedding.
        where: the file, for messages.

    Returns:
        [vocab_size], higher merges first.

    Raises:
        CheckpointError: merges in an order that no scores give.
    """
    _check_complete(merges, ordinary, added, where)
    places: dict[str, list[int]] = {}  # token -> the first and the last merge to it
    for rank, (left, right) in enumerate(merges):
        places.setdefault(left + right, [rank, rank])[1] = rank
    scores = [_NO_SCORE] * vocab_size
    groups: list[list[str]] = []  # tokens whose merges are mixed
    first = end = -1
    for token, (start, last) in places.items():  # in the order of `start`
        if start > end:
            groups.append([])
            first = start
        groups[-1].append(token)
        end = max(end, last)
        scores[ordinary[token]] = -float(first)
    runs: dict[str, list[_RunMerge]] = {}  # character -> the merges of runs of it
    for rank, (left, right) in enumerate(merges):
        if (left + right).count(left[0]) == len(left + right):
            one = _RunMerge(len(left), len(right), rank, -scores[ordinary[left + right]])
            runs.setdefault(left[0], []).append(one)
    for group in groups:
        if len(group) > 1:
            _check_tied(group, runs.get(group[0][0], []), where)
    return scores


def _check_complete(
    merges: list[tuple[str, str]], ordinary: Mapping[str, int], added: Collection[int], where: str
) -> None:
    """Check that any two tokens that join to a token are a merge."""
    pairs = set(merges)
    for token, token_id in ordinary.items():
        if token_id in added:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ordinary and right in ordinary and (left, right) not in pairs:
                raise CheckpointError(
                    f"{where}: {left[:40]!r} and {right[:40]!r} join to a token without a merge"
                )


def _check_tied(tokens: list[str], runs: list[_RunMerge], where: str) -> None:
    """Check that tokens whose merges are mixed may share one score.

    They may if they are runs of one character, and a run of any length that can matter comes out the same by
    the merges' places and by the scores. In Phi-3.5 these are the runs of 2 to 16 spaces.
    """
    char = tokens[0][0]
    if set("".join(tokens)) != {char}:
        raise CheckpointError(f"{where}: the merges to {tokens[0][:40]!r} do not stand together")
    longest = max(one.left + one.right for one in runs)
    if longest > _MAX_RUN:
        raise CheckpointError(f"{where}: a run of {longest} {char!r} is a token, expected at most {_MAX_RUN}")
    by_place = {(one.left, one.right): float(one.rank) for one in runs}
    by_score = {(one.left, one.right): one.cost for one in runs}
    for n in range(2, 2 * longest + 2):
        if _merge_run(n, by_place) != _merge_run(n, by_score):
            raise CheckpointError(f"{where}: runs of {char!r} merge in an order that no scores give")


def _merge_run(n: int, place: Mapping[tuple[int, int], float]) -> list[int]:
    """Byte-pair merging of a run of `n` characters, as lengths: the lowest place first, then the leftmost."""
    parts = [1] * n
    while True:
        pairs = [
            (place[pair], i) for i in range(len(parts) - 1) if (pair := (parts[i], parts[i + 1])) in place
        ]
        if not pairs:
            return parts
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
