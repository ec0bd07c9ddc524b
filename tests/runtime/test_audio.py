# SPDX-License-Identifier: Apache-2.0
"""Sound files of every kind to 16 kHz mono, against what was put in; and files that lie."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import soundfile

from pocketphi.runtime import audio
from pocketphi.runtime.errors import InputError
from pocketphi.runtime.logmel import log_mel

ROOT = Path(__file__).resolve().parent.parent
SPEECH = ROOT / "audio" / "jfk.flac"  # 44.1 kHz stereo, 11 s
MP3 = ROOT / "audio" / "1272-141231-0002.mp3"  # 16 kHz mono, 13.3 s

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


def tone(rate: int, seconds: float = 1.0, hertz: float = 440.0) -> Float32:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def encoded(samples: npt.NDArray[np.floating], rate: int, kind: str = "WAV", subtype: str = "FLOAT") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


def refusal(source: Path | bytes | io.BufferedIOBase, **options: str) -> str:
    with pytest.raises(InputError) as caught:
        audio.load(source, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Pipe(io.RawIOBase):
    """Bytes that come in odd pieces and cannot be sought in, as from another process."""

    def __init__(self, data: bytes, piece: int = 1001) -> None:
        self._file, self._piece = io.BytesIO(data), piece

    def readable(self) -> bool:
        return True

    def read(self, n: int = -1) -> bytes:
        return self._file.read(self._piece if n < 0 else min(n, self._piece))


# What each type may be off by: its step for integers, and for the lossy ones what their authors promise of
# a tone (8-bit logarithmic: half of 1/32 up to 1.0, after rounding to 13 bits).
EXACT = [
    ("WAV", "PCM_U8", 1 / 128),
    ("WAV", "PCM_16", 1 / 32768),
    ("WAV", "PCM_24", 1 / 2**23),
    ("WAV", "PCM_32", 2**-23),  # float32 cannot hold more
    ("WAV", "FLOAT", 0.0),
    ("WAV", "DOUBLE", 0.0),
    ("WAV", "ULAW", 1 / 64 + 1 / 4096),
    ("WAV", "ALAW", 1 / 64 + 1 / 4096),
    ("RF64", "PCM_16", 1 / 32768),
    ("W64", "PCM_24", 1 / 2**23),
    ("AIFF", "PCM_16", 1 / 32768),
    ("AU", "PCM_16", 1 / 32768),
    ("CAF", "PCM_16", 1 / 32768),
    ("FLAC", "PCM_16", 1 / 32768),
    ("FLAC", "PCM_24", 1 / 2**23),
]


@pytest.mark.parametrize(("kind", "subtype", "step"), EXACT)
def test_every_sample_type(kind: str, subtype: str, step: float) -> None:
    want = tone(16000)
    clip = audio.load(encoded(want, 16000, kind, subtype))
    assert clip.sample_rate == 16000 and clip.samples.dtype == np.float32
    assert clip.samples.shape == want.shape and clip.seconds == 1.0
    assert np.abs(clip.samples - want).max() <= step


@pytest.mark.parametrize(
    ("kind", "subtype"),
    [("WAV", "IMA_ADPCM"), ("WAV", "MS_ADPCM"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")],
)
def test_lossy_types_sound_the_same(kind: str, subtype: str) -> None:
    want = tone(16000)
    got = audio.load(encoded(want, 16000, kind, subtype)).samples
    assert abs(len(got) - len(want)) <= 1017  # ADPCM fills its last block up
    noise = got[: len(want)] - want
    assert (noise**2).mean() < 0.01 * (want**2).mean()  # these types promise over 20 dB for a tone


def test_real_recordings() -> None:
    clip = audio.load(SPEECH)
    assert (clip.sample_rate, len(clip.samples)) == (16000, 11 * 16000)
    assert len(audio.load(MP3).samples) == soundfile.info(str(MP3)).frames


def test_channels_are_averaged() -> None:
    left, right = tone(16000), tone(16000, hertz=1000)
    got = audio.load(encoded(np.stack([left, right], 1), 16000)).samples
    assert np.array_equal(got, (left + right) / np.float32(2))
    many = np.repeat(left[:, None], 64, 1)
    assert np.abs(audio.load(encoded(many, 16000)).samples - left).max() < 64 * np.finfo(np.float32).eps


def test_8_khz_stays() -> None:
    want = tone(8000)
    clip = audio.load(encoded(want, 8000))
    assert clip.sample_rate == 8000 and np.array_equal(clip.samples, want)


@pytest.mark.parametrize("rate", [7350, 11025, 12000, 22050, 24000, 32000, 44100, 48000, 96000, 192000])
def test_resampling_keeps_a_tone_and_its_place(rate: int) -> None:
    clip = audio.load(encoded(tone(rate, 2.0), rate))
    want = tone(16000, 2.0)
    assert clip.sample_rate == 16000 and len(clip.samples) == -(-2 * rate * 16000 // rate)
    # VHQ promises 28 bits; float32 rounds each sample, and the ends ring because the tone is cut there.
    inner = slice(800, -800)
    assert np.abs(clip.samples - want)[inner].max() < 1e-6


@pytest.mark.parametrize("rate", [44100, 48000])
def test_resampling_lets_nothing_fold_back(rate: int) -> None:
    clip = audio.load(encoded(tone(rate, 1.0, hertz=10000), rate))  # above half of 16 kHz: must vanish
    assert np.abs(clip.samples)[800:-800].max() < 1e-6


def resample_poly(x: Float32, down: int) -> Float64:
    """The reference's own: scipy.signal.resample_poly(x, 1, down), Kaiser 5.0, 10 · down taps each side."""
    n = 20 * down + 1
    at = np.arange(n) - 10 * down
    taps = np.sinc(at / down) * np.kaiser(n, 5.0)
    return np.convolve(x.astype(np.float64), taps / taps.sum())[10 * down :][: len(x) : down]


