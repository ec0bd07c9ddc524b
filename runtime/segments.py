# SPDX-License-Identifier: Apache-2.0
"""Cuts long audio into passes the model was made for, each in the quietest place near the end of its reach.

The encoder reads 500 tokens (40 s) as one block, and the model was trained on clips of up to 40 s for
transcription: a pass is kept under 30 s, the length that speech recognisers agree on.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .parts import Float32

MAX_PASS_S = 30.0
_EARLIEST_S = 20.0  # a cut is looked for between here and MAX_PASS_S
_WINDOW_S = 0.2  # a pause worth cutting in is at least this long
_STEP_S = 0.02


def cut(samples: Float32, sample_rate: int, *, whole_up_to_s: float = 40.0) -> Iterator[tuple[int, int]]:
    """Where each pass begins and ends, in samples; together they are the whole clip, in order.

    Args:
        samples: float32 [n], mono.
        sample_rate: Hz.
        whole_up_to_s: a clip of up to this length is one pass.

    Yields:
        (start, stop). No pass but the only one is longer than `MAX_PASS_S`.
    """
    start, n = 0, len(samples)
    if n <= whole_up_to_s * sample_rate:
        yield 0, n
        return
    while n - start > MAX_PASS_S * sample_rate:
        low = start + int(_EARLIEST_S * sample_rate)
        high = start + int(MAX_PASS_S * sample_rate)
        stop = low + _quietest(samples[low:high], sample_rate)
        yield start, stop
        start = stop
    yield start, n


def _quietest(samples: Float32, sample_rate: int) -> int:
    """The middle of the window with the least energy, in samples from the beginning."""
    window, step = int(_WINDOW_S * sample_rate), int(_STEP_S * sample_rate)
    energy = np.concatenate([[0.0], np.cumsum(samples.astype(np.float64) ** 2)])
    starts = np.arange(0, len(samples) - window + 1, step)
    return int(starts[(energy[starts + window] - energy[starts]).argmin()]) + window // 2
