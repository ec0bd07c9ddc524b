# SPDX-License-Identifier: Apache-2.0
"""The log-probabilities of a base model on disk, in the format of llama.cpp's perplexity tool.

    bytes   type                 what
    8       "_logits_"
    4       uint32               n_ctx, tokens in a chunk
    4       int32                vocab_size
    4       int32                n_chunks
    4·c·n   int32 [c, n]         the tokens, c = n_chunks, n = n_ctx
    2·c·s·w uint16 [c, s, w]     a row per scored position, s = n - 1 - n // 2, w = row_values(vocab_size)

A row is float32 scale, float32 offset, then a uint16 q for each id, and one more that is nothing where the
vocabulary is odd: ln p = scale · q + offset. All little-endian. What is more than 16 below the most likely
token is stored as 16 below, so that a step is at most 16 / 65535 = 0.00024.

Source: `log_softmax` with `uint16_t * log_prob`, `perplexity` and `kl_divergence` in llama.cpp's
tools/perplexity/perplexity.cpp. Files go both ways.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..runtime.errors import InputError, OutputError
from ..runtime.files import check_file, open_beside, put_in_place, reason_of
from ..runtime.parts import Float32, Int32

UInt16 = npt.NDArray[np.uint16]

_MAGIC = b"_logits_"
_HEADER = struct.Struct("<8sIii")
_RANGE = np.float32(16)  # how far below the most likely token a log-probability can be
_STEPS = np.float32(65535)
_FIXED = 4  # uint16 values that scale and offset take
# What float32 makes of a stored ln p at most: two roundings each in the range, the scale's inverse, the sum
# of exponentials, the offset and decoding, of numbers below 32, which are half a unit in the last place.
_ROUNDINGS = 10 * 32 * float(np.finfo(np.float32).eps) / 2


def scored(n_ctx: int) -> int:
    """Positions of a chunk that are scored: the second half, but for the last, which nothing follows."""
    return n_ctx - 1 - n_ctx // 2


def row_values(vocab_size: int) -> int:
    """uint16 values in a row."""
    return _FIXED + vocab_size + vocab_size % 2


def file_bytes(n_chunks: int, n_ctx: int, vocab_size: int) -> int:
    """The size of a file."""
    return _HEADER.size + n_chunks * (4 * n_ctx + 2 * scored(n_ctx) * row_values(vocab_size))


def encode(logits: Float32, log_sum: Float32) -> UInt16:
    """Rows as they are stored.

    Args:
        logits: float32 [n, vocab_size].
        log_sum: float32 [n], ln Σ exp(logits - max of the row).

    Returns:
        uint16 [n, row_values(vocab_size)].
    """
    n, vocab_size = logits.shape
    top = logits.max(1)
    low = np.maximum(logits.min(1), top - _RANGE)
    scale = (top - low) / _STEPS
    scale[scale < np.finfo(np.float32).tiny] = 0  # all alike; the inverse of less would be infinite
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    rows = np.zeros((n, row_values(vocab_size)), "<u2")
    rows[:, :_FIXED] = np.stack([scale, low - top - log_sum], 1).astype("<f4").view("<u2")
    q = np.maximum(logits, low[:, None])
    q -= low[:, None]
    q *= inverse[:, None]
    rows[:, _FIXED : _FIXED + vocab_size] = np.rint(q, out=q)
    return rows


def decode(rows: UInt16, vocab_size: int) -> Float32:
    """Log-probabilities of stored rows: float32 [n, vocab_size]."""
    fixed = np.ascontiguousarray(rows[:, :_FIXED]).view("<f4")
    found = rows[:, _FIXED : _FIXED + vocab_size].astype(np.float32)
    found *= fixed[:, :1]
    found += fixed[:, 1:]
    return found


class LogitsWriter:
    """A new file, which appears whole or not at all: a temporary, then a rename. A context manager."""

    def __init__(self, path: Path, tokens: Int32, vocab_size: int) -> None:
        """
        Args:
            path: the file to make; an existing one is replaced at the end.
            tokens: int32 [n_chunks, n_ctx].
            vocab_size: of the rows that follow.

        Raises:
            OutputError: there is no room on the disk for the whole of it, or it cannot be made.
        """
        n_chunks, n_ctx = tokens.shape
        self.path = path
        self.size = file_bytes(n_chunks, n_ctx, vocab_size)
        self._written = 0
        try:
            if path.exists() and not path.is_file():
                raise OutputError(f"{str(path)[:200]!r}: cannot be written: is not a regular file")
            free = shutil.disk_usage(path.parent).free
            if free < self.size:
                raise OutputError(f"{path}: takes {_gib(self.size)}, the disk has {_gib(free)} left")
            self._file, self._temporary = open_beside(path)
        except (OSError, ValueError) as exc:  # ValueError: NUL in a name
            raise OutputError(f"{str(path)[:200]!r}: cannot be written: {reason_of(exc)}") from None
        try:
            self._write(_HEADER.pack(_MAGIC, n_ctx, vocab_size, n_chunks))
            self._write(tokens.astype("<i4").tobytes())
        except BaseException:
            self._discard()
            raise

    def write(self, rows: UInt16) -> None:
        """Append rows from `encode`, in order.

        Raises:
            OutputError: the disk is full or broken.
        """
        self._write(rows.tobytes())

    def __enter__(self) -> LogitsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._discard()
            return
        assert self._written == self.size, "a row too many or too few"
        try:
            put_in_place(self._file, self._temporary, self.path)
        except BaseException as failure:
            self._discard()
            if isinstance(failure, OSError):
                raise self._error(failure) from None
            raise

    def _write(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as exc:
            raise self._error(exc) from None
        self._written += len(data)

    def _discard(self) -> None:
        with contextlib.suppress(OSError):  # closing writes what is buffered: on a full disk again in vain
            self._file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink()

    def _error(self, exc: OSError) -> OutputError:
        return OutputError(f"{self.path}: cannot be written: {reason_of(exc)}")


@dataclass(frozen=True, slots=True)
class _Header:
    n_ctx: int
    vocab_size: int
    n_chunks: int


class LogitsReader:
    """A file of this or of llama.cpp's making, checked before anything in it is believed. A context manager.

    Attributes:
        tokens: int32 [n_chunks, n_ctx].
    """

    def __init__(self, path: Path, vocab_size: int) -> None:
        """
        Args:
            path: the file; nothing but its header and tokens is read yet.
            vocab_size: the model's.

        Raises:
            InputError: no such file, not of this format, of another vocabulary, or not of the size that its
                header implies.
        """
        self.path = path
        check_file(path)
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as exc:
            raise InputError(f"{path}: cannot be read: {reason_of(exc)}") from None
        try:
            header = self._header(vocab_size)
            shape = header.n_chunks, header.n_ctx
            self.tokens: Int32 = self._read(_HEADER.size, shape, "<i4").astype(np.int32)
            if self.tokens.min() < 0 or self.tokens.max() >= vocab_size:
                strange = self.tokens[(self.tokens < 0) | (self.tokens >= vocab_size)][0]
                raise InputError(f"{path}: holds the token id {strange}, expected 0 to {vocab_size - 1}")
        except BaseException:
            self._file.close()
            raise
        self._vocab_size = vocab_size

    def __enter__(self) -> LogitsReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def log_probabilities(self, chunk: int, first: int, n: int) -> Float32:
        """What the base model said: float32 [n, vocab_size], natural logs.

        Args:
            chunk: from 0.
            first, n: the scored positions, from 0 in each chunk.

        Raises:
            InputError: the file has shrunk, or a row is no distribution.
        """
        n_chunks, n_ctx = self.tokens.shape
        width = row_values(self._vocab_size)
        at = _HEADER.size + 4 * n_chunks * n_ctx + 2 * width * (chunk * scored(n_ctx) + first)
        rows = self._read(at, (n, width), "<u2").astype(np.uint16, copy=False)
        self._check(_in_range(rows, self._vocab_size), chunk)
        found = decode(rows, self._vocab_size)
        self._check(_sum_to_one(rows, found), chunk)
        return found

    def _header(self, vocab_size: int) -> _Header:
        size = os.fstat(self._file.fileno()).st_size
        raw = self._file.read(_HEADER.size)
        if len(raw) < _HEADER.size or raw[: len(_MAGIC)] != _MAGIC:
            raise InputError(f"{self.path}: is no file of log-probabilities (see --save-logits)")
        _, n_ctx, found, n_chunks = _HEADER.unpack(raw)
        if found != vocab_size:
            raise InputError(f"{self.path}: its vocabulary has {found} tokens, this model's {vocab_size}")
        if scored(n_ctx) < 1 or n_chunks < 1:
            raise InputError(
                f"{self.path}: holds {n_chunks} chunks of {n_ctx} tokens, which is nothing to score"
            )
        expected = file_bytes(n_chunks, n_ctx, found)
        if size != expected:
            raise InputError(
                f"{self.path}: has {size} bytes, expected {expected} for {n_chunks} chunks of {n_ctx} tokens"
            )
        return _Header(n_ctx, found, n_chunks)

    def _read(self, offset: int, shape: tuple[int, int], dtype: str) -> npt.NDArray[Any]:
        array: npt.NDArray[Any] = np.empty(shape, dtype)
        view, done = array.data.cast("B"), 0
        try:
            self._file.seek(offset)
            while done < len(view):
                got = self._file.readinto(view[done:])
                if not got:
                    raise InputError(
                        f"{self.path}: ends at {offset + done} bytes: it has been cut while in use"
                    )
                done += got
        except OSError as exc:
            raise InputError(f"{self.path}: cannot be read: {reason_of(exc)}") from None
        return array

    def _check(self, sound: npt.NDArray[np.bool_], chunk: int) -> None:
        if not sound.all():
            raise InputError(
                f"{self.path}: chunk {chunk + 1} has a row that is no distribution: the file is damaged"
            )


def _in_range(rows: UInt16, vocab_size: int) -> npt.NDArray[np.bool_]:
    """Of each row, whether its most likely token's p is in [1 / vocab_size, 1]; then all p are finite."""
    scale, offset = _scale_and_offset(rows)
    top = offset + scale * int(_STEPS)
    sound: npt.NDArray[np.bool_] = np.isfinite(scale) & np.isfinite(offset) & (scale >= 0)
    sound &= scale * int(_STEPS) <= float(_RANGE) + _ROUNDINGS
    sound &= (top <= _ROUNDINGS) & (top >= -math.log(vocab_size) - _ROUNDINGS)
    return sound


