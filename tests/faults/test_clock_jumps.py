# SPDX-License-Identifier: Apache-2.0
"""A wall clock that is set while somebody listens: nothing is lost or heard twice, and no delay is an hour.

Live transcription goes by the monotonic clock. If anything in it asked for the time of day instead, audio
would come an hour late or all at once, and delays would be negative or enormous.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from pocketphi.runtime.audio import Sound
from pocketphi.runtime.engine import Model
from pocketphi.runtime.live import Listener, LiveOptions
from pocketphi.runtime.reader import Reader
from pocketphi.runtime.sources import Paced
from pocketphi.runtime.speech_task import Task

from ..bite.zygote import Child, Outcome, Zygote
from ..runtime.test_live import check as check_events
from ..test_live_cli import RATE, objects, reference, samples
from .conftest import needs_linux
from .worlds import CLIP, HERE, ONE, World, preloaded

pytestmark = needs_linux
HOUR_S = 3600
LIVE = ["live", "--json", "--step", "0.5", *ONE]


@pytest.fixture(scope="module")
def jumping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    with preloaded(HERE / "clock_jump.c", tmp_path_factory.mktemp("clock")) as running:
        yield running


@pytest.fixture
def there(jumping: Zygote, user: dict[str, str], tmp_path: Path) -> World:
    return World(jumping, user, tmp_path, {"CLOCK_JUMPS": str(tmp_path / "looks")})


def test_the_clock_jumps(there: World) -> None:
    """What the others rest on: in a second, the time of day moves by an hour, and the monotonic clock does
    not."""
    code = (
        "import time\n"
        "days, steady = [], []\n"
        "for _ in range(100): days.append(time.time()); steady.append(time.monotonic()); time.sleep(0.01)\n"
        "print(max(days) - min(days) > 3600, steady == sorted(steady), steady[-1] - steady[0] < 600)\n"
    )
    done = there.zygote.start([], env={**there.env, **there.extra}, cwd=there.path, code=code).wait()
    assert (done.code, done.out) == (0, b"True True True\n")


def check(outcome: Outcome, there: World, n_samples: int) -> dict[str, Any]:
    """Every sample covered once, all delays those of a watch; gives the summary."""
    assert (outcome.code, outcome.timed_out) == (0, False), outcome.err[-2000:]
    *events, summary = objects(outcome.out)
    assert [e["text"] for e in events if e["type"] == "final"] == [reference()]
    closed = [e for e in events if e["type"] != "partial"]
    assert closed[0]["t0"] == 0
    assert all(abs(a["t1"] - b["t0"]) < 1e-9 for a, b in pairwise(closed))
    assert abs(closed[-1]["t1"] - n_samples / RATE) <= 1e-3
    assert summary["dropped_samples"] == summary["overruns"] == summary["underruns"] == 0
    assert summary["seconds"] == round(n_samples / RATE, 3)
    of_events = [e["delay"] for e in events if "delay" in e and e["type"] != "silence"]
    figures = [v for one in summary["delays"].values() for k, v in one.items() if k != "n" and v is not None]
    assert figures and all(0 <= value < HOUR_S / 10 for value in of_events + figures), (of_events, figures)
    assert int((there.path / "looks").read_text("ascii")) > 0, "nobody looked: the jumps proved nothing"
    return summary


def test_a_file_in_real_time(there: World) -> None:
    path = there.path / "clip.wav"
    soundfile.write(path, samples(), RATE)
    began = time.monotonic()
    outcome = there.run([*LIVE, "--file", str(path), "--realtime", "--save-audio", "kept.wav"])
    assert time.monotonic() - began >= len(samples()) / RATE - 0.2, "no faster than it was said"
    check(outcome, there, len(samples()))
    assert np.array_equal(
        soundfile.read(there.path / "kept.wav", dtype="float32")[0], samples() / np.float32(32768)
    )


def test_a_pipe_that_fills_as_a_microphone_does(there: World) -> None:
    """A tenth of a second at a time, at the pace of the sound."""
    reading, writing = os.pipe()

    def feed(into: int) -> None:
        began, sound = time.monotonic(), samples()
        with os.fdopen(into, "wb", 0) as pipe:
            for at in range(0, len(sound), RATE // 10):
                time.sleep(max(0.0, began + at / RATE - time.monotonic()))
                pipe.write(sound[at : at + RATE // 10].astype("<i2").tobytes())

    child: Child = there.start([*LIVE, "--stdin"], stdin=reading)
    os.close(reading)
    writer = threading.Thread(target=feed, args=(writing,))
    writer.start()
    outcome = child.wait()
    writer.join()
    check(outcome, there, len(samples()))


class Suspended:
    """A clock that goes on by an hour at once, as on systems whose clock counts the time that they sleep."""

    def __init__(self, at: float) -> None:
        self._time, self._at = 100.0, 100.0 + at

    def now(self) -> float:
        return self._time + (HOUR_S if self._time >= self._at else 0)

    def wait_until(self, moment: float) -> None:
        while self.now() < moment:
            self._time = min(moment, self._time + 0.01)


@pytest.mark.parametrize("at", [0.0, 0.5, 1.3, 2.5, 4.0])
def test_the_steady_clock_jumps_forward(at: float, model: Path) -> None:
    """All that is due then comes at once: nothing is skipped, and the words are the same."""
    said = samples() / np.float32(32768)
    clock = Suspended(at)
    with Model(model, n_threads=1) as loaded, Paced(Sound("made", RATE, iter([said])), clock) as source:
        listener = Listener(Reader(loaded, Task(), {}), source, LiveOptions(step_s=0.5), clock)
        events = list(listener)
    check_events(events, len(said))
    assert [e.text for e in events if e.type == "final"] == [reference()]
    assert all(e.delay >= 0 for e in events)
    found = listener.summary.to_object()
    assert found["dropped_samples"] == 0
    assert found["seconds"] == round(len(said) / RATE, 3)


def test_two_sessions_and_a_transcript(there: World) -> None:
    """Names made of the time of day, and stamps of files from an hour ahead, are no reason to fail."""
    for _ in range(2):
        outcome = there.run(["live", "--stdin", "-o", "out", *ONE], stdin=samples().astype("<i2").tobytes())
        assert outcome.code == 0, outcome.err[-2000:]
    written = list((there.path / "out").glob("live-*.txt"))
    assert [p.read_text("utf-8") for p in written] == [reference() + "\n"] * 2
    assert there.done(["transcribe", str(CLIP), *ONE]).out.decode() == reference() + "\n"
    found = json.loads(there.done(["run", "-p", "How do you spell tea?", "--json", *ONE]).out)
    assert found["text"] == "T-E-A."
    assert all(0 <= value < 1e6 for key, value in found["timings"].items() if key.endswith("_ms"))
