# SPDX-License-Identifier: Apache-2.0
"""Where live audio comes from: what every source offers, a file in real time, and keeping what was heard.

The microphone is in `capture`, standard input in `pipe`. No source drops anything: what nobody has asked for
yet is its backlog.
"""

from __future__ import annotations

import logging
import math
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np

from . import audio
from .clock import Clock
from .errors import InputError, OutputError
from .growing_file import GrowingFile, not_written
from .parts import Float32

_log = logging.getLogger(__name__)
BLOCK_S = 0.1
_FLOAT = 3  # WAV's tag for IEEE floating point
_MOST_BYTES = (1 << 32) - 256  # of sound: a WAV's sizes have 32 bits


class Source(Protocol):
    """Audio that comes by and by. One consumer; `stop` and the figures may be used from elsewhere."""

    name: str
    sample_rate: int  # of the blocks: 16000 or 8000 Hz

    @property
    def blocks(self) -> Iterator[Float32]:
        """float32 [n], mono, in order, up to about 0.1 s each; waits for what has not come yet.

        Ends at the end of the source, or after `stop` when everything captured has been given out.

        Raises:
            InputError: the source broke; what came before has been given out.
        """

    @property
    def started(self) -> float:
        """The clock's time of sample 0; now, as long as there is none."""

    @property
    def level_dbfs(self) -> float:
        """How loud the latest block is that arrived; -inf for digital silence."""

    @property
    def overruns(self) -> int:
        """How often the device reported that it lost input."""

    @property
    def underruns(self) -> int:
        """How often it gave silence in place of input that had not come."""

    def backlog_s(self) -> float:
        """Seconds captured that `blocks` has not given out yet."""

    def stop(self) -> None:
        """No more audio is taken. From any thread, from a signal's handler, and more than once."""

    def close(self) -> None:
        """Let go of the device or file."""

    def __enter__(self) -> Source: ...

    def __exit__(self, *_: object) -> None: ...


class Paced:
    """A sound file, given out as a microphone would: sample k is there at `started` + k / `sample_rate`.

    The clock starts when the first block is asked for. Who asks late finds a backlog: what is due and was
    not given out. It never counts more than there is, by the header; where that does not say how long the
    sound is, it counts by the clock until the end has been read.

    Args:
        sound: of any length; about a minute of it is held.
        clock: decides what is due.
        pace: False: everything is due at once; the backlog is what the header says there still is, or
            what has been read ahead, and is positive until the last block. `stop` then ends at once.
    """

    overruns = underruns = 0

    def __init__(self, sound: audio.Sound, clock: Clock, *, pace: bool = True) -> None:
        self.name, self.sample_rate = sound.name, sound.sample_rate
        self._sound, self._clock, self._pace = sound, clock, pace
        self._started: float | None = None
        self._stopped: float | None = None  # when
        self._held: Float32 = np.zeros(0, np.float32)
        self._read = self._given = 0  # samples
        self._ended = False
        self._failed: InputError | None = None
        self._level = -math.inf
        self._blocks = self._cut()

    @property
    def blocks(self) -> Iterator[Float32]:
        """See `Source.blocks`."""
        return self._blocks

    def _cut(self) -> Iterator[Float32]:
        """Blocks of 0.1 s, each when its last sample is due."""
        self._started = self._clock.now()
        while len(block := self._take(int(BLOCK_S * self.sample_rate))):
            if self._pace and self._stopped is None:
                self._clock.wait_until(self._started + (self._given + len(block)) / self.sample_rate)
            if self._stopped is not None and not len(block := block[: max(0, self._due() - self._given)]):
                return
            self._given += len(block)
            self._level = audio.level_dbfs(block)
            yield block
        if self._failed is not None:
            raise self._failed

    def _take(self, n: int) -> Float32:
        """The next n samples. One more is read, so that the last block is known to be the last."""
        while len(self._held) <= n and not self._ended:
            try:
                block = next(self._sound.blocks, None)
            except InputError as exc:
                self._failed, block = exc, None
            if block is None:
                self._ended = True
            else:
                self._read += len(block)
                self._held = np.concatenate([self._held, block])
        block, self._held = self._held[:n], self._held[n:]
        return block

    def _due(self) -> int:
        """Samples that have come by now."""
        if self._started is None:
            return 0
        if not self._pace and self._stopped is not None:
            return self._given
        announced = None if self._sound.seconds is None else round(self._sound.seconds * self.sample_rate)
        there = self._read if self._ended or announced is None else max(self._read, announced)
        if not self._pace:
            return there
        moment = self._clock.now() if self._stopped is None else self._stopped
        elapsed = int((moment - self._started) * self.sample_rate)
        return elapsed if announced is None and not self._ended else min(elapsed, there)

    def backlog_s(self) -> float:
        """See `Source.backlog_s`."""
        return max(0, self._due() - self._given) / self.sample_rate

    @property
    def started(self) -> float:
        """See `Source.started`."""
        return self._clock.now() if self._started is None else self._started

    @property
    def level_dbfs(self) -> float:
        """See `Source.level_dbfs`; of the latest block given out."""
        return self._level

    def stop(self) -> None:
        """See `Source.stop`."""
        if self._stopped is None:
            self._stopped = self._clock.now()

    def close(self) -> None:
        """The file is closed by who opened it."""
        self.stop()

    def __enter__(self) -> Paced:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_recording(path: Path, heard: Path | None = None) -> None:
    """Whether a recording can be written to `path`; nothing is opened.

    Args:
        path: missing, or a regular file, which a recording replaces. A link is refused, whatever it names.
        heard: the file that is listened to.

    Raises:
        InputError: `path` is the file that is listened to.
        OutputError: it is something else than a regular file, or its folder takes no files.
    """
    with _writing(path):
        if not path.parent.is_dir():
            raise OutputError(f"{path}: cannot be written: {path.parent} is not a folder")
        if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
            raise OutputError(f"{path}: cannot be written: is not a regular file")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise OutputError(f"{path}: cannot be written: no file can be made in {path.parent}")
        for one in (path, _part(path)):
            if heard is not None and heard.exists() and one.exists() and one.samefile(heard):
                raise InputError(f"{one}: is the file that is listened to, expected another")


