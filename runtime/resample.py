# SPDX-License-Identifier: Apache-2.0
"""The two image resamplers of the reference, equal to it in every pixel.

OpenCV's resizes are others: its bilinear one has no antialiasing, its bicubic one rounds differently.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

_WEIGHT_BITS = 15  # of the largest weight, which torch keeps in an int16
_MOST_FRACTION_BITS = 22
_BAND = 16  # output pixels that share one small dense matrix
_PRODUCT_SIZE = (
    1 << 18
)  # multiplications in one product: OpenBLAS starts no threads, the operands stay in cache
_CUBIC_HALF = np.array([-0.09375, 0.59375, 0.59375, -0.09375], np.float32)
"""Cubic convolution with a = -0.75 half-way between two samples; exact in float32."""


def bilinear(planes: UInt8, width: int, height: int) -> UInt8:
    """Antialiased bilinear resize, equal bit for bit to torchvision's `resize` of uint8 pixels.

    It resamples rows first, rounds to 8 bits, then columns, with weights of 15 bits. Sums of 8-bit pixels
    times such weights are exact in float64 in any order, so a matrix product does them. Pillow differs
    in having weights of 22 bits: by 1 of 255 on few pixels.

    Args:
        planes: uint8 [3, h, w].

    Returns:
        uint8 [3, height, width].
    """
    n, h, w = planes.shape
    if width != w:
        lines = planes.reshape(n * h, w)
        out = np.empty((n * h, width), np.uint8)
        for first, last, low, weights in _bands(w, width):
            step = max(1, _PRODUCT_SIZE // weights.size)
            for at in range(0, n * h, step):
                piece = lines[at : at + step, low : low + len(weights)].astype(np.float64)
                out[at : at + step, first:last] = piece @ weights + 0.5  # the cast cuts off
        planes = out.reshape(n, h, width)
    if height != h:
        resized = np.empty((n, height, width), np.uint8)
        for first, last, low, weights in _bands(h, height):
            step = max(1, _PRODUCT_SIZE // weights.size)
            for plane, target in zip(planes, resized, strict=True):
                for at in range(0, width, step):
                    piece = plane[low : low + len(weights), at : at + step].astype(np.float64)
                    target[first:last, at : at + step] = weights.T @ piece + 0.5
        planes = resized
    return planes


def _bands(n_in: int, n_out: int) -> list[tuple[int, int, int, Float64]]:
    """For each run of outputs: first, last, first input needed, and weights float64 [inputs, outputs]."""
    low, weights = _triangle(n_in, n_out)
    bands = []
    for first in range(0, n_out, _BAND):
        last = min(first + _BAND, n_out)
        start = int(low[first])
        stop = min(int(low[last - 1]) + weights.shape[1], n_in)
        dense = np.zeros((stop - start + weights.shape[1], last - first))
        at = low[first:last, None] - start + np.arange(weights.shape[1])
        np.put_along_axis(dense, at.T, weights[first:last].T, axis=0)
        bands.append((first, last, start, np.ascontiguousarray(dense[: stop - start])))
    return bands


def _triangle(n_in: int, n_out: int) -> tuple[Int64, Float64]:
    """The triangle filter over the inputs of each output.

    Source: `_compute_indices_min_size_weights_aa` and `compute_indices_int16_weights_aa` in torch's
    UpSampleKernel.cpp.

    Returns:
        The first input of each output, int64 [n_out], and weights float64 [n_out, taps], whole multiples
        of a power of two, zero where an output has fewer taps.
    """
    scale = n_in / n_out
    support = max(scale, 1.0)
    center = scale * (np.arange(n_out) + 0.5)
    low = np.maximum((center - support + 0.5).astype(np.int64), 0)
    high = np.minimum((center + support + 0.5).astype(np.int64), n_in)
    taps = np.arange(int((high - low).max()))
    weights = np.maximum(1 - np.abs((taps + low[:, None] - center[:, None] + 0.5) * (1.0 / support)), 0.0)
    weights[taps >= (high - low)[:, None]] = 0
    weights /= np.cumsum(weights, axis=1)[:, -1:]  # cumsum adds from left to right, as torch does
    largest, bits = float(weights.max()), 0
    while bits < _MOST_FRACTION_BITS and int(0.5 + largest * (2 << bits)) < 1 << _WEIGHT_BITS:
        bits += 1
    return low, np.floor(weights * (1 << bits) + 0.5) / (1 << bits)


def shrink_bicubic(planes: Float32, factor_down: int, factor_across: int) -> Float32:
    """Bicubic resize by whole factors, as torch's `interpolate(mode="bicubic", align_corners=False)`.

    No antialiasing, a = -0.75. With a whole factor g each output lies on a sample (g odd) or half-way
    between two (g even), so there is one set of weights, and g = 1 changes nothing. Results are not
    clamped: they may overshoot the range of the input.

    Args:
        planes: float32 [3, h · factor_down, w · factor_across].

    Returns:
        float32 [3, h, w].
    """
    return _shrink(_shrink(planes, factor_across, 2), factor_down, 1)


def _shrink(planes: Float32, factor: int, axis: int) -> Float32:
    n_in = planes.shape[axis]
    if factor % 2:
        return np.take(planes, np.arange(factor // 2, n_in, factor), axis)
    before = np.arange(factor // 2 - 1, n_in, factor)
    terms = (
        weight * np.take(planes, np.clip(before + offset, 0, n_in - 1), axis)
        for offset, weight in enumerate(_CUBIC_HALF, -1)
    )
    total: Float32 = next(terms)
    for term in terms:
        total += term
    return total
