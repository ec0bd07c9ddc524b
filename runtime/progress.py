# SPDX-License-Identifier: Apache-2.0
"""A progress bar with the time that is left, on stderr, for work that takes more than a moment."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class ProgressBar:
    """Bytes done of bytes to do. Shows nothing where stderr is not a terminal."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def start(self, total_bytes: int, what: str) -> None:
        """Show an empty bar for `total_bytes` of work on `what`."""
        self.finish()
        if not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description:<32}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task(what, total=total_bytes)
        self._progress.start()

    def advance(self, n_bytes: int, what: str) -> None:
        """`n_bytes` more are done; `what` is being worked on."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=n_bytes, description=what)

    def finish(self) -> None:
        """Take the bar away. Safe to call twice."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
