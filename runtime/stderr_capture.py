# SPDX-License-Identifier: Apache-2.0
"""Takes what C libraries write to the process's stderr, so that an error stays one line of ours."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TypeVar

_MAX_BYTES = 1 << 16
_ONE = threading.RLock()  # a process has one stderr
_IDLE = "pocketphi-decoder"  # a model's own thread: it works only while the one that calls the model waits
_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class Captured:
    """What was written; complete when the block has ended."""

    text = ""


@contextmanager
def captured_stderr() -> Iterator[Captured]:
    """Redirect file descriptor 2 into a temporary file for the time of a block: one thread after another."""
    found = Captured()
    sys.stderr.flush()
    with _ONE, tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield found
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            found.text = file.read(_MAX_BYTES).decode("utf-8", "replace")


class Unheard:
    """Makes calls of one kind, block after block of a file, and keeps what they write to stderr.

    Only while this is the one thread of Python's that runs: nobody else can write meanwhile, or begin to, and
    nothing of another's is lost. Beside a second, such as a progress bar's, calls are made as they are.
    """

    def __init__(self) -> None:
        self._said = ""

    def __call__(self, call: Callable[[], _T]) -> _T:
        """What the call gives."""
        here = threading.current_thread()
        if any(t is not here and not t.name.startswith(_IDLE) for t in threading.enumerate()):
            return call()
        with ExitStack() as kept:
            found = Captured()
            with suppress(OSError):  # no stderr, or no folder for a temporary file: then as it is
                found = kept.enter_context(captured_stderr())
            result = call()
        self._said = self._said or found.text
        return result

    def report(self, name: str) -> None:
        """Log what was said first, if anything was: no error has come of it."""
        if self._said.strip():
            line = self._said.strip().splitlines()[0]
            _log.warning("%s: was read, but its decoder complained: %s", name, line[:200])
