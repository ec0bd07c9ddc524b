# SPDX-License-Identifier: Apache-2.0
"""Crops of an image to rows for the decoder: the SigLIP tower and its projector on ONNX Runtime.

`convert/write_onnx_vision.py` describes the two graphs. The tower reads one crop at a time, so memory does
not grow with their number, and of a crop only the patches that show the image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import BundleError
from .hd import CROP_PATCHES, PATCH_PIXELS, Window
from .image import ImageInput
from .onnx_session import OnnxSession
from .parts import Float32

_PROJECTED_ROWS = 2048  # at a time: 25 MB at full size for each value of the projector


@dataclass(frozen=True, slots=True)
class VisionFiles:
    """Where the two graphs are."""

    tower: Path
    projector: Path


class VisionEncoder:
    """The vision encoder of one model directory."""

    def __init__(self, files: VisionFiles, *, n_threads: int) -> None:
        """Load both graphs.

        Args:
            files: as the converter wrote them.
            n_threads: they sleep between runs: the decoder needs the cores.

        Raises:
            BundleError: a graph is missing, damaged, or not the one that the converter writes.
        """
        self._files = files
        tower = {"patches": 3, "position_ids": 1, "keys": 1, "grid": 1}
        self._tower = OnnxSession(files.tower, n_threads, tower, "features")
        self._projector = OnnxSession(files.projector, n_threads, {"features": 2, "rows": 1}, "embeddings")

    def encode(self, image: ImageInput, on_crop: Callable[[int, int], None] | None = None) -> Float32:
        """Rows for the image placeholder.

        Args:
            on_crop: called after each crop with how many are done and how many there are. What it raises
                ends the work.

        Returns:
            float32 [image.n_tokens, d_model].

        Raises:
            BundleError: the rows are not finite, or not as many as the image has positions.
            KernelError: ONNX Runtime failed.
        """
        features = []
        for n, (crop, window) in enumerate(zip(image.crops, image.layout.windows(), strict=True), 1):
            if window.n_features:
                features.append(self._features(crop, window))
            if on_crop is not None:
                on_crop(n, image.layout.n_crops)
        stacked, order = np.concatenate(features), image.layout.assembly()
        rows = np.concatenate(
            [
                self._projector.run(features=stacked, rows=order[at : at + _PROJECTED_ROWS])
                for at in range(0, len(order), _PROJECTED_ROWS)
            ]
        )
        where = self._files.tower.parent
        if len(rows) != image.n_tokens:
            raise BundleError(
                f"{where}: the vision encoder gives {len(rows)} rows, expected {image.n_tokens}"
            )
        if not np.isfinite(rows).all():
            raise BundleError(f"{where}: the vision encoder gives numbers that are not finite: it is damaged")
        return rows

    def _features(self, crop: Float32, window: Window) -> Float32:
        """Pooled features float32 [window.n_features, d] of one crop."""
        return self._tower.run(
            patches=patches(crop, window)[None],
            position_ids=window.position_ids,
            keys=window.keys,
            grid=np.array([window.rows // 2, window.columns // 2], np.int64),
        )


def patches(crop: Float32, window: Window) -> Float32:
    """The window's patches, row by row.

    Args:
        crop: float32 [3, 448, 448].

    Returns:
        float32 [window.rows · window.columns, 588]: channel by channel, each 14 rows of 14 pixels.
    """
    n, side = CROP_PATCHES, PATCH_PIXELS
    split = crop.reshape(3, n, side, n, side).transpose(1, 3, 0, 2, 4)
    found: Float32 = split[: window.rows, : window.columns].reshape(-1, 3 * side * side)
    return found
