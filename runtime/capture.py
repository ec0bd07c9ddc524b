# SPDX-License-Identifier: Apache-2.0
"""The microphone, through PortAudio: which there are, and one as a `sources.Source`.

Blocks come from PortAudio's own thread, which only ever puts them on a queue: it never waits, and nothing is
dropped. What the device itself reports as lost is counted.
"""

from __future__ import annotations

import logging
import math
import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from . import audio
from .clock import Clock, RealClock
from .errors import InputError, one_line
from .parts import Float32
from .stderr_capture import captured_stderr

BLOCK_S = 0.1
_FIRST_S = 10.0  # until the first block, while a sound server wakes up (0.7 s is usual)
_SILENT_S = 2.0  # without a block: the device is gone, it would send silence as blocks
_LAST_S = 0.5  # until the block that was being spoken at `stop`
_POLL_S = 0.1  # how soon `stop` and a lost device are noticed
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Device:
    """Something that sound can be recorded from."""

    index: int  # this and `name` are what `Microphone` takes
    name: str
    host: str  # the sound system it belongs to
    channels: int  # at most
    sample_rate: int  # Hz, its own
    is_default: bool


def devices() -> list[Device]:
    """What sound can be recorded from. PortAudio looks once in a process: later plugs are not seen.

    Raises:
        InputError: PortAudio is not installed, or does not start.
    """
    sounddevice = _portaudio()
    with _quiet(sounddevice, "the list of sound devices"):
        hosts = sounddevice.query_hostapis()
        default = sounddevice.default.device[0]
        return [
            Device(
                found["index"],
                found["name"],
                hosts[found["hostapi"]]["name"],
                found["max_input_channels"],
                round(found["default_samplerate"]),
                found["index"] == default,
            )
            for found in sounddevice.query_devices()
            if found["max_input_channels"] > 0
        ]


def portaudio_version() -> str:
    """As PortAudio says it.

    Raises:
        InputError: as `devices`.
    """
    return str(_portaudio().get_portaudio_version()[1])


def _portaudio() -> Any:
    """The module; importing it loads and starts PortAudio."""
    try:
        with captured_stderr() as said:  # what ALSA thinks of every device it knows of
            import sounddevice
    except OSError as exc:
        raise InputError(
            f"microphone: {one_line(exc)}: install it (Debian, Ubuntu: libportaudio2; Fedora: portaudio; "
            "it comes with pocketphi on macOS and Windows), or use --file or --stdin"
        ) from None
    except Exception as exc:  # PortAudioError, which has no name before the import: it does not start
        raise InputError(f"microphone: PortAudio does not start: {one_line(exc)}") from None
    _report(said.text)
    return sounddevice


@contextmanager
def _quiet(sounddevice: Any, name: str) -> Iterator[None]:
    """PortAudio's exceptions as one line, and what C libraries have to say in the log."""
    try:
        with captured_stderr() as said:
            yield
    except (sounddevice.PortAudioError, ValueError, OSError) as exc:
        raise InputError(f"{name}: cannot be used: {one_line(exc)}") from None
    finally:
        _report(said.text)


def _report(text: str) -> None:
    for line in text.splitlines():
        _log.debug("%s", line)


def choose(wanted: int | str | None, there: list[Device]) -> Device:
    """The device with an index, or with a name or a part of it in any case; None: the default.

    Raises:
        InputError: there is none, or a part of several names.
    """
    if not there:
        raise InputError("microphone: this machine has none; --file and --stdin work without one")
    if wanted is None:
        return next((device for device in there if device.is_default), there[0])
    listed = ", ".join(f"{device.index}: {device.name} ({device.host})" for device in there)
    if isinstance(wanted, int) or wanted.isdecimal():
        found = [device for device in there if device.index == int(wanted)]
    else:
        part = wanted.casefold()
        found = [device for device in there if part in device.name.casefold()]
        exact = [device for device in found if part == device.name.casefold()]
        found = exact if len(exact) == 1 else found
        listed = ", ".join(f"{device.index}: {device.name} ({device.host})" for device in found or there)
    if len(found) != 1:
        several = "is the name of several, give a number" if found else "is not there, expected one of"
        raise InputError(f"microphone {str(wanted)!r}: {several}: {listed}"[:500])
    return found[0]


