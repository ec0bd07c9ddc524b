# SPDX-License-Identifier: Apache-2.0
"""Programs that listen to a microphone: PortAudio records what the test plays, in real time."""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from pocketphi.runtime import audio
from pocketphi.runtime.engine import Model
from pocketphi.runtime.parts import Float32, Media, Message

from . import scoring
from .conftest import Converted
from .microphone import VirtualMicrophone, virtual_microphone
from .test_cli import CALL
from .test_live_cli import AUDIO, CLIP, finals, objects


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A cache of the test's own, for the built-in model."""
    return {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")), "NO_COLOR": "1"}


@pytest.fixture(scope="module")
def microphone(
    cache: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[VirtualMicrophone, dict[str, str]]]:
    """A microphone of the test's own, and the environment of programs that listen to it."""
    with virtual_microphone(tmp_path_factory.mktemp("sound")) as found:
        yield found, found.environment | cache


def answer(
    microphone: tuple[VirtualMicrophone, dict[str, str]], args: Sequence[str | Path], typed: bytes = b""
) -> str:
    """stdout of a program to which sqa-000 is played when it listens."""
    played, listening = microphone
    with subprocess.Popen(
        [*CALL, *map(str, args)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=listening,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(typed)
        process.stdin.close()
        process.stdin = None
        while (line := process.stderr.readline()) and "listening…".encode() not in line:
            assert b"error" not in line, line
        played.play(AUDIO / "sqa-000.flac")
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    return out.decode("utf-8")


def test_a_question_asked_by_voice(microphone: tuple[VirtualMicrophone, dict[str, str]]) -> None:
    assert answer(microphone, ["run", "--mic"]) == "A lion has 4 legs.\n"
    found = json.loads(answer(microphone, ["run", "--mic", "--device", "default", "--json"]))
    assert found["mode"] == "speech"


def test_a_spoken_turn_of_a_chat(microphone: tuple[VirtualMicrophone, dict[str, str]]) -> None:
    assert answer(microphone, ["chat"], b"/mic\n/exit\n") == "A lion has 4 legs.\n"


def test_a_microphone_that_is_unplugged(cache: dict[str, str], tmp_path: Path) -> None:
    """What was said before is written down, the file is whole, the error is one line."""
    (tmp_path / "sound").mkdir()
    with virtual_microphone(tmp_path / "sound") as found:
        listening = found.environment | cache
        with subprocess.Popen(
            [*CALL, "live", "--json", "-o", str(tmp_path / "out")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=listening,
        ) as process:  # fmt: skip
            assert process.stderr is not None
            while b"listening" not in (line := process.stderr.readline()):
                assert line.startswith(b"loading"), line
            found.play(CLIP)
            found.unplug()
            out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert err.startswith(b"error: microphone")
    assert err.count(b"\n") == 1
    *events, summary = objects(out)
    said = finals(events)
    assert said[0].startswith("Send a message")
    assert (summary["utterances"], summary["dropped_samples"]) == (len(said), 0)
    (path,) = (tmp_path / "out").iterdir()
    assert path.read_text("utf-8").splitlines() == said


def test_every_clip_through_the_microphone(
    microphone: tuple[VirtualMicrophone, dict[str, str]], tmp_path: Path, converted: Converted
) -> None:
    """The evaluation clips, in real time: what `live` writes is what its recording gives as a file."""
    played, listening = microphone
    rows = [row for row in scoring.rows("speech") if row["task"] == "asr"]
    heard = tmp_path / "heard.wav"
    with (
        (tmp_path / "out").open("wb") as out,
        subprocess.Popen(
            [*CALL, "live", "--json", "--save-audio", str(heard)],
            stdout=out, stderr=subprocess.PIPE, env=listening,
        ) as process,
    ):  # fmt: skip
        assert process.stderr is not None
        while b"listening" not in (line := process.stderr.readline()):
            assert line.startswith(b"loading"), line
        for row in rows:
            played.play(scoring.EVAL / row["audio"])
            time.sleep(1.0)  # the silence in which an utterance ends
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    *events, summary = objects((tmp_path / "out").read_bytes())
    live = finals(events)

    def transcripts(*files: Path) -> list[str]:
        names = [str(file) for file in files]
        done = subprocess.run([*CALL, "transcribe", *names], env=listening, capture_output=True, check=True)
        return done.stdout.decode("utf-8").splitlines()

    assert summary["dropped_samples"] == summary["overruns"] == summary["committed_word_changes"] == 0
    assert summary["overruled_tokens"] == 0
    assert live == transcripts(heard)
    assert len(live) >= len(rows)
    wanted = scoring.words(" ".join(row["reference"] for row in rows))

    def wer(texts: Sequence[str]) -> float:
        return 100 * scoring.edits(scoring.words(" ".join(texts)), wanted) / len(wanted)

    # How the encoder's 80 ms fall on the words is chance, in a recording anew each time. It is worth errors
    # to so small a model: whole clips, begun at eight places of the grid, say how many.
    with Model(converted("phi4-nano", "Q8_0", lora_quant="Q8_0", encoders="int8")) as model:
        clips = [audio.load(scoring.EVAL / row["audio"]).samples for row in rows]
        offline = [wer([read(model, clip[start:]) for clip in clips]) for start in range(0, 1280, 160)]
    found, mean, spread = wer(live), statistics.mean(offline), statistics.stdev(offline)
    print(f"live {found:.2f} %; whole clips {offline[0]:.2f} %, shifted {mean:.2f} ± {spread:.2f} %")
    print(summary["delays"])
    assert found <= mean + 1.0 + 2 * spread


def read(model: Model, samples: Float32) -> str:
    """A whole clip, as files of up to 40 s were read before there was a segmenter."""
    clip = Media("audio", (samples, 16000))
    return model.chat([Message("user", "Transcribe the audio clip into text.", media=(clip,))]).text
