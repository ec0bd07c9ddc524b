# SPDX-License-Identifier: Apache-2.0
"""Clips that are none, that lie about themselves, or that are more or less than can be heard."""

# ruff: noqa: E501  (one case a line reads as a table)
from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import soundfile

from ..tiny import NANO
from .conftest import Bitten
from .table import Case, Place

CLIP = NANO.parent / "eval" / "audio" / "asr-000.flac"
SAID = r"How many legs does a rooster have\?"
Samples = npt.NDArray[np.float64]


def transcribed(
    content: bytes | Callable[[Path], object], name: str = "clip.wav", *args: str
) -> Callable[[Place], list[str]]:
    """`transcribe` a file of that content, or of what is made there."""

    def make(place: Place) -> list[str]:
        if isinstance(content, bytes):
            place.write(name, content)
        else:
            content(place.path / name)
        return ["transcribe", str(place.path / name), *args]

    return make


def heard(content: bytes, name: str = "clip.wav") -> Callable[[Place], list[str]]:
    """Ask about it with `run`."""
    return lambda place: ["run", "--audio", str(place.write(name, content)), "-p", "Transcribe.", "-n", "4"]


def wav(samples: Samples, rate: int = 16000, subtype: str = "PCM_16", kind: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, subtype=subtype, format=kind)
    return file.getvalue()


def speech(rate: int = 16000, channels: int = 1, scale: float = 1.0) -> Samples:
    """The evaluation clip at another rate, in so many channels."""
    samples, own = soundfile.read(CLIP)
    at = np.arange(0, len(samples), own / rate)
    return np.repeat(np.interp(at, np.arange(len(samples)), samples)[:, None] * scale, channels, axis=1)


def silence(seconds: float, rate: int = 16000) -> Samples:
    return np.zeros(round(seconds * rate))


def header(**fields: int) -> bytes:
    """A WAV of 1,000 samples whose header says otherwise."""
    f = {"riff": 2036, "size": 16, "code": 1, "channels": 1, "rate": 16000, "second": 32000, "block": 2, "bits": 16,
         "data": 2000} | fields  # fmt: skip
    return (
        b"RIFF" + struct.pack("<I", f["riff"]) + b"WAVEfmt "
        + struct.pack("<IHHIIHH", f["size"], f["code"], f["channels"], f["rate"], f["second"], f["block"], f["bits"])
        + b"data" + struct.pack("<I", f["data"]) + bytes(2000)
    )  # fmt: skip


def with_values(value: float) -> bytes:
    samples = speech()[:, 0].astype(np.float32)
    samples[1234] = value
    return wav(samples.astype(np.float64), subtype="FLOAT")


def hours(path: Path) -> None:
    """5 h of silence that take 576 MB only in the file's length."""
    n = 5 * 3600 * 16000 * 2
    head = b"RIFF" + struct.pack("<I", n + 36) + header()[8:40] + struct.pack("<I", n)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + n)