class Microphone:
    """Records from the moment that the device gives its first block.

    That can be 2 s later, where a sound server wakes up first.

    At 16 kHz mono where the device can, else as it likes best; other rates and channels are resampled and
    mixed as those of a file. `started` is the moment of the first block less its length: how long the device
    and its driver hold sound back before they give it is not known.

    Args:
        device: index, or name or part of it, as `devices` lists them; None: the default.
        clock: what `started` is read from.
        form: rate in Hz and channels to record at; None: what is best.

    Raises:
        InputError: no PortAudio, no such device, or it cannot be opened. Later, from `blocks`: it is gone.
    """

    def __init__(
        self,
        device: int | str | None = None,
        clock: Clock | None = None,
        *,
        form: tuple[int, int] | None = None,
    ) -> None:
        self.device = choose(device, devices())
        self.name = f"microphone {self.device.name!r}"
        self.overruns = self.underruns = 0
        self._clock = clock or RealClock()
        self._queue: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._arrived = self._given = 0  # samples at the device's rate, and at ours
        self._started: float | None = None
        self._stopped: float | None = None  # when
        self._latest = b""
        self._ended = False  # no block will come
        sounddevice = _portaudio()
        self._stop_stream = sounddevice.CallbackStop
        with _quiet(sounddevice, self.name):
            self._rate, self._channels = form or self._form(sounddevice)
            sound = audio.from_blocks(self._columns(), self._rate, self._channels, name=self.name)
            self.sample_rate = sound.sample_rate
            self._blocks = self._counted(sound.blocks)
            self._stream = sounddevice.RawInputStream(
                samplerate=self._rate,
                blocksize=int(BLOCK_S * self._rate),
                device=self.device.index,
                channels=self._channels,
                dtype="int16",
                callback=self._take,
                finished_callback=self._finish,
            )
            self._stream.start()

    def _form(self, sounddevice: Any) -> tuple[int, int]:
        """The first rate and number of channels that the device takes."""

        def takes(rate: int, channels: int) -> bool:
            try:
                sounddevice.check_input_settings(self.device.index, channels, "int16", samplerate=rate)
            except sounddevice.PortAudioError:
                return False
            return True

        return best_form(self.device, takes)

    def _take(self, data: Any, frames: int, _: Any, status: Any) -> None:
        """In PortAudio's thread: one block."""
        self.overruns += bool(status.input_overflow)
        self.underruns += bool(status.input_underflow)
        now = self._clock.now()
        if self._started is None:
            self._started = now - frames / self._rate
        self._latest = bytes(data)
        self._queue.put(self._latest)
        self._arrived += frames
        if self._complete():
            raise self._stop_stream

    def _finish(self) -> None:
        self._ended = True

    def _complete(self) -> bool:
        """Whether what was spoken before `stop` is there."""
        if self._stopped is None or self._started is None:
            return False
        return self._started + self._arrived / self._rate >= self._stopped

    @property
    def blocks(self) -> Iterator[Float32]:
        """See `sources.Source.blocks`."""
        return self._blocks

    def _counted(self, blocks: Iterator[Float32]) -> Iterator[Float32]:
        for block in blocks:
            self._given += len(block)
            if len(block):
                yield block
        if self._stopped is None:
            raise InputError(f"{self.name}: no more sound comes from it, was it unplugged?")

    def _columns(self) -> Iterator[npt.NDArray[Any]]:
        """int16 [n, channels], until it is stopped or gone and everything has been given out."""
        waited = 0.0  # in polls: when the whole process was suspended, the device was too
        while True:
            over = self._ended or self._complete() or waited > self._patience()
            try:
                raw = self._queue.get(timeout=0 if over else _POLL_S)
            except queue.Empty:
                if over:
                    return
                waited += _POLL_S
            else:
                waited = 0.0
                yield np.frombuffer(raw, np.int16).reshape(-1, self._channels)

    def _patience(self) -> float:
        """Seconds to wait for a block."""
        if self._stopped is not None:
            return _LAST_S
        return _FIRST_S if self._started is None else _SILENT_S

    def backlog_s(self) -> float:
        """See `sources.Source.backlog_s`."""
        return max(0.0, self._arrived / self._rate - self._given / self.sample_rate)

    @property
    def started(self) -> float:
        """See `sources.Source.started`."""
        return self._clock.now() if self._started is None else self._started

    @property
    def level_dbfs(self) -> float:
        """See `sources.Source.level_dbfs`."""
        latest = np.frombuffer(self._latest, np.int16).reshape(-1, self._channels)
        return audio.level_dbfs(audio.mono(latest)) if len(latest) else -math.inf

    def stop(self) -> None:
        """See `sources.Source.stop`. The block that is being spoken is still taken."""
        if self._stopped is None:
            self._stopped = self._clock.now()

    def close(self) -> None:
        """Let go of the device."""
        self.stop()
        with captured_stderr() as said:
            self._stream.close(ignore_errors=True)
        _report(said.text)

    def __enter__(self) -> Microphone:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def best_form(device: Device, takes: Callable[[int, int], bool]) -> tuple[int, int]:
    """Rate and channels to record at: 16 kHz mono, else its own rate with as few channels as it takes."""
    most = min(device.channels, audio.MAX_CHANNELS)
    own = device.sample_rate
    for form in ((audio.SAMPLE_RATE, 1), (own, 1), (own, min(2, most))):
        if takes(*form):
            return form
    return own, most
