# SPDX-License-Identifier: Apache-2.0
"""What happens to a process: signals at every stage, no memory, home, reader or AVX2, another of its kind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ..conftest import Converted
from ..tiny import NANO
from .conftest import Bitten
from .table import Case
from .test_text_inputs import tokens
from .zygote import CAN_FORK, Child, Limits, Outcome, Zygote, plain_environment

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are sent to a process there")
ENDLESS = ["run", "-p", "Hi", "--grammar", 'root ::= "ha " root']
TEA = ["run", "-p", "How do you spell tea?"]
Start = Callable[..., Child]


@pytest.fixture
def start(zygote: Zygote, user: dict[str, str], tmp_path: Path) -> Start:
    """Start the program in a folder of its own."""

    def run(args: list[str], env: dict[str, str] | None = None, **options: object) -> Child:
        return zygote.start(args, env=user | (env or {}), cwd=tmp_path, **options)  # type: ignore[arg-type]

    return run


def when(seen: Callable[[], object], child: Child, number: int) -> Outcome:
    """Send it a signal as soon as something is seen."""
    limit = time.monotonic() + 20
    while not seen() and time.monotonic() < limit:
        time.sleep(0.005)
    assert seen()
    child.send(number)
    return child.wait()


def check_end(outcome: Outcome, code: int) -> None:
    assert (outcome.code, outcome.timed_out) == (code, False), outcome.err[-2000:]
    assert b"Traceback" not in outcome.err


@pytest.mark.parametrize("delay_s", [0.1, 0.2, 0.3, 0.5, 0.7, 1.0])
def test_ctrl_c_while_a_long_prompt_is_read(delay_s: float, start: Start, tmp_path: Path) -> None:
    """Over two seconds of reading: whatever it is at, it ends with 130, and says nothing."""
    (tmp_path / "p").write_text(tokens(8191), "utf-8")
    child = start(["run", "--raw", "-f", "p", "-n", "1"])
    time.sleep(delay_s)
    child.send(signal.SIGINT)
    outcome = child.wait()
    check_end(outcome, 130 if outcome.code != -signal.SIGINT else -signal.SIGINT)
    assert outcome.code == 130 or delay_s == 0.0, (
        "only before the program has begun may it be the system's way"
    )
    assert (outcome.out.strip(), outcome.err) == (b"", b"")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_it_writes(number: int, code: int, start: Start) -> None:
    child = start(ENDLESS)
    outcome = when(lambda: child.out_so_far().startswith(b"ha "), child, number)
    check_end(outcome, code)
    assert outcome.out.strip(b"ha \n") == b""
    assert outcome.err == b""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_a_conversion(number: int, code: int, start: Start, tmp_path: Path) -> None:
    """What it has begun is gone when it ends."""
    child = start(["convert", str(NANO), "-o", "out", "--quant", "Q4_K_M"])
    outcome = when(lambda: list(tmp_path.iterdir()), child, number)
    check_end(outcome, code)
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == []


def test_a_reader_that_has_left(start: Start) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    child = start(ENDLESS, stdout=writing)
    os.close(writing)
    outcome = child.wait()
    check_end(outcome, 1)
    assert outcome.err == b""


@pytest.mark.skipif(not CAN_FORK, reason="the limit is one of Linux's")
@pytest.mark.parametrize("spare_mb", [16, 256])
@pytest.mark.parametrize("what", ["text", "image", "audio", "convert"])
def test_no_memory(
    what: str, spare_mb: int, zygote: Zygote, start: Start, user: dict[str, str], tmp_path: Path
) -> None:
    """So much address space beside what the libraries take: it works, or one line says that it does not.

    Below what imports take, and where only the threads' stacks do not fit any more, it is not promised: there
    native libraries end the process themselves.
    """
    probe = "print(open('/proc/self/status').read().split('VmSize:')[1].split()[0])"
    taken = zygote.start([], env=user, cwd=tmp_path, code=probe).wait()
    media = NANO.parent / "eval"
    args = {
        "text": [*TEA, "-n", "2"],
        "image": ["run", "--image", str(media / "images" / "img-012.png"), "-p", "What?", "-n", "2"],
        "audio": ["transcribe", str(media / "audio" / "asr-000.flac")],
        "convert": ["convert", str(NANO), "-o", "out", "--quant", "Q8_0"],
    }[what]
    outcome = start(args, limits=Limits(60, 600, int(taken.out) // 1024 + spare_mb)).wait()
    assert not outcome.timed_out
    assert b"Traceback" not in outcome.err
    assert 0 <= outcome.code <= 6, outcome
    if outcome.code:
        assert outcome.err.startswith(b"error: ")
        assert outcome.err.count(b"\n") == 1
        assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not CAN_FORK, reason="the limit is one of Linux's")
@pytest.mark.parametrize(
    ("spare_mb", "line"),
    [
        (4, rb"error: \S+tokenizer\.json: to read it needs 7\.\d MiB of memory, RLIMIT_AS \(.*\) leaves "),
        (12, rb"error: there is not enough memory for another thread "),
    ],
)
def test_no_memory_for_a_conversion(
    spare_mb: int, line: bytes, zygote: Zygote, user: dict[str, str], tmp_path: Path
) -> None:
    """Not for the tokenizer's reader; not for the second of four threads, whose stacks take 8 MiB each."""
    code = """
import resource
from pathlib import Path

resource.setrlimit(resource.RLIMIT_STACK, (8 << 20, resource.getrlimit(resource.RLIMIT_STACK)[1]))
from pocketphi.cli import main

taken = int(Path("/proc/self/status").read_text().split("VmSize:")[1].split()[0]) << 10
resource.setrlimit(resource.RLIMIT_AS, (taken + (SPARE << 20),) * 2)
main()
""".replace("SPARE", str(spare_mb))
    args = ["convert", str(NANO), "-o", "out", "--quant", "Q8_0", "-t", "4"]
    outcome = zygote.start(args, env=user, cwd=tmp_path, code=code).wait()
    assert outcome.code == 1, outcome
    assert re.fullmatch(line + rb"[^\n]*\n", outcome.err), outcome
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == []


