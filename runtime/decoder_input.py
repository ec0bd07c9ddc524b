# SPDX-License-Identifier: Apache-2.0
"""What every decoder asks of what it is given, whichever engine runs it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InputError, KernelError
from .parts import EmbedSpan, Span
from .spec import TextSpec


def check_threads(n: int | None) -> None:
    """InputError: out of range; None leaves the number to the decoder."""
    if n is not None and not 1 <= n <= 512:
        raise InputError(f"threads is {n}, expected 1 to 512")


def check_adapter(name: str | None, known: Collection[str]) -> None:
    """InputError: there is no such adapter."""
    if name is not None and name not in known:
        raise InputError(f"adapter {name!r} is not in this model (it has: {', '.join(known) or 'none'})")


def check_n_logits(n: int, n_rows: int) -> None:
    """KernelError: logits are asked for after no row, or after more than there are."""
    if not 1 <= n <= n_rows:
        raise KernelError(f"logits of {n} rows are asked for, expected 1 to {n_rows}")


def checked_rows(
    span: Span, spec: TextSpec, *, length: int, capacity: int, ids: type[np.signedinteger[Any]]
) -> npt.NDArray[Any]:
    """A span as a pass takes it, when it follows `length` tokens in room for `capacity`.

    Args:
        ids: the engine's type of token ids.

    Returns:
        Token ids [n] of that type, or embeddings float32 [n, d_model].

    Raises:
        KernelError: it does not fit, or has rows of another width.
        InputError: an id that is none.
    """
    n = len(span)
    if n == 0 or length + n > capacity:
        raise KernelError(f"{n} tokens after {length} do not fit a cache of {capacity}")
    if isinstance(span, EmbedSpan):
        if span.rows.shape[1:] != (spec.d_model,):
            raise KernelError(f"embeddings have shape {list(span.rows.shape)}, expected [n, {spec.d_model}]")
        return np.ascontiguousarray(span.rows, np.float32)
    found = np.ascontiguousarray(span.ids, ids)
    if found.min() < 0 or found.max() >= spec.vocab_size:
        raise InputError(f"token ids must be from 0 to {spec.vocab_size - 1}")
    return found
