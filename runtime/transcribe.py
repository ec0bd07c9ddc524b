# SPDX-License-Identifier: Apache-2.0
"""Recordings of any length to transcripts: the same segmenter and reader as live, without partials."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .audio import Sound
from .growing_speech import GrowingSpeech
from .reader import Reading, ReadsSpeech
from .segments import Segmenter, SegmentRules, Silence, Speech
from .transcript import Segment


def transcribe(
    reader: ReadsSpeech,
    sound: Sound,
    rules: SegmentRules,
    *,
    done_until_s: float = 0.0,
    progress: Callable[[float], None] | None = None,
) -> Iterator[Segment]:
    """Utterances as they are read, in order. Memory does not grow with the recording.

    Args:
        reader: reads utterances.
        sound: at 8 or 16 kHz, block by block.
        rules: where utterances begin and end.
        done_until_s: segments that end by then were read before: found again, and not read.
        progress: told how many seconds of the recording are done.

    Yields:
        Segments with the utterances' times: to the detector's frame of 32 ms, pre-roll and tail included.

    Raises:
        InputError: the model cannot listen, or the recording turns out to be damaged.
    """
    for segment, _ in read_utterances(reader, sound, rules, done_until_s=done_until_s, progress=progress):
        yield segment


def read_utterances(
    reader: ReadsSpeech,
    sound: Sound,
    rules: SegmentRules,
    *,
    done_until_s: float = 0.0,
    progress: Callable[[float], None] | None = None,
) -> Iterator[tuple[Segment, Reading]]:
    """`transcribe`, with what the reader has read for each segment."""
    reader.check(rules.max_s)
    rate = sound.sample_rate
    for piece in _pieces(sound, Segmenter(rate, rules)):
        t0, t1 = piece.start / rate, piece.stop / rate
        if isinstance(piece, Speech) and t1 > done_until_s:
            speech = GrowingSpeech(rate)
            speech.set_window(piece.samples)
            reading = reader.read(speech)
            yield Segment(t0, t1, reading.text, reading.translation), reading
        if progress is not None:
            progress(t1)


def _pieces(sound: Sound, segmenter: Segmenter) -> Iterator[Speech | Silence]:
    for block in sound.blocks:
        yield from segmenter.push(block)
    yield from segmenter.finish()
