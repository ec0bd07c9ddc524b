# SPDX-License-Identifier: Apache-2.0
"""What every decoder can do, whichever engine runs it: tokens and embeddings in, logits out."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from .parts import Float32, Span
from .spec import RopeTable, TextSpec


class Decoder(Protocol):
    """One model with one sequence and its KV cache.

    The cache belongs to (model, adapter, RoPE table): `open` starts an empty one, everything else
    works on the one that is open. Policy (which table, what to reuse) is the session's.
    """

    @property
    def spec(self) -> TextSpec:
        """The decoder's shape."""

    @property
    def adapters(self) -> Collection[str]:
        """Names that `open` accepts beside None."""

    @property
    def adapter(self) -> str | None:
        """The adapter of the open cache."""

    @property
    def table(self) -> RopeTable:
        """The RoPE table of the open cache."""

    @property
    def length(self) -> int:
        """Tokens in the cache."""

    @property
    def capacity(self) -> int:
        """Tokens the cache has room for."""

    def open(self, *, table: RopeTable, capacity: int, adapter: str | None) -> None:
        """Start an empty cache with room for at least `capacity` tokens.

        Raises:
            InputError: no such adapter, or more tokens than the table or the model allows.
            KernelError: the engine has no memory for it, or the adapter does not act.
        """

    def grow(self, capacity: int) -> None:
        """Make room for at least `capacity` tokens and keep what is cached, bit for bit."""

    def feed(self, span: Span) -> Float32:
        """Append a span (at least one row) and return the logits after its last row: float32 [vocab_size].

        The array is the caller's to change and keep.
        """

    def feed_each(self, span: Span, n: int) -> Float32:
        """Append a span and return the logits after each of its last `n` rows: float32 [n, vocab_size].

        `n` is from 1 to the span's length. All rows are computed together, so they differ from rows fed
        one by one by the rounding of another order of summing. The array is the caller's to change and keep.
        """

    def rewind(self, length: int) -> None:
        """Drop everything after the first `length` tokens."""

    def save_state(self) -> bytes:
        """The cache's content, for `load_state` of the same model, adapter and table."""

    def load_state(self, state: bytes, length: int) -> None:
        """Replace the cache's content with what `save_state` gave when it held `length` tokens."""

    def close(self) -> None:
        """Give back memory. Safe to call twice."""
