# SPDX-License-Identifier: Apache-2.0
"""Any sound file or stream to mono float32 at 16 kHz, or at 8 kHz when that is what it holds.

A file is decoded, mixed down and resampled in blocks, so that memory is the result and a few megabytes.
Nothing is dropped: a file that ends before its header says so is an error. Through a pipe it is not, since
there the writer of the header could not know.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from . import mpeg
from .errors import InputError, native
from .parts import Float32
from .stderr_capture import Unheard

with native("libsndfile or soxr"):
    import soundfile
    import soxr

SAMPLE_RATE = 16000  # Hz: what everything becomes that is not 8 kHz
TELEPHONE_RATE = 8000  # Hz: kept, the log-mel front end has a path of its own for it
MAX_SECONDS = 4 * 3600  # of a clip in memory: 921 MB; 180,000 tokens, more than any context holds
MIN_SECONDS = 0.025  # one frame of the front end
MAX_CHANNELS = 64
MAX_STREAM_BYTES = 4 << 30  # of a file that comes through a pipe, where no header bounds it
_RATES = (1000, 1_000_000)  # Hz; below and above there is no speech, only broken headers
_BLOCK_VALUES = 1 << 20  # samples over all channels decoded at once: 4 MB
_PIECE_BYTES = 1 << 20  # even: whole samples
_UNKNOWN = 1 << 62  # frames: libsndfile's largest number stands for a header that gives none
STREAMED_BYTES = 0x7FFF0000  # who writes a WAV into a pipe announces about this much, or twice as much
_LARGEST = 1e30  # far above any sample; sums of channels and filters cannot overflow below it

# How a file begins that libsndfile reads: WAV in its kinds, AIFF, AU, CAF, FLAC, Ogg, W64, MP3 with a tag.
MAGIC = (b"RIFF", b"RIFX", b"RF64", b"FORM", b".snd", b"caff", b"fLaC", b"OggS", b"riff", b"ID3")


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """Sound as the front end takes it."""

    samples: Float32  # [n], mono, nominally in [-1, 1]
    sample_rate: int  # 16000 or 8000 Hz

    @property
    def seconds(self) -> float:
        """Duration."""
        return len(self.samples) / self.sample_rate


def load(source: Path | bytes | BinaryIO, *, name: str | None = None) -> Clip:
    """A whole clip.

    Args:
        source: a file; the bytes of one; or a stream such as standard input, read to its end, which holds a
            file or, when it begins like none, raw signed 16-bit little-endian samples, mono at 16 kHz.
        name: what messages call it; None: the file, "audio", or the stream's own name.

    Returns:
        The mean of the channels. 8 kHz stays, everything else is resampled to 16 kHz with a linear-phase
        band-limited filter (soxr, very high quality), ceil(n · 16000 / rate) samples.

    Raises:
        InputError: not a sound file, damaged, shorter than it says, no or over 64 channels, a rate outside
            1 kHz to 1 MHz, shorter than 25 ms, longer than 4 hours, or a sample that is not finite.
    """
    with stream(source, name=name, max_seconds=MAX_SECONDS) as sound:
        return _clip(sound)


def from_samples(samples: npt.NDArray[Any], sample_rate: int, *, where: str = "audio") -> Clip:
    """A clip from samples in memory, under the same rules as a file.

    Args:
        samples: [n], or [n, channels] as soundfile gives them; floating point is nominally in [-1, 1],
            integers span their type.
        sample_rate: in Hz.
        where: what messages call them.

    Raises:
        InputError: as `load`; or an array of another kind.
    """
    if samples.ndim not in (1, 2) or samples.dtype.kind not in "fi":
        raise InputError(
            f"{where}: is {samples.dtype} {list(samples.shape)}, expected samples [n] or [n, channels]"
        )
    columns = samples.reshape(len(samples), -1) if samples.size else np.zeros((0, 1), np.float32)
    _check_length(len(columns) / sample_rate if sample_rate > 0 else 0.0, MAX_SECONDS, where)
    n = max(1, _BLOCK_VALUES // columns.shape[1])
    blocks = (columns[i : i + n] for i in range(0, len(columns), n))
    return _clip(from_blocks(blocks, sample_rate, columns.shape[1], name=where))


def from_blocks(
    blocks: Iterator[npt.NDArray[Any]], sample_rate: int, channels: int, *, name: str = "audio"
) -> Sound:
    """Sound as it comes, for as long as it comes, under the rules and with the samples of `load`.

    A block goes in and what can be known of it comes out: at 8 and 16 kHz all of it, else all but the
    resampler's reach, under 0.1 s from 11 kHz up. What is held back comes when `blocks` ends.

    Args:
        blocks: [n, channels] each, floating point or integers that span their type.
        sample_rate: of the blocks, in Hz.
        channels: 1 to 64.
        name: what messages call it.

    Raises:
        InputError: a rate or a number of channels as `load` refuses; later, a sample that is not finite.
    """
    _check_kind(sample_rate, channels, name)
    return _sound(map(mono, blocks), sample_rate, name)


def mono(block: npt.NDArray[Any]) -> Float32:
    """The mean of the channels of [n, channels], floating point or integers that span their type."""
    return _mix(_floats(block))


def _floats(values: npt.NDArray[Any]) -> Float32:
    """float32; integers divided by their type's span."""
    if values.dtype.kind == "i":
        return np.asarray(values.astype(np.float32) / -np.float32(np.iinfo(values.dtype).min))
    with np.errstate(over="ignore"):  # an infinity is refused later
        return values.astype(np.float32)


