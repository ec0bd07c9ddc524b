# SPDX-License-Identifier: Apache-2.0
"""The commands together: runs the one that was typed; errors become one line and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
from io import TextIOWrapper
from typing import NoReturn

import typer

from pocketphi.runtime.errors import PocketPhiError

from .fit import plan
from .health import doctor
from .importance import imatrix
from .judge import evaluate
from .listen import transcribe
from .live import live
from .make import convert, info
from .measure import bench
from .talk import chat, run

app = typer.Typer(
    no_args_is_help=True, add_completion=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Microsoft's Phi-4 family on this device: convert a checkpoint, then talk to it, offline.",
)  # fmt: skip

# As --help lists them.
for _command in (run, chat, transcribe, live, convert, plan, imatrix, info, bench, evaluate, doctor):
    app.command("eval" if _command is evaluate else None)(_command)


def _on_sigterm(_signal: int, _frame: object) -> None:
    raise SystemExit(143)


def perform() -> NoReturn:
    """A PocketPhiError becomes one line on stderr and its exit code. A traceback means a bug.

    Raises:
        SystemExit: always, but for bugs.
        KeyboardInterrupt: Ctrl-C outside a command.
    """
    _repair_streams()
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except PocketPhiError as exc:
        _fail(str(exc), exc.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        raise SystemExit(130) from None
    except MemoryError:
        _fail("there is not enough memory (`pocketphi plan` says what would fit)", 1)
    except BrokenPipeError:  # whoever read our output has left
        raise SystemExit(1) from None
    except OSError as exc:  # ours are PocketPhiErrors: this one is a standard stream's
        if exc.errno not in (errno.EBADF, errno.ENOSPC, errno.EIO, errno.EFBIG):
            raise
        _fail(f"standard output: cannot be written: {exc.strerror}", 6)
    except Exception as exc:
        # Usage errors: Typer keeps its exception classes private, but not their method.
        if not hasattr(exc, "format_message"):
            raise
        _fail(f"{exc.format_message()} (see --help)", 2)
    finally:
        _drop_unwritten()
    raise SystemExit(code if isinstance(code, int) else 0)


def _repair_streams() -> None:
    """Reading a closed standard stream finds nothing; writing to it fails, but for comments, which get lost.

    A character that the terminal lacks becomes a question mark.
    """
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # Open for reading, so that what is written to stdout is an error when it leaves the buffer.
            handle = os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)
            setattr(sys, name, os.fdopen(handle, "r" if name == "stdin" else "w", encoding="utf-8"))
        elif name != "stdin" and isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def _drop_unwritten() -> None:
    """What stdout does not take: the interpreter would try again at its end, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, exit_code: int) -> NoReturn:
    typer.echo("error: " + " ".join(message.split()), err=True)
    raise SystemExit(exit_code) from None
