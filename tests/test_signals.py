# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C at any moment, most of all while the program is still starting."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are sent to a process there")

MOMENTS = [0.0, 0.005, *(0.02 * i for i in range(1, 16)), 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0]


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A user with a home, and the built-in model in its cache."""
    home = tmp_path_factory.mktemp("home")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("POCKETPHI_", "XDG_", "HF_"))}
    clean |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "NO_COLOR": "1"}
    subprocess.run(
        [*program(2), "run", "-p", "Hi", "-n", "1"], env=clean, timeout=120, check=True, capture_output=True
    )
    return clean


BEGIN = """
import os, signal, sys
from pocketphi.cli import main
sys.argv[0] = "pocketphi"
real = signal.signal
def first(*args):
    signal.signal = real
    real(*args)
    os.write(SIGN, b".")
signal.signal = first
main()
"""


def program(sign: int) -> list[str]:
    """It says on this descriptor that it looks after SIGINT: what is earlier is mostly the interpreter's."""
    return [sys.executable, "-c", BEGIN.replace("SIGN", str(sign))]


def interrupted(env: dict[str, str], after_s: float, *args: str, times: int = 1) -> tuple[int, str]:
    """Exit code and stderr of a program that got SIGINT so long after its beginning. Its stdin stays open."""
    ours, theirs = os.pipe()
    with subprocess.Popen(
        [*program(theirs), *args],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, pass_fds=(theirs,),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:  # fmt: skip
        os.close(theirs)
        assert os.read(ours, 1) == b"."
        os.close(ours)
        time.sleep(after_s)
        for _ in range(times):
            process.send_signal(signal.SIGINT)
        process.wait(timeout=60)  # with its input still open
        assert process.stderr is not None
        err = process.stderr.read().decode("utf-8")
    return process.returncode, err


@pytest.mark.parametrize("after_s", MOMENTS)
def test_ctrl_c_while_it_starts(after_s: float, env: dict[str, str]) -> None:
    """Transcribing from a pipe in which nothing comes: it never ends by itself."""
    code, err = interrupted(env, after_s, "transcribe", "-")
    assert (code, "Traceback" in err) == (130, False), err


@pytest.mark.parametrize("after_s", MOMENTS[::3])
def test_ctrl_c_while_live_starts(after_s: float, env: dict[str, str]) -> None:
    code, err = interrupted(env, after_s, "live", "--stdin")
    assert (code, "Traceback" in err) == (130, False), err


@pytest.mark.parametrize("after_s", [0.0, 0.1, 0.3, 0.6])
def test_ctrl_c_twice(after_s: float, env: dict[str, str]) -> None:
    code, err = interrupted(env, after_s, "transcribe", "-", times=2)
    assert (code, "Traceback" in err) == (130, False), err


SLOW_IMPORT = """
import sys, pathlib
folder = pathlib.Path(sys.argv.pop())
sys.path.insert(0, str(folder))
(folder / "slow.py").write_text('''
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
    [None for _ in range(1000)]
except BaseException:
    raise ImportError("initialization failed")
''')
class Dropped:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        [None for _ in range(1000)]
import os, signal, time
import pocketphi.cli, pocketphi.cli.program
def perform():
    WHAT
    print("whole", flush=True)
    time.sleep(60)
pocketphi.cli.program.perform = perform
pocketphi.cli.main()
"""


@pytest.mark.parametrize("what", ["import slow", "Dropped()"])
def test_ctrl_c_where_an_exception_would_be_lost(what: str, tmp_path: Path) -> None:
    """As in an extension's import, which makes ImportError of every exception: it ends first."""
    script = SLOW_IMPORT.replace("WHAT", what)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True, text=True, timeout=30, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "whole\n", "")