def _part(path: Path) -> Path:
    """What is written until the recording is whole."""
    return path.with_name(f"{path.name}.part")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as exc:  # ValueError: a zero byte in the path
        raise not_written(path, exc) from None


def recorded(source: Source, path: Path) -> Source:
    """The same source; every block it gives out is written too, as mono 32-bit floating-point WAV.

    The file appears when the source is closed; until then it is `path` with `.part` after it, which can be
    read up to its last block whatever happens. When it cannot be written any longer, the source goes on all
    the same, the part stays, and `close` says so.

    Raises:
        InUseError: another process writes it.
        OutputError: `path` cannot be written; from `close`, that it could be no longer.
    """
    return _Recorded(source, path)


class _Recorded:
    """See `recorded`."""

    def __init__(self, source: Source, path: Path) -> None:
        self.name, self.sample_rate = source.name, source.sample_rate
        self._source, self._path = source, path
        check_recording(path)
        self._bytes = 0  # of sound
        self._failed: OutputError | None = None
        self._file: GrowingFile | None = GrowingFile(_part(path))
        try:
            self._file.append(self._header(streamed=True))
        except OutputError:
            self._file.close()
            raise
        self._blocks = self._kept()

    def _header(self, *, streamed: bool) -> bytes:
        """Of a WAV; `streamed` says that its end is not known."""
        rate, size = self.sample_rate, 0xFFFFFFFF if streamed else self._bytes
        kind = struct.pack("<HHIIHHH", _FLOAT, 1, rate, 4 * rate, 4, 32, 0)
        body = b"WAVEfmt " + struct.pack("<I", len(kind)) + kind
        body += b"fact" + struct.pack("<II", 4, size // 4) + b"data" + struct.pack("<I", size)
        return b"RIFF" + struct.pack("<I", 0xFFFFFFFF if streamed else len(body) + size) + body

    @property
    def blocks(self) -> Iterator[Float32]:
        """See `Source.blocks`."""
        return self._blocks

    def _kept(self) -> Iterator[Float32]:
        for block in self._source.blocks:
            if self._file is not None and self._failed is None:
                try:
                    self._keep(self._file, block.astype("<f4").tobytes())
                except OutputError as exc:
                    self._failed = exc
                    _log.warning("%s; listening goes on without it", exc)
            yield block

    def _keep(self, file: GrowingFile, raw: bytes) -> None:
        if self._bytes + len(raw) > _MOST_BYTES:
            raise OutputError(f"{file.path}: is full: a WAV file holds {_MOST_BYTES:,} bytes")
        file.append(raw)
        self._bytes += len(raw)

    @property
    def started(self) -> float:
        """See `Source.started`."""
        return self._source.started

    @property
    def level_dbfs(self) -> float:
        """See `Source.level_dbfs`."""
        return self._source.level_dbfs

    @property
    def overruns(self) -> int:
        """See `Source.overruns`."""
        return self._source.overruns

    @property
    def underruns(self) -> int:
        """See `Source.underruns`."""
        return self._source.underruns

    def backlog_s(self) -> float:
        """See `Source.backlog_s`."""
        return self._source.backlog_s()

    def stop(self) -> None:
        """See `Source.stop`."""
        self._source.stop()

    def close(self) -> None:
        """Close the source; the file gets its length and its name."""
        file, self._file = self._file, None
        try:
            self._source.close()
        finally:
            if file is not None:
                self._finish(file)

    def _finish(self, file: GrowingFile) -> None:
        try:
            file.rewrite(self._header(streamed=False))
            if self._failed is not None:
                kept_s = self._bytes / (4 * self.sample_rate)
                raise OutputError(f"{self._failed}; it holds the first {kept_s:.1f} s")
            file.rename(self._path)
        finally:
            file.close()

    def __enter__(self) -> _Recorded:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
