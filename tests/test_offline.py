# SPDX-License-Identifier: Apache-2.0
"""No command opens a socket that leaves this machine: each runs with a library that ends who tries.

`offline_guard.c` says what it sees. That it sees something is tested first. ONNX Runtime's telemetry
would send later; it is seen by the identifier that it keeps in the temporary folder.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from pocketphi.cli.program import app

from . import tiny
from .scoring import EVAL

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the guard is loaded as Linux loads it")

GUARD = Path(__file__).with_name("offline_guard.c")
CALL = [sys.executable, "-c", "import sys; sys.argv[0] = 'pocketphi'; from pocketphi.cli import main; main()"]
CAUGHT = 97  # the guard's exit code
NOWHERE = "http://127.0.0.1:9"  # should the guard fail: the discard port, where nobody listens
HF = "some-org/some-model"

TEXT = "Tell me where a lion lives. A lion lives in the savanna. " * 100  # more than two chunks of 512 tokens
ONE = ["-t", "1"]  # a thread: two of a busy machine's wait for each other
SPEECH_ITEMS = str(EVAL / "speech.jsonl")
IMATRIX = Path(__file__).parent / "golden/imatrix/llama-imatrix.gguf"
IMAGE, CLIP = str(EVAL / "images/img-000.png"), str(EVAL / "audio/asr-010.flac")
ITEMS = [
    {"audio": CLIP},
    {"messages": [{"role": "user", "content": [{"type": "image", "path": IMAGE}]}], "max_tokens": 4},
]
SAVE = ["--save-logits", "{tmp}/logits"]
# Every command, with what makes it load all that it may load. "{tmp}" is a folder of the case.
CASES: dict[str, list[list[str]]] = {
    "run": [
        [*ONE, "--image", IMAGE, "--audio", CLIP, "-p", "What is it?", "-n", "4", "--json"],
        [*ONE, "--video", "{tmp}/v.avi", "--frames", "2", "-p", "What is it?", "-n", "4"],
        [*ONE, "--grammar", 'root ::= "yes" | "no"', "-p", "Is it?"],
    ],
    "chat": [[*ONE, "-n", "4"]],
    "transcribe": [[*ONE, CLIP], [*ONE, CLIP, "--format", "srt", "-o", "{tmp}/out"]],
    "live": [[*ONE, "--file", CLIP], [*ONE, "--stdin"], ["--list-devices"]],
    "convert": [
        [*ONE, str(tiny.NANO), "-o", "{tmp}/m", "-q", "Q4_0"],
        [*ONE, str(tiny.NANO), "-o", "{tmp}/i", "-q", "Q4_0", "--imatrix", str(IMATRIX)],
        [str(tiny.NANO), "--dry-run"],
    ],
    "info": [["--check"]],
    "bench": [
        [*ONE, "-n", "2", "-r", "1", "--only", "text"],
        [*ONE, "-n", "2", "-r", "1", "-p", "8", "--compare", "stock"],
    ],
    "plan": [[str(tiny.NANO), "--ram", "8G"]],
    "doctor": [["--json"]],
    "eval": [
        [*ONE, "--data", SPEECH_ITEMS, "--metric", "exact", "--limit", "1", "-o", "{tmp}/out"],
        [*ONE, "--data", "{tmp}/text.txt", "--metric", "ppl", "--chunks", "1", *SAVE],
        [*ONE, "--metric", "kld", "--logits", "{tmp}/logits"],
    ],
    "batch": [[*ONE, "{tmp}/items.jsonl", "-o", "{tmp}/out.jsonl", "--workers", "2"]],
    "imatrix": [[*ONE, "--data", "{tmp}/text.txt", "-o", "{tmp}/imatrix.gguf", "--chunks", "1"]],
}
LISTENS = {"serve"}  # opens a socket for others; tests/serve/ looks after what it may connect to
WITH_EXTRA = {  # cases that need a library that only an extra brings
    "jiwer": [*ONE, "--data", SPEECH_ITEMS, "--metric", "wer", "--limit", "1"],
    "sacrebleu": [*ONE, "--data", SPEECH_ITEMS, "--metric", "bleu", "--limit", "1"],
}


def write_video(path: Path) -> None:
    """Two frames of grey."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    assert writer.isOpened()
    for _ in range(2):
        writer.write(np.full((48, 64, 3), 128, np.uint8))
    writer.release()


