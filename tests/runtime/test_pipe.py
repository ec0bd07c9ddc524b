# SPDX-License-Identifier: Apache-2.0
"""Sound through real pipes while it is being written, against the same bytes in a file; and no sound."""

from __future__ import annotations

import io
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pytest
import soundfile

from pocketphi.runtime import audio, pipe
from pocketphi.runtime.clock import RealClock
from pocketphi.runtime.errors import InputError
from pocketphi.runtime.pipe import Piped

PCM_GUID = bytes.fromhex("0100000000001000800000aa00389b71")


def noise(n: int, channels: int, width: int) -> bytes:
    return np.random.default_rng(1).bytes(n * channels * width)


def wav(
    data: bytes,
    rate: int = 16000,
    channels: int = 1,
    width: int = 2,
    *,
    sizes: tuple[int, int] | None = None,
    form: int = 1,
    extra: bytes = b"",
    before: bytes = b"",
    after: bytes = b"",
) -> bytes:
    """By hand; `sizes` are what the header says of all and of the sound, the rest are other chunks."""
    fmt = struct.pack("<HHIIHH", form, channels, rate, rate * channels * width, channels * width, 8 * width)
    fmt += extra
    whole, size = sizes or (36 + len(extra) + len(before) + len(data) + len(after), len(data))
    head = b"RIFF" + struct.pack("<I", whole & 0xFFFFFFFF) + b"WAVE" + before
    return (
        head + b"fmt " + struct.pack("<I", len(fmt)) + fmt + b"data" + struct.pack("<I", size) + data + after
    )


def until(condition: Any) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def until_nobody_reads() -> None:
    """Before a file is closed: the next one may get its number, and a thread would read from that."""
    until(lambda: not any(thread.name == "pipe" for thread in threading.enumerate()))