@pytest.mark.parametrize("down", [2, 3, 6])
def test_multiples_of_16_khz_are_close_to_the_reference(down: int) -> None:
    rate = 16000 * down
    x = audio._resampled(iter([audio.load(SPEECH).samples]), 16000 * 16000 // rate)  # speech at a higher rate
    high = np.concatenate(list(x))
    got, want = audio.load(encoded(high, rate)).samples, resample_poly(high, down)
    assert len(got) == len(want)
    # Its short filter lets 0.1 % through differently near 8 kHz; the mel bands below 6.2 kHz hardly see it.
    assert np.sqrt(((got - want) ** 2).mean() / (want**2).mean()) < 2e-3
    difference = np.abs(log_mel(got) - log_mel(want.astype(np.float32)))[:, :70]
    assert difference.mean() < 0.005 and difference.max() < 0.1


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = encoded(np.stack([tone(44100, 3.0), tone(44100, 3.0, hertz=90)], 1), 44100)
    whole = audio.load(raw).samples
    monkeypatch.setattr(audio, "_BLOCK_VALUES", 2 * 977)
    assert np.array_equal(audio.load(raw).samples, whole)
    with audio.stream(raw) as sound:
        assert sound.sample_rate == 16000
        assert np.array_equal(np.concatenate(list(sound.blocks)), whole)


def test_a_stream_of_raw_samples() -> None:
    want = np.round(tone(16000) * 32767).astype("<i2")
    clip = audio.load(Pipe(want.tobytes()))  # type: ignore[arg-type]
    assert clip.sample_rate == 16000
    assert np.array_equal(clip.samples, want.astype(np.float32) / 32768)
    cut = audio.load(Pipe(want.tobytes()[:-1]))  # type: ignore[arg-type]  # closed in the middle of a sample
    assert np.array_equal(cut.samples, clip.samples[:-1])


@pytest.mark.parametrize(
    ("kind", "subtype"),
    [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("AIFF", "PCM_16"), ("RF64", "PCM_16")],
)
def test_a_stream_of_a_file(kind: str, subtype: str) -> None:
    raw = encoded(tone(48000), 48000, kind, subtype)
    piped = audio.load(Pipe(raw))  # type: ignore[arg-type]
    assert np.array_equal(piped.samples, audio.load(raw).samples)


def test_a_stream_of_mp3_without_a_tag() -> None:
    """It has no magic number: two frames in a row are what tells it from samples."""
    for rate in (44100, 16000, 11025):  # MPEG 1, 2 and 2.5
        raw = encoded(tone(rate), rate, "MP3", "MPEG_LAYER_III")
        assert raw[0] == 0xFF
        piped = audio.load(Pipe(raw))  # type: ignore[arg-type]
        assert np.array_equal(piped.samples, audio.load(raw).samples)
    like = raw[:8] + SECOND
    samples = audio.load(Pipe(like)).samples  # type: ignore[arg-type]
    assert np.array_equal(samples, np.frombuffer(like, "<i2").astype(np.float32) / 32768)


def wav(
    data: bytes, *, announced: int | None = None, channels: int = 1, rate: int = 16000, form: int = 1
) -> bytes:
    """A WAV written by hand: 16-bit, or whatever the header is told to say."""
    size = len(data) if announced is None else announced
    head = struct.pack(
        "<HHIIHH", form, channels, rate, 2 * rate * channels & 0xFFFFFFFF, 2 * channels & 0xFFFF, 16
    )
    body = b"WAVEfmt " + struct.pack("<I", len(head)) + head + b"data" + struct.pack("<I", size) + data
    return b"RIFF" + struct.pack("<I", 4 + len(body) & 0xFFFFFFFF) + body


SECOND = np.round(tone(16000) * 32767).astype("<i2").tobytes()


def test_the_header_of_a_pipe_may_announce_anything() -> None:
    want = np.frombuffer(SECOND, "<i2").astype(np.float32) / 32768
    for announced in (0xFFFFFFFF, 0x7FFFFFFF, 1 << 20):
        got = audio.load(Pipe(wav(SECOND, announced=announced))).samples  # type: ignore[arg-type]
        assert np.array_equal(got, want)
    for announced in (0xFFFFFFFF, 0x7FFFFFFF):  # saved from a pipe
        assert np.array_equal(audio.load(wav(SECOND, announced=announced)).samples, want)


def test_a_recorder_that_crashed(tmp_path: Path) -> None:
    """It writes the sizes when it ends: libsndfile takes 0 for no sound."""
    whole = wav(SECOND, announced=0)
    path = tmp_path / "crashed.wav"
    for size in (0, 36):  # of all, in the header
        path.write_bytes(whole[:4] + struct.pack("<I", size) + whole[8:])
        for source in (path, path.read_bytes(), Pipe(path.read_bytes())):
            assert "announces no sound but goes on: 32,000 bytes more" in refusal(source)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="goes on"), audio.stream(path):
            pass
    note = b"LIST" + struct.pack("<I", 4) + b"INFO"
    path.write_bytes(wav(note, announced=0))  # a note after no sound is in order
    with audio.stream(path) as sound:
        assert sum(map(len, sound.blocks)) == 0