SILENT = r"^\S+: no speech found$"
GOOD = wav(speech())
CASES = [
    Case("empty", transcribed(b""), 2, r"clip\.wav: "),
    Case("1 byte", transcribed(b"R"), 2, r"clip\.wav: is not a sound file"),
    Case("RIFF alone", transcribed(b"RIFF"), 2, r"clip\.wav: is not a sound file"),
    Case("text", transcribed(b"hello world, this is no sound\n" * 9), 2, r"clip\.wav: is not a sound file"),
    Case("a picture", transcribed(b"\x89PNG\r\n\x1a\n" + bytes(99)), 2, r"clip\.wav: is not a sound file"),
    Case("missing", lambda place: ["transcribe", "gone.wav"], 2, r"gone\.wav: no such file"),
    Case("a directory", transcribed(lambda p: p.mkdir()), 2, r"clip\.wav: is not a regular file"),
    Case("a FIFO", transcribed(os.mkfifo), 2, r"clip\.wav: is not a regular file"),
    Case("/dev/zero", lambda place: ["transcribe", "/dev/zero"], 2, r"/dev/zero: is not a regular file"),
    Case("a name with NUL bytes escaped", lambda place: ["transcribe", "x\udcff.wav"], 2, r"no such file"),
    Case("a name of 5,000", lambda place: ["transcribe", "x" * 5000], 2, r"cannot be read: File name too long"),
    Case("raw without header", transcribed(bytes(3200), "clip.raw"), 2, r"clip\.raw: has no header: raw samples"),
    Case("0 samples", transcribed(wav(silence(0))), 0, SILENT),
    Case("0 samples, asked", heard(wav(silence(0))), 2, r"clip\.wav: lasts 0 samples \(0\.0 ms\), expected at least"),
    Case("1 sample, asked", heard(wav(np.zeros(1))), 2, r"clip\.wav: lasts 1 samples \(0\.1 ms\), expected at least"),
    Case("10 ms, asked", heard(wav(silence(0.01))), 2, r"clip\.wav: lasts 160 samples \(10\.0 ms\), expected at"),
    Case("1 sample", transcribed(wav(np.zeros(1))), 0, SILENT),
    Case("10 ms", transcribed(wav(silence(0.01))), 0, SILENT),
    Case("all zero", transcribed(wav(silence(3))), 0, SILENT),
    Case("all zero, asked", heard(wav(silence(3))), 0, ""),
    Case("DC", transcribed(wav(np.full(48000, 0.5))), 0, SILENT),
    Case("clipping", transcribed(wav(np.clip(speech() * 50, -1, 1))), 0, ""),
    Case("NaN", transcribed(with_values(np.nan)), 2, r"clip\.wav: sample 1234 is nan, expected values in \[-1, 1\]"),
    Case("infinity", transcribed(with_values(np.inf)), 2, r"clip\.wav: sample 1234 is inf, expected"),
    Case("1e38", transcribed(with_values(1e38)), 2, r"clip\.wav: sample 1234 is 1e\+38, expected"),
    Case("8 kHz", transcribed(wav(speech(8000), 8000)), 0, "", out="^How many"),
    Case("44.1 kHz", transcribed(wav(speech(44100), 44100)), 0, "", out=SAID),
    Case("192 kHz", transcribed(wav(speech(192000), 192000)), 0, "", out=SAID),
    Case("999 Hz", transcribed(wav(silence(9, 999), 999)), 2, r"clip\.wav: is at 999 Hz, expected 1000 to 1000000"),
    Case("2 channels", transcribed(wav(speech(channels=2))), 0, "", out=SAID),
    Case("64 channels", transcribed(wav(speech(channels=64))), 0, "", out=SAID),
    Case("65 channels", transcribed(wav(speech(channels=65))), 2, r"clip\.wav: has 65 channels, expected 1 to 64"),
    Case("65,535 channels", transcribed(header(channels=65535)), 2, r"clip\.wav: "),
    Case("0 channels", transcribed(header(channels=0)), 2, r"clip\.wav: "),
    Case("0 Hz", transcribed(header(rate=0)), 2, r"clip\.wav: "),
    Case("2^32-1 Hz", transcribed(header(rate=0xFFFFFFFF)), 2, r"clip\.wav: "),
    Case("block of 0", transcribed(header(block=0)), 0, SILENT),
    Case("0 bits", transcribed(header(bits=0)), 2, r"clip\.wav: "),
    Case("7 bits", transcribed(header(bits=7)), 0, SILENT),
    Case("an unknown code", transcribed(header(code=0x1234)), 2, r"clip\.wav: is not a sound file"),
    Case("format chunk of 2^32-1", transcribed(header(size=0xFFFFFFFF)), 2, r"clip\.wav: "),
    Case("24 bits", transcribed(wav(speech(), subtype="PCM_24")), 0, "", out=SAID),
    Case("8 bits", transcribed(wav(speech(scale=2), subtype="PCM_U8")), 0, "", out="rooster"),
    Case("32 bits", transcribed(wav(speech(), subtype="PCM_32")), 0, "", out=SAID),
    Case("float", transcribed(wav(speech(), subtype="FLOAT")), 0, "", out=SAID),
    Case("double", transcribed(wav(speech(), subtype="DOUBLE")), 0, "", out=SAID),
    Case("µ-law", transcribed(wav(speech(), subtype="ULAW")), 0, "", out=SAID),
    Case("A-law", transcribed(wav(speech(), subtype="ALAW")), 0, "", out=SAID),
    Case("IMA ADPCM", transcribed(wav(speech(), subtype="IMA_ADPCM")), 0, "", out="rooster"),
    Case("Microsoft ADPCM", transcribed(wav(speech(), subtype="MS_ADPCM")), 0, "", out="rooster"),
    Case("ADPCM of block 1", transcribed(header(code=0x11, block=1, bits=4)), 2, r"clip\.wav: "),
    Case("ADPCM of block 65,535", transcribed(header(code=0x11, block=65535, bits=4)), 2, r"clip\.wav: is not a sound file"),
    Case("FLAC", transcribed(CLIP.read_bytes(), "clip.flac"), 0, "", out=SAID),
    Case("FLAC cut", transcribed(CLIP.read_bytes()[:9000], "clip.flac"), 2, r"clip\.flac: (is cut short: has \d+ of|is not a sound file that can be read: .*lost sync)"),
    Case("FLAC damaged", transcribed(CLIP.read_bytes()[:9000] + bytes(64) + CLIP.read_bytes()[9064:], "clip.flac"),
         2, r"clip\.flac: is not a sound file that can be read: .*lost sync"),
    Case("Ogg Vorbis", transcribed(wav(speech(), subtype="VORBIS", kind="OGG"), "clip.ogg"), 0, "", out="rooster"),
    Case("Ogg cut", transcribed(wav(speech(), subtype="VORBIS", kind="OGG")[:5000], "clip.ogg"), 0, SILENT),
    Case("cut", transcribed(GOOD[:-5000]), 2, r"clip\.wav: is cut short: announces [\d,]+ bytes of sound and has"),
    Case("announces less", transcribed(header(data=200)), 0, SILENT),
    Case("announces nothing", transcribed(header(data=0, riff=36)), 2, r"clip\.wav: announces no sound but goes on: 2,0"),
    Case("announces 2^31-1", transcribed(header(data=0x7FFEFFFF)), 2, r"clip\.wav: is cut short: announces 2,147,418,111"),
    Case("RIFF > 4 GB", transcribed(header(data=0xFFFFFFFE, riff=0xFFFFFFFF)), 0, SILENT),
    Case("RF64 of 2^63", transcribed(b"RF64\xff\xff\xff\xffWAVEds64" + struct.pack("<IQQQI", 28, 1 << 63, 1 << 63, 1 << 62, 0)
                                     + header()[12:36] + b"data\xff\xff\xff\xff" + bytes(2000)), 0, SILENT),
    Case("5 h, asked", lambda place: (hours(place.path / "clip.wav"), ["run", "--audio", "clip.wav", "-p", "x"])[1], 2,
         r"clip\.wav: lasts 5\.0 hours, expected at most 4: cut it into parts"),
    Case("40.01 s", transcribed(wav(silence(40.01))), 0, SILENT),
    Case("40.01 s, asked", heard(wav(silence(40.01))), 0, "", max_seconds=40),
    Case("30 min and 1 s", transcribed(wav(silence(1801))), 0, SILENT, max_seconds=120),
    Case("stdin empty", lambda place: ["transcribe", "-"], 2, r"standard input: is empty"),
    Case("stdin of 1 byte", lambda place: ["transcribe", "-"], 0, r"^standard input: no speech found$", stdin=b"\0"),
    Case("stdin closed mid-frame", lambda place: ["transcribe", "-"], 0, r"^standard input: no speech found$",
         stdin=bytes(16001)),
    Case("stdin closed mid-file", lambda place: ["transcribe", "-"], 0, "", stdin=GOOD[:-5001], out="How many"),
    Case("stdin closed in the header", lambda place: ["transcribe", "-"], 2, r"standard input: is not a sound file",
         stdin=GOOD[:30]),
    Case("stdin, asked", lambda place: ["run", "--audio", "-", "-p", "x"], 2, r"standard input: is empty"),
    Case("one of two bad", lambda place: ["transcribe", str(CLIP), str(place.write("clip.wav", b"x"))], 2,
         r"clip\.wav: is not a sound file", out=SAID),
    Case("no device of that name", lambda place: ["live", "--device", "no such microphone"], 2,
         r"(no such microphone|microphone|PortAudio)"),
    Case("no speech encoder", lambda place: ["transcribe", str(CLIP), "-m", str(place.shared_model("phi4-mini", "F16"))],
         2, r"has no speech encoder"),
]  # fmt: skip


# What libmpg123 says on stderr, in several lines, is one of ours where the clip is read, and none where it is not.
_MP3 = (Path(__file__).parents[1] / "audio" / "1272-141231-0002.mp3").read_bytes()
SPOILT_MP3 = [
    Case("noise in an MP3", transcribed(_MP3[:2000] + bytes(range(7, 250)) * 3 + _MP3[2000:], "clip.mp3"), 0,
         r"^\S+clip\.mp3: was read, but its decoder complained: Note: Illegal Audio-MPEG-Header"),
    Case("half an MP3, then nothing", transcribed(_MP3[: len(_MP3) // 2] + bytes(3000), "clip.mp3"), 2,
         r"clip\.mp3: is not a sound file that can be read: "),
]  # fmt: skip


@pytest.mark.parametrize("case", SPOILT_MP3, ids=lambda case: case.id)
def test_a_spoilt_mp3(case: Case, bitten: Bitten) -> None:
    bitten(case)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_clip(case: Case, bitten: Bitten) -> None:
    bitten(case)
