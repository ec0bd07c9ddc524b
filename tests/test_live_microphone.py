# SPDX-License-Identifier: Apache-2.0
"""Programs that listen to a microphone: PortAudio records what the test plays, in real time."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from .microphone import VirtualMicrophone, virtual_microphone
from .test_live_cli import AUDIO, CALL, CLIP, finals, objects


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
