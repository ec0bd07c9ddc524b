# SPDX-License-Identifier: Apache-2.0
"""The command line. Parses, calls the library, prints; it holds no model logic.

Heavy modules are imported inside the command that needs them, so that `--help` answers at once.
Exit codes: 0 done, 1 failed while running, 2 usage or unusable input, 3 model directory,
4 native library, 5 checkpoint, 6 output, 130 Ctrl-C, 143 SIGTERM.

This file imports next to nothing: Ctrl-C is looked after from its `main` on.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType

_AGAIN_S = 0.02


def main() -> None:
    """The program, to its end: see `program.perform`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is to be ignored
        signal.signal(signal.SIGINT, on_signal)
    try:
        try:
            from .program import perform

            perform()
        finally:  # all is done: nothing is left to break off, and an exception would only be printed
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one may have come before the line above
        raise SystemExit(130) from None


def on_signal(number: int, frame: FrameType | None) -> None:
    """SIGINT and SIGTERM end the program, but where the exception would be lost: there, a little later."""
    if not _swallows(frame):
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
    later = threading.Timer(_AGAIN_S, _signal_again, (number,))
    later.daemon = True
    later.start()


def _swallows(frame: FrameType | None) -> bool:
    """Whether an exception raised here may be lost, or come out as another one.

    C extensions that are being imported turn it into an ImportError, and who catches that takes the module
    for missing. A finalizer, and llama.cpp's log, cannot raise at all.
    """
    while frame is not None and frame.f_code is not main.__code__:
        code = frame.f_code
        if code.co_filename.startswith("<frozen importlib") or code.co_name == "__del__":
            return True
        if str(frame.f_globals.get("__name__")).endswith(".runtime.ggml_log"):
            return True
        frame = frame.f_back
    return False


def _signal_again(number: int) -> None:
    if sys.platform == "win32":
        signal.raise_signal(number)
    else:  # to the main thread: if it waits for input by now, that has to end
        signal.pthread_kill(threading.main_thread().ident or 0, number)