def _sum_to_one(rows: UInt16, found: Float32) -> npt.NDArray[np.bool_]:
    """Of each row, whether its probabilities sum to 1, but for what storing them does.

    Each stored ln p is within half a step, and roundings, of the true one, so their sum is within that factor
    of 1. What was further than 16 below the most likely token is stored as q = 0, and is too high by at most
    all that is stored of it: e to the offset, each.

    Args:
        rows: uint16 [n, row_values(vocab_size)].
        found: float32 [n, vocab_size], the same decoded.
    """
    scale, offset = _scale_and_offset(rows)
    n_lowest = (rows[:, _FIXED : _FIXED + found.shape[1]] == 0).sum(1)
    cut_off = scale * int(_STEPS) >= float(_RANGE) - _ROUNDINGS
    more = np.where(cut_off, n_lowest * np.exp(offset), 0.0)
    off = scale / 2 + _ROUNDINGS
    total = np.exp(found).sum(1, dtype=np.float64)
    sound: npt.NDArray[np.bool_] = (total >= np.exp(-off)) & (total <= np.exp(off) + more)
    return sound


def _scale_and_offset(rows: UInt16) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    fixed = np.ascontiguousarray(rows[:, :_FIXED]).view("<f4").astype(np.float64)
    return fixed[:, 0], fixed[:, 1]


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"
