# SPDX-License-Identifier: Apache-2.0
"""How the next token is chosen: the settings, checked. The engines' samplers carry them out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from .errors import InputError
from .parts import Float32


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings of one request. The default is greedy, as the model cards decode.

    Names, meanings and the other defaults are llama.cpp's. With `temperature` 0 the most probable
    token is taken and top-k, top-p, min-p and the seed have no effect.

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

    def __post_init__(self) -> None:
        checks = (
            ("temperature", 0.0 <= self.temperature <= 100.0, "a number from 0 to 100"),
            ("top-k", 0 <= self.top_k < 1 << 31, "a whole number from 0"),
            ("top-p", 0.0 < self.top_p <= 1.0, "above 0 and up to 1"),
            ("min-p", 0.0 <= self.min_p <= 1.0, "from 0 to 1"),
            ("repeat penalty", 0.0 < self.repeat_penalty <= 100.0, "above 0 and up to 100"),
            ("seed", self.seed is None or 0 <= self.seed < 1 << 32, "a whole number below 2^32"),
        )
        values = (self.temperature, self.top_k, self.top_p, self.min_p, self.repeat_penalty, self.seed)
        for (name, good, want), value in zip(checks, values, strict=True):
            if not good or (isinstance(value, float) and not math.isfinite(value)):
                raise InputError(f"{name} is {value}, expected {want}")
        if self.grammar is not None and self.json_schema is not None:
            raise InputError("both a grammar and a JSON schema are given, expected at most one")

    @property
    def is_constrained(self) -> bool:
        """Whether a grammar or a schema says which tokens may follow."""
        return self.grammar is not None or self.json_schema is not None


class Sampler(Protocol):
    """Chooses tokens for one answer; keeps what penalties and grammars need to remember."""

    def sample(self, logits: Float32) -> int:
        """The next token id. `logits`, float32 [vocab_size], may be overwritten."""

    def close(self) -> None:
        """Give back memory. Safe to call twice."""
