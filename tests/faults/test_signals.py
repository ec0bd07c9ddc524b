# SPDX-License-Identifier: Apache-2.0
"""SIGINT and SIGTERM at any moment of every command: 130 or 143, no traceback, nothing half-written.

`tests/test_signals.py` has Ctrl-C while the program starts, and `tests/bite/test_process.py` in a long
prompt. Here each command is met at moments spread over all of its life, once it listens to signals; what it
has written then is whole or a part that can be gone on with. A command that had finished before its signal
came has to have finished well.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from ..bite.zygote import PROGRAM, Child
from ..test_signals import SLOW_IMPORT
from ..tiny import NANO
from .conftest import needs_linux
from .test_kill import CONVERT, IMATRIX, ITEMS, LOGITS, TRANSCRIBE
from .worlds import CLIP, EVAL, ONE, TEXT, World, fractions, seconds_of, whole_model

pytestmark = needs_linux

MOMENTS = 3  # for each signal
PICTURE = str(EVAL / "images" / "img-012.png")
COMMANDS: dict[str, list[str]] = {
    "run": ["run", "--image", PICTURE, "--audio", str(CLIP), "-p", "What?", "-n", "30", *ONE],
    "chat": ["chat", *ONE],
    "convert": CONVERT,
    "info": ["info", "--check"],
    "transcribe": TRANSCRIBE,
    "live": ["live", "--file", str(CLIP), "--save-audio", "kept.wav", "-o", "out", *ONE],
    "eval": ITEMS,
    "logits": LOGITS,
    "imatrix": IMATRIX,
    "bench": ["bench", "-n", "2", "-r", "2", "--only", "text", *ONE],
    "plan": ["plan", str(NANO), "--ram", "8G"],
    "doctor": ["doctor", "--json"],
}
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
PARTS = r"\.part$|\.part\.jsonl$"  # what --resume goes on with, and sound up to its last block


def listens(child: Child) -> bool:
    """Whether its handler of SIGTERM is there, the last of the two to be put in place."""
    with suppress(FileNotFoundError, ProcessLookupError):
        caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{child.pid}/status").read_text("ascii"))
        return caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)
    return True  # it is over


def met(world: World, name: str, number: signal.Signals, after_s: float) -> int:
    """The exit code of a command that got a signal so long after it began to listen."""
    child = world.start(COMMANDS[name], stdin=b"Hi\nHello\n/save a.json\n" if name == "chat" else b"")
    limit = time.monotonic() + 30
    while not listens(child) and time.monotonic() < limit:
        time.sleep(0.001)
    time.sleep(after_s)
    with suppress(ProcessLookupError):
        child.send(number)
    outcome = child.wait()
    text = outcome.err.decode("utf-8")
    assert not outcome.timed_out
    assert "Traceback" not in text and "Exception ignored" not in text, text[-2000:]
    # The interpreter takes SIGTERM's handler away in its last milliseconds: then everything has been done.
    late = number == signal.SIGTERM and outcome.code == -number
    assert outcome.code in (0, CODES[number]) or late, (outcome.code, text[-2000:])
    return 0 if late else outcome.code


def check_left(world: World, code: int) -> None:
    """Nothing that has no name of its own, and no final file that is not whole."""
    names = [str(p.relative_to(world.path)) for p in world.path.rglob("*") if p.is_file()]
    hidden = [n for n in names if ".partial-" in n or ".replaced-" in n]
    assert hidden == []
    parts = [n for n in names if re.search(PARTS, n)]
    assert code != 0 or parts == []
    if (world.path / "out" / "bundle.json").exists():
        assert whole_model(world.path / "out")


@pytest.mark.parametrize("name", COMMANDS)
def test_any_moment(name: str, world: World, tmp_path: Path) -> None:
    codes = []
    moments = fractions(MOMENTS * len(CODES), seed=len(name))
    (world.path / "text.txt").write_text(TEXT, "utf-8")
    takes_s = seconds_of(world, COMMANDS[name], b"Hi\nHello\n/save a.json\n" if name == "chat" else b"")
    for i, part in enumerate(moments):
        here = tmp_path / str(i)
        here.mkdir()
        (here / "text.txt").write_text(TEXT, "utf-8")
        again = World(world.zygote, world.env, here)
        codes.append(met(again, name, list(CODES)[i % 2], part * takes_s))
        check_left(again, codes[-1])
    assert 130 in codes or 143 in codes, "none of the signals came in time"


@pytest.mark.parametrize("what", ["import slow", "Dropped()"])
def test_sigterm_where_an_exception_would_be_lost(what: str, tmp_path: Path) -> None:
    """In a finalizer or a callback from C it would be printed as ignored, and the program would go on."""
    script = SLOW_IMPORT.replace("WHAT", what).replace("SIGINT", "SIGTERM")
    listening = "def perform():\n    signal.signal(signal.SIGTERM, pocketphi.cli.on_signal)\n"
    done = subprocess.run(
        [sys.executable, "-c", script.replace("def perform():\n", listening), str(tmp_path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (143, "whole\n", "")


@pytest.mark.parametrize("after_s", [0.0, 0.1, 0.3, 0.6, 1.0])
def test_sigterm_while_it_is_imported(after_s: float, user: dict[str, str], tmp_path: Path) -> None:
    """A process of its own, with imports that take long: it ends silently, by its handler or without it."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "transcribe", "-", "-o", "out"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=user, cwd=tmp_path,
    ) as process:  # fmt: skip
        time.sleep(after_s)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)  # with its input still open
        assert process.stderr is not None
        text = process.stderr.read().decode("utf-8")
    assert process.returncode in (143, -signal.SIGTERM)
    assert "Traceback" not in text and "Exception ignored" not in text, text
    assert not [p for p in tmp_path.rglob("*") if ".partial-" in p.name]
