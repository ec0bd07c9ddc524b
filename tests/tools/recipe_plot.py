# SPDX-License-Identifier: Apache-2.0
"""Draws docs/recipes.png from docs/recipes.json: size against divergence, and how right the answers are.

The same JSON gives the same picture with the same matplotlib; it carries the JSON's SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, NullLocator
from matplotlib.transforms import Bbox

WIDTH, HEIGHT, DPI = 1200, 560, 100  # pixels; dots per inch
SOURCE = "pocketphi recipes.json sha256"  # the picture's text chunk

# Okabe and Ito's colours, which the colour-blind tell apart; marks differ too.
_PLAIN, _IMATRIX = ("#0072B2", "o"), ("#D55E00", "D")
_FLOOR = 1e-6  # nats: the 16 bits of the base's probabilities. What is below is drawn there
_PANELS = ((0.05, 0.42), (0.68, 0.145), (0.845, 0.145))  # left end, width; names of rows before the second
_SIZES = (5, 6, 7, 8, 10, 15, 20, 30, 40)  # MB, with a tick

Row = Mapping[str, Any]


def draw(source: Path, out: Path) -> None:
    """Write the picture."""
    text = source.read_bytes()
    rows = sorted(json.loads(text)["recipes"], key=lambda row: row["disk_bytes"])
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure = plt.figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI)
        left, middle, right = (figure.add_axes((x, 0.08, width, 0.84)) for x, width in _PANELS)
        _divergence(left, rows)
        _rates(middle, rows, "wer", "word error rate, %")
        _rates(right, rows, "exact", "exact match, %")
        middle.set_yticks(range(len(rows)), [f"{row['name']}   {n}" for n, row in enumerate(rows, 1)])
        right.set_yticks(range(len(rows)), [])
        metadata = {"Software": None, "Description": f"{SOURCE} {hashlib.sha256(text).hexdigest()}"}
        figure.savefig(out, metadata=metadata)
        plt.close(figure)


def _mark(row: Row) -> tuple[str, str]:
    return _IMATRIX if row["options"]["imatrix"] else _PLAIN


def _divergence(axes: Axes, rows: Sequence[Row]) -> None:
    """Size against KLD, each dot with the number of its row."""
    axes.set(xscale="log", yscale="log", title="KL divergence from F32, nats, against size on disk, MB")
    points = [(row["disk_bytes"] / 1e6, max(row["kld"]["kld"], _FLOOR)) for row in rows]
    for row, (x, y) in zip(rows, points, strict=True):
        colour, marker = _mark(row)
        error = 1.96 * row["kld"]["kld_error"] if row["kld"]["kld"] > _FLOOR else 0.0
        axes.errorbar(x, y, [[min(error, y - _FLOOR)], [error]], fmt=marker, color=colour, elinewidth=1, ms=6)
    axes.set_xlim(0.88 * min(x for x, _ in points), 1.35 * max(x for x, _ in points))
    axes.set_ylim(_FLOOR / 2, 4 * max(y for _, y in points))
    axes.xaxis.set_major_locator(FixedLocator(_SIZES))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    _number(axes, rows, points)


def _number(axes: Axes, rows: Sequence[Row], points: Sequence[tuple[float, float]]) -> None:
    """Each row's number at the nearest place where it covers neither a dot nor another number."""
    axes.figure.canvas.draw()
    renderer = axes.figure.canvas.get_renderer()
    taken = [
        Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in (axes.transData.transform(point) for point in points)
    ]
    for n, (row, point) in enumerate(zip(rows, points, strict=True), 1):
        colour, _ = _mark(row)
        for dx, dy in _places():
            line = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
            how = {"textcoords": "offset points", "ha": "center", "va": "center", "color": colour}
            text = axes.annotate(f"{n}", point, (dx, dy), arrowprops=line, **how)
            text.update_positions(renderer)
            box = Text.get_window_extent(text).padded(1)  # without the line
            if not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()
        else:
            raise RuntimeError(f"there is no free place for {row['name']}")


def _places() -> Iterator[tuple[float, float]]:
    """Points right and up from a dot, the near ones first."""
    for reach in range(11, 60, 4):
        for eighth in (1, 7, 3, 5, 0, 2, 6, 4):
            yield reach * math.cos(math.pi * eighth / 4), reach * math.sin(math.pi * eighth / 4)


def _rates(axes: Axes, rows: Sequence[Row], what: str, title: str) -> None:
    """A score of each, with its 95 % interval; the smallest model on top."""
    for y, row in enumerate(rows):
        colour, marker = _mark(row)
        low, high = (100 * end for end in row[what]["ci95"])
        score = 100 * row[what]["score"]
        error = [[score - low], [high - score]]
        axes.errorbar(score, y, xerr=error, fmt=marker, color=colour, elinewidth=1, ms=6)
    axes.set(title=title, ylim=(len(rows) - 0.4, -0.6))
    axes.grid(axis="x", color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
