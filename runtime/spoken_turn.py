# SPDX-License-Identifier: Apache-2.0
"""One spoken turn of a conversation: what somebody says, up to the pause after it."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from .capture import Microphone
from .parts import Float32, Waveform
from .segments import Segmenter, SegmentRules, Speech
from .sources import Source
from .stderr_capture import captured_stderr

_log = logging.getLogger(__name__)
MAX_TURN_S = 120.0  # of one turn; the longest utterance of a caption ends no turn: a pause does


def open_microphone(device: int | str | None = None) -> Source:
    """A microphone that is recording.

    Args:
        device: its number, or its name or a part of it; None: the system's default.

    Raises:
        InputError: PortAudio or the device is missing, or there are several of that name.
    """
    return Microphone(device)


def record_turn(source: Source, rules: SegmentRules | None, note: Callable[[str], None]) -> Waveform | None:
    """What is said until the first pause, with the pre-roll and the tail that `rules` give it.

    Args:
        source: is stopped and closed, also where something fails.
        rules: what a pause is; None: the usual.
        note: told in one line that it is time to speak.

    Returns:
        float32 [n] and the rate in Hz; None where the source ended and nobody had spoken.

    Raises:
        InputError: the source failed.
    """
    with source:
        segmenter = Segmenter(source.sample_rate, rules)
        note("listening… speak, then pause (Ctrl-C cancels)")
        with captured_stderr() as said:  # C libraries have their say when a device is gone
            parts = _speech(source, segmenter)
            source.stop()
    for line in said.text.splitlines():
        _log.debug("%s", line)
    return (np.concatenate(parts), source.sample_rate) if parts else None


def _speech(source: Source, segmenter: Segmenter) -> list[Float32]:
    """The first utterance, in pieces where it is a long one."""
    found: list[Float32] = []
    for block in source.blocks:
        found += [piece.samples for piece in segmenter.push(block) if isinstance(piece, Speech)]
        # A piece that was only too long is followed by the rest of its utterance at once.
        over = sum(map(len, found)) >= MAX_TURN_S * source.sample_rate
        if found and (over or segmenter.open is None):
            return found
    return found + [piece.samples for piece in segmenter.finish() if isinstance(piece, Speech)]
