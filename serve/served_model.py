# SPDX-License-Identifier: Apache-2.0
"""A model that can be stopped from another thread: before each medium and before each forward pass."""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.decoder import Decoder
from ..runtime.decoder_slots import Slot
from ..runtime.engine import Model
from ..runtime.errors import InputError
from ..runtime.parts import AudioProjector, EmbedSpan, Float32, Media, Span, TokenSpan
from ..runtime.session import Session
from ..runtime.spec import RopeTable, TextSpec
from .errors import MediaError

_PASS = 512  # rows that the decoders read in one pass: to cut a prompt there changes no number


class Stopped(Exception):
    """Nobody waits for the answer any more, or it has taken too long."""


class StoppableDecoder:
    """Another decoder, asked before each pass whether to go on. See `decoder.Decoder`."""

    def __init__(self, decoder: Decoder, check: Callable[[], None]) -> None:
        """`check` raises what ends the work."""
        self._decoder, self._check = decoder, check

    @property
    def spec(self) -> TextSpec:
        """The decoder's shape."""
        return self._decoder.spec

    @property
    def adapters(self) -> Collection[str]:
        """Names that `open` accepts beside None."""
        return self._decoder.adapters

    @property
    def adapter(self) -> str | None:
        """The adapter of the open cache."""
        return self._decoder.adapter

    @property
    def table(self) -> RopeTable:
        """The RoPE table of the open cache."""
        return self._decoder.table

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._decoder.length

    @property
    def capacity(self) -> int:
        """Tokens the cache has room for."""
        return self._decoder.capacity

    def open(self, *, table: RopeTable, capacity: int, adapter: str | None) -> None:
        """See `decoder.Decoder.open`."""
        self._check()
        self._decoder.open(table=table, capacity=capacity, adapter=adapter)

    def grow(self, capacity: int) -> None:
        """See `decoder.Decoder.grow`."""
        self._decoder.grow(capacity)

    def feed(self, span: Span) -> Float32:
        """See `decoder.Decoder.feed`."""
        last: Float32 = self.feed_each(span, 1)[0]
        return last

    def feed_each(self, span: Span, n: int) -> Float32:
        """See `decoder.Decoder.feed_each`. Stopped in the middle, nothing is appended."""
        if len(span) <= _PASS:
            return self._read(span, n)
        before, start = self.length, 0
        try:
            while len(span) - start > _PASS and len(span) - start - n >= _PASS:
                self._read(_cut(span, start, start + _PASS), 1)
                start += _PASS
            return self._read(_cut(span, start, len(span)), n)
        except BaseException:
            if self.length > before:
                self._decoder.rewind(before)
            raise

    def _read(self, span: Span, n: int) -> Float32:
        """One pass, unless `check` has it end: before it, or while a slot waits for it."""
        while True:
            self._check()
            try:
                return self._decoder.feed_each(span, n)
            except CancelledError:  # nothing was appended
                continue

    def rewind(self, length: int) -> None:
        """See `decoder.Decoder.rewind`."""
        self._decoder.rewind(length)

    def save_state(self) -> bytes:
        """See `decoder.Decoder.save_state`."""
        return self._decoder.save_state()

    def load_state(self, state: bytes, length: int) -> None:
        """See `decoder.Decoder.load_state`."""
        self._decoder.load_state(state, length)

    def close(self) -> None:
        """See `decoder.Decoder.close`."""
        self._decoder.close()


class ServedModel(Model):
    """`Model` for a worker: what it does for a job ends soon after `should_stop` says so.

    A picture or clip that cannot be used is a MediaError. For one thread at a time; `cancel` is for others.
    """

    def __init__(self, path: Path, **options: Any) -> None:
        """As `Model`."""
        super().__init__(path, **options)
        self.should_stop: Callable[[], bool] = lambda: False
        decoder = StoppableDecoder(self._decoder, self.check)
        self._session = Session(decoder, limit=self._session.limit, note=self._note)

    def check(self) -> None:
        """Raises:
        Stopped: the job is to end.
        """
        if self.should_stop():
            raise Stopped

    def cancel(self) -> None:
        """`should_stop` has come true: a pass that waits for others is not waited for."""
        if isinstance(self._decoder, Slot):
            self._decoder.cancel()

    def _embed(self, media: Media, projector: AudioProjector | None) -> EmbedSpan:
        self.check()
        try:
            return super()._embed(media, projector)
        except InputError as exc:
            raise MediaError(str(exc)) from None


def _cut(span: Span, start: int, stop: int) -> Span:
    if start == 0 and stop == len(span):
        return span
    if isinstance(span, EmbedSpan):
        return EmbedSpan(np.ascontiguousarray(span.rows[start:stop]), f"{span.key}+{start}")
    return TokenSpan(span.ids[start:stop])
