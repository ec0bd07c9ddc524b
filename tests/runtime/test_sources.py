# SPDX-License-Identifier: Apache-2.0
"""Files in real time on clocks of every kind, and what was heard kept bit for bit."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pocketphi.runtime import audio
from pocketphi.runtime.audio import Sound
from pocketphi.runtime.capture import Microphone
from pocketphi.runtime.clock import RealClock, SkippingClock
from pocketphi.runtime.errors import InputError, InUseError, OutputError
from pocketphi.runtime.pipe import Piped
from pocketphi.runtime.sources import Paced, Source, check_recording, recorded

from ..clocks import MadeTime

SPEECH = Path(__file__).resolve().parent.parent / "audio" / "jfk.flac"  # 44.1 kHz stereo, 11 s

Float32 = npt.NDArray[np.float32]


def samples(seconds: float, rate: int = 16000) -> Float32:
    return np.random.default_rng(2).uniform(-1, 1, int(seconds * rate)).astype(np.float32)


def sound(values: Float32, rate: int = 16000, cut: int = 7001, known: bool = True) -> Sound:
    """In blocks that are not those which come out."""
    blocks = (values[i : i + cut] for i in range(0, len(values), cut))
    return Sound("clip", rate, blocks, len(values) / rate if known else None)


@pytest.mark.parametrize("rate", [16000, 8000])
@pytest.mark.parametrize("cut", [1, 100, 1600, 7001, 1 << 20])
def test_each_block_when_its_last_sample_is_due(rate: int, cut: int) -> None:
    clock, want, got = MadeTime(), samples(1.25, rate), []
    with Paced(sound(want, rate, cut), clock) as source:
        assert source.started == clock.now()
        clock.time += 5  # nothing is due before someone listens
        assert source.backlog_s() == 0.0
        for block in source.blocks:
            got.append(block)
            assert clock.now() == pytest.approx(source.started + sum(map(len, got)) / rate, abs=1e-9)
            assert source.backlog_s() <= 1 / rate  # the clock's rounding
            assert source.level_dbfs == audio.level_dbfs(block)
    assert [len(block) for block in got] == [rate // 10] * 12 + [rate // 20]
    assert np.array_equal(np.concatenate(got), want)
    assert (source.name, source.sample_rate, source.overruns) == ("clip", rate, 0)


@pytest.mark.parametrize("known", [True, False])
def test_who_is_slow_has_a_backlog(known: bool) -> None:
    clock = MadeTime()
    source = Paced(sound(samples(3.0), known=known), clock)
    next(source.blocks)
    clock.time += 2
    assert source.backlog_s() == pytest.approx(2.0, abs=1e-4)
    late = clock.now()
    for _ in range(20):  # all of them are there already
        next(source.blocks)
    assert clock.now() == late and source.backlog_s() == pytest.approx(0.0, abs=1e-4)
    clock.time += 60
    if known:  # no more than there is
        assert source.backlog_s() == pytest.approx(0.9)
    else:  # by the clock, until the end has been read
        assert source.backlog_s() > 50
    assert len(list(source.blocks)) == 9 and source.backlog_s() == 0.0


@pytest.mark.parametrize("known", [True, False])
def test_without_pace_all_is_due_until_the_last(known: bool) -> None:
    clock = MadeTime()
    source = Paced(sound(samples(1.0), known=known), clock, pace=False)
    left = []
    for _ in source.blocks:
        left.append(source.backlog_s())
    assert clock.now() == 1000.0
    assert len(left) == 10 and min(left[:-1]) > 0 and left[-1] == 0.0
    if known:
        assert left == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])


def test_stopping_gives_out_what_was_due() -> None:
    clock, want, got = MadeTime(), samples(3.0), []
    source = Paced(sound(want), clock)
    for _ in range(2):
        got.append(next(source.blocks))
    clock.time += 0.25
    source.stop()
    clock.time += 1
    source.stop()  # once is enough: what is due does not grow
    assert source.backlog_s() == pytest.approx(0.25, abs=1e-4)
    got += list(source.blocks)
    assert len(np.concatenate(got)) in (7199, 7200)  # 0.45 s, and the clock's rounding
    assert np.array_equal(np.concatenate(got), want[: len(np.concatenate(got))])
    quick = Paced(sound(want), clock, pace=False)
    next(quick.blocks)
    quick.stop()
    assert list(quick.blocks) == [] and quick.backlog_s() == 0.0


def test_a_file_that_breaks_is_given_out_first() -> None:
    want = samples(1.0)

    def blocks() -> Iterator[Float32]:
        yield want
        raise InputError("clip: is cut short")

    source, got = Paced(Sound("clip", 16000, blocks(), 60.0), MadeTime()), []
    with pytest.raises(InputError, match="clip: is cut short"):
        for block in source.blocks:
            got.append(block)
    assert np.array_equal(np.concatenate(got), want)


def test_a_file_without_waiting() -> None:
    """11 s of speech, for which the clock says 11 s and a watch does not."""
    clock, before = SkippingClock(), time.monotonic()
    with audio.stream(SPEECH) as found, Paced(found, clock) as source:
        assert found.seconds == 11.0
        got = np.concatenate(list(source.blocks))
        assert clock.now() - source.started >= 11.0 > time.monotonic() - before
    assert np.array_equal(got, audio.load(SPEECH).samples)


def test_a_file_in_real_time() -> None:
    before = time.monotonic()
    with Paced(sound(samples(0.5)), RealClock()) as source:
        assert sum(map(len, source.blocks)) == 8000
    assert time.monotonic() - before >= 0.5


def test_what_is_heard_is_kept(tmp_path: Path) -> None:
    want = samples(1.25)
    path, part = tmp_path / "said.wav", tmp_path / "said.wav.part"
    clock = MadeTime()
    with recorded(Paced(sound(want), clock), path) as source:
        blocks = source.blocks
        first = next(blocks)
        assert np.array_equal(audio.load(part).samples, first)  # whatever happens now
        assert not path.exists() and source.level_dbfs == audio.level_dbfs(first)
        clock.time += 0.5
        assert source.backlog_s() == pytest.approx(0.5, abs=1e-4)
        assert (source.name, source.sample_rate, source.overruns, source.started) == ("clip", 16000, 0, 1000)
        got = [first, *blocks]
    source.close()
    clip = audio.load(path)
    assert clip.sample_rate == 16000 and np.array_equal(clip.samples, want)
    assert np.array_equal(np.concatenate(got), want) and not part.exists()


def test_only_what_was_given_out_is_kept(tmp_path: Path) -> None:
    want = samples(1.0, 8000)
    with recorded(Paced(sound(want, 8000), MadeTime()), tmp_path / "a.wav") as source:
        next(source.blocks)
        source.stop()
        assert list(source.blocks) == []
    clip = audio.load(tmp_path / "a.wav")
    assert clip.sample_rate == 8000 and np.array_equal(clip.samples, want[:800])


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none" / "a.wav", Path("/dev/null/a.wav"), tmp_path / "a\0.wav"):
        with pytest.raises(OutputError, match="cannot be written: "):
            recorded(Paced(sound(samples(1.0)), MadeTime()), path)
    assert list(tmp_path.iterdir()) == []


FULL = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from pocketphi.runtime.audio import Sound
from pocketphi.runtime.clock import SkippingClock
from pocketphi.runtime.errors import OutputError
from pocketphi.runtime.sources import Paced, recorded

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
blocks = iter([np.ones(16000, np.float32)] * 3)
given = 0
try:
    with recorded(Paced(Sound("clip", 16000, blocks), SkippingClock()), Path(sys.argv[1])) as source:
        for block in source.blocks:
            given += len(block)
except OutputError as exc:
    print(exc)
print(given)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs a limit of the file size")
def test_a_disk_that_gets_full(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    found = subprocess.run(
        [sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, timeout=60, check=True
    )
    said, given = found.stdout.splitlines()
    part = tmp_path / "a.wav.part"
    assert said == f"'{part}': cannot be written: File too large; it holds the first 0.7 s"
    assert found.stderr == f"'{part}': cannot be written: File too large; listening goes on without it\n"
    assert given == "48000", "everything that was heard"
    assert list(tmp_path.iterdir()) == [part]
    assert len(audio.load(part).samples) == 11200  # 7 blocks of 6400 bytes


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_what_is_no_regular_file_is_not_recorded_over(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    (tmp_path / "precious").write_bytes(b"kept")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        before = {p.name: p.lstat().st_ino for p in tmp_path.iterdir()}
        for name in ("pipe", "link", "socket"):
            for refuse in (check_recording, lambda p: recorded(Paced(sound(samples(1.0)), MadeTime()), p)):
                with pytest.raises(OutputError, match="is not a regular file"):
                    refuse(tmp_path / name)
    assert {p.name: p.lstat().st_ino for p in tmp_path.iterdir()} == before
    assert (tmp_path / "precious").read_bytes() == b"kept"


def test_what_is_heard_is_not_recorded_over(tmp_path: Path) -> None:
    heard, other = tmp_path / "a.wav", tmp_path / "b.wav"
    heard.write_bytes(b"sound")
    check_recording(other, heard)
    other.hardlink_to(heard)
    (tmp_path / "c.wav.part").hardlink_to(heard)
    for path in (heard, other, tmp_path / "c.wav"):
        with pytest.raises(InputError, match="is the file that is listened to"):
            check_recording(path, heard)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_a_pipe_or_a_link_in_the_place_of_the_part_is_replaced(kind: str, tmp_path: Path) -> None:
    part, precious = tmp_path / "a.wav.part", tmp_path / "precious"
    precious.write_bytes(b"kept")
    if kind == "pipe":
        os.mkfifo(part)
    else:
        part.symlink_to(precious)
    with recorded(Paced(sound(samples(0.5)), MadeTime(), pace=False), tmp_path / "a.wav") as source:
        assert sum(map(len, source.blocks)) == 8000
    assert len(audio.load(tmp_path / "a.wav").samples) == 8000
    assert precious.read_bytes() == b"kept"


def test_two_do_not_record_to_one_file(tmp_path: Path) -> None:
    """A lock belongs to whom opened it, so that two of one process are as two processes are."""
    path = tmp_path / "a.wav"
    with recorded(Paced(sound(samples(0.5)), MadeTime(), pace=False), path) as source:
        with pytest.raises(InUseError if os.name != "nt" else OutputError):
            recorded(Paced(sound(samples(0.5)), MadeTime()), path)
        assert sum(map(len, source.blocks)) == 8000
    assert len(audio.load(path).samples) == 8000


@pytest.mark.parametrize("kind", [Paced, Piped, Microphone])
def test_all_of_them_are_sources(kind: type) -> None:
    """They know nothing of `Source`, which is above or beside them."""
    counted = {"overruns", "underruns"}  # where they are counted, in the constructor
    assert {n for n in vars(Source) if not n.startswith("_")} - counted <= set(dir(kind))
    assert {"__enter__", "__exit__"} <= set(dir(kind))
