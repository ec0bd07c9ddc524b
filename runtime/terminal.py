# SPDX-License-Identifier: Apache-2.0
"""A person's terminal: line editing with history, the answer on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Literal

_HISTORY_LINES = 1000
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


class Console:
    """The chat's terminal. Dims reasoning only where stdout is a terminal and NO_COLOR is not set."""

    def __init__(self) -> None:
        self._interactive = sys.stdin.isatty()
        self._ansi = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._history = _history_file()
        self._readline = None
        if self._interactive:
            with contextlib.suppress(ImportError):  # not on Windows: plain input() serves
                import readline

                self._readline = readline
                if self._history is not None:
                    with contextlib.suppress(OSError):
                        readline.read_history_file(self._history)
                readline.set_history_length(_HISTORY_LINES)

    def read(self, prompt: str) -> str | None:
        """One line; None at the end of input. The prompt shows only where somebody types."""
        try:
            return input(prompt if self._interactive else "")
        except EOFError:
            return None

    def write(self, text: str, style: Literal["answer", "reasoning"] = "answer") -> None:
        """A piece of an answer, at once."""
        if style == "reasoning" and self._ansi:
            text = f"{_DIM}{text}{_PLAIN}"
        sys.stdout.write(text)
        sys.stdout.flush()

    def say(self, line: str) -> None:
        """A comment, on stderr."""
        sys.stderr.write(line + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        """Keep the history for the next time, if the disk lets us."""
        if self._readline is not None and self._history is not None:
            with contextlib.suppress(OSError):
                self._history.parent.mkdir(parents=True, exist_ok=True)
                self._readline.write_history_file(self._history)


def _history_file() -> Path | None:
    """None: there is no home to keep it in."""
    state = os.environ.get("XDG_STATE_HOME")
    with contextlib.suppress(RuntimeError):
        return (Path(state) if state else Path.home() / ".local" / "state") / "pocketphi" / "chat_history"
    return None