def test_files_that_end_too_early() -> None:
    assert "is cut short: announces 64,000 bytes" in refusal(wav(SECOND, announced=64000))
    assert "is cut short" in refusal(MP3.read_bytes()[:60000])
    assert "lost sync" in refusal(SPEECH.read_bytes()[:300000])
    vorbis = encoded(tone(16000, 3), 16000, "OGG", "VORBIS")
    assert refusal(vorbis[: len(vorbis) // 2]).startswith("audio: ")


@pytest.mark.parametrize("n", [0, 1, 160, 399])
def test_too_short(n: int) -> None:
    want = f"lasts {n} samples ({n / 16:.1f} ms), expected at least 25 ms"
    assert want in refusal(encoded(tone(16000)[:n], 16000))
    assert (want if n else "audio: is empty") in refusal(Pipe(SECOND[: 2 * n]))
    assert refusal(encoded(tone(8000)[: n // 2], 8000)).endswith("expected at least 25 ms")


def test_the_shortest() -> None:
    assert len(audio.load(encoded(tone(16000)[:400], 16000)).samples) == 400
    assert len(audio.load(encoded(tone(8000)[:200], 8000)).samples) == 200


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (44100, 2)])
def test_samples_that_are_not_finite(bad: float, rate: int, channels: int) -> None:
    x = np.repeat(tone(rate)[:, None], channels, 1)
    x[12345] = bad
    assert "sample 12345 is" in refusal(encoded(x, rate))
    x[12345] = np.inf, *[-np.inf] * (channels - 1)
    assert "sample 12345 is" in refusal(encoded(x, rate))


def test_silence_a_constant_and_clipping_are_sound() -> None:
    for value in (0.0, 0.25, 1.0, 40.0):
        clip = audio.load(encoded(np.full(16000, value, np.float32), 16000))
        assert (clip.samples == np.float32(value)).all()
        assert np.isfinite(log_mel(clip.samples)).all()


@pytest.mark.parametrize("rate", [8000, 16000, 11025, 44100, 48000, 192000])
def test_sound_as_it_comes(rate: int) -> None:
    """Blocks of any size give the samples of the file, each as soon as it can be known."""
    left, right = tone(rate, 2.0), tone(rate, 2.0, hertz=1000)
    columns = np.round(np.stack([left, right], 1) * 32767).astype(np.int16)
    taken = given = 0
    got = []

    def blocks() -> Iterator[npt.NDArray[np.int16]]:
        nonlocal taken
        for i in range(0, len(columns), rate // 50):
            taken += len(columns[i : i + rate // 50])
            yield columns[i : i + rate // 50]

    sound = audio.from_blocks(blocks(), rate, 2)
    assert sound.seconds is None
    for block in sound.blocks:
        got.append(block)
        given += len(block)
        assert given / sound.sample_rate > taken / rate - 0.1
    assert np.array_equal(np.concatenate(got), audio.load(encoded(columns, rate, subtype="PCM_16")).samples)
    with pytest.raises(InputError, match="has 65 channels"):
        audio.from_blocks(iter([]), rate, 65)


def test_loudness() -> None:
    assert audio.level_dbfs(np.zeros(0, np.float32)) == audio.level_dbfs(np.zeros(9, np.float32)) == -np.inf
    assert audio.level_dbfs(np.full(9, -1, np.float32)) == 0.0
    assert audio.level_dbfs(2 * tone(16000)) == pytest.approx(-10 * np.log10(2))  # a full sine


def test_channels_and_rates_out_of_range() -> None:
    assert "has 65 channels, expected 1 to 64" in refusal(encoded(np.zeros((16000, 65)), 16000))
    assert refusal(wav(SECOND, channels=0)).startswith("audio: ")
    assert "is at 500 Hz, expected 1000 to 1000000" in refusal(wav(SECOND, rate=500))
    assert "is at 4000000 Hz" in refusal(wav(SECOND, rate=4_000_000))
    assert refusal(wav(SECOND, rate=0)).startswith("audio: ")


def test_four_hours_are_the_limit(tmp_path: Path) -> None:
    """RF64 of 5 GB, of which the disk holds only the header: refused by what it says, not after decoding."""
    rate, frames = 48000, 5 * 3600 * 48000
    raw = bytearray(encoded(np.zeros((100, 2), np.float32), rate, "RF64", "PCM_16"))
    start = raw.index(b"data") + 8
    sizes = raw.index(b"ds64") + 8
    raw[sizes : sizes + 24] = struct.pack("<QQQ", start + 4 * frames - 8, 4 * frames, frames)
    path = tmp_path / "long.wav"
    path.write_bytes(raw[:start])
    os.truncate(path, start + 4 * frames)
    assert path.stat().st_size > 1 << 31
    assert "lasts 5.0 hours, expected at most 4: cut it into parts" in refusal(path)
    with audio.stream(path) as sound:  # in blocks it may be as long as it likes
        assert sound.seconds == 5 * 3600
        assert not next(sound.blocks).any()
    limited = pytest.raises(InputError, match=r"lasts 5\.0 hours, expected at most 4\.5: cut")
    with limited, audio.stream(path, max_seconds=4.5 * 3600):
        pass


LONG = """
import resource, sys
from pathlib import Path
from pocketphi.runtime import audio

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB

with audio.stream(Path(sys.argv[1])) as sound:
    n = sum(len(next(sound.blocks)) for _ in range(3))
    before = peak()
    n += sum(map(len, sound.blocks))
    print(n / sound.sample_rate, sound.seconds, peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is in other units there")
def test_hours_in_a_few_megabytes(tmp_path: Path) -> None:
    """An hour of stereo, resampled, of which the disk holds only the header."""
    path, frames = tmp_path / "long.wav", 3600 * 12000
    path.write_bytes(wav(b"", announced=4 * frames, channels=2, rate=12000))
    os.truncate(path, 44 + 4 * frames)
    command = [sys.executable, "-c", LONG, str(path)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    seconds, announced, grown = map(float, out.split())
    assert seconds == announced == 3600
    assert grown < 16 * 1024  # two blocks of 4 MB, before and after the resampler, and as much again


def test_what_says_how_long_it_is(tmp_path: Path) -> None:
    for raw, seconds in ((encoded(tone(44100, 2.0), 44100, "FLAC", "PCM_16"), 2.0), (wav(SECOND), 1.0)):
        for source in (raw, Pipe(raw)):
            with audio.stream(source) as sound:  # type: ignore[arg-type]
                assert sound.seconds == seconds
    with audio.stream(Pipe(SECOND)) as sound:  # type: ignore[arg-type]
        assert sound.seconds is None


def test_an_endless_stream_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio, "MAX_SECONDS", 100)
    with Path("/dev/zero").open("rb") as zeros:
        assert "expected at most" in refusal(zeros, name="standard input")
    monkeypatch.setattr(audio, "MAX_STREAM_BYTES", 1 << 20)
    assert "has over 1,048,576 bytes" in refusal(Pipe(wav(bytes(1 << 21))))


@pytest.mark.parametrize(
    "raw",
    [b"", b"R", b"RIFF", b"hello, world", b"\0" * 5000, b"OggS" * 100, b"fLaC" + b"\xff" * 99, b"ID3" * 50],
)
def test_what_is_no_sound_file(raw: bytes) -> None:
    assert refusal(raw).startswith("audio: is not a sound file that can be read: ")


def test_nothing_but_us_writes_to_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    dump = bytearray(encoded(tone(16000), 16000, "SDS", "PCM_16"))
    dump[30:200] = bytes(170)
    assert "is a MIDI sample dump" in refusal(bytes(dump))
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("cut", [4, 12, 20, 36, 43])
def test_every_beginning_of_a_wav(cut: int) -> None:
    assert refusal(wav(SECOND)[:cut]).startswith("audio: ")
    assert refusal(Pipe(wav(SECOND)[:cut])).startswith("audio: ")


def test_adpcm_with_impossible_blocks() -> None:
    """Block sizes whose product does not fit 32 bits: what CVE-2026-37555 is about."""
    for align, per_block in ((0, 0), (1, 1), (0xFFFF, 0xFFFF), (256, 0xFFFF), (4, 50000)):
        fmt = struct.pack("<HHIIHHHH", 0x11, 1, 16000, 8000, align, 4, 2, per_block)
        body = (
            b"WAVEfmt "
            + struct.pack("<I", len(fmt))
            + fmt
            + b"data"
            + struct.pack("<I", 60000)
            + bytes(60000)
        )
        raw = b"RIFF" + struct.pack("<I", 4 + len(body)) + body
        try:
            assert np.isfinite(audio.load(raw).samples).all()
        except InputError as exc:
            assert "\n" not in str(exc)


def test_what_is_not_a_file(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none.wav")
    assert "is not a regular file" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "is not a regular file" in refusal(tmp_path / "pipe")
    assert "is not a regular file" in refusal(Path("/dev/zero"))
    assert refusal(Path("a\0b.wav"))
    (tmp_path / "x.raw").write_bytes(SECOND)
    assert "has no header" in refusal(tmp_path / "x.raw")
    closed = io.BytesIO(SECOND)
    closed.close()
    assert "cannot be read" in refusal(closed)


def test_any_file_name(tmp_path: Path) -> None:
    for name in ("sound of – ü 音.wav", "no-suffix", os.fsdecode(b"\xff\xfe.wav")):
        path = tmp_path / name
        path.write_bytes(wav(SECOND))
        assert len(audio.load(path).samples) == 16000


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio.tempfile, "tempdir", str(tmp_path))
    audio.load(wav(SECOND))
    refusal(b"RIFF")
    assert list(tmp_path.iterdir()) == []


def test_samples_in_memory() -> None:
    want = tone(16000)
    assert np.array_equal(audio.from_samples(want, 16000).samples, want)
    assert np.array_equal(audio.from_samples(np.stack([want, want], 1), 16000).samples, want)
    ints = np.round(want * 32767).astype(np.int16)
    assert np.array_equal(audio.from_samples(ints, 16000).samples, ints.astype(np.float32) / 32768)
    high = tone(48000)
    assert np.array_equal(audio.from_samples(high, 48000).samples, audio.load(encoded(high, 48000)).samples)


@pytest.mark.parametrize(
    ("samples", "rate"),
    [
        (np.zeros(0, np.float32), 16000),
        (np.zeros(399, np.float32), 16000),
        (np.full(400, np.nan, np.float32), 16000),
        (np.full(400, 1e300), 16000),
        (np.zeros((400, 65), np.float32), 16000),
        (np.zeros((4, 4, 4), np.float32), 16000),
        (np.zeros(400, np.complex64), 16000),
        (np.zeros(400, np.float32), 0),
    ],
)
def test_samples_that_cannot_be_used(samples: npt.NDArray[np.generic], rate: int) -> None:
    with pytest.raises(InputError, match=r"^clip: "):
        audio.from_samples(samples, rate, where="clip")