@contextmanager
def written(raw: bytes, tmp_path: Path, piece: int = 997) -> Iterator[BinaryIO]:
    """A pipe into which another process writes, piece by piece."""
    (tmp_path / "raw").write_bytes(raw)
    command = ["dd", f"if={tmp_path / 'raw'}", f"bs={piece}", "status=none"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        try:
            yield child.stdout  # type: ignore[misc]
            assert child.wait(timeout=60) == 0  # all of it was taken
        finally:
            until_nobody_reads()


def heard(raw: bytes, tmp_path: Path, piece: int = 997) -> audio.Clip:
    with written(raw, tmp_path, piece) as file:
        source = Piped(file, RealClock(), name="pipe")
        blocks = list(source.blocks)
        assert all(len(block) > 0 and block.dtype == np.float32 for block in blocks)
        assert source.backlog_s() == 0.0 and source.overruns == 0
        return audio.Clip(np.concatenate([np.zeros(0, np.float32), *blocks]), source.sample_rate)


def refusal(raw: bytes, tmp_path: Path) -> str:
    with pytest.raises(InputError) as caught:
        heard(raw, tmp_path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def through_load(raw: bytes) -> npt.NDArray[np.float32]:
    """What `audio.load` makes of the same bytes."""
    return audio.load(io.BytesIO(raw)).samples


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("rate", "channels"),
    [(16000, 1), (16000, 2), (8000, 2), (44100, 2), (48000, 64), (11025, 3), (1000, 1), (1_000_000, 1)],
)
def test_the_samples_of_a_file(width: int, rate: int, channels: int, tmp_path: Path) -> None:
    raw = wav(noise(rate // 2, channels, width), rate, channels, width)
    got = heard(raw, tmp_path, piece=99_991 if channels == 64 else 997)
    assert got.sample_rate == (8000 if rate == 8000 else 16000)
    assert np.array_equal(got.samples, through_load(raw))


SECOND = noise(16000, 1, 2)
WHOLE = np.frombuffer(SECOND, "<i2").astype(np.float32) / 32768


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000, 0xFFFFFFFF - 36, 0, 1 << 20])
@pytest.mark.parametrize("whole", [0xFFFFFFFF, 0x7FFFFFFF, 0])
def test_sizes_that_a_streaming_writer_puts(size: int, whole: int, tmp_path: Path) -> None:
    raw = wav(SECOND, sizes=(whole, size))
    assert np.array_equal(heard(raw, tmp_path).samples, WHOLE)
    if whole and size:  # libsndfile takes 0 for no sound
        assert np.array_equal(through_load(raw), WHOLE)


def test_other_chunks(tmp_path: Path) -> None:
    """Before the sound, odd ones have a byte more; what is after it is no sound, and the writer can end."""
    before = b"LIST" + struct.pack("<I", 9001) + bytes(9002) + b"fact" + struct.pack("<II", 4, 5)
    after = b"LIST" + struct.pack("<I", 500_000) + b"\x55" * 500_000
    raw = wav(SECOND, before=before, after=after)
    assert np.array_equal(heard(raw, tmp_path, piece=50_000).samples, WHOLE)
    assert np.array_equal(through_load(raw), WHOLE)


def test_extensible(tmp_path: Path) -> None:
    data = noise(16000, 2, 3)
    raw = wav(data, 48000, 2, 3, form=0xFFFE, extra=struct.pack("<HHI", 22, 24, 3) + PCM_GUID)
    assert np.array_equal(heard(raw, tmp_path).samples, through_load(raw))


def test_raw_samples(tmp_path: Path) -> None:
    assert np.array_equal(heard(SECOND, tmp_path).samples, WHOLE)
    assert np.array_equal(heard(SECOND[:-1], tmp_path).samples, WHOLE[:-1])  # half a sample is none
    assert np.array_equal(heard(SECOND[:2], tmp_path).samples, WHOLE[:1])


def test_nothing_at_all(tmp_path: Path) -> None:
    assert refusal(b"", tmp_path).startswith("pipe: is empty, expected WAV (PCM)")
    assert len(heard(wav(b""), tmp_path).samples) == 0  # a recording of nothing is one


def test_descriptor_0_is_standard_input() -> None:
    """As the command line opens it where it was closed."""
    script = """
import os
os.close(0)
file = os.fdopen(os.open(os.devnull, os.O_RDONLY), "rb")
from pocketphi.runtime import audio, pipe
from pocketphi.runtime.clock import RealClock
for read in (audio.load, lambda file: pipe.Piped(file, RealClock())):
    try:
        read(file)
    except audio.InputError as exc:
        print(str(exc)[:24])
"""
    said = subprocess.check_output([sys.executable, "-c", script], text=True, timeout=60)
    assert said == "standard input: is empty\n" * 2


def test_frames_without_a_magic_number(tmp_path: Path) -> None:
    """MP3 and AAC begin with a frame. The refusal comes as soon as the second one's header is there."""
    for rate in (48000, 44100, 22050, 8000):  # of MPEG 1, 2 and 2.5
        file = io.BytesIO()
        soundfile.write(file, WHOLE, rate, format="MP3")
        raw = file.getvalue()
        assert raw[0] == 0xFF and refusal(raw, tmp_path).startswith("pipe: is MP3, expected")
        assert len(heard(raw[:8] + bytes(4000), tmp_path).samples) == 2004  # samples that begin alike
        assert len(heard(raw[:9], tmp_path).samples) == 4
    header = bytes.fromhex("fff15080")  # ADTS: AAC-LC, 44.1 kHz, stereo; 13 bits of length follow
    frame = header + ((200 << 5) | 0x1F).to_bytes(2, "big") + bytes(194)
    assert refusal(frame * 3, tmp_path).startswith("pipe: is AAC, expected")
    assert len(heard(frame + bytes(4000), tmp_path).samples) == 2100


def test_a_wav_that_ends_early(tmp_path: Path) -> None:
    """The writer was stopped: what came is what there is."""
    assert np.array_equal(heard(wav(SECOND)[:-1001], tmp_path).samples, WHOLE[:-501])


def encoded(kind: str, subtype: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, WHOLE, 16000, format=kind, subtype=subtype)
    return file.getvalue()


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        (encoded("FLAC", "PCM_16"), "FLAC"),
        (encoded("OGG", "VORBIS"), "Ogg"),
        (encoded("AIFF", "PCM_16"), "AIFF"),
        (encoded("RF64", "PCM_16"), "RF64"),
        (encoded("WAV", "FLOAT"), "WAV with floating point"),
        (encoded("WAV", "ULAW"), "WAV with samples of format 0x0007"),
        (b"ID3\x04" + bytes(99), "MP3"),
        (b"\0\0\0\x20ftypM4A " + bytes(99), "MP4"),
        (b"RIFF" + bytes(4) + b"AVI " + bytes(99), "RIFF without sound"),
        (wav(b"", channels=3, width=2)[:32] + b"\x05\0\x10\0data" + bytes(9), "WAV with 16 bits in 5 bytes"),
    ],
)
def test_what_is_something_else(raw: bytes, found: str, tmp_path: Path) -> None:
    said = refusal(raw, tmp_path)
    assert said.startswith(f"pipe: is {found}")
    assert "expected WAV (PCM) or raw signed 16-bit little-endian samples, mono at 16 kHz: `ffmpeg" in said


