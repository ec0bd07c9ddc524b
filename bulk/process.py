# SPDX-License-Identifier: Apache-2.0
"""A worker process, seen from the one that started it: asked one item at a time."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from ..runtime import errors
from ..runtime.errors import KernelError, PocketPhiError
from .lines import Task
from .performer import ItemSettings, ModelSettings
from .records import Outcome

# Not `-m`: it would look for modules in the current folder first. `-I` keeps that out, and the search path of
# this process, which it would lose, is given.
_CODE = "import sys; sys.path[:] = {path!r}; from {package}.worker import main; main()"


# Windows: Ctrl-C is for this process alone; elsewhere see `_interrupts_blocked`.
_CREATION_FLAGS: int = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)


class DiedError(Exception):
    """The process has ended in the middle of something."""


class WorkerProcess:
    """A process with a model."""

    def __init__(self, model: ModelSettings, items: ItemSettings) -> None:
        """Start it; `wait_ready` waits until it has loaded the model."""
        code = _CODE.format(path=sys.path, package=__package__)
        with _interrupts_blocked():
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                creationflags=_CREATION_FLAGS,
            )
        self._settings = {"model": asdict(model), "items": asdict(items)}

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def wait_ready(self) -> None:
        """Until the model is loaded.

        Raises:
            PocketPhiError: it cannot be, for the reason and of the class that the worker gives.
            DiedError: the process has ended.
        """
        self._send(self._settings)
        self._receive()

    def ask(self, task: Task) -> Outcome:
        """Have one item answered.

        Raises:
            PocketPhiError: no item can be answered.
            DiedError: the process has ended.
        """
        self._send(asdict(task))
        return Outcome(**self._receive())

    def kill(self) -> None:
        """End it, in the middle of an item too. Safe to call twice, and from another thread."""
        with contextlib.suppress(OSError):
            self._process.kill()

    def close(self) -> None:
        """End it and wait. Safe to call twice."""
        self.kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # what it did not take
                    stream.close()
        self._process.wait()

    def _send(self, value: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(value).encode("ascii") + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError):  # ValueError: closed by another thread
            raise self._died() from None

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        try:
            line = self._process.stdout.readline()
        except (OSError, ValueError):
            line = b""
        if not line.endswith(b"\n"):
            raise self._died()
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise error_of(found["error"])
        return found

    def _died(self) -> DiedError:
        self.kill()
        code = self._process.wait()
        if code >= 0:
            return DiedError(f"the worker ended with exit code {code}")
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        more = " (too little memory, as a rule)" if name == "SIGKILL" else ""
        return DiedError(f"the worker was ended by {name}{more}")


def error_of(found: Mapping[str, str]) -> PocketPhiError:
    """An error that another process had."""
    kind = getattr(errors, found["class"], KernelError)
    return kind(found["message"]) if issubclass(kind, PocketPhiError) else KernelError(found["message"])


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """A process that this thread starts does not see Ctrl-C: it inherits which signals are blocked.

    Not by a session of its own: Linux shares the processor out by sessions, and a busy machine may leave the
    workers a fraction of what they get in this one.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
