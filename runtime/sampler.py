# SPDX-License-Identifier: Apache-2.0
"""How the next token is chosen: the settings, checked. The engines' samplers carry them out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from .errors import InputError
from .parts import Float32, Int32


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings of one request. The default is greedy, as the model cards decode.

    Names, meanings and the other defaults are llama.cpp's, but for the last three: see LogitChanges.
    With `temperature` 0 the most probable token is taken and top-k, top-p, min-p and the seed have
    no effect.

    Raises:
        InputError: a value outside its range.
    """

    temperature: float = 0.0  # from 0
    top_k: int = 40  # 0: all tokens
    top_p: float = 0.95  # (0, 1], 1: off
    min_p: float = 0.05  # [0, 1], 0: off
    repeat_penalty: float = 1.0  # above 0, 1: off; over the last 64 tokens
    seed: int | None = None  # 32 bits; None: a new one for each request
    grammar: str | None = None  # GBNF that the whole answer must match
    json_schema: str | None = None  # JSON schema that the whole answer must match
    frequency_penalty: float = 0.0  # [-2, 2], taken from a token's logit for each time the answer has it
    presence_penalty: float = 0.0  # [-2, 2], taken once from those of all tokens that the answer has
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)  # by id, [-100, 100], added

    def __post_init__(self) -> None:
        checks = (
            ("temperature", 0.0 <= self.temperature <= 100.0, "a number from 0 to 100"),
            ("top-k", 0 <= self.top_k < 1 << 31, "a whole number from 0"),
            ("top-p", 0.0 < self.top_p <= 1.0, "above 0 and up to 1"),
            ("min-p", 0.0 <= self.min_p <= 1.0, "from 0 to 1"),
            ("repeat penalty", 0.0 < self.repeat_penalty <= 100.0, "above 0 and up to 100"),
            ("frequency penalty", -2.0 <= self.frequency_penalty <= 2.0, "from -2 to 2"),
            ("presence penalty", -2.0 <= self.presence_penalty <= 2.0, "from -2 to 2"),
            ("seed", self.seed is None or 0 <= self.seed < 1 << 32, "a whole number below 2^32"),
        )
        values = (
            self.temperature, self.top_k, self.top_p, self.min_p, self.repeat_penalty,
            self.frequency_penalty, self.presence_penalty, self.seed,
        )  # fmt: skip
        for (name, good, want), value in zip(checks, values, strict=True):
            if not good or (isinstance(value, float) and not math.isfinite(value)):
                raise InputError(f"{name} is {value}, expected {want}")
        for token, bias in self.logit_bias.items():
            if not -100.0 <= bias <= 100.0:
                raise InputError(f"logit bias of token {token} is {bias}, expected from -100 to 100")
        if self.grammar is not None and self.json_schema is not None:
            raise InputError("both a grammar and a JSON schema are given, expected at most one")

    @property
    def is_constrained(self) -> bool:
        """Whether a grammar or a schema says which tokens may follow."""
        return self.grammar is not None or self.json_schema is not None


def token_id(key: str) -> int | None:
    """A token id as the keys of a JSON object have it; None where a key is none.

    By its form and length first: int() takes "1_0", other alphabets' digits, and not 5,000 of them.
    """
    return int(key) if key.isascii() and key.isdecimal() and len(key) < 10 else None


class LogitChanges:
    """What a request adds to and takes from one answer's logits before a token is chosen from them.

    As OpenAI's reference has it, with c[j] times that the answer so far has token j:
    logit[j] + bias[j] - c[j] frequency_penalty - (c[j] > 0) presence_penalty. The prompt does not count.
    """

    def __init__(self, sampling: Sampling, vocab_size: int, masked_ids: Int32) -> None:
        """
        Args:
            sampling: the settings.
            vocab_size: rows of the logits.
            masked_ids: int32 [n], ids that must never be chosen (rows without a token).

        Raises:
            InputError: a bias for an id that is not in [0, vocab_size), or is masked.
        """
        for token in sampling.logit_bias:
            if not (isinstance(token, (int, np.integer)) and 0 <= token < vocab_size):
                raise InputError(f"logit bias: token is {str(token)[:40]}, expected 0 to {vocab_size - 1}")
        self._ids = np.array(list(sampling.logit_bias), np.int32)
        for token in np.intersect1d(self._ids, masked_ids):
            raise InputError(f"logit bias: {token} names no token")
        self._bias = np.array(list(sampling.logit_bias.values()), np.float32)
        self._frequency, self._presence = sampling.frequency_penalty, sampling.presence_penalty
        penalised = self._frequency != 0.0 or self._presence != 0.0
        self._counts: Float32 | None = np.zeros(vocab_size, np.float32) if penalised else None

    def apply(self, logits: Float32) -> None:
        """Change `logits`, float32 [vocab_size]; -inf stays what it is."""
        logits[self._ids] += self._bias
        if self._counts is not None:
            said = np.flatnonzero(self._counts)
            logits[said] -= self._counts[said] * self._frequency + self._presence

    def accept(self, token: int) -> None:
        """The answer has another token."""
        if self._counts is not None:
            self._counts[token] += 1.0


class Sampler(Protocol):
    """Chooses tokens for one answer; keeps what penalties and grammars need to remember."""

    def sample(self, logits: Float32) -> int:
        """The next token id. `logits`, float32 [vocab_size], may be overwritten."""

    def close(self) -> None:
        """Give back memory. Safe to call twice."""


def most_probable(logits: Float32, n: int) -> list[int]:
    """The ids of the `n` largest logits but -inf, in falling order; of equal ones the lower id first.

    Args:
        logits: float32 [vocab_size].
        n: from 1; there may be fewer.
    """
    n = min(n, len(logits))
    least = np.partition(logits, -n)[-n]
    found = np.flatnonzero((logits >= least) & (logits > -np.inf))
    ordered: list[int] = found[np.argsort(-logits[found], kind="stable")][:n].tolist()
    return ordered
