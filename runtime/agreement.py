# SPDX-License-Identifier: Apache-2.0
"""Which words of a growing utterance are settled: those that one reading after another agrees on.

A reading of unfinished speech is right at its beginning and guesses at its end: the last word may be cut in
two, the one before was chosen to go with it, and a model completes sentences nobody has finished. What
consecutive readings have in common, their last two words apart, is committed and never changes again.

Source: LocalAgreement-2 in Liu, Niehues, Spanakis, "Low-Latency Sequence-to-Sequence Speech Recognition
and Translation by Partial Hypothesis Selection" (2020), section 3; and three conditions of our own, measured
on phi4-nano's clips (MODEL.md): the last two words wait, the readings span at least a second of audio, and
each was sure of the words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

SPAN_S = 1.0  # seconds of audio over which readings have to agree
CONFIDENCE = 0.7  # probability of each token in each of these readings
HELD_WORDS = 2  # at the end of each reading


@dataclass(frozen=True, slots=True)
class _Hypothesis:
    token_ids: tuple[int, ...]
    sure: int  # tokens from the beginning, each with at least `CONFIDENCE`
    stop_s: float


class Agreement:
    """The readings of one utterance, and what they have settled."""

    def __init__(self, starts_word: Callable[[int], bool]) -> None:
        """
        Args:
            starts_word: whether a token begins a word: commits happen in front of such tokens only.
        """
        self._starts_word = starts_word
        self._readings: list[_Hypothesis] = []
        self._committed = 0

    @property
    def committed(self) -> tuple[int, ...]:
        """The settled tokens; every later value begins with this one."""
        return self._readings[-1].token_ids[: self._committed] if self._readings else ()

    def add(self, token_ids: Sequence[int], logprobs: Sequence[float], stop_s: float) -> None:
        """Take the next reading.

        Args:
            token_ids: the text; it begins with what is committed.
            logprobs: the logarithm of each token's probability.
            stop_s: how much of the utterance was read, in seconds; more than the time before.
        """
        ids = tuple(token_ids)
        assert ids[: self._committed] == self.committed, "a reading begins with what is committed"
        least = math.log(CONFIDENCE)
        sure = next((i for i, p in enumerate(logprobs) if p < least), len(ids))
        self._readings.append(_Hypothesis(ids, sure, stop_s))
        while len(self._readings) > 1 and self._readings[1].stop_s <= stop_s - SPAN_S:
            del self._readings[0]
        if self._readings[0].stop_s <= stop_s - SPAN_S:
            self._committed = max(self._committed, self._agreed())

    def _agreed(self) -> int:
        """Tokens that all readings begin with and are sure of, to a place where all of them begin a word."""
        latest = self._readings[-1].token_ids
        same = min(min(r.sure, self._first_held(r.token_ids)) for r in self._readings)
        for reading in self._readings:
            same = next((i for i in range(same) if reading.token_ids[i] != latest[i]), same)
        while same > 0 and not all(self._starts_word(r.token_ids[same]) for r in self._readings):
            same -= 1
        return same

    def _first_held(self, token_ids: Sequence[int]) -> int:
        """Where the words begin that are held back."""
        words = [i for i, token in enumerate(token_ids) if i == 0 or self._starts_word(token)]
        return words[-HELD_WORDS] if len(words) >= HELD_WORDS else 0
