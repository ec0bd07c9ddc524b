# SPDX-License-Identifier: Apache-2.0
"""The pictures of this folder's golden data, made from integers so that they are the same everywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

HERE = Path(__file__).parent
FILES = HERE / "files"
EVAL = HERE.parents[2] / "nano" / "eval" / "images"

SIZES: Mapping[str, tuple[int, int]] = {  # name -> width, height
    "whole": (448, 448),  # one crop, no padding
    "enlarged": (300, 500),  # padded below
    "wide": (500, 300),  # padded on the right
    "edge": (449, 448),  # the second crop has one column of valid patches
    "thin": (448, 20),  # fewest tokens
    "grid": (1200, 896),  # seven crops, the padding ends inside one
    "photo": (1613, 1210),  # 12 crops, scaled down a little
    "search": (3000, 2600),  # too large for whole crops: the grid is searched for
}
N_SAMPLES = 4096  # of each image's global view


def picture(width: int, height: int) -> npt.NDArray[np.uint8]:
    """uint8 [height, width, 3]: gradients that wrap round, a checkerboard, and noise in the lower half."""
    y, x = np.mgrid[:height, :width].astype(np.uint32)
    red, green = (3 * x + 5 * y) % 256, (x * x // 64 + 2 * y) % 256
    blue = (x // 32 + y // 32) % 2 * 200 + 20
    noise = ((x * np.uint32(2654435761)) ^ (y * np.uint32(2246822519))) * np.uint32(3266489917) >> 24
    noisy = y > height // 2
    return np.stack([red, np.where(noisy, noise, green), blue], axis=-1).astype(np.uint8)


def samples(size: int) -> npt.NDArray[np.int64]:
    """Which numbers of a flattened array of `size` the golden data keeps."""
    return np.arange(N_SAMPLES, dtype=np.int64) * 7919 * 101 % size


def digest(array: npt.NDArray[np.float32]) -> str:
    """SHA-256 of float32 values as they lie in memory."""
    return hashlib.sha256(np.ascontiguousarray(array, "<f4").tobytes()).hexdigest()
