# SPDX-License-Identifier: Apache-2.0
"""Cuts a stream of sound into what is said and what is silence, as it comes and without losing a sample.

Frames of 32 ms are cut from the stream, not from the blocks it comes in, so that the pieces depend on the
samples alone. Memory holds the utterance that is open, at most `max_s`, and otherwise what the pre-roll may
still claim.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np

from .errors import InputError
from .parts import Float32
from .voice import FRAME_S, STEADY_MOST, VoiceDetector

_RATES = (16000, 8000)

# Speech begins when _BEGIN of _OF frames are at least _SPEECH. Music gives single frames and pairs, the onset
# of a low tone up to five; the steady rest is out already (see `voice`). Of 453 synthetic sounds without
# speech 4 of 6 takes 12 for speech, 5 of 7 takes 9, 6 of 8 takes 6. All of phi4-nano's evaluation clips and
# two real voices pass each of them; 6 frames are 0.19 s, shorter than most spoken words.
_SPEECH = 0.5
_BEGIN = 6
_OF = 8
# It may begin earlier, with frames that count for less, such as an even "m": each at most _GAP frames (0.19
# s) before the next, within the latest _LOOK (0.77 s).
_MAYBE = STEADY_MOST
_LOOK = 24
_GAP = 6
_STILL_SPEECH = 0.35  # once it has begun, Silero's own hysteresis of 0.15 keeps it going

_CUT_FROM = 2 / 3  # of max_s: an utterance that grows too long is cut between here and max_s
_QUIET_S = 0.2  # the window whose energy is compared
_QUIET_STEP_S = 0.02

_LIMITS = {  # seconds
    "pause_s": (0.2, 10),
    "pre_roll_s": (0, 2),
    "tail_s": (0.05, 10),  # so that no utterance is shorter than the 25 ms that the front end needs
    "max_s": (3, 40),  # the speech encoder reads 40 s as one block
    "silence_s": (1, 600),
}


@dataclass(frozen=True, slots=True)
class SegmentRules:
    """When an utterance begins and ends; all in seconds."""

    pause_s: float = 0.7  # without speech this long it is over
    pre_roll_s: float = 0.3  # before the first frame that is speech
    # After the last one, at most pause_s. Measured: 0.2 s cuts soft final consonants (phi4-nano's word error
    # rate is 8 % instead of 5 %).
    tail_s: float = 0.4
    max_s: float = 30.0  # what speech recognisers agree on for one pass
    silence_s: float = 10.0  # a long silence is reported in pieces of this length

    def __post_init__(self) -> None:
        for field in fields(self):
            value, (low, high) = getattr(self, field.name), _LIMITS[field.name]
            if not low <= value <= high:  # not a number is in no range
                raise InputError(f"{field.name} is {value:g} s, expected {low:g} to {high:g}")

    @property
    def earliest_cut_s(self) -> float:
        """No utterance that goes on is cut before this: words up to here stay in it."""
        return _CUT_FROM * self.max_s


@dataclass(frozen=True, slots=True, eq=False)
class Speech:
    """An utterance, or the part of one that fits into `max_s`."""

    start: int  # in samples from the beginning of the stream
    samples: Float32  # [n]
    sample_rate: int  # Hz

    @property
    def stop(self) -> int:
        """One past its last sample."""
        return self.start + len(self.samples)


@dataclass(frozen=True, slots=True)
class Silence:
    """A stretch in which nobody speaks, in samples from the beginning of the stream."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class Growing:
    """What is being said."""

    start: int  # in samples from the beginning of the stream
    window: (
        Float32  # [n], read-only: from `start` to the latest frame, or to the tail's end when that is earlier
    )
    pausing: bool  # the window is at its tail's end: it is the whole utterance, unless speech goes on


Piece = Speech | Silence