def _clip(sound: Sound) -> Clip:
    """All of it, at least one frame long."""
    raw = bytearray()  # grows in place: joining arrays would hold everything twice
    for block in sound.blocks:
        raw += block.data.cast("B")
    found = np.frombuffer(raw, np.float32)
    if len(found) < MIN_SECONDS * sound.sample_rate:
        ms = 1000 * len(found) / sound.sample_rate
        raise InputError(f"{sound.name}: lasts {len(found)} samples ({ms:.1f} ms), expected at least 25 ms")
    return Clip(found, sound.sample_rate)


@dataclass(frozen=True, slots=True, eq=False)
class Sound:
    """An open file or stream."""

    name: str
    sample_rate: int  # of the blocks: 16000 or 8000 Hz
    blocks: Iterator[Float32]  # float32 [n] each, mono, in order; raises InputError as `load` does
    seconds: float | None = None  # how long the header says it is; None: it does not say


@contextmanager
def stream(
    source: Path | bytes | BinaryIO, *, name: str | None = None, max_seconds: float | None = None
) -> Iterator[Sound]:
    """`load` in blocks of up to a minute, for what reads a long file bit by bit; 0 samples are no error here.

    Args:
        source, name: as for `load`.
        max_seconds: refuse what is longer; None: any length, in a few megabytes of memory.

    Raises:
        InputError: as `load`.
    """
    with _opened(source, name) as sound:
        if max_seconds is None:
            yield sound
        else:
            _check_length(sound.seconds or 0.0, max_seconds, sound.name)
            yield replace(sound, blocks=_bounded(sound, max_seconds))


@contextmanager
def _opened(source: Path | bytes | BinaryIO, name: str | None) -> Iterator[Sound]:
    """Of any length."""
    if name is None:
        own = source if isinstance(source, Path) else getattr(source, "name", "audio")
        name = "standard input" if own in ("<stdin>", 0) else str(own)
    if isinstance(source, Path):
        _check_file(source)
        with _decoder(source, name, complete=True) as sound:
            yield sound
    elif isinstance(source, bytes):
        with _temporary(iter([source]), name) as path, _decoder(path, name, complete=True) as sound:
            yield sound
    else:
        head = b""

        def peek(n: int) -> bytes:
            nonlocal head
            head += _read(source, n - len(head), name)
            return head[:n]

        if not peek(4):  # the longest of MAGIC
            raise InputError(f"{name}: is empty")
        if head.startswith(MAGIC) or mpeg.format_of(peek) is not None:
            pieces = _pieces(source, head, name)
            with _temporary(pieces, name) as path, _decoder(path, name, complete=False) as sound:
                yield sound
        else:
            yield _sound(_raw(_pieces(source, head, name)), SAMPLE_RATE, name)


def _check_file(path: Path) -> None:
    """Refuse what is not a file before anything opens it: a FIFO would wait for its writer."""
    try:
        if not path.is_file():
            found = "is not a regular file: what comes through a pipe is read as -"
            raise InputError(f"{path}: {found if path.exists() else 'no such file'}")
        path.open("rb").close()
    except (OSError, ValueError) as exc:  # ValueError: a zero byte in the path
        raise InputError(f"{path}: cannot be read: {getattr(exc, 'strerror', None) or exc}") from None
    if path.suffix.lower() == ".raw":  # soundfile would ask for its format
        raise InputError(
            f"{path}: has no header: raw samples, 16-bit mono at 16 kHz, are read through a pipe as -"
        )


