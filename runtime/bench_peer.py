# SPDX-License-Identifier: Apache-2.0
"""The peer of a comparison: the same measurement on stock ggml, in a process of its own.

One process holds one set of kernels, and its threads wait actively between two steps. So the peer lives in
a child that measures when it is told to and sleeps on its pipe otherwise. JSON, an object a line:

    to the child     the plan, then {} for each repetition; the end of the pipe ends the process
    from the child   {"kernels": …} when it is ready, {"prefill_s": …, "decode_s": …}, or {"error": …}
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from . import ggml_plugin
from .bench_decoder import Sample, SpeedPlan, open_runner
from .errors import KernelError, PocketPhiError
from .gguf_header import read_header


class Peer:
    """The child, from its parent's side."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def sample(self) -> Sample:
        """One repetition there; this process waits.

        Raises:
            KernelError: the child failed or is gone.
        """
        self._tell({})
        answer = self._hear()
        return Sample(answer["prefill_s"], answer["decode_s"])

    def start(self, plan: SpeedPlan) -> None:
        """Send the plan and wait until the child has loaded the model.

        Raises:
            KernelError: it could not, or it does not run stock ggml.
        """
        self._tell(asdict(plan))
        if self._hear()["kernels"] != "stock":
            raise KernelError("the peer process did not run stock ggml")

    def _tell(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            _write(self._process.stdin, message)
        except BrokenPipeError:
            raise KernelError(self._obituary()) from None

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise KernelError(self._obituary())
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise KernelError(f"the peer process said {line[:80]!r}") from None
        if "error" in answer:
            raise KernelError(f"the peer process failed: {answer['error']}")
        return answer

    def _obituary(self) -> str:
        return f"the peer process ended with status {self._process.wait()}"


@contextmanager
def open_peer(plan: SpeedPlan) -> Iterator[Peer]:
    """Start the child and load the model there; it is gone when the block is left, however it is left."""
    environment = {k: v for k, v in os.environ.items() if k != "GGML_BACKEND_PATH"}
    process = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # A module of the current folder must not stand in for one of ours (Python 3.11 and later).
        env=environment | {"POCKETPHI_KERNELS": "stock", "PYTHONSAFEPATH": "1"},
        text=True,
        encoding="utf-8",
        start_new_session=True,  # Ctrl-C is for the parent, which ends the child
    )
    try:
        peer = Peer(process)
        peer.start(plan)
        yield peer
    finally:
        process.kill()  # it holds nothing but memory
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                _close(pipe)


def _close(pipe: IO[str]) -> None:
    with suppress(BrokenPipeError):  # what was still in the buffer has no reader any more
        pipe.close()


def _write(stream: IO[str], message: dict[str, Any]) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


def _serve() -> None:
    """The child's whole life."""
    first = sys.stdin.readline()
    if not first:
        return  # the parent has left already
    plan = SpeedPlan(**json.loads(first))
    lora = None if plan.lora is None else read_header(Path(plan.lora))
    with open_runner(plan, read_header(Path(plan.model)), lora) as runner:
        _write(sys.stdout, {"kernels": "plug-in" if ggml_plugin.load().active else "stock"})
        for _ in sys.stdin:
            _write(sys.stdout, asdict(runner.sample()))


if __name__ == "__main__":
    try:
        try:
            _serve()
        except PocketPhiError as exc:
            _write(sys.stdout, {"error": str(exc)})
    except BrokenPipeError:  # the parent is gone
        os._exit(1)
