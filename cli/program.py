# SPDX-License-Identifier: Apache-2.0
"""The commands together: runs the one that was typed; errors become one line and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
from io import TextIOWrapper
from typing import Any, NoReturn

import typer

from pocketphi.runtime.errors import PocketPhiError, shortened

from . import on_signal
from .bulk import batch
from .fit import plan
from .health import doctor
from .importance import imatrix
from .judge import evaluate
from .listen import transcribe
from .live import live
from .make import convert, info
from .measure import bench
from .serve import serve
from .talk import chat, run

app = typer.Typer(
    no_args_is_help=True, add_completion=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Microsoft's Phi-4 family on this device: convert a checkpoint, then talk to it, offline.",
)  # fmt: skip

_LONGEST = 1200  # characters of a usage error; shorter ones of ours are cut already
_EXPECTED = {  # what pydantic calls it: what to say
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of fewer digits",
    "float_parsing": "a number",
}

# As --help lists them.
for _command in (
    run,
    chat,
    transcribe,
    live,
    serve,
    batch,
    convert,
    plan,
    imatrix,
    info,
    bench,
    evaluate,
    doctor,
):
    app.command("eval" if _command is evaluate else None)(_command)


def perform() -> NoReturn:
    """A PocketPhiError becomes one line on stderr and its exit code. A traceback means a bug.

    Raises:
        SystemExit: always, but for bugs.
        KeyboardInterrupt: Ctrl-C outside a command.
    """
    _repair_streams()
    signal.signal(signal.SIGTERM, on_signal)
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
        if str(exc) == "can't start new thread":  # Python's RuntimeError: no room for its stack
            _fail("there is not enough memory for another thread (-t sets their number)", 1)
        # Usage errors: Typer keeps its exception classes private, but not their method.
        if not hasattr(exc, "format_message"):
            raise
        _fail(f"{_usage(exc)} (see --help)", 2)
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


def _usage(exc: Any) -> str:
    """What Typer says; of a number in our words, since Typer's, which are pydantic's, leave out what was found."""
    param, cause = getattr(exc, "param", None), exc.__cause__
    if param is None or not hasattr(cause, "errors"):
        return str(exc.format_message())
    first = cause.errors()[0]
    wanted = _EXPECTED.get(first["type"])
    if wanted is None:
        return str(exc.format_message()).replace("Value error, ", "")  # pydantic's, before what was found
    found = str(first["input"])[:40]
    shown = found if "{" in wanted else repr(found)  # a number outside its range, or something that is none
    return f"{'/'.join(param.opts)} is {shown}, expected {wanted.format_map(first.get('ctx', {}))}"


def _fail(message: str, exit_code: int) -> NoReturn:
    typer.echo("error: " + shortened(" ".join(message.split()), _LONGEST), err=True)
    raise SystemExit(exit_code) from None
