# SPDX-License-Identifier: Apache-2.0
"""`doctor`: is everything here, and does it compute what it should?

Probes run in a process of their own: one that kills it (an instruction that this CPU lacks) or hangs (a sound
server that does not answer) is a finding too, and the rest goes on in another process.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .options import Json
from .values import to_json

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from pocketphi.runtime.doctor import Finding

_PATIENCE_S = 60.0  # the slowest, the first question of the self-test, converts the built-in model: 2 s


def doctor(as_json: Json = False) -> None:
    """What this machine has, what is installed, and whether it works: a self-test of a few seconds.

    Exit code 1 if something fails. A warning is about what some commands would miss.
    """
    from pocketphi.runtime.doctor import to_object, worst

    findings = []
    for finding in _examine():
        findings.append(finding)
        if not as_json:
            typer.echo(finding.line())
    if as_json:
        typer.echo(to_json(to_object(findings)))
    if worst(findings) == "fail":
        raise typer.Exit(1)


def _examine() -> Iterator[Finding]:
    """All findings, each as soon as it is there."""
    import multiprocessing  # 30 ms that --help need not wait for

    from pocketphi.runtime.doctor import Finding, names
    from pocketphi.runtime.errors import one_line

    left = names()
    context = multiprocessing.get_context("spawn")
    while left:
        receive, send = context.Pipe(duplex=False)
        child = context.Process(target=_examine_there, args=(list(left), send), daemon=True)
        try:
            with _sigint_ignored():
                child.start()
            send.close()
            reason = f"no answer in {_PATIENCE_S:.0f} s"
            while left and receive.poll(_PATIENCE_S):
                finding: Finding = receive.recv()
                left.remove(finding.what)
                yield finding
        except EOFError:
            child.join()
            code = child.exitcode or 0
            reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        except OSError as exc:  # no process, or no working directory to start one in
            reason = f"cannot be started: {one_line(exc)}"
        finally:
            if child.pid is not None:
                child.kill()
                child.join()
            send.close()
            receive.close()
        if left:
            yield Finding(left.pop(0), "fail", f"the probe ended: {reason}")


def _examine_there(names: list[str], send: Connection) -> None:
    """In the child. What is wrong comes back as findings, and is not logged beside them."""
    from pocketphi.runtime.doctor import examine

    logging.disable(logging.CRITICAL)
    for finding in examine(names, _builtin):
        send.send(finding)


def _builtin(cache: Path | None) -> Path:
    """The built-in model, without a bar: the process that makes it does not own the terminal."""
    from pocketphi.convert.builtin import builtin_bundle

    return builtin_bundle(cache)


@contextmanager
def _sigint_ignored() -> Iterator[None]:
    """A child started meanwhile ignores Ctrl-C for good: this process hears it, and ends the child."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