@contextmanager
def _temporary(pieces: Iterator[bytes], name: str) -> Iterator[Path]:
    """A file with what came through a pipe.

    libsndfile 1.2 could read from memory through callbacks, but then refuses a sound MP3 now and then.
    """
    path, size = None, 0
    try:
        try:
            handle, text = tempfile.mkstemp(prefix="pocketphi-", suffix=".sound")
            path = Path(text)
            with os.fdopen(handle, "wb") as file:
                for piece in pieces:
                    size += len(piece)
                    if size > MAX_STREAM_BYTES:
                        raise InputError(f"{name}: has over {MAX_STREAM_BYTES:,} bytes, give it as a file")
                    file.write(piece)
        except OSError as exc:
            raise InputError(f"{name}: cannot be kept in a temporary file: {exc.strerror}") from None
        yield path
    finally:
        if path is not None:
            path.unlink(missing_ok=True)


def _read(source: BinaryIO, n: int, name: str) -> bytes:
    """Up to n bytes, fewer only at the end of the stream."""
    found = b""
    try:
        while len(found) < n and (piece := source.read(n - len(found))):
            found += piece
    except (OSError, ValueError) as exc:  # ValueError: it is closed
        raise InputError(f"{name}: cannot be read: {getattr(exc, 'strerror', None) or exc}") from None
    return found


def _pieces(source: BinaryIO, head: bytes, name: str) -> Iterator[bytes]:
    """A stream to its end in pieces of 1 MiB, of which `head` has been read."""
    piece = head + _read(source, _PIECE_BYTES - len(head), name)
    while piece:
        yield piece
        piece = _read(source, _PIECE_BYTES, name)


def _raw(pieces: Iterator[bytes]) -> Iterator[Float32]:
    """Signed 16-bit little-endian samples; half a sample at the end is not one."""
    for piece in pieces:
        yield np.frombuffer(piece[: len(piece) & ~1], "<i2").astype(np.float32) / np.float32(32768)


@contextmanager
def _decoder(path: Path, name: str, *, complete: bool) -> Iterator[Sound]:
    """A sound file through libsndfile; `complete` asks that it is as long as its header says."""
    with path.open("rb") as file:
        head = file.read(8)
    if head.startswith(b"\xf0\x7e"):  # libsndfile writes to stdout when one is damaged
        raise InputError(f"{name}: is a MIDI sample dump, expected a sound file")
    try:
        # As bytes where file names are bytes: they need not be UTF-8.
        file_name = str(path) if os.name == "nt" else os.fsencode(path)
        with Unheard()(lambda: soundfile.SoundFile(file_name)) as decoder:
            rate = decoder.samplerate
            _check_kind(rate, decoder.channels, name)
            if decoder.frames < 0:
                raise InputError(f"{name}: has a damaged header: {decoder.frames} samples")
            _check_closed(decoder, path, head, name)
            if complete:
                _check_complete(decoder, name)
            seconds = decoder.frames / rate if decoder.frames < _UNKNOWN else None
            yield _sound(_decoded(decoder, name, complete=complete), rate, name, seconds)
    except soundfile.SoundFileError as exc:
        raise InputError(f"{name}: is not a sound file that can be read: {_reason(exc)}") from None


def _sound(mono: Iterator[Float32], rate: int, name: str, seconds: float | None = None) -> Sound:
    """Mono blocks at any rate to what is given out."""
    checked = _finite(mono, name)
    if rate in (SAMPLE_RATE, TELEPHONE_RATE):
        return Sound(name, rate, checked, seconds)
    return Sound(name, SAMPLE_RATE, _resampled(checked, rate), seconds)


def _check_kind(rate: int, channels: int, name: str) -> None:
    """What a header may say, before anything is decoded."""
    if not 1 <= channels <= MAX_CHANNELS:
        raise InputError(f"{name}: has {channels} channels, expected 1 to {MAX_CHANNELS}")
    if not _RATES[0] <= rate <= _RATES[1]:
        raise InputError(f"{name}: is at {rate} Hz, expected {_RATES[0]} to {_RATES[1]}")


