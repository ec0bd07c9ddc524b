# SPDX-License-Identifier: Apache-2.0
"""Weights and activations for tests of the plug-in inside ggml, and how exact a product of them must be."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from pocketphi.convert.ggml_types import F16, F32, Q4_0, Q4_K, Q5_K, Q6_K, Q8_0, GgmlType
from pocketphi.convert.quantize import Quantizer

from ..ggml_graph import BF16

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]

QUANTIZED = (Q4_0, Q8_0, Q4_K, Q5_K, Q6_K)
FLOATS = (F16, BF16, F32)
NMSE = 5e-4  # of a product whose activations have 8 bits; test-backend-ops of ggml allows the same
EPS = 2.0**-24  # the relative error of one float32 rounding
HEAD, ROTARY = 128, 96  # values of an attention head, and how many RoPE turns


@dataclass(frozen=True, eq=False)
class Matrix:
    """Weights as ggml stores them, and what that means."""

    kind: GgmlType
    data: Bytes  # [rows, bytes of a row]
    values: Float64  # [rows, columns]


@functools.cache
def matrix(kind: GgmlType, rows: int, columns: int) -> Matrix:
    w = np.random.default_rng(rows + columns).standard_normal((rows, columns), np.float32) * np.float32(0.02)
    if kind is BF16:
        data = (w.view(np.uint32) >> 16).astype("<u2").view(np.uint8).reshape(rows, -1)
    else:
        data = Quantizer().quantize(w, kind)
    return Matrix(kind, data, dequantize(data, GGMLQuantizationType(kind.id)).astype(np.float64))


def activations(tokens: int, columns: int) -> Float32:
    """Normal numbers."""
    return np.random.default_rng(tokens).standard_normal((tokens, columns), np.float32)


def uneven(tokens: int, columns: int) -> Float32:
    """With a few large columns, as a model has them; the last of several tokens is zero."""
    x = activations(tokens, columns)
    x[:, :: columns // 4 + 1] *= 20
    if tokens > 1:
        x[-1] = 0
    return x


def nmse(got: npt.NDArray[np.floating], want: npt.NDArray[np.floating]) -> float:
    difference = got.astype(np.float64) - want
    return float((difference**2).sum() / (want.astype(np.float64) ** 2).sum())


def shared_columns(kind: GgmlType, columns: int) -> int:
    """How many activations share a scale: see PK_SHARED_BLOCKS in kernels/matmul/matmul.h."""
    return 32 if kind is Q8_0 or columns % 256 else 256


def product(m: Matrix, x: Float64, x_error: Float64 | float = 0.0) -> tuple[Float64, Float64]:
    """W x, and how far a correct kernel may be from it when x is off by `x_error` already.

    With float weights x stays float32: one rounding for each of K products and sums. Quantized, x is
    rounded to 8 bits: half a step of max / 127 of the columns that share it. The integers then are exact,
    and each half of 32 columns has a product with its scales and an addition, 4 K / 32 roundings at most of
    the sums so far. Those sums are below |x| times four times the block's largest weight: a K-quant's sum
    and its minimum are each at most twice that.
    """
    columns = x.shape[1]
    size = abs(x) + x_error
    if m.kind in FLOATS:
        bound = size @ abs(m.values).T * ((columns + 2) * EPS)
        return x @ m.values.T, bound + np.broadcast_to(x_error, x.shape) @ abs(m.values).T
    n = shared_columns(m.kind, columns)
    half = size.reshape(len(x), -1, n).max(2).repeat(n, 1) / 254 * (1 + 4 * EPS)
    largest = 4 * abs(m.values).reshape(len(m.values), -1, 32).max(2).repeat(32, 1)
    rounding = (size + half) @ largest.T * ((4 * columns // 32 + 8) * EPS)
    return x @ m.values.T, (half + x_error) @ abs(m.values).T + rounding


def causal(tokens: int, keys: int, used: int) -> npt.NDArray[np.float16]:
    """float16 [tokens, keys]: the tokens are the last of `used` keys, cells behind them are empty."""
    place = np.arange(used - tokens, used)[:, None]
    return np.where(np.arange(keys) <= place, 0, -np.inf).astype(np.float16)