@pytest.mark.parametrize("cut", [4, 11, 12, 19, 20, 35, 36, 43])
def test_headers_that_end(cut: int, tmp_path: Path) -> None:
    assert refusal(wav(SECOND)[:cut], tmp_path).startswith("pipe: is a WAV that ends within its header")


def test_headers_that_lie(tmp_path: Path) -> None:
    start = b"RIFF\xff\xff\xff\xffWAVE"
    huge = start + b"LIST\xf0\xff\xff\xff" + bytes(99)
    assert "damaged header: chunk b'LIST' of 4,294,967,280 bytes" in refusal(huge, tmp_path)
    assert "damaged header: chunk b'data'" in refusal(start + b"data" + bytes(4) + SECOND, tmp_path)
    assert "damaged header: chunk b'fmt '" in refusal(start + b"fmt " + struct.pack("<I", 15), tmp_path)
    many = start + (b"junk" + struct.pack("<I", 4 << 20) + bytes(4 << 20)) * 5
    with pytest.raises(InputError, match="damaged header"):  # given up on, with the writer still writing
        Piped(io.BytesIO(many), RealClock())
    assert "has 65 channels, expected 1 to 64" in refusal(wav(SECOND, channels=65), tmp_path)
    assert "has 0 channels, expected 1 to 64" in refusal(wav(SECOND, channels=0), tmp_path)
    assert "is at 500 Hz, expected 1000 to 1000000" in refusal(wav(SECOND, rate=500), tmp_path)


def test_a_terminal() -> None:
    ours, theirs = os.openpty()
    with (
        os.fdopen(ours, "rb", 0),
        os.fdopen(theirs, "rb") as file,
        pytest.raises(InputError, match="is a terminal, expected WAV"),
    ):
        Piped(file, RealClock())


class Writer:
    """A pipe whose writing end the test holds: nothing comes unless the test writes."""

    def __init__(self) -> None:
        ours, self.end = os.pipe()
        self.file = os.fdopen(ours, "rb")

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        if self.end >= 0:
            os.close(self.end)
        self.end = -1
        until_nobody_reads()
        self.file.close()

    def write(self, raw: bytes) -> None:
        assert os.write(self.end, raw) == len(raw)


def test_sound_comes_out_while_it_is_written() -> None:
    with Writer() as writer:
        writer.write(wav(b"", sizes=(0, 0)))
        before = time.monotonic()
        with Piped(writer.file, RealClock()) as source:
            assert source.backlog_s() == 0.0 and source.level_dbfs == -np.inf
            for i in range(5):  # the writer waits for us, so nothing may be held back
                writer.write(SECOND[3200 * i : 3200 * (i + 1)])
                got = 0
                while got < 1600:
                    block = next(source.blocks)
                    at = 1600 * i + got
                    assert np.array_equal(block, WHOLE[at : at + len(block)])
                    got += len(block)
            assert before - 0.1 <= source.started <= time.monotonic() - 0.1


