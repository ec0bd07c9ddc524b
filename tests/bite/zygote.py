# SPDX-License-Identifier: Apache-2.0
"""Runs the program in many short-lived processes: forked from one that has imported everything.

Importing costs more than most refusals. The zygote imports once, starts no thread and loads no model; each
request is a fork of it, which becomes the program with streams, environment, folder and limits of its own,
and ends as the interpreter does. A native crash is that child's wait status, no matter what it was doing.

Where there is no Linux, the program is started as a process like any other: slower, and without a peak.
Run as a script, this file is the zygote.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

CAN_FORK = sys.platform == "linux"
PROGRAM = "import sys; sys.argv[0] = 'pocketphi'; from pocketphi.cli import main; main()"

# Not onnxruntime: importing it starts a thread. A child that needs it imports it then.
_IMPORTS = (
    "numpy",
    "tokenizers",
    "llama_cpp",
    "gguf",
    "onnx",
    "safetensors",
    "cv2",
    "soundfile",
    "soxr",
    "rich.progress",
    "numpy.ctypeslib",
    "typer._adapters",  # Typer's own, with all of pydantic: otherwise loaded by every command anew
    "pocketphi.cli.program",
    "pocketphi.convert",
    "pocketphi.convert.builtin",
    "pocketphi.convert.conversion",
    "pocketphi.convert.hub",
    "pocketphi.runtime.audio",
    "pocketphi.runtime.image",
    "pocketphi.runtime.engine",
    "pocketphi.runtime.repl",
    "pocketphi.runtime.report",
    "pocketphi.runtime.progress",
    "pocketphi.runtime.terminal",
    "pocketphi.runtime.transcript",
)
Files = tuple[IO[bytes], ...]  # what it writes to stdout, to stderr
_HEADROOM_MB = 2048  # what a child may map beyond what it may touch: stacks of threads, arenas


@dataclass(frozen=True)
class Outcome:
    """How a process ended."""

    code: int  # exit code; negative: the signal that killed it
    out: bytes
    err: bytes
    peak_mb: float  # 0 where it is not measured. Forked: at least the zygote's own, about 110 MB
    seconds: float
    timed_out: bool


@dataclass(frozen=True)
class Limits:
    """What a process may take."""

    seconds: float = 20
    rss_mb: int = 600
    address_mb: int = 0  # 0: no limit on its address space


class Child:
    """A process that runs. `wait` has to be called."""

    def __init__(self, pid: int, files: Files, kept: contextlib.ExitStack, limits: Limits) -> None:
        self.pid, self._files, self._kept, self._limits = pid, files, kept, limits
        self._started = time.monotonic()

    def out_so_far(self) -> bytes:
        """What it has written to stdout."""
        return os.pread(self._files[0].fileno(), 1 << 20, 0)

    def send(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait(self) -> Outcome:
        """Its end, or after the time allowed, ours for it."""
        timed_out = not self._ends_within(self._limits.seconds)
        if timed_out:
            self._kill()
        code, peak_mb = self._status()
        seconds = time.monotonic() - self._started
        with self._kept:
            out, err = (os.pread(file.fileno(), 8 << 20, 0) for file in self._files)
        return Outcome(code, out, err, peak_mb, seconds, timed_out)

    def _ends_within(self, seconds: float) -> bool:
        raise NotImplementedError

    def _kill(self) -> None:
        raise NotImplementedError

    def _status(self) -> tuple[int, float]:
        raise NotImplementedError


class _Forked(Child):
    def __init__(self, result: int, files: Files, kept: contextlib.ExitStack, limits: Limits) -> None:
        self._result = result
        super().__init__(int.from_bytes(os.read(result, 4), "little"), files, kept, limits)

    def _ends_within(self, seconds: float) -> bool:
        return bool(select.select([self._result], [], [], seconds)[0])

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _status(self) -> tuple[int, float]:
        with os.fdopen(self._result, "rb") as file:
            found = json.loads(file.read() or b"null")
        if found is None:
            raise RuntimeError("the zygote is gone")
        return found["code"], found["peak_mb"]


class _Spawned(Child):
    def __init__(
        self, process: subprocess.Popen[bytes], files: Files, kept: contextlib.ExitStack, limits: Limits
    ) -> None:
        self._process = process
        super().__init__(process.pid, files, kept, limits)

    def _ends_within(self, seconds: float) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
            return True
        return False

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _status(self) -> tuple[int, float]:
        return self._process.returncode, 0.0


def _anonymous() -> IO[bytes]:
    return tempfile.TemporaryFile()


def plain_environment() -> dict[str, str]:
    """This process's environment without what concerns the program and its libraries."""
    ours = ("POCKETPHI_", "XDG_", "HF_", "ORT_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


class Zygote:
    """Starts processes of the program. A context manager."""

    def __init__(self) -> None:
        if not CAN_FORK:
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        one_thread = {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=plain_environment() | one_thread,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        self._socket = ours
        if ours.recv(16) != b"ready":
            raise RuntimeError(f"the zygote did not start: exit code {self._server.wait()}")

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *_: object) -> None:
        if CAN_FORK:
            self._socket.close()
            self._server.wait(10)

    def start(
        self, args: list[str], *, env: Mapping[str, str], cwd: Path, stdin: bytes | int = b"",
        limits: Limits = Limits(), stdout: int | None = None, code: str | None = None,
    ) -> Child:  # fmt: skip
        """Start the program.

        Args:
            args: after the program's name.
            stdin: what is in it, or a descriptor.
            stdout: a descriptor; None: a file that `Child.wait` reads.
            code: Python to run instead of the program.
        """
        kept = contextlib.ExitStack()  # closed by Child.wait
        out, err = kept.enter_context(_anonymous()), kept.enter_context(_anonymous())
        with tempfile.TemporaryFile() as feed:
            if isinstance(stdin, bytes):
                feed.write(stdin)
                feed.seek(0)
                stdin = feed.fileno()
            streams = (stdin, out.fileno() if stdout is None else stdout, err.fileno())
            if CAN_FORK:
                request = {
                    "args": args, "env": dict(env), "cwd": str(cwd), "code": code, "limits": vars(limits)
                }  # fmt: skip
                return _Forked(self._ask(request, streams), (out, err), kept, limits)
            process = subprocess.Popen(
                [sys.executable, "-c", code or PROGRAM, *args], env=dict(env), cwd=cwd,
                stdin=streams[0], stdout=streams[1], stderr=streams[2],
            )  # fmt: skip
            return _Spawned(process, (out, err), kept, limits)

    def _ask(self, request: dict[str, Any], streams: tuple[int, int, int]) -> int:
        """The descriptor on which the process's id and end will be told."""
        reading, writing = os.pipe()
        with tempfile.TemporaryFile() as text:
            text.write(json.dumps(request).encode("ascii"))
            text.seek(0)
            socket.send_fds(self._socket, [b"run"], [text.fileno(), writing, *streams])
        os.close(writing)
        return reading


def _serve(asked: socket.socket, set_by_imports: Mapping[str, str]) -> str | None:
    """The zygote's life. Returns in each child, with the Python that it has to run; at the end, None."""
    watched: dict[int, tuple[int, int]] = {}  # a process's descriptor -> (its id, where to tell its end)
    while True:
        for ready in select.select([asked, *watched], [], [])[0]:
            if ready is not asked:
                pid, result = watched.pop(ready)
                os.close(ready)
                _, status, used = os.wait4(pid, 0)
                told = {"code": os.waitstatus_to_exitcode(status), "peak_mb": used.ru_maxrss / 1024}
                with os.fdopen(result, "wb") as file:
                    file.write(json.dumps(told).encode("ascii"))
                continue
            message, fds, _, _ = socket.recv_fds(asked, 16, 5)
            if not message:
                return None
            pid = os.fork()
            if pid == 0:
                for other in [asked.detach(), *watched, *(r for _, r in watched.values()), fds[1]]:
                    os.close(other)
                return _become(fds[0], fds[2:], set_by_imports)
            os.write(fds[1], pid.to_bytes(4, "little"))
            for fd in (fds[0], *fds[2:]):
                os.close(fd)
            watched[os.pidfd_open(pid)] = (pid, fds[1])


def _become(request_fd: int, streams: list[int], set_by_imports: Mapping[str, str]) -> str:
    """In the child: take on what was asked for. Returns the Python to run."""
    import resource

    os.setpgid(0, 0)
    with os.fdopen(request_fd, "rb") as file:
        request = json.load(file)
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
        os.close(fd)
    # The interpreter's own know from its start whether they can seek.
    sys.stdin = os.fdopen(0, encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
    processors = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(
        0, {processors[os.getpid() % len(processors)]}
    )  # the threads here are not worth many
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update({**set_by_imports, **request["env"]})
    limits = request["limits"]
    mb, seconds = 1 << 20, int(4 * limits["seconds"]) + 1
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    data = (limits["rss_mb"] + _HEADROOM_MB) * mb
    resource.setrlimit(resource.RLIMIT_DATA, (data, data))
    if limits["address_mb"]:
        resource.setrlimit(resource.RLIMIT_AS, (limits["address_mb"] * mb,) * 2)
    sys.argv = ["pocketphi", *request["args"]]
    code: str = request["code"] or PROGRAM
    return code


def _import_everything() -> Mapping[str, str]:
    """Returns what the imports put into the environment: a child's own would have done so too."""
    import importlib

    before = dict(os.environ)
    for name in _IMPORTS:
        with contextlib.suppress(ModuleNotFoundError):  # then every child imports what it needs itself
            importlib.import_module(name)
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads != 1:
        sys.exit(f"the zygote has {threads} threads after its imports, expected 1: a fork would lose them")
    gc.collect()
    gc.freeze()
    return {name: value for name, value in os.environ.items() if before.get(name) != value}


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its modules are not top-level names
    _asked = socket.socket(fileno=int(sys.argv[1]))
    _set = _import_everything()
    _asked.send(b"ready")
    _code = _serve(_asked, _set)
    if _code is not None:
        exec(compile(_code, "<program>", "exec"), {"__name__": "__main__"})
