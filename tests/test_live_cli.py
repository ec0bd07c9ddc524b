# SPDX-License-Identifier: Apache-2.0
"""`live` as people and scripts meet it: its own process, signals, pipes, a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import struct
import subprocess
import termios
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from fcntl import ioctl
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import soundfile

from . import tiny
from .runtime.test_live_view import Screen
from .test_cli import CALL, call

AUDIO = tiny.NANO.parent / "eval" / "audio"
CLIP = AUDIO / "asr-003.flac"
RATE = 16000


def objects(out: str | bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def finals(events: Sequence[dict[str, Any]]) -> list[str]:
    return [e["text"] for e in events if e["type"] == "final"]


def samples() -> np.ndarray[Any, np.dtype[np.int16]]:
    """The clip with silence around it, as a microphone gives it."""
    said, rate = soundfile.read(CLIP, dtype="int16")
    assert rate == RATE
    quiet = np.zeros(RATE, np.int16)
    return np.concatenate([quiet, said, quiet, quiet])


def reference() -> str:
    rows = [json.loads(line) for line in (AUDIO.parent / "speech.jsonl").read_text("utf-8").splitlines()]
    return str(next(row["reference"] for row in rows if row["audio"] == "audio/asr-003.flac"))


USAGE = [
    (["--stdin", "--file", CLIP], "--stdin and --file"),
    (["--selftest", "--stdin"], "expected one"),
    (["--device", "1", "--file", CLIP], "--device and --file"),
    (["--realtime"], "--file"),
    (["--minutes", "3"], "--selftest"),
    (["--selftest", "--minutes", "0"], "--minutes is 0"),
    (["--selftest", "--minutes", "nan"], "--minutes is nan"),
    (["--selftest", "--translate", "French"], "--selftest"),
    (["--stdin", "--step", "0"], "--step is 0 s, expected 0.2 to 30"),
    (["--stdin", "--step", "nan"], "--step is nan"),
    (["--stdin", "--step", "abc"], "--step"),
    (["--stdin", "--pause", "-1"], "pause"),
    (["--stdin", "--pause", "nan"], "--pause is nan s"),
    (["--stdin", "-o", ""], "is empty"),
    (["--file", ""], "is empty"),
    (["--stdin", "--save-audio", ""], "is empty"),
    (["--stdin", "--format", "", "-o", "x"], "format ''"),
    (["--file", CLIP, "--save-audio", CLIP], "is the file that is listened to"),
    (["--stdin", "--instruction", "\udcff"], "--instruction is not Unicode"),
    (["--stdin", "--both"], "language"),
    (["--stdin", "--translate", " "], "empty"),
    (["--stdin", "--prompt", " "], "empty"),
    (["--stdin", "--instruction", "x", "--prompt", "y"], "give one of them"),
    (["--stdin", "--format", "srt"], "-o"),
    (["--stdin", "--format", "doc", "-o", "x"], "format 'doc'"),
    (["--file", "/nowhere.wav"], "/nowhere.wav"),
    (["--no-such-flag"], "--no-such-flag"),
]


@pytest.mark.parametrize(
    ("args", "want"), USAGE, ids=lambda v: " ".join(map(str, v))[:40] if isinstance(v, list) else None
)
def test_usage_errors_are_exit_2_and_one_line(
    args: list[str | Path], want: str, env: dict[str, str], tmp_path: Path
) -> None:
    args = [tmp_path / "x" if a == "x" else a for a in args]
    code, out, err = call(env, "live", *args)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert want in err


def test_events_of_a_file(env: dict[str, str]) -> None:
    code, out, err = call(env, "live", "--file", CLIP, "--json")
    assert code == 0
    assert "Traceback" not in err
    *events, summary = objects(out)
    assert finals(events) == [reference()]
    seconds = soundfile.info(CLIP).duration
    # What was heard is covered without a gap, to the millisecond that times are written with.
    closed = [e for e in events if e["type"] != "partial"]
    assert closed[0]["t0"] == 0
    assert all(abs(a["t1"] - b["t0"]) < 1e-9 for a, b in pairwise(closed))
    assert abs(closed[-1]["t1"] - seconds) <= 1e-3
    assert summary["type"] == "summary"
    assert summary["utterances"] == 1
    assert summary["dropped_samples"] == 0


def test_plain_text_is_what_scripts_get(env: dict[str, str]) -> None:
    code, out, err = call(env, "live", "--file", CLIP)
    assert (code, out) == (0, reference() + "\n")
    assert "s heard, 1 " in err
    assert "delay" not in err, "a file that is read at once has none"


def test_in_real_time_what_is_committed_stays(env: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "clip.wav"
    soundfile.write(path, samples(), RATE)
    code, out, _ = call(env, "live", "--file", path, "--realtime", "--step", "0.5", "--json")
    assert code == 0
    *events, summary = objects(out)
    assert finals(events) == [reference()]
    shown = ""
    for event in (e for e in events if e["type"] == "partial"):
        assert event["committed"].startswith(shown)
        assert event["text"].startswith(event["committed"])
        shown = event["committed"]
    assert reference().startswith(shown)
    assert summary["committed_word_changes"] == 0
    assert summary["delays"]["final"]["n"] == 1


@pytest.mark.parametrize("kind", ["raw", "wav"])
def test_a_pipe_gives_the_same_text(kind: str, env: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "clip.wav"
    soundfile.write(path, samples(), RATE, subtype="PCM_16")
    data = path.read_bytes() if kind == "wav" else samples().astype("<i2").tobytes()
    code, out, _ = call(env, "live", "--stdin", "--json", stdin=data)
    *events, summary = objects(out)
    assert (code, finals(events)) == (0, [reference()])
    assert summary["seconds"] == round(len(samples()) / RATE, 3)


def test_an_empty_pipe_is_an_error(env: dict[str, str]) -> None:
    code, out, err = call(env, "live", "--stdin", "--json")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: standard input: is empty")


def test_files_and_the_audio_are_kept(env: dict[str, str], tmp_path: Path) -> None:
    path, kept, folder = tmp_path / "clip.wav", tmp_path / "kept.wav", tmp_path / "new" / "folder"
    soundfile.write(path, samples(), RATE, subtype="PCM_16")
    code, out, _ = call(
        env, "live", "--file", path, "--format", "txt,srt,vtt,json", "-o", folder, "--save-audio", kept
    )
    assert (code, out) == (0, reference() + "\n")
    assert sorted(p.name for p in folder.iterdir()) == [
        f"clip.wav.live.{f}" for f in ("json", "srt", "txt", "vtt")
    ]
    assert (folder / "clip.wav.live.txt").read_text("utf-8") == reference() + "\n"
    segment = json.loads((folder / "clip.wav.live.json").read_text("utf-8"))["segments"][0]
    assert 0.5 < segment["t0"] < 1.2
    heard, rate = soundfile.read(kept, dtype="float32")
    assert rate == RATE
    assert np.array_equal(heard, samples() / np.float32(32768))


def test_a_session_from_a_pipe_is_named_by_its_time(env: dict[str, str], tmp_path: Path) -> None:
    assert call(env, "live", "--stdin", "-o", tmp_path, stdin=samples().tobytes())[0] == 0
    (path,) = tmp_path.glob("live-????????-??????.txt")
    assert path.read_text("utf-8") == reference() + "\n"


def test_sessions_of_one_second_have_names_of_their_own(tmp_path: Path) -> None:
    from pocketphi.cli import live_files

    with ExitStack() as stack:
        for _ in range(8):  # in far less than 8 s
            files = stack.enter_context(live_files.live_files(tmp_path, None, ("txt", "json")))
            assert files is not None
    assert len(list(tmp_path.glob("*.txt"))) == len(list(tmp_path.glob("*.json"))) == 8


def test_a_transcript_that_was_interrupted_is_not_touched(env: dict[str, str], tmp_path: Path) -> None:
    names = [f"{CLIP.name}.{ending}" for ending in ("part.jsonl", "txt.part", "txt")]
    for name in names:
        (tmp_path / name).write_text("of transcribe", "utf-8")
    assert call(env, "live", "--file", CLIP, "-o", tmp_path)[0] == 0
    assert {(tmp_path / name).read_text("utf-8") for name in names} == {"of transcribe"}
    assert (tmp_path / f"{CLIP.name}.live.txt").read_text("utf-8") == reference() + "\n"


def test_what_cannot_be_written_is_found_before_the_model_loads(env: dict[str, str], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / f"{CLIP.name}.live.txt").mkdir()
    for args in (["--save-audio", tmp_path / "pipe"], ["--save-audio", tmp_path], ["-o", tmp_path]):
        code, out, err = call(env, "live", "--file", CLIP, *args)
        assert (code, out) == (6, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err


def test_a_recording_that_fails_does_not_end_the_session(env: dict[str, str], tmp_path: Path) -> None:
    """A limit of 100 kB for any file stands for a disk that gets full."""
    kept, folder = tmp_path / "kept.wav", tmp_path / "out"
    call(env, "info")  # the built-in model is there: nothing else is large
    limited = ["bash", "-c", 'trap "" XFSZ; ulimit -f 100; exec "$@"', "bash", *CALL]
    args = ["live", "--file", CLIP, "-o", folder, "--save-audio", kept]
    done = subprocess.run([*limited, *map(str, args)], capture_output=True, env=env, timeout=300, check=False)
    assert (done.returncode, done.stdout.decode()) == (6, reference() + "\n")
    last = done.stderr.decode().splitlines()[-1]
    assert last.startswith(f"error: '{kept}.part': cannot be written: File too large; it holds the first ")
    assert (folder / f"{CLIP.name}.live.txt").read_text("utf-8") == reference() + "\n"
    assert 0 < len(soundfile.read(f"{kept}.part")[0]) < soundfile.info(CLIP).frames


def test_a_terminal_is_no_pipe(env: dict[str, str]) -> None:
    code, written = on_a_terminal(env, 200, ["live", "--stdin"])
    assert code == 2
    assert written.startswith("error: --stdin: standard input is a terminal")


def test_both_languages(env: dict[str, str]) -> None:
    code, out, _ = call(env, "live", "--file", AUDIO / "ast-000.flac", "--both", "-tr", "French")
    assert (code, out) == (
        0,
        "The big bird dances behind the car.\nLe grand oiseau danse derrière la voiture.\n",
    )


class Live:
    """`live --stdin` that has heard the clip and waits for more, with its first words on stdout."""

    def __init__(self, env: dict[str, str], *args: str | Path) -> None:
        self.process = subprocess.Popen(
            [*CALL, "live", "--stdin", *map(str, args)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env,
        )  # fmt: skip
        self.stdin, self.stdout = self.pipe(self.process.stdin), self.pipe(self.process.stdout)
        self.stdin.write(samples()[: -2 * RATE].astype("<i2").tobytes())
        self.stdin.flush()
        self.lines: list[bytes] = []
        while not self.lines or json.loads(self.lines[-1])["type"] != "partial":
            self.lines.append(self.stdout.readline())
            assert self.lines[-1], "it ended before the first words"

    @staticmethod
    def pipe(stream: IO[bytes] | None) -> IO[bytes]:
        assert stream is not None
        return stream

    def rest(self) -> tuple[int, list[dict[str, Any]], str]:
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, objects(b"".join(self.lines) + out), err.decode("utf-8")


@pytest.mark.parametrize(("number", "want"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_the_first_signal_ends_the_session_and_loses_nothing(
    number: signal.Signals, want: int, env: dict[str, str], tmp_path: Path
) -> None:
    """The utterance is open when the signal comes: no pause has ended it, and the pipe is still open."""
    live = Live(env, "--json", "-o", tmp_path)
    live.process.send_signal(number)
    code, (*events, summary), err = live.rest()
    assert code == want
    assert "Traceback" not in err
    assert finals(events) == [reference()]
    assert summary["type"] == "summary"
    assert summary["seconds"] == round((len(samples()) - 2 * RATE) / RATE, 3)
    (path,) = tmp_path.iterdir()
    assert path.read_text("utf-8") == reference() + "\n"


def test_two_signals_end_it_at_once(env: dict[str, str], tmp_path: Path) -> None:
    """Both come while the process is halted, so that none is over before the other. The parts stay.

    Which of two that wait is the second is the system's choice, and its code is the one: another thread may
    take SIGTERM before the main one looks at SIGINT.
    """
    live = Live(env, "--json", "-o", tmp_path)
    for number in (signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGCONT):
        live.process.send_signal(number)
    code, events, err = live.rest()
    assert code in (130, 143)
    assert "Traceback" not in err
    assert events[-1]["type"] != "summary"
    assert [p.suffix for p in tmp_path.iterdir()] == [".part"]


def test_ctrl_c_twice_is_a_keyboard_interrupt() -> None:
    from pocketphi.cli.live import _signals

    stopped: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    with _signals(lambda: stopped.append(1)) as received:
        signal.raise_signal(signal.SIGINT)
        assert stopped == [1]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert received == [signal.SIGINT] * 2
    assert stopped == [1]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_reader_that_leaves_ends_the_session(env: dict[str, str], tmp_path: Path) -> None:
    live = Live(env, "--json", "-o", tmp_path)
    with live.process:
        live.stdout.close()
        live.stdin.write(bytes(4 * RATE))  # the pause after the words: a final that nobody reads
        live.stdin.flush()
        err = live.pipe(live.process.stderr).read().decode("utf-8")
        assert live.process.wait(timeout=60) == 1
    assert all(line.startswith(("loading", "listening")) for line in err.splitlines()), err
    assert [p.suffix for p in tmp_path.iterdir()] == [".txt"]


def test_what_comes_before_damage_is_read_to_its_end(env: dict[str, str], tmp_path: Path) -> None:
    """A file is decoded 2^20 samples at once: the words end there, then comes one that is no number."""
    path, folder = tmp_path / "clip.wav", tmp_path / "out"
    said = samples()[: -2 * RATE] / np.float32(32768)
    damaged = np.zeros((1 << 20) + 1000, np.float32)
    damaged[(1 << 20) - len(said) : 1 << 20] = said
    damaged[-1] = np.nan
    soundfile.write(path, damaged, RATE, subtype="FLOAT")
    code, out, err = call(env, "live", "--file", path, "--json", "-o", folder)
    assert code == 2
    assert err.splitlines()[-1].startswith("error: ")
    assert "clip.wav" in err.splitlines()[-1]
    *events, summary = objects(out)
    assert finals(events) == [reference()]
    assert summary["type"] == "summary"
    assert (folder / "clip.wav.live.txt").read_text("utf-8") == reference() + "\n"


def on_a_terminal(
    env: dict[str, str],
    columns: int,
    args: Sequence[str | Path],
    each: Callable[[bytes], None] = lambda _: None,
) -> tuple[int, str]:
    """A child whose three streams are one terminal; what it wrote."""
    master, slave = pty.openpty()
    ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        [*CALL, *map(str, args)], stdin=slave, stdout=slave, stderr=slave, env=env | {"TERM": "xterm"}
    )
    os.close(slave)
    raw = bytearray()
    try:
        while chunk := os.read(master, 65536):
            raw += chunk
            each(bytes(raw))
    except OSError:  # the other end is closed
        pass
    os.close(master)
    return process.wait(timeout=60), raw.decode("utf-8")


def test_a_terminal_is_left_with_the_words_alone(env: dict[str, str], tmp_path: Path) -> None:
    call(env, "info")  # the built-in model is there: no progress bar
    path = tmp_path / "clip.wav"
    soundfile.write(path, samples(), RATE)
    code, written = on_a_terminal(env, 40, ["live", "--file", path, "--realtime", "--step", "0.5"])
    assert code == 0
    for state in ("listening", "speaking "):
        assert re.search(rf"{state} [█░]{{12}} +-\S+ dBFS", written), f"the meter while {state}"
    screen = Screen(40)
    screen.feed(written)
    text = " ".join("".join(r.ljust(40) for r in screen.rows).split())
    assert text.startswith("loading the model… listening to"), text
    after = text.partition("Ctrl-C ends")[2].split()
    assert after[0] in ("[00:00]", "[00:01]")
    assert " ".join(after[1:]).startswith(reference())
    assert "dBFS" not in text


def test_the_devices_are_listed(env: dict[str, str]) -> None:
    code, out, err = call(env, "live", "--list-devices", "--json")
    if code == 2:
        assert "PortAudio" in err
        assert err.count("\n") == 1
        return
    assert code == 0
    for device in json.loads(out):
        assert set(device) >= {"index", "name", "host", "channels", "sample_rate", "is_default"}
        assert device["channels"] > 0


def test_a_device_that_is_not_there(env: dict[str, str]) -> None:
    code, out, err = call(env, "live", "--device", "no such microphone, surely")
    assert (code, out) == (2, "")
    assert err.startswith("error: microphone")
    assert err.count("\n") == 1, err


def test_the_selftest_ends_with_its_figures(env: dict[str, str]) -> None:
    code, out, _ = call(env, "live", "--selftest", "--minutes", "0.2", "--json")
    assert code == 0
    *events, figures = objects(out)
    assert finals(events)
    assert figures["type"] == "summary"
    assert figures["utterances"] == len(finals(events))
    assert figures["committed_word_changes"] == 0
    assert figures["dropped_samples"] == 0
    assert figures["wer"] >= 0


def test_flags_of_a_spoken_question(env: dict[str, str]) -> None:
    code, out, err = call(env, "run", "-p", "x", "--device", "0")
    assert (code, out, err) == (2, "", "error: --device is about --mic\n")
    code, out, err = call(env, "run", "--mic", "--device", "no such microphone, surely")
    assert (code, out) == (2, "")
    assert err.startswith("error: microphone")
    assert err.count("\n") == 1
