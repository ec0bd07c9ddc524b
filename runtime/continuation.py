# SPDX-License-Identifier: Apache-2.0
"""The logits after a prompt and after each token chosen since, read ahead where a draft says what may come.

A draft is what somebody expects the answer to be: the last reading of the same speech, a template. Its
next tokens are read in the same forward pass as the token before them. As long as the tokens chosen are
the proposed ones their logits are there already; at the first other one the rest is taken back out of
the cache. So a draft never changes what is computed for a token, only how many are computed together:
the logits are the same but for rounding, as after any other cut of a sequence into passes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .parts import Float32, Int32, Span, TokenSpan
from .session import Session

NO_DRAFT: Int32 = np.zeros(0, np.int32)

# Rows in a pass with a draft. From 32 on llama.cpp may take other kernels, whose last bits differ: with 8-bit
# weights that moves logits by up to 0.1, and a near tie the other way. Below, they stay within 3e-6.
_ROWS = 31
_MOST = _ROWS - 1  # tokens proposed beside the chosen one; a row of logits each, 0.8 MB at 200,064 tokens
_AFTER_MISMATCH = 8  # until all of a proposal have been taken again
_AHEAD = 8  # how far a token that is not the expected one is looked for in the draft
_MISSES = 2  # passes in a row without one proposed token taken: the draft is given up


@dataclass(slots=True)
class Passes:
    """What was computed after the prompt's own pass."""

    n: int = 0
    ms: float = 0.0
    draft_n: int = 0  # tokens proposed, those of the prompt's pass included
    draft_n_accepted: int = 0  # of these, how many were chosen


class Continuation:
    """One sequence while it grows: `logits` after what it is, `advance` by the token chosen from them."""

    def __init__(
        self,
        session: Session,
        spans: Sequence[Span],
        *,
        adapter: str | None,
        reserve: int = 0,
        draft: Int32 = NO_DRAFT,
    ) -> None:
        """Read the prompt, and the start of the draft with it.

        Args:
            session: nobody else may use it before `close`.
            spans: the prompt, at least one token.
            adapter: which LoRA reads it.
            reserve: tokens that will probably follow.
            draft: int32 [n], ids of the vocabulary that may follow; any length, and it may be wrong.

        Raises:
            InputError: no token in the prompt, or more than the session's limit.
        """
        self._session, self._draft = session, draft
        self.passes = Passes()
        self._at = 0  # the draft's token that is expected next
        self._matched = 0  # the draft's tokens before this one have been met or passed over
        self._most, self._misses = _MOST, 0
        # The draft shares the pass of the prompt's last tokens, where they leave room.
        last = len(spans[-1]) if spans and isinstance(spans[-1], TokenSpan) else 0
        first = draft[: max(0, _ROWS - last)]
        self._rows, self._cached = session.read_ahead(spans, first, adapter=adapter, reserve=reserve)
        self._propose(draft[: len(self._rows) - 1])
        self._length = session.length - len(self._proposed)

    @property
    def cached(self) -> int:
        """Tokens of the prompt that were not read again."""
        return self._cached

    @property
    def is_full(self) -> bool:
        """Whether the session's limit leaves no room for another token."""
        return self._length >= self._session.limit

    @property
    def logits(self) -> Float32:
        """The logits after the last token: float32 [vocab_size]. The caller may overwrite them."""
        row: Float32 = self._rows[self._taken]
        return row

    def advance(self, token_id: int) -> None:
        """Append the token that was chosen: no work if it was proposed, else one forward pass.

        Raises:
            InputError: the session is at its limit.
        """
        if self._taken < len(self._proposed) and self._proposed[self._taken] == token_id:
            self._taken += 1
            self._at += 1
            self._matched = self._at
            self.passes.draft_n_accepted += 1
        else:
            self._judge()
            self._follow(token_id)
            self._pass(token_id)
        self._length += 1

    def close(self) -> None:
        """Take proposals that nobody chose back out of the session."""
        if self._session.length > self._length:
            self._session.drop(self._session.length - self._length)

    def _propose(self, tokens: Int32) -> None:
        self._proposed, self._taken = tokens, 0
        self.passes.draft_n += len(tokens)

    def _judge(self) -> None:
        """Give the draft up when it was no use twice in a row."""
        if len(self._proposed):
            self._misses = 0 if self._taken else self._misses + 1
        if self._misses == _MISSES:
            self._draft = NO_DRAFT

    def _follow(self, token_id: int) -> None:
        """Find the place in the draft after a token that was not among those proposed."""
        ahead = np.flatnonzero(self._draft[self._at : self._at + _AHEAD] == token_id)
        if len(ahead) and ahead[0] == 0:
            self._most = _MOST  # as expected: the proposal was only too short
        else:
            self._most = _AFTER_MISMATCH
        if len(ahead):
            self._at = self._matched = self._at + int(ahead[0]) + 1
            return
        # A token taken for a replacement may have been an insertion: then what it replaced comes next.
        behind = np.flatnonzero(self._draft[self._matched : self._at] == token_id)
        if len(behind):
            self._at = self._matched = self._matched + int(behind[0]) + 1
        else:
            self._at += 1

    def _pass(self, token_id: int) -> None:
        started = time.perf_counter()
        self.close()
        most = min(self._most, max(self._session.room - 1, 0))
        proposal = self._draft[self._at : self._at + most]
        self._rows = self._session.extend(np.concatenate([np.array([token_id], np.int32), proposal]))
        self._propose(proposal)
        self.passes.n += 1
        self.passes.ms += (time.perf_counter() - started) * 1e3