class Segmenter:
    """Sound in, pieces out: in order, without gap or overlap, from sample 0 to the last."""

    def __init__(
        self,
        sample_rate: int,
        rules: SegmentRules | None = None,
        voice: Callable[[Float32], float] | None = None,
    ) -> None:
        """An empty stream.

        Args:
            sample_rate: 16000 or 8000 Hz.
            rules: None: the defaults.
            voice: the probability of speech in the next frame, float32 [0.032 · sample_rate]; None: Silero's.

        Raises:
            InputError: another rate.
        """
        if sample_rate not in _RATES:
            raise InputError(f"the sound is at {sample_rate} Hz, expected 16000 or 8000")
        self._rate, self._rules = sample_rate, rules or SegmentRules()
        self._voice = voice or VoiceDetector(sample_rate)
        self._frame = round(FRAME_S * sample_rate)
        self._pause = self._samples(self._rules.pause_s)
        self._tail = min(self._samples(self._rules.tail_s), self._pause)
        self._max = self._samples(self._rules.max_s)
        self._held = _Held()
        self._seen = 0  # frames have been cut up to here
        self._start = 0  # of the piece that is open: speech or silence
        self._spoken = -1  # where the latest frame of speech ended; -1: nobody speaks
        self._recent: deque[float] = deque(maxlen=_LOOK)  # probabilities of the latest frames, in silence

    def push(self, samples: Float32) -> list[Piece]:
        """Take the next samples.

        Args:
            samples: float32 [n], mono, finite, any n.

        Returns:
            The pieces that are complete now.
        """
        self._held.append(samples)
        found: list[Piece] = []
        while self._held.stop - self._seen >= self._frame:
            stop = self._seen + self._frame
            probability = self._voice(self._held.view(self._seen, stop))
            self._seen = stop
            found += self._in_silence(probability) if self._spoken < 0 else self._in_speech(probability)
        return found

    def finish(self) -> list[Piece]:
        """The end of the stream: what is still open. What is left of a frame belongs to the last piece."""
        stop, found = self._held.stop, list[Piece]()
        if self._spoken >= 0:
            end = self._spoken + self._tail
            found += self._close(min(stop, self._start + self._max) if end >= self._seen else end)
        if stop > self._start:
            found += self._silences(stop, at_end=True)
        self._seen = stop
        self._recent.clear()
        return found

    @property
    def open(self) -> Growing | None:
        """What is being said; None: nothing. When it ends in a pause, its samples are the last window."""
        if self._spoken < 0:
            return None
        end = self._spoken + self._tail
        window = self._held.view(self._start, min(self._seen, end))
        return Growing(self._start, window, self._seen >= end)

    def _samples(self, seconds: float) -> int:
        return round(seconds * self._rate)

    def _in_silence(self, probability: float) -> list[Piece]:
        """A frame while nobody speaks: the beginning of speech, or more silence."""
        self._recent.append(probability)
        pre_roll = self._samples(self._rules.pre_roll_s)
        latest = list(self._recent)[-_OF:]
        if sum(p >= _SPEECH for p in latest) < _BEGIN:
            return self._silences(self._seen - _LOOK * self._frame - pre_roll)
        start = max(self._start, self._seen - self._spoken_frames() * self._frame - pre_roll)
        found = self._silences(start, at_end=True)
        self._start, self._spoken = start, self._seen
        self._recent.clear()
        return found

    def _spoken_frames(self) -> int:
        """How many of the recent frames belong to the speech that has begun."""
        latest = list(self._recent)
        first = next(i for i, p in enumerate(latest) if i >= len(latest) - _OF and p >= _SPEECH)
        for i in range(first - 1, -1, -1):
            if latest[i] >= _MAYBE and first - i <= _GAP:
                first = i
        return len(latest) - first

    def _in_speech(self, probability: float) -> list[Piece]:
        """A frame of an utterance: it goes on, ends in a pause, or grows too long."""
        if probability >= _STILL_SPEECH:
            self._spoken = self._seen
        elif self._seen - self._spoken >= self._pause:
            return self._close(self._spoken + self._tail)
        if self._seen - self._start < self._max:
            return []
        low, high = self._start + int(self._max * _CUT_FROM), self._start + self._max
        cut = low + _quietest(self._held.view(low, high), self._rate)
        if cut < self._spoken:
            return self._speech(cut)
        return self._close(min(self._spoken + self._tail, high))  # nothing was said after the cut

    def _close(self, stop: int) -> list[Piece]:
        """The utterance ends at `stop`; silence follows."""
        self._spoken = -1
        return self._speech(stop)

    def _speech(self, stop: int) -> list[Piece]:
        piece = Speech(self._start, self._held.view(self._start, stop).copy(), self._rate)
        self._start = stop
        self._held.drop(stop)
        return [piece]

    def _silences(self, stop: int, *, at_end: bool = False) -> list[Piece]:
        """Silence up to `stop` in whole pieces; at the silence's end the rest too."""
        most, found = self._samples(self._rules.silence_s), list[Piece]()
        while stop - self._start >= most or (at_end and stop > self._start):
            end = min(stop, self._start + most)
            found.append(Silence(self._start, end))
            self._start = end
        self._held.drop(stop)
        return found


class _Held:
    """The samples of a stream from some point on, in a buffer that grows and moves seldom."""

    def __init__(self) -> None:
        self._buffer: Float32 = np.empty(1 << 15, np.float32)
        self._first = 0  # the stream's sample at the buffer's beginning
        self._low = 0  # what is kept, in the buffer
        self._high = 0

    @property
    def stop(self) -> int:
        """How many samples the stream has had."""
        return self._first + self._high

    def append(self, samples: Float32) -> None:
        """Add to the end. When that is full, what is kept moves to a buffer of twice the size."""
        n = len(samples)
        if self._high + n > len(self._buffer):
            kept = self._buffer[self._low : self._high]
            buffer = np.empty(max(1 << 15, 2 * (len(kept) + n)), np.float32)
            buffer[: len(kept)] = kept
            self._buffer, self._first = buffer, self._first + self._low
            self._low, self._high = 0, len(kept)
        self._buffer[self._high : self._high + n] = samples
        self._high += n

    def view(self, start: int, stop: int) -> Float32:
        """Samples of the stream, read-only. They stay: what is appended goes behind them or elsewhere."""
        found = self._buffer[start - self._first : stop - self._first]
        found.flags.writeable = False
        return found

    def drop(self, start: int) -> None:
        """Samples before `start` are not asked for again."""
        self._low = max(self._low, start - self._first)


def _quietest(samples: Float32, sample_rate: int) -> int:
    """The middle of the window with the least energy, in samples from the beginning."""
    window, step = round(_QUIET_S * sample_rate), round(_QUIET_STEP_S * sample_rate)
    energy = np.concatenate([[0.0], np.cumsum(samples.astype(np.float64) ** 2)])
    starts = np.arange(0, len(samples) - window + 1, step)
    return int(starts[(energy[starts + window] - energy[starts]).argmin()]) + window // 2