def commands() -> list[str]:
    """As the program registers them."""
    found = [(c.name, c.callback) for c in app.registered_commands]
    return [name or (callback.__name__ if callback else "") for name, callback in found]


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("guard") / "guard.so"
    compiler = os.environ.get("CC", "cc")
    flags = ["-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, "-o", library, GUARD, "-ldl"], check=True)
    return library


@pytest.fixture
def guarded(guard: Path, env: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The environment of a guarded program. No proxy: the hub's client would talk to that one instead."""
    clean = {k: v for k, v in env.items() if "proxy" not in k.lower()}
    noted = tmp_path / "attempts"
    return clean | {"LD_PRELOAD": str(guard), "OFFLINE_GUARD": str(noted), "HF_ENDPOINT": NOWHERE}


def attempts(env: dict[str, str]) -> list[str]:
    noted = Path(env["OFFLINE_GUARD"])
    return noted.read_text("ascii").splitlines() if noted.exists() else []


def call(env: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=env, input="Hello!\n", capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("code", "noted"),
    [
        ('import socket; socket.create_connection(("127.0.0.1", 9), 1)', "getaddrinfo 0"),
        ("import socket; socket.socket()", "socket 2"),
        ("import socket; socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)", "socket 10"),
        ("import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)", "socket 16"),
        ('import socket; socket.gethostbyname("localhost")', "getaddrinfo 2"),
        ('import ctypes; ctypes.CDLL(None).gethostbyname(b"localhost")', "gethostbyname 2"),
    ],
)
def test_the_guard_catches(code: str, noted: str, guarded: dict[str, str]) -> None:
    done = call(guarded, sys.executable, "-c", code)
    assert (done.returncode, attempts(guarded)) == (CAUGHT, [noted])


def test_the_guard_catches_a_child(guarded: dict[str, str]) -> None:
    """Of a process that a command starts, whatever becomes of the command."""
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import socket; socket.socket()'])"
    done = call(guarded, sys.executable, "-c", code)
    assert (done.returncode, attempts(guarded)) == (0, ["socket 2"])


def test_the_guard_lets_the_machine_talk_to_itself(guarded: dict[str, str], tmp_path: Path) -> None:
    code = f"""
import socket
server = socket.socket(socket.AF_UNIX); server.bind({str(tmp_path / "s")!r}); server.listen()
client = socket.socket(socket.AF_UNIX); client.connect({str(tmp_path / "s")!r}); client.sendall(b"x")
print(server.accept()[0].recv(1))
"""
    done = call(guarded, sys.executable, "-c", code)
    assert (done.returncode, done.stdout, attempts(guarded)) == (0, "b'x'\n", [])


@pytest.mark.skipif(importlib.util.find_spec("huggingface_hub") is None, reason="needs pocketphi[hub]")
def test_the_one_flag_that_goes_out_is_caught(guarded: dict[str, str], tmp_path: Path) -> None:
    done = call(guarded, *CALL, "convert", HF, "--from-hub", "-o", str(tmp_path / "m"))
    assert done.returncode == CAUGHT
    assert attempts(guarded) != []


def test_from_the_hubs_cache_alone(guarded: dict[str, str], tmp_path: Path) -> None:
    done = call(guarded, *CALL, "convert", HF, "--from-hub", "--offline", "-o", str(tmp_path / "m"))
    assert done.returncode not in (0, CAUGHT), done.stderr
    assert attempts(guarded) == []


@pytest.mark.parametrize("name", [name for name in commands() if name not in LISTENS])
def test_no_command_uses_the_network(name: str, guarded: dict[str, str], tmp_path: Path) -> None:
    assert name in CASES, "a new command needs cases of its own"
    (tmp_path / "text.txt").write_text(TEXT, "utf-8")
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS), "utf-8")
    write_video(tmp_path / "v.avi")
    for arguments in CASES[name]:
        filled = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
        done = call(guarded, *CALL, name, *filled)
        assert attempts(guarded) == [], (arguments, done.stderr)
        # PortAudio may be missing; whatever else does not work has not shown what it would have opened.
        allowed = {0, 2} if "--list-devices" in arguments else {0}
        assert done.returncode in allowed, (arguments, done.stderr)


@pytest.mark.parametrize("module", WITH_EXTRA)
def test_no_metric_uses_the_network(module: str, guarded: dict[str, str]) -> None:
    pytest.importorskip(module)
    done = call(guarded, *CALL, "eval", *WITH_EXTRA[module])
    assert (done.returncode, attempts(guarded)) == (0, []), done.stderr


def test_help_and_the_library(guarded: dict[str, str]) -> None:
    assert call(guarded, *CALL, "--help").returncode == 0
    script = "import pocketphi; [getattr(pocketphi, name) for name in pocketphi.__all__]"
    assert call(guarded, sys.executable, "-c", script).returncode == 0
    assert attempts(guarded) == []


@pytest.fixture
def traced(env: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The environment of a user who has set nothing, with an empty folder for what is temporary."""
    (tmp_path / "t").mkdir()
    plain = {name: value for name, value in env.items() if not name.startswith("ORT_")}
    return plain | {"TMPDIR": str(tmp_path / "t")}


def test_onnx_runtime_leaves_no_identifier(traced: dict[str, str], tmp_path: Path) -> None:
    """Of a device or a session, which is what its telemetry begins with."""
    done = call(traced, *CALL, "run", *ONE, "--image", IMAGE, "--audio", CLIP, "-p", "What is it?", "-n", "1")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "t").iterdir()] == []


def test_onnx_runtime_would_leave_one(traced: dict[str, str], tmp_path: Path) -> None:
    """Without our word it does: so the test above would see it."""
    assert call(traced, sys.executable, "-c", "import onnxruntime").returncode == 0
    if list((tmp_path / "t").iterdir()) == []:
        pytest.skip("this build of ONNX Runtime is without telemetry")
    again = tmp_path / "again"
    again.mkdir()
    quiet = traced | {"TMPDIR": str(again)}
    assert call(quiet, sys.executable, "-c", "import pocketphi.runtime, onnxruntime").returncode == 0
    assert list(again.iterdir()) == []
