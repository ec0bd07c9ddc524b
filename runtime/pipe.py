# SPDX-License-Identifier: Apache-2.0
"""Live audio from a pipe that is still being written, as WAV or as raw samples.

`wave` of the standard library cannot do this: it takes a size of 0 for no sound, knows extensible WAVs from
Python 3.12 on, and waits until all of a read is there.
"""

from __future__ import annotations

import math
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from . import audio, mpeg
from .clock import Clock
from .errors import InputError
from .parts import Float32

BLOCK_S = 0.1
MAX_HELD_S = 600  # then the writer waits
_MAX_HELD_BYTES = 256 << 20  # the same, for formats of which 600 s are more
_MAX_PIECE = 1 << 20  # bytes read at once
_FIRST_PIECE = 4096  # bytes read at once as long as the format is not known
_MAX_HEADER = 16 << 20  # bytes before the sound: covers and tags
_POLL_S = 0.1  # how soon `stop` is noticed by who waits
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE  # WAV's format tags
_WANTED = (
    "expected WAV (PCM) or raw signed 16-bit little-endian samples, mono at 16 kHz: "
    "`ffmpeg -i INPUT -f wav -c:a pcm_s16le -` writes such a WAV"
)
_OTHER = {  # how a stream begins that is neither
    **{magic: magic.decode("ascii") for magic in audio.MAGIC},
    b"fLaC": "FLAC",
    b"OggS": "Ogg",
    b"ID3": "MP3",
    b"FORM": "AIFF",
    b".snd": "AU",
    b"caff": "CAF",
    b"riff": "W64",
    b"\x1aE\xdf\xa3": "Matroska or WebM",
}


