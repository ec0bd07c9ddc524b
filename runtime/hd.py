# SPDX-License-Identifier: Apache-2.0
"""How an image is cut into crops and their features are put in order ("dynamic HD"): integers only.

An image is scaled to fit a canvas of whole 448-pixel crops, padded on the right or at the bottom, and read
crop by crop: once whole, scaled down to one crop (the global view), then each crop of the canvas. Crops
are cut into 32 × 32 patches of 14 pixels; four patches become one row of features.

Source: `dynamic_preprocess` of Phi4MultimodalImageProcessor and `Phi4MultimodalImageEmbedding.forward` in
transformers; their comments in microsoft/Phi-4-multimodal-instruct's processing_phi4mm.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .errors import InputError

Int64 = npt.NDArray[np.int64]

CROP_PIXELS = 448
PATCH_PIXELS = 14
CROP_PATCHES = CROP_PIXELS // PATCH_PIXELS  # a side
CROP_ROWS = CROP_PATCHES // 2  # of features, a side: 2 × 2 patches are averaged
MAX_CROPS = 36  # of the canvas, the global view not counted: `dynamic_hd` of the published processor
MAX_PIXELS = 100_000_000  # of one image, before it is scaled: 300 MB decoded
MIN_SIDE_PIXELS = 10  # of the scaled image; the reference refuses less
SUB_SEPARATOR, GLOBAL_SEPARATOR, FIRST_FEATURE = 0, 1, 2  # in `Layout.assembly`


@dataclass(frozen=True, slots=True)
class Window:
    """The part of a crop that is computed: patches (row, column) with row < rows and column < columns.

    Of these the first `valid_rows` × `valid_columns` show the image and may be attended to. Where they are
    odd in number, the patches beside them are computed too, because the average of 2 × 2 takes them in.
    """

    valid_rows: int
    valid_columns: int

    @property
    def rows(self) -> int:
        """Rows of patches, even."""
        return self.valid_rows + self.valid_rows % 2

    @property
    def columns(self) -> int:
        """Columns of patches, even."""
        return self.valid_columns + self.valid_columns % 2

    @property
    def n_features(self) -> int:
        """Rows of features that come out."""
        return self.rows * self.columns // 4

    @property
    def position_ids(self) -> Int64:
        """int64 [rows · columns]: which row of the 32 × 32 position embedding each patch gets.

        The valid patches are stretched over the full range, bucket(k) = ⌊32 k / n⌋; the others have 0.
        """
        ids = np.zeros((self.rows, self.columns), np.int64)
        down = np.arange(self.valid_rows) * CROP_PATCHES // self.valid_rows
        across = np.arange(self.valid_columns) * CROP_PATCHES // self.valid_columns
        ids[: self.valid_rows, : self.valid_columns] = down[:, None] * CROP_PATCHES + across
        return ids.reshape(-1)

    @property
    def keys(self) -> Int64:
        """int64 [valid_rows · valid_columns]: the patches that are attended to, counted in the window."""
        at = np.arange(self.rows * self.columns, dtype=np.int64).reshape(self.rows, self.columns)
        return at[: self.valid_rows, : self.valid_columns].reshape(-1)


WHOLE = Window(CROP_PATCHES, CROP_PATCHES)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything of one image goes. Sides of the canvas are in crops."""

    columns: int
    rows: int
    width: int  # of the scaled image, pixels, at most 448 · columns; the rest is padding
    height: int

    @property
    def n_crops(self) -> int:
        """The global view and the crops of the canvas."""
        return 1 + self.columns * self.rows

    @property
    def valid_columns(self) -> int:
        """Columns of patches that are not all padding; one that is padded in part is valid."""
        return CROP_PATCHES * self.columns - (CROP_PIXELS * self.columns - self.width) // PATCH_PIXELS

    @property
    def valid_rows(self) -> int:
        """Rows of patches that are not all padding."""
        return CROP_PATCHES * self.rows - (CROP_PIXELS * self.rows - self.height) // PATCH_PIXELS

    @property
    def feature_columns(self) -> int:
        """Columns of the mosaic of pooled features that are used."""
        return (self.valid_columns + 1) // 2

    @property
    def feature_rows(self) -> int:
        """Rows of the mosaic that are used."""
        return (self.valid_rows + 1) // 2

    @property
    def n_tokens(self) -> int:
        """Positions in the prompt: mosaic and global view, a separator after each row, one in between."""
        mosaic = self.feature_rows * (self.feature_columns + 1)
        return mosaic + 1 + CROP_ROWS * (CROP_ROWS + 1)

    def windows(self) -> Iterator[Window]:
        """What is computed of each crop: the global view first, then the canvas row by row."""
        yield WHOLE
        for row in range(self.rows):
            for column in range(self.columns):
                down = min(max(self.valid_rows - CROP_PATCHES * row, 0), CROP_PATCHES)
                across = min(max(self.valid_columns - CROP_PATCHES * column, 0), CROP_PATCHES)
                yield Window(down, across)

    def assembly(self) -> Int64:
        """int64 [n_tokens]: which feature row stands at each position of the prompt.

        Feature rows are counted from `FIRST_FEATURE` through the windows in order, each window row by
        row; 0 and 1 are the learned separators `sub_GN` and `glb_GN`.
        """
        parts = []
        first = FIRST_FEATURE
        for window in self.windows():
            count = window.n_features
            parts.append(np.arange(first, first + count).reshape(window.rows // 2, window.columns // 2))
            first += count
        rows = [np.hstack(parts[1 + r * self.columns :][: self.columns]) for r in range(self.rows)]
        order = (_with_separators(np.vstack(rows)), [GLOBAL_SEPARATOR], _with_separators(parts[0]))
        return np.concatenate(order).astype(np.int64)


def _with_separators(rows: Int64) -> Int64:
    """Each row of features followed by `sub_GN`, flattened."""
    return np.pad(rows, ((0, 0), (0, 1)), constant_values=SUB_SEPARATOR).reshape(-1)


def layout(width: int, height: int, max_crops: int = MAX_CROPS, *, where: str = "image") -> Layout:
    """The layout of an image of `width` × `height` pixels.

    Args:
        max_crops: of the canvas. Fewer mean fewer tokens; the reference has 36.
        where: opens the message of an error.

    Raises:
        InputError: scaled to fit, a side would have fewer than 10 pixels, as in the reference.
    """
    assert width > 0 and height > 0
    if max_crops < 1:
        raise InputError(f"most crops is {max_crops}, expected at least 1")
    columns, rows = -(-width // CROP_PIXELS), -(-height // CROP_PIXELS)
    if columns * rows > max_crops:
        columns, rows = _closest_grid(width, height, max_crops)
    across, down = CROP_PIXELS * columns / width, CROP_PIXELS * rows / height  # doubles, as the reference
    if across < down:
        made = Layout(columns, rows, CROP_PIXELS * columns, int(height * across))
    else:
        made = Layout(columns, rows, int(width * down), CROP_PIXELS * rows)
    if min(made.width, made.height) < MIN_SIDE_PIXELS:
        raise InputError(
            f"{where}: {width} × {height} pixels is too long and thin: "
            f"scaled to {made.width} × {made.height}, expected at least {MIN_SIDE_PIXELS} a side"
        )
    return made


def _closest_grid(width: int, height: int, max_crops: int) -> tuple[int, int]:
    """The grid of at most `max_crops` whose shape is closest; of equal ones the largest not too large."""
    grids = [(i, j) for i in range(1, max_crops + 1) for j in range(1, max_crops // i + 1)]
    best, best_distance = (1, 1), float("inf")
    for i, j in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        distance = abs(width / height - i / j)
        enough = width * height > 0.5 * CROP_PIXELS**2 * i * j
        if distance < best_distance or (distance == best_distance and enough):
            best, best_distance = (i, j), distance
    return best
