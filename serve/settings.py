# SPDX-License-Identifier: Apache-2.0
"""What both kinds of request set the same way: sampling, lengths, stop strings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..runtime.errors import InputError
from ..runtime.sampler import Sampling, token_id
from .errors import Refusal
from .facts import Facts
from .limits import Limits
from .schema import ChatRequest, CompletionRequest

_SEED_BITS = (1 << 32) - 1  # a sampler's seed has 32


def sampling_of(
    request: ChatRequest | CompletionRequest, limits: Limits, facts: Facts, json_schema: str | None = None
) -> Sampling:
    """How to choose tokens: what is not set is the library's default, which is greedy.

    Raises:
        Refusal: 400, a value outside its range.
    """
    given: dict[str, Any] = {
        "temperature": request.temperature,
        "top_k": request.top_k,
        "top_p": request.top_p,
        "min_p": request.min_p,
        "repeat_penalty": request.repeat_penalty,
        "frequency_penalty": request.frequency_penalty,
        "presence_penalty": request.presence_penalty,
        "seed": None if request.seed is None else request.seed & _SEED_BITS,
        "logit_bias": _bias_of(request.logit_bias or {}, limits, facts),
    }
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():  # each alone, so that who asked is told which
        try:
            Sampling(**{name: value})
        except InputError as exc:
            raise Refusal(400, str(exc), code="invalid_value", param=name) from None
    return Sampling(**given, json_schema=json_schema)


def _bias_of(given: Mapping[str, float], limits: Limits, facts: Facts) -> dict[int, float]:
    size, name = facts.meta["n_vocab"], "logit_bias"
    if len(given) > limits.biases:
        what = f"{name}: has {len(given)} tokens, expected at most {limits.biases}"
        raise Refusal(400, what, code="invalid_value", param=name)
    found: dict[int, float] = {}
    for key, value in given.items():
        if (token := token_id(key)) is None or token >= size:
            what = f'{name}: {key[:40]!r} is no token id, expected "0" to "{size - 1}"'
            raise Refusal(400, what, code="invalid_value", param=name)
        found[token] = value
    return found


def top_of(name: str, value: int | None, most: int) -> int:
    """How many of the most probable tokens are asked for in the place of each.

    Raises:
        Refusal: 400, not 0 to `most`.
    """
    if value is not None and not 0 <= value <= most:
        raise Refusal(400, f"{name}: is {value}, expected 0 to {most}", code="invalid_value", param=name)
    return value or 0


def tokens_of(name: str, value: int | None) -> int | None:
    """The most tokens of an answer.

    Raises:
        Refusal: 400, fewer than 1.
    """
    if value is not None and value < 1:
        raise Refusal(400, f"{name}: is {value}, expected at least 1", code="invalid_value", param=name)
    return value


def stops_of(request: ChatRequest | CompletionRequest, limits: Limits) -> list[str]:
    """The stop strings.

    Raises:
        Refusal: 400, too many, an empty or too long one.
    """
    found = request.stops
    if len(found) > limits.stop or any(not 0 < len(one) <= limits.stop_chars for one in found):
        what = f"expected at most {limits.stop} texts of 1 to {limits.stop_chars} characters"
        raise Refusal(400, f"stop: {what}", code="invalid_value", param="stop")
    return found
