# SPDX-License-Identifier: Apache-2.0
"""How long work reports what it has done; the command line draws it, a library caller may ignore it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called from one thread, in the order start, advance…, finish. An exception it raises stops the work."""

    def start(self, total_bytes: int, what: str) -> None:
        """Work of `total_bytes` output bytes begins; `what` names it, e.g. "backbone-Q4_K_M.gguf"."""

    def advance(self, n_bytes: int, what: str) -> None:
        """`n_bytes` more are written; `what` is the tensor or file they belong to."""

    def finish(self) -> None:
        """All bytes are written. Not called when the work fails."""


class Silent:
    """The Progress that shows nothing."""

    def start(self, total_bytes: int, what: str) -> None:
        """Do nothing."""

    def advance(self, n_bytes: int, what: str) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""
