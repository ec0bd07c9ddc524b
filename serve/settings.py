# SPDX-License-Identifier: Apache-2.0
"""What both kinds of request set the same way: sampling, lengths, stop strings."""

from __future__ import annotations

from ..runtime.errors import InputError
from ..runtime.sampler import Sampling
from .errors import Refusal
from .limits import Limits
from .schema import ChatRequest, CompletionRequest

_SEED_BITS = (1 << 32) - 1  # a sampler's seed has 32


def sampling_of(request: ChatRequest | CompletionRequest, json_schema: str | None = None) -> Sampling:
    """How to choose tokens: what is not set is the library's default, which is greedy.

    Raises:
        Refusal: 400, a value outside its range.
    """
    given = {
        "temperature": request.temperature,
        "top_k": request.top_k,
        "top_p": request.top_p,
        "min_p": request.min_p,
        "repeat_penalty": request.repeat_penalty,
        "seed": None if request.seed is None else request.seed & _SEED_BITS,
    }
    try:
        return Sampling(**{k: v for k, v in given.items() if v is not None}, json_schema=json_schema)  # type: ignore[arg-type]
    except InputError as exc:
        raise Refusal(400, str(exc), code="invalid_value") from None


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