class Piped:
    """WAV (PCM) or raw signed 16-bit samples, mono at 16 kHz, from a pipe that is still being written.

    A thread takes what comes, as it comes. Nothing is lost: when 10 minutes are held, the writer waits.
    The samples are those that `audio.load` gives for the same bytes in a file. The header's length is not
    believed where a streaming writer could not know it: the end is then the end of the pipe.

    Args:
        file: open for reading bytes; a terminal is refused. It is left open, and has to stay so
            while a thread reads from it: until its writer's end, or the first bytes after `close`.
        clock: tells when the first sample came.
        name: what messages call it; None: the stream's own name.

    Raises:
        InputError: nothing or something else comes, or a header that ends early or lies. It is waited for.
    """

    overruns = underruns = 0

    def __init__(self, file: BinaryIO, clock: Clock, *, name: str | None = None) -> None:
        own = getattr(file, "name", "pipe") if name is None else name
        own = "<stdin>" if own == 0 else own if isinstance(own, str) else "pipe"  # of a descriptor: a number
        self.name = "standard input" if own == "<stdin>" else own
        if file.isatty():
            raise InputError(f"{self.name}: is a terminal, {_WANTED}")
        self._clock = clock
        self._inbox = _Inbox(file, clock)
        self._given = 0  # samples
        self._level = -math.inf
        try:
            self._pcm = _header(self._inbox, self.name)
            sound = audio.from_blocks(
                self._columns(), self._pcm.sample_rate, self._pcm.channels, name=self.name
            )
        except BaseException:
            self._inbox.stopped = True
            raise
        self.sample_rate = sound.sample_rate
        held = min(MAX_HELD_S * self._pcm.sample_rate * self._pcm.frame, _MAX_HELD_BYTES)
        self._piece = max(1, int(BLOCK_S * self._pcm.sample_rate)) * self._pcm.frame
        self._inbox.begin(self._pcm.sample_rate * self._pcm.frame, min(self._piece, _MAX_PIECE), held)
        self._blocks = self._counted(sound.blocks)

    @property
    def blocks(self) -> Iterator[Float32]:
        """See `Source.blocks`."""
        return self._blocks

    def _columns(self) -> Iterator[npt.NDArray[Any]]:
        """Integers [n, channels] as they come."""
        left = self._pcm.size
        while left is None or left >= self._pcm.frame:
            most = self._piece if left is None else min(self._piece, left)
            raw = self._inbox.take(most, self._pcm.frame)
            if not raw:
                break
            left = None if left is None else left - len(raw)
            yield self._pcm.columns(raw)
        self._inbox.end()  # what follows the sound is let pass, or its writer would wait for ever

    def _counted(self, blocks: Iterator[Float32]) -> Iterator[Float32]:
        for block in blocks:
            self._given += len(block)
            if len(block):
                yield block
        if self._inbox.failed:
            raise InputError(f"{self.name}: cannot be read: {self._inbox.failed}")

    def backlog_s(self) -> float:
        """See `Source.backlog_s`."""
        arrived = self._inbox.arrived if self._pcm.size is None else min(self._inbox.arrived, self._pcm.size)
        return max(0.0, arrived // self._pcm.frame / self._pcm.sample_rate - self._given / self.sample_rate)

    @property
    def started(self) -> float:
        """See `Source.started`. Of a writer who is faster than real time, when it began."""
        return self._clock.now() if self._inbox.started is None else self._inbox.started

    @property
    def level_dbfs(self) -> float:
        """See `Source.level_dbfs`."""
        at, raw = self._inbox.latest
        raw = raw[-at % self._pcm.frame :]
        if raw := raw[: len(raw) // self._pcm.frame * self._pcm.frame]:
            self._level = audio.level_dbfs(audio.mono(self._pcm.columns(raw)))
        return self._level

    def stop(self) -> None:
        """See `Source.stop`."""
        self._inbox.stopped = True

    def close(self) -> None:
        """End the thread as soon as its writer writes or closes."""
        self.stop()

    def __enter__(self) -> Piped:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class _Pcm:
    """What the bytes of a pipe are."""

    sample_rate: int
    channels: int
    width: int  # bytes a sample: 1 (unsigned), 2, 3 or 4
    size: int | None  # bytes of sound; None: until the end

    @property
    def frame(self) -> int:
        """Bytes of one sample of each channel."""
        return self.channels * self.width

    def columns(self, raw: bytes) -> npt.NDArray[Any]:
        """Whole frames as integers [n, channels] that span their type."""
        if self.width == 1:
            values: npt.NDArray[Any] = (np.frombuffer(raw, np.uint8) ^ np.uint8(0x80)).view(np.int8)
        elif self.width == 3:  # as the upper three bytes of four
            wide = np.zeros((len(raw) // 3, 4), np.uint8)
            wide[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
            values = wide.view("<i4")
        else:
            values = np.frombuffer(raw, f"<i{self.width}")
        return values.reshape(-1, self.channels)


class _Inbox:
    """The bytes of a pipe: a thread takes them as they come, and they are kept until they are asked for."""

    def __init__(self, file: BinaryIO, clock: Clock) -> None:
        # Not through a buffered reader: it would wait for all it was asked for, and its lock, held by a
        # thread that waits, is fatal when Python ends.
        self._file = getattr(file, "raw", file)
        self._clock = clock
        self._held = bytearray()
        self._changed = threading.Condition()
        self._piece, self._most = _FIRST_PIECE, _FIRST_PIECE
        self._second = 0  # bytes; 0: the sound has not begun
        self._ended = self._ignored = False
        self._moment = 0.0  # of the latest arrival
        self.arrived = 0  # bytes of sound
        self.started: float | None = None
        self.latest = (0, b"")  # bytes of sound before the latest arrival, and what arrived
        self.failed = ""  # why reading ended early
        self.stopped = False  # a plain value: a signal's handler must not wait for a lock
        threading.Thread(target=self._read, name="pipe", daemon=True).start()

    def _read(self) -> None:
        try:
            while not self.stopped:
                piece = self._file.read(self._piece)
                if piece is None:  # someone made the pipe non-blocking
                    time.sleep(_POLL_S / 10)
                elif not piece or self.stopped:
                    break
                else:
                    self._keep(bytes(piece))
        except (OSError, ValueError) as exc:  # ValueError: it was closed
            self.failed = getattr(exc, "strerror", None) or str(exc)
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _keep(self, piece: bytes) -> None:
        with self._changed:
            if self._ignored:
                return
            self._moment = self._clock.now()
            self._held += piece
            if self._second:
                self._note(piece)
            self._changed.notify_all()
            while len(self._held) >= self._most and not (self.stopped or self._ignored):
                self._changed.wait(_POLL_S)

    def _note(self, sound: bytes) -> None:
        """That this just came; the first of it was spoken as long ago as it lasts."""
        if self.started is None:
            self.started = self._moment - len(sound) / self._second
        self.latest = (self.arrived, sound)
        self.arrived += len(sound)

    def begin(self, second: int, piece: int, most: int) -> None:
        """What is held now and comes from now on is sound: bytes a second, to read at once, and to hold."""
        with self._changed:
            self._second, self._piece, self._most = second, piece, most
            if self._held:
                self._note(bytes(self._held))
            self._changed.notify_all()

    def end(self) -> None:
        """What else comes is let pass."""
        with self._changed:
            self._ignored = True
            self._held.clear()
            self._changed.notify_all()

    def peek(self, n: int) -> bytes:
        """The next n bytes, still to be taken; fewer only at the end."""
        with self._changed:
            self._most = max(self._most, n)
            while len(self._held) < n and not (self._ended or self.stopped):
                self._changed.wait(_POLL_S)
            return bytes(self._held[:n])

    def take(self, most: int, unit: int) -> bytes:
        """What there is, in whole units, at most so many bytes; waits for one unit; b"" at the end."""
        self.peek(unit)
        with self._changed:
            n = min(most, len(self._held)) // unit * unit
            taken = bytes(self._held[:n])
            del self._held[:n]
            self._changed.notify_all()
            return taken


def _header(inbox: _Inbox, name: str) -> _Pcm:
    """Read up to the first byte of sound."""
    start = inbox.peek(12)
    if not start and not inbox.failed:
        raise InputError(f"{name}: is empty, {_WANTED}")
    if start.startswith(b"RIFF") and start[8:] == b"WAVE":
        inbox.take(12, 12)
        return _wav_header(inbox, name)
    found = next((kind for magic, kind in _OTHER.items() if start.startswith(magic)), None)
    if start[4:8] == b"ftyp":
        found = "MP4"
    if start.startswith(b"RIFF"):
        found = "RIFF without sound" if len(start) == 12 else "a WAV that ends within its header"
    found = found or mpeg.format_of(inbox.peek)
    if found is not None:
        raise InputError(f"{name}: is {found}, {_WANTED}")
    return _Pcm(audio.SAMPLE_RATE, 1, 2, None)


def _wav_header(inbox: _Inbox, name: str) -> _Pcm:
    """The chunks of a WAV up to its sound."""
    kind, seen = None, 0
    while seen <= _MAX_HEADER and (head := inbox.take(8, 8)):
        tag, size = struct.unpack("<4sI", head)
        if tag == b"data" and kind is not None:
            unknown = size == 0 or size >= audio.STREAMED_BYTES
            return _pcm(kind, None if unknown else size, name)
        seen += 8 + size
        if tag == b"data" or seen > _MAX_HEADER or (tag == b"fmt " and not 16 <= size <= 1024):
            break
        size += size & 1  # chunks begin at even places
        chunk = inbox.take(size, size) if size else b""
        if len(chunk) < size:
            raise InputError(f"{name}: is a WAV that ends within its header")
        kind = chunk if tag == b"fmt " else kind
    else:
        raise InputError(f"{name}: is a WAV that ends within its header")
    raise InputError(f"{name}: is a WAV with a damaged header: chunk {tag!r} of {size:,} bytes")


def _pcm(kind: bytes, size: int | None, name: str) -> _Pcm:
    """What a WAV's format chunk says."""
    tag, channels, rate, _, frame, bits = struct.unpack("<HHIIHH", kind[:16])
    if tag == _EXTENSIBLE and len(kind) >= 26:
        tag = struct.unpack("<H", kind[24:26])[0]
    if tag != _PCM:
        found = "floating point" if tag == _FLOAT else f"samples of format 0x{tag:04x}"
        raise InputError(f"{name}: is WAV with {found}, {_WANTED}")
    if bits not in (8, 16, 24, 32) or frame != channels * bits // 8:
        raise InputError(
            f"{name}: is WAV with {bits} bits in {frame} bytes for {channels} channels, {_WANTED}"
        )
    return _Pcm(rate, channels, bits // 8, size)
