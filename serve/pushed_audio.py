# SPDX-License-Identifier: Apache-2.0
"""Audio that a client appends piece by piece, cut into stretches where it commits or clears.

The event loop appends; a thread takes one stretch after the other and hears it as a `sources.Source`. Nothing
is dropped: what nobody has looked at is held, up to a bound.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ..runtime import audio
from ..runtime.audio import Sound
from ..runtime.clock import Clock
from ..runtime.parts import Float32
from ..runtime.segments import SegmentRules
from ..runtime.sources import BLOCK_S
from .errors import Refusal

_WIDTH = 2  # bytes of a sample: signed, 16 bits, little-endian, mono
_MOST_WAITING = 4096  # stretches: they may be as short as a sample


class Dropped(Exception):
    """The stretch was cleared: nobody wants to know what was said in it."""


class Stretch:
    """What comes between two commits or clears. A `sources.Source` at 16 kHz for one thread."""

    name = "the input audio buffer"
    sample_rate = audio.SAMPLE_RATE
    overruns = underruns = 0

    def __init__(self, buffer: AudioBuffer, rate: int, rules: SegmentRules | None, start_s: float) -> None:
        """
        Args:
            buffer: that it is a part of.
            rate: of what is appended, in Hz.
            rules: where utterances begin and end; None: it is all one, and is read when it is complete.
            start_s: what was appended before it.
        """
        self.rate, self.rules, self.start_s = rate, rules, start_s
        self.complete = False  # nothing is added any more
        self.cleared = False
        self.exhausted = False  # `blocks` has given out the last
        self.item_id = ""  # of one that is read when it is complete
        self.commit_id: str | None = None  # the client's own id of its commit
        self.committed = False
        self.started = 0.0  # see `Source.started`: as late as what has come allows
        self._buffer = buffer
        self._block = int(BLOCK_S * rate) * _WIDTH  # bytes of what is given out at once
        self._held = bytearray()
        self._latest = b""
        self._arrived = self._given = 0  # samples at `rate`, and at 16 kHz
        columns = audio.from_blocks(self._columns(), rate, 1, name=self.name)
        self._blocks = self._counted(columns.blocks)

    @property
    def blocks(self) -> Iterator[Float32]:
        """See `Source.blocks`. It raises Dropped when the stretch is cleared."""
        return self._blocks

    @property
    def sound(self) -> Sound:
        """The same, for who wants a recording."""
        return Sound(self.name, self.sample_rate, self._blocks, self.seconds)

    @property
    def seconds(self) -> float:
        """What has come."""
        return self._arrived / self.rate

    @property
    def given_s(self) -> float:
        """What has been given out."""
        return self._given / self.sample_rate

    @property
    def level_dbfs(self) -> float:
        """See `Source.level_dbfs`."""
        return audio.level_dbfs(audio.mono(_column(self._latest))) if self._latest else -math.inf

    def backlog_s(self) -> float:
        """See `Source.backlog_s`."""
        return max(0.0, self.seconds - self.given_s)

    def stop(self) -> None:
        """See `Source.stop`."""
        self._buffer.end()

    def close(self) -> None:
        """There is nothing to let go of."""

    def __enter__(self) -> Stretch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, raw: bytes, now: float) -> None:
        """For the buffer, with its lock."""
        self._held += raw
        self._latest = raw[-self._block :]  # no more: it is not counted as held
        self._arrived += len(raw) // _WIDTH
        self.started = max(self.started, now - self.seconds)

    def take(self, most: int) -> bytes | None:
        """For the buffer, with its lock: what is there; b"": none yet; None: no more comes."""
        if self.cleared:
            raise Dropped
        taken = bytes(self._held[:most])
        del self._held[:most]
        return None if not taken and self.complete else taken

    def drop(self) -> int:
        """For the buffer, with its lock: the bytes that are held no more."""
        n = len(self._held)
        self._held.clear()
        self._latest = b""
        self.complete = self.cleared = True
        return n

    def _columns(self) -> Iterator[npt.NDArray[Any]]:
        """Integers [n, 1] as they come."""
        while raw := self._buffer.take(self, self._block):
            yield _column(raw)

    def _counted(self, blocks: Iterator[Float32]) -> Iterator[Float32]:
        for block in blocks:
            self._given += len(block)
            if len(block):
                yield block
        self.exhausted = True


class AudioBuffer:
    """A client's input audio buffer. Every method may be called from any thread."""

    def __init__(self, clock: Clock, most_s: float) -> None:
        """`most_s`: seconds that nobody has looked at."""
        self._clock, self._most_s = clock, most_s
        self._changed = threading.Condition()
        self._waiting: deque[Stretch] = deque()  # for the thread; the last may still grow
        self._open: Stretch | None = None
        self._ended = False
        self._start_s = 0.0  # of the next stretch
        self._held_s = 0.0
        self.rate = 0  # of all that has come; 0: nothing has

    @property
    def open(self) -> Stretch | None:
        """What is appended to; None: there is nothing since the last commit or clear."""
        return self._open

    @property
    def held_s(self) -> float:
        """Seconds that nobody has looked at."""
        return self._held_s

    def append(self, raw: bytes, rate: int, rules: SegmentRules | None) -> None:
        """Add whole samples; a stretch that begins with them has these rules.

        Raises:
            Refusal: 413, too much waits.
        """
        seconds = len(raw) / _WIDTH / rate
        with self._changed:
            if self._ended:
                return
            if self._held_s + seconds > self._most_s:
                what = f"over {self._most_s:g} s of audio wait to be looked at: send it more slowly"
                raise Refusal(413, what, code="input_audio_buffer_full")
            if self._open is None and len(self._waiting) >= _MOST_WAITING:
                what = (
                    f"over {_MOST_WAITING:,} commits and clears wait to be looked at: send them more slowly"
                )
                raise Refusal(413, what, code="input_audio_buffer_full")
            self.rate = rate
            if self._open is None:
                self._open = Stretch(self, rate, rules, self._start_s)
                if rules is not None:
                    self._waiting.append(self._open)
            self._open.add(raw, self._clock.now())
            self._held_s += seconds
            self._changed.notify_all()

    def commit(self, item_id: str, commit_id: str | None) -> Stretch:
        """What is open is complete.

        Args:
            item_id: of a stretch that is one item.
            commit_id: the client's own id of its commit.
        """
        with self._changed:
            found = self._close()
            found.item_id, found.commit_id, found.committed = item_id, commit_id, True
            if found.rules is None:
                self._waiting.append(found)
            return found

    def clear(self) -> Stretch:
        """What is open is not wanted: its thread finds it `cleared`, in its turn."""
        with self._changed:
            found = self._close()
            if found.rules is None:
                self._waiting.append(found)
            self._held_s -= found.drop() / _WIDTH / found.rate
            return found

    def end(self) -> None:
        """Take no more: what is being said is read to its end, what waits for a commit is not."""
        with self._changed:
            self._ended = True
            if self._open is not None:
                self._close()
            self._changed.notify_all()

    def close(self) -> None:
        """Nobody wants to know any more."""
        self.end()
        with self._changed:
            for stretch in self._waiting:
                stretch.drop()
            self._waiting.clear()
            self._held_s = 0.0
            self._changed.notify_all()

    def stretches(self) -> Iterator[Stretch]:
        """In order, as they come; waits. Ends after `end`, when there are none left."""
        while True:
            with self._changed:
                while not self._waiting and not self._ended:
                    self._changed.wait()
                if not self._waiting:
                    return
                found = self._waiting[0]
            yield found
            with self._changed:
                if self._waiting:  # they are gone after `close`
                    self._waiting.popleft()

    def take(self, stretch: Stretch, most: int) -> bytes:
        """For a stretch: up to `most` bytes of it; waits for some; b"" at its end."""
        with self._changed:
            while (found := stretch.take(most)) is not None and not found:
                self._changed.wait()
            if found:
                self._held_s -= len(found) / _WIDTH / stretch.rate
            return found or b""

    def _close(self) -> Stretch:
        found, self._open = self._open, None
        assert found is not None
        found.complete = True
        self._start_s += found.seconds
        self._changed.notify_all()
        return found


def _column(raw: bytes) -> npt.NDArray[Any]:
    return np.frombuffer(raw, "<i2").reshape(-1, 1)
