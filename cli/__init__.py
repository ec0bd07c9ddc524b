# SPDX-License-Identifier: Apache-2.0
"""The command line. Parses, calls the library, prints; it holds no model logic.

Heavy modules are imported inside the command that needs them, so that `--help` answers at once.
Exit codes: 0 done, 1 failed while running, 2 usage or unusable input, 3 model directory,
4 native library, 5 checkpoint, 6 output, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from io import TextIOWrapper
from typing import NoReturn

import typer

from pocketphi.runtime.errors import PocketPhiError

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

for _command in (run, chat, transcribe, live, convert, info, bench):  # as --help lists them
    app.command()(_command)


def _on_sigterm(_signal: int, _frame: object) -> None:
    raise SystemExit(143)


def main() -> None:
    """A PocketPhiError becomes one line on stderr and its exit code. A traceback means a bug."""
    _repair_streams()
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except PocketPhiError as exc:
        _fail(str(exc), exc.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        raise SystemExit(130) from None
    except BrokenPipeError:  # whoever read our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter flushes again and complains
        raise SystemExit(1) from None
    except OSError as exc:  # ours are PocketPhiErrors: this one is a standard stream's
        if exc.errno not in (errno.ENOSPC, errno.EIO, errno.EFBIG):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        _fail(f"standard output: cannot be written: {exc.strerror}", 6)
    except Exception as exc:
        # Usage errors: Typer keeps its exception classes private, but not their method.
        if not hasattr(exc, "format_message"):
            raise
        _fail(f"{exc.format_message()} (see --help)", 2)
    raise SystemExit(code if isinstance(code, int) else 0)


def _repair_streams() -> None:
    """A closed standard stream becomes /dev/null; a character the terminal lacks becomes a question mark."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115  kept for life
        elif mode == "w" and isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def _fail(message: str, exit_code: int) -> NoReturn:
    typer.echo("error: " + " ".join(message.split()), err=True)
    raise SystemExit(exit_code) from None