def test_sound_comes_out_resampled_while_it_is_written() -> None:
    with Writer() as writer:
        writer.write(wav(b"", 48000, sizes=(0, 0)))
        with Piped(writer.file, RealClock()) as source:
            written = got = 0
            for i in range(10):
                writer.write(SECOND[9600 * (i % 3) : 9600 * (i % 3) + 9600])  # 0.1 s
                written += 1600
                while got < written - 1600:  # at most 0.1 s is held back
                    got += len(next(source.blocks))
            until(lambda: source.backlog_s() == pytest.approx((written - got) / 16000))
            source.stop()
            assert got + sum(map(len, source.blocks)) == written  # and that comes at the end


def test_stopping_while_the_writer_is_idle() -> None:
    with Writer() as writer:
        writer.write(wav(SECOND[:8000], sizes=(0, 0)))
        with Piped(writer.file, RealClock()) as source:
            previous = signal.signal(signal.SIGALRM, lambda *_: source.stop())
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            try:
                got = np.concatenate(list(source.blocks))  # waits in the middle of it
            finally:
                signal.signal(signal.SIGALRM, previous)
            source.stop()
            assert np.array_equal(got, WHOLE[:4000])
            assert list(source.blocks) == [] and source.backlog_s() == 0.0


def test_loudness_is_that_of_what_came_last() -> None:
    with Writer() as writer:
        writer.write(wav(b"", 16000, 2, sizes=(0, 0)))
        with Piped(writer.file, RealClock()) as source:
            writer.write(np.full((1600, 2), 16384, "<i2").tobytes())
            until(lambda: source.level_dbfs > -7)
            assert source.level_dbfs == pytest.approx(20 * np.log10(0.5))
            writer.write(bytes(2))  # half of a frame says nothing, and does not shift what follows
            writer.write(bytes(6398))
            until(lambda: source.level_dbfs == -np.inf)
            assert source.backlog_s() == 0.2


def test_a_writer_who_is_too_fast_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "MAX_HELD_S", 2)
    raw = wav(SECOND * 20)  # 640 kB, of which the pipe itself holds 64
    with written(raw, tmp_path, piece=4096) as file, Piped(file, RealClock()) as source:
        until(lambda: source.backlog_s() >= 2)
        time.sleep(0.2)  # it would go on now, if it did
        assert 2 <= source.backlog_s() <= 2.1
        assert np.array_equal(np.concatenate(list(source.blocks)), np.tile(WHOLE, 20))


def test_a_connection_that_breaks() -> None:
    """Reset by its peer: what came is given out, then it is said."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        peer = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
        with ours, ours.makefile("rb") as file:
            peer.sendall(wav(SECOND[:8000], sizes=(0, 0)))
            with Piped(file, RealClock(), name="connection") as source:
                until(lambda: source.backlog_s() == 0.25)
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                peer.close()
                got = np.concatenate([next(source.blocks) for _ in range(3)])
                with pytest.raises(InputError, match="connection: cannot be read: Connection reset by peer"):
                    next(source.blocks)
        assert np.array_equal(got, WHOLE[:4000])


def test_who_cannot_read() -> None:
    ours, theirs = os.pipe()
    with os.fdopen(ours, "rb"), os.fdopen(theirs, "rb") as wrong:
        source = Piped(wrong, RealClock())
        with pytest.raises(InputError, match="cannot be read: Bad file descriptor"):
            next(source.blocks)


def test_python_ends_while_the_writer_is_idle() -> None:
    """A thread that waits for standard input must not keep the process, nor break its end."""
    code = (
        "import sys\n"
        "from pocketphi.runtime.clock import RealClock\n"
        "from pocketphi.runtime.pipe import Piped\n"
        "source = Piped(sys.stdin.buffer, RealClock())\nnext(source.blocks)\nprint(source.name)"
    )
    command = [sys.executable, "-c", code]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, **streams) as child:  # type: ignore[call-overload]
        child.stdin.write(SECOND[:3200])
        child.stdin.flush()
        assert child.wait(timeout=60) == 0
        assert (child.stdout.read(), child.stderr.read()) == (b"standard input\n", b"")


def test_no_thread_is_left() -> None:
    with Writer() as writer:
        writer.write(SECOND)
        Piped(writer.file, RealClock(), name="pipe").close()
        writer.write(SECOND)  # it sees that it was closed when something comes
        until_nobody_reads()