@pytest.mark.skipif(not CAN_FORK, reason="the limit is one of Linux's")
@pytest.mark.parametrize(
    ("loaded", "line"),
    [
        ("", rb"KernelError ONNX Runtime cannot be loaded: [^\n]+\n"),
        ("onnx_session.library()", rb"KernelError [^\n]+front\.onnx: ONNX Runtime has too little [^\n]+\n"),
    ],
    ids=["the library", "a graph's threads"],
)
def test_no_memory_for_onnx_runtime(
    loaded: str, line: bytes, zygote: Zygote, user: dict[str, str], tmp_path: Path
) -> None:
    """4 MiB beside what is there: neither for the library nor for seven threads of 2 MiB or more."""
    code = f"""
import resource
from pathlib import Path
from pocketphi.runtime import kernels, onnx_session
from pocketphi.runtime.errors import PocketPhiError

kernels.is_available()
{loaded}
path = next(Path({user["XDG_CACHE_HOME"]!r}).glob("pocketphi/*/speech-front.onnx"))
taken = int(Path("/proc/self/status").read_text().split("VmSize:")[1].split()[0]) << 10
resource.setrlimit(resource.RLIMIT_AS, (taken + (4 << 20),) * 2)
try:
    onnx_session.OnnxSession(path, 8, {{"features": 3}}, "tokens")
except PocketPhiError as exc:
    print(type(exc).__name__, exc)
"""
    outcome = zygote.start([], env=user, cwd=tmp_path, code=code).wait()
    assert outcome.code == 0, outcome
    assert re.fullmatch(line, outcome.out), outcome
    assert outcome.err == b""


def test_two_on_one_cache(start: Start, tmp_path: Path) -> None:
    """Both find it empty and make the built-in model; one is kept, nothing of the other is."""
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    ends = [child.wait() for child in [start(TEA, env, limits=Limits(60, 600)) for _ in range(2)]]
    assert [(end.code, end.out) for end in ends] == [(0, b"T-E-A.\n")] * 2
    folders = [p.name for p in (tmp_path / "cache" / "pocketphi").iterdir() if p.is_dir()]
    assert len(folders) == 1


@pytest.mark.parametrize("home", ["file", "file/x", "/proc/x", "x\0y"[:1] + "/../file/y"])
def test_a_home_that_cannot_be_written(home: str, start: Start, converted: Converted, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    path = str(tmp_path / home)
    env = {"HOME": path, "XDG_CACHE_HOME": f"{path}/cache"}
    outcome = start(TEA, env).wait()
    check_end(outcome, 6)
    assert outcome.err.startswith(b"error: ")
    assert outcome.err.count(b"\n") == 1
    assert b"POCKETPHI_CACHE" in outcome.err
    model = str(converted("phi4-nano", "Q8_0"))
    outcome = start([*TEA, "-m", model], env).wait()
    check_end(outcome, 0)
    assert (outcome.out, outcome.err) == (b"T-E-A.\n", b"")


@pytest.mark.parametrize("mask", ["none", "avx2,fma,f16c"])
def test_a_processor_without(mask: str, start: Start) -> None:
    outcome = start(TEA, {"POCKETPHI_CPU_MASK": mask}).wait()
    assert (outcome.code, outcome.out, outcome.err) == (0, b"T-E-A.\n", b"")


def test_a_mask_that_is_none(bitten: Bitten) -> None:
    env = {"POCKETPHI_CPU_MASK": "sse9"}
    clip = str(NANO.parent / "eval" / "audio" / "asr-000.flac")
    said = r"POCKETPHI_CPU_MASK is 'sse9', expected 'none' or names from: "
    bitten(Case("mask", lambda place: ["transcribe", clip], 4, said, env=env))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere ggml prints its own few lines")
def test_no_debugger_when_ggml_aborts(tmp_path: Path) -> None:
    """ggml would start gdb on the process; here that is a script that leaves a note."""
    for name in ("gdb", "lldb"):
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\n", "ascii")
        (tmp_path / name).chmod(0o755)
    code = """
import ctypes, resource, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
import pocketphi.runtime
from llama_cpp import _ggml
ctypes.CDLL(_ggml.libggml._name).ggml_abort(b"x.c", 1, b"told")
"""
    plain = {name: value for name, value in plain_environment().items() if not name.startswith("GGML_")}
    env = plain | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    asked = tmp_path / "asked"
    control = code.replace("import pocketphi.runtime\n", "")
    for program, wanted in ((control, True), (code, False)):
        asked.unlink(missing_ok=True)
        done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, timeout=60)
        assert done.returncode == -signal.SIGABRT, done.stderr
        assert b"told" in done.stderr
        assert asked.exists() is wanted
