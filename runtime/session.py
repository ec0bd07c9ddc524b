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
from .parts import EmbedSpan, Float32, Int32, Span, TokenSpan

_GROWTH = 512  # tokens of room to add at least when the cache is full
_PIECE = 128  # tokens whose logits `run_through` holds at once: 100 MB with a vocabulary of 200,064
_ROWS_PER_KEY = 1 << 32  # an embedded row's mark is -(key number · this + row + 1): never a token id
_NOTHING = np.zeros(0, np.int32)


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
        self._keys: dict[str, int] = {}  # of the spans in the sequence
        self._n_keys = 0  # there have been
        self._open = False

    @property
    def length(self) -> int:
        """Tokens in the sequence."""
        return len(self._marks)

    @property
    def limit(self) -> int:
        """The most tokens the sequence may have."""
        return self._limit

    @property
    def room(self) -> int:
        """Tokens that can follow before the limit, or before everything has to be read again."""
        rope, total = self._decoder.spec.rope, self.length + 1
        if not self._open or rope.table(total) != self._decoder.table:
            return 0
        return self._most(total) - self.length

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
        logits, kept = self.read_ahead(spans, _NOTHING, adapter=adapter, reserve=reserve)
        return logits[0], kept

    def read_ahead(
        self, spans: Sequence[Span], proposed: Int32, *, adapter: str | None, reserve: int = 0
    ) -> tuple[Float32, int]:
        """`read`, and in the same pass the tokens that may come next: the sequence ends with them.

        Args:
            spans: the prompt, at least one token.
            proposed: int32 [n]; cut where the limit is, or the end of the RoPE table that the prompt needs.
            adapter: as for `read`.
            reserve: tokens that will probably follow the prompt.

        Returns:
            float32 [1 + m, vocab_size], the logits after the prompt and after each of the first m <= n
            tokens of `proposed`, and how many tokens of the prompt were reused.

        Raises:
            InputError: as for `read`.
        """
        prompt = self._checked(spans)
        spans = _joined(spans, TokenSpan(proposed[: self._most(prompt) - prompt]))
        total = sum(len(span) for span in spans)
        return self._read(spans, 1 + total - prompt, adapter, max(total, prompt + reserve))

    def read_each(self, spans: Sequence[Span], n: int, *, adapter: str | None, within: int = 0) -> Float32:
        """Make `spans` the sequence, all of it read with the RoPE table that its whole length needs.

        Args:
            spans: as for `read`.
            n: 1 to the tokens of the sequence.
            adapter: as for `read`.
            within: tokens of a sequence that these begin: the table is the one for so many.

        Returns:
            float32 [n, vocab_size], the logits after each of the last `n` tokens.

        Raises:
            InputError: as for `read`.
        """
        wanted = max(self._checked(spans), within)
        self._check_limit(wanted)
        return self._read(spans, n, adapter, wanted, within)[0]

    def run_through(self, spans: Sequence[Span], *, adapter: str | None) -> int:
        """Read a whole sequence anew, every layer for every token, and forget it: for a decoder's observer.

        Where nobody wants a token's logits, the last layer and the head skip it.

        Returns:
            how many tokens were read.

        Raises:
            InputError: as for `read`.
        """
        total = self._checked(spans)
        self.reset()
        self._start(total, total, adapter)
        for span in spans:
            for start in range(0, len(span), _PIECE):
                (piece,) = _first([_after(span, start)], _PIECE)
                self._decoder.feed_each(piece, len(piece))
        self.reset()
        return total

    def step(self, token_id: int) -> Float32:
        """Append one token and return the logits after it: float32 [vocab_size].

        Raises:
            InputError: the sequence is at its limit.
        """
        last: Float32 = self.extend(np.array([token_id], np.int32))[0]
        return last

    def extend(self, ids: Int32) -> Float32:
        """Append tokens in one pass and return the logits after each: float32 [n, vocab_size].

        Args:
            ids: int32 [n], at most `room` of them. One alone may also be the token that passes the end of
                the short RoPE table: then everything is read again.

        Raises:
            InputError: they do not fit.
        """
        total = self.length + len(ids)
        if total > self._limit:
            raise InputError(f"the context of {self._limit} tokens is full")
        spans = _joined(self._spans, TokenSpan(ids))
        if self.room == 0 and len(ids) == 1:
            return self.read(spans, adapter=self._decoder.adapter, reserve=_GROWTH)[0][None]
        if len(ids) > self.room:
            raise InputError(f"{len(ids)} tokens are added after {self.length}, expected at most {self.room}")
        self._reserve(total, total + _GROWTH)
        logits = self._decoder.feed_each(TokenSpan(ids), len(ids))
        self._marks, self._spans = np.append(self._marks, ids.astype(np.int64)), spans
        return logits

    def drop(self, n: int) -> None:
        """Take back the last `n` tokens."""
        length = max(self.length - n, 0)
        if self._open:
            self._decoder.rewind(min(length, self._decoder.length))
        self._marks, self._spans = self._marks[:length], _first(self._spans, length)

    def reset(self) -> None:
        """Forget the sequence."""
        if self._open:
            self._decoder.rewind(0)
        self._spans, self._marks = [], self._marks[:0]

    def _checked(self, spans: Sequence[Span]) -> int:
        """How many tokens a prompt has; InputError for none or more than the limit."""
        total = sum(len(span) for span in spans)
        if total == 0:
            raise InputError("the prompt is empty")
        self._check_limit(total)
        return total

    def _check_limit(self, total: int) -> None:
        if total > self._limit:
            raise InputError(f"the prompt has {total} tokens, the context holds {self._limit} (see -c)")

    def _read(
        self, spans: Sequence[Span], n: int, adapter: str | None, wanted: int, within: int = 0
    ) -> tuple[Float32, int]:
        """Make `spans` the sequence, in a cache with room for `wanted` tokens where one has to be made.

        The RoPE table is that of a sequence of `within` tokens, if those are more.
        Gives float32 [n, vocab_size], the logits after each of the last `n` tokens, and how many tokens
        were reused.
        """
        marks = self._mark(spans)
        total, kept = len(marks), 0
        whole = max(total, within)
        if self._fits(whole, adapter):
            kept = min(_common_prefix(self._marks, marks), total - n, self._decoder.length)
            self._decoder.rewind(kept)
            self._reserve(total, wanted)
        else:
            self._explain(whole, adapter)
            self._start(whole, wanted, adapter)
        self._marks, self._spans = marks[:kept], []
        logits = self._feed(spans, marks, kept, n)
        self._spans = list(spans)
        used = {span.key for span in spans if isinstance(span, EmbedSpan)}
        self._keys = {key: number for key, number in self._keys.items() if key in used}
        return logits, kept

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
        return min(wanted, self._most(needed))

    def _most(self, total: int) -> int:
        """The most tokens that a sequence read the way `total` tokens have to be can grow to."""
        rope = self._decoder.spec.rope
        if rope.is_long_rope and rope.table(total) == "short":
            return min(self._limit, rope.original_context)
        return self._limit

    def _feed(self, spans: Sequence[Span], marks: npt.NDArray[np.int64], kept: int, n: int) -> Float32:
        """Feed everything after the first `kept` tokens; the marks always say what the cache holds.

        Gives the logits after each of the last `n` tokens.
        """
        logits: list[Float32] = []
        start = 0
        for span in spans:
            stop = start + len(span)
            if stop > kept:
                rest = _after(span, max(kept - start, 0))
                wanted = min(max(stop - (len(marks) - n), 0), len(rest))
                found = self._decoder.feed_each(rest, max(wanted, 1))
                self._marks = marks[:stop]
                if wanted:
                    logits.append(found)
            start = stop
        return np.concatenate(logits) if len(logits) > 1 else logits[0]

    def _mark(self, spans: Sequence[Span]) -> npt.NDArray[np.int64]:
        parts = [np.zeros(0, np.int64)]
        for span in spans:
            if isinstance(span, EmbedSpan):
                if span.key not in self._keys:
                    self._keys[span.key] = self._n_keys
                    self._n_keys += 1
                number = self._keys[span.key]
                parts.append(-(number * _ROWS_PER_KEY + np.arange(1, len(span) + 1, dtype=np.int64)))
            else:
                parts.append(span.ids.astype(np.int64))
        return np.concatenate(parts)


def _common_prefix(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> int:
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


def _joined(spans: Sequence[Span], more: TokenSpan) -> list[Span]:
    """Tokens that follow tokens collect in one growing span, so that reading them is one batch."""
    if len(more) == 0:
        return list(spans)
    last = spans[-1] if spans else None
    if isinstance(last, TokenSpan):
        return [*spans[:-1], TokenSpan(np.concatenate([last.ids, more.ids]))]
    return [*spans, more]


def _first(spans: Sequence[Span], length: int) -> list[Span]:
    """The spans of the first `length` tokens."""
    found: list[Span] = []
    for span in spans:
        n = min(len(span), length)
        if n == 0:
            break
        whole = n == len(span)
        if isinstance(span, EmbedSpan):
            found.append(span if whole else EmbedSpan(span.rows[:n], span.key))
        else:
            found.append(span if whole else TokenSpan(span.ids[:n]))
        length -= n
    return found


def _after(span: Span, start: int) -> Span:
    if isinstance(span, EmbedSpan):
        return EmbedSpan(span.rows[start:], f"{span.key}+{start}") if start else span
    return TokenSpan(span.ids[start:])
