# SPDX-License-Identifier: Apache-2.0
"""One sequence over a decoder: what to reuse, what to read again, and which RoPE table is right.

The cache belongs to (adapter, RoPE table). A sequence of up to `original_context` tokens is read with
the short table, a longer one with the long table, from its first token on: keys that were rotated
with the short table are useless beyond, and so is everything computed from them. So the crossing costs
one re-read of the whole sequence, as in the reference, and no approximation.

Source: `Phi3ForCausalLM.prepare_inputs_for_generation` and `longrope_frequency_update` in transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from .decoder import Decoder
from .errors import InputError
from .parts import EmbedSpan, Float32, Span, TokenSpan

_GROWTH = 512  # tokens of room to add at least when the cache is full
_ROWS_PER_KEY = 1 << 32  # an embedded row's mark is -(key number · this + row + 1): never a token id


class Session:
    """A decoder, and the sequence in its cache."""

    def __init__(self, decoder: Decoder, *, limit: int, note: Callable[[str], None]) -> None:
        """
        Args:
            decoder: not shared with another session.
            limit: the most tokens the sequence may have.
            note: told in one line when something is read again.
        """
        self._decoder = decoder
        self._limit = limit
        self._note = note
        self._spans: list[Span] = []  # the sequence as it was given, for reading it again
        self._marks: npt.NDArray[np.int64] = np.zeros(0, np.int64)  # one number a token, equal iff equal
        self._keys: dict[str, int] = {}
        self._open = False

    @property
    def length(self) -> int:
        """Tokens in the sequence."""
        return len(self._marks)

    @property
    def limit(self) -> int:
        """The most tokens the sequence may have."""
        return self._limit

    def read(self, spans: Sequence[Span], *, adapter: str | None, reserve: int = 0) -> tuple[Float32, int]:
        """Make `spans` the sequence, reading only what the cache does not hold already.

        Args:
            spans: the whole sequence, at least one token.
            adapter: which LoRA reads it; a change reads everything again.
            reserve: tokens that will probably follow; room for them is made at once.

        Returns:
            float32 [vocab_size], the logits after the last token, and how many tokens were reused.

        Raises:
            InputError: no token, or more than the limit.
        """
        marks = self._mark(spans)
        total = len(marks)
        if total == 0:
            raise InputError("the prompt is empty")
        if total > self._limit:
            raise InputError(f"the prompt has {total} tokens, the context holds {self._limit} (see -c)")
        kept = 0
        if self._fits(total, adapter):
            kept = min(_common_prefix(self._marks, marks), total - 1, self._decoder.length)
            self._decoder.rewind(kept)
            self._reserve(total, total + reserve)
        else:
            self._explain(total, adapter)
            self._start(total, total + reserve, adapter)
        self._marks, self._spans = marks[:kept], []
        logits = self._feed(spans, marks, kept)
        self._spans = list(spans)
        return logits, kept

    def step(self, token_id: int) -> Float32:
        """Append one token and return the logits after it: float32 [vocab_size].

        Raises:
            InputError: the sequence is at its limit.
        """
        total = self.length + 1
        if total > self._limit:
            raise InputError(f"the context of {self._limit} tokens is full")
        span = TokenSpan(np.array([token_id], np.int32))
        if self._decoder.spec.rope.table(total) != self._decoder.table:
            return self.read([*self._spans, span], adapter=self._decoder.adapter, reserve=_GROWTH)[0]
        self._reserve(total, total + _GROWTH)
        logits = self._decoder.feed(span)
        self._marks = np.append(self._marks, np.int64(token_id))
        self._append(span)
        return logits

    def reset(self) -> None:
        """Forget the sequence."""
        if self._open:
            self._decoder.rewind(0)
        self._spans, self._marks = [], self._marks[:0]

    def _fits(self, total: int, adapter: str | None) -> bool:
        """Whether what is cached was read the way a sequence of `total` tokens has to be."""
        d = self._decoder
        return self._open and d.adapter == adapter and d.table == d.spec.rope.table(total)

    def _explain(self, total: int, adapter: str | None) -> None:
        if not self._open or self.length == 0:
            return
        rope = self._decoder.spec.rope
        if self._decoder.adapter != adapter:
            self._note(f"adapter {adapter or 'none'}: reading the conversation again")
        else:
            side = "passed" if total > rope.original_context else "is back within"
            self._note(
                f"the conversation {side} {rope.original_context} tokens: "
                f"reading it again with the {rope.table(total)} RoPE table"
            )

    def _start(self, total: int, wanted: int, adapter: str | None) -> None:
        table = self._decoder.spec.rope.table(total)
        self._open = False
        self._marks, self._spans = self._marks[:0], []
        self._decoder.open(table=table, capacity=self._bounded(total, wanted), adapter=adapter)
        self._open = True

    def _reserve(self, needed: int, wanted: int) -> None:
        """Room for `needed` tokens; when more has to be made, for `wanted` as far as table and limit go."""
        if needed > self._decoder.capacity:
            self._open = False  # until it is done: a cache half copied is no cache
            self._decoder.grow(self._bounded(needed, wanted))
            self._open = True

    def _bounded(self, needed: int, wanted: int) -> int:
        rope = self._decoder.spec.rope
        most = self._limit
        if rope.is_long_rope and rope.table(needed) == "short":
            most = min(most, rope.original_context)
        return min(wanted, most)

    def _feed(self, spans: Sequence[Span], marks: npt.NDArray[np.int64], kept: int) -> Float32:
        """Feed everything after the first `kept` tokens; the marks always say what the cache holds."""
        logits: Float32 | None = None
        start = 0
        for span in spans:
            stop = start + len(span)
            if stop > kept:
                logits = self._decoder.feed(_after(span, max(kept - start, 0)))
                self._marks = marks[:stop]
            start = stop
        assert logits is not None, "read() leaves at least one token to feed"
        return logits

    def _append(self, span: TokenSpan) -> None:
        """Generated tokens collect in one growing span, so that a re-read is one batch."""
        last = self._spans[-1] if self._spans else None
        if isinstance(last, TokenSpan):
            self._spans[-1] = TokenSpan(np.concatenate([last.ids, span.ids]))
        else:
            self._spans.append(span)

    def _mark(self, spans: Sequence[Span]) -> npt.NDArray[np.int64]:
        parts = [np.zeros(0, np.int64)]
        for span in spans:
            if isinstance(span, EmbedSpan):
                number = self._keys.setdefault(span.key, len(self._keys))
                parts.append(-(number * _ROWS_PER_KEY + np.arange(1, len(span) + 1, dtype=np.int64)))
            else:
                parts.append(span.ids.astype(np.int64))
        return np.concatenate(parts)


def _common_prefix(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> int:
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


def _after(span: Span, start: int) -> Span:
    if isinstance(span, EmbedSpan):
        return EmbedSpan(span.rows[start:], f"{span.key}+{start}") if start else span
    return TokenSpan(span.ids[start:])