def _check_complete(decoder: soundfile.SoundFile, name: str) -> None:
    """Whether the bytes are there that a WAV, AIFF or AU announces: libsndfile just takes what is there."""
    for match in re.finditer(r"(?:data|SSND|Data Size) *: (\d+) \(should be (\d+)\)", decoder.extra_info):
        announced, there = int(match[1]), int(match[2])
        if there < announced < STREAMED_BYTES:
            found = f"announces {announced:,} bytes of sound and has {there:,}"
            raise InputError(f"{name}: is cut short: {found}; what there is can be read through a pipe, as -")


def _check_closed(decoder: soundfile.SoundFile, path: Path, head: bytes, name: str) -> None:
    """Whether a WAV without sound ends where it says: one whose writer has crashed goes on."""
    behind = path.stat().st_size - max(44, 8 + int.from_bytes(head[4:], "little"))
    if decoder.frames == 0 and head.startswith(b"RIFF") and behind > 0:
        raise InputError(f"{name}: announces no sound but goes on: {behind:,} bytes more than it says")


def _check_length(seconds: float, most: float, name: str) -> None:
    if seconds > most:
        found, wanted = f"{seconds / 3600:.1f} hours", f"at most {most / 3600:g}: cut it into parts"
        raise InputError(f"{name}: lasts {found}, expected {wanted}")


def _decoded(decoder: soundfile.SoundFile, name: str, *, complete: bool) -> Iterator[Float32]:
    """The mean of the channels, block by block."""
    buffer = np.empty((max(1, _BLOCK_VALUES // decoder.channels), decoder.channels), np.float32)
    n, unheard = 0, Unheard()  # libmpg123 writes to stderr, without the file's name
    while len(block := unheard(lambda: decoder.read(out=buffer))):
        n += len(block)
        yield _mix(block)
    if complete and n < decoder.frames < _UNKNOWN:
        raise InputError(f"{name}: is cut short: has {n} of the {decoder.frames} samples it announces")
    unheard.report(name)


def _mix(block: Float32) -> Float32:
    """The mean of the channels of [n, channels], in new memory."""
    with np.errstate(invalid="ignore", over="ignore"):  # `_finite` looks for what comes of that
        return np.asarray(block.mean(axis=1, dtype=np.float32)) if block.shape[1] > 1 else block[:, 0].copy()


def _finite(blocks: Iterator[Float32], name: str) -> Iterator[Float32]:
    """Pass blocks on, as long as they are finite."""
    n = 0
    for block in blocks:
        if not (np.abs(block) <= _LARGEST).all():  # false for NaN too
            at = n + int(np.argmin(np.abs(block) <= _LARGEST))
            raise InputError(f"{name}: sample {at} is {block[at - n]:g}, expected values in [-1, 1]")
        n += len(block)
        yield block


def _bounded(sound: Sound, most: float) -> Iterator[Float32]:
    """Pass blocks on, as long as they are not too many."""
    n = 0
    for block in sound.blocks:
        _check_length((n := n + len(block)) / sound.sample_rate, most, sound.name)
        yield block


def _resampled(blocks: Iterator[Float32], rate: int) -> Iterator[Float32]:
    """16 kHz. The filter's delay is taken out; the last block is cut or filled up to the exact length."""
    resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="VHQ")
    taken = given = 0
    for block in blocks:
        taken += len(block)
        given += len(out := resampler.resample_chunk(block))
        yield out
    rest = resampler.resample_chunk(np.zeros(0, np.float32), last=True)
    wanted = -(-taken * SAMPLE_RATE // rate) - given
    yield np.pad(rest, (0, max(0, wanted - len(rest))))[: max(0, wanted)]


def _reason(exc: soundfile.SoundFileError) -> str:
    """libsndfile's own words, in one line without the name of a Python object."""
    text = exc.error_string if isinstance(exc, soundfile.LibsndfileError) else str(exc)
    return " ".join(text.split()).rstrip(".")[:200]


def level_dbfs(samples: Float32) -> float:
    """How loud it is: root mean square of float32 [n], in dB below a constant 1.0; -inf for silence."""
    power = float(np.mean(np.square(samples, dtype=np.float64))) if len(samples) else 0.0
    return 10 * math.log10(power) if power > 0 else -math.inf
