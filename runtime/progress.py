# SPDX-License-Identifier: Apache-2.0
"""Progress bars with the time that is left, on stderr, for work that takes more than a moment."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, TaskID
    from typing_extensions import Self

_FIGURES_CELLS = 46  # of the widest figures with a short bar: what is being done gets the rest


class _Bar:
    """One line that comes and goes. Shows nothing where stderr is not a terminal."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def finish(self) -> None:
        """Take the bar away. Safe to call twice."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    @contextmanager
    def aside(self) -> Iterator[None]:
        """No bar while something else is printed on the same terminal."""
        if self._progress is None:
            yield
            return
        self._progress.stop()
        try:
            yield
        finally:
            self._progress.start()

    def _show(
        self,
        columns: list[ProgressColumn],
        total: float | None,
        what: str,
        window_s: float,
        done: float = 0.0,
    ) -> None:
        """A bar between `what` and the columns; its speed is that of the last `window_s` seconds."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        room = max(1, console.width - _FIGURES_CELLS)
        self._progress = Progress(
            TextColumn(f"{{task.description:<{min(room, 32)}.{room}}}", markup=False),
            BarColumn(),
            *columns,
            TimeRemainingColumn(),
            console=console,
            transient=True,
            redirect_stdout=False,  # it would send stdout to stderr, a pipe's too
            speed_estimate_period=window_s,
        )
        self._task = self._progress.add_task(what, total=total, completed=int(done), amount="")
        self._progress.start()


class ProgressBar(_Bar):
    """Bytes done of bytes to do."""

    def start(self, total_bytes: int, what: str) -> None:
        """Show an empty bar for `total_bytes` of work on `what`."""
        self.finish()
        if not sys.stderr.isatty():
            return
        from rich.progress import DownloadColumn, TransferSpeedColumn

        self._show([DownloadColumn(binary_units=True), TransferSpeedColumn()], total_bytes, what, 30.0)

    def advance(self, n_bytes: int, what: str) -> None:
        """`n_bytes` more are done; `what` is being worked on."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=n_bytes, description=what)


class CountBar(_Bar):
    """Things done of things to do: items, pieces of a text."""

    def start(self, total: int, what: str, *, done: int = 0) -> None:
        """Show the bar for `total` of them; what was done before does not count as speed."""
        self.finish()
        if not sys.stderr.isatty():
            return
        from rich.progress import MofNCompleteColumn

        self._show([MofNCompleteColumn()], total, what, 600.0, done)

    def advance(self, n: int, what: str) -> None:
        """`n` more are done; `what` is being worked on."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=n, description=what)


class AudioBar(_Bar):
    """Seconds of audio done of those there are, and how many times faster than they were spoken."""

    def __init__(self) -> None:
        super().__init__()
        self._total_s: float | None = None
        self._before_s = 0.0

    def start(self, total_s: float | None, what: str, *, before_s: float = 0.0) -> None:
        """Show the bar for the recording `what`; None: nobody knows how long it is. What was done before does
        not count as speed.
        """
        self.finish()
        if not sys.stderr.isatty():
            return
        from rich.progress import TextColumn

        self._total_s, self._before_s = total_s, before_s
        # An utterance of 30 s may take as long to read: rich's own 30 s would see one step of it.
        self._show([TextColumn("{task.fields[amount]}", markup=False)], total_s, what[-32:], 600.0, before_s)
        self.reach(before_s)

    def reach(self, done_s: float) -> None:
        """This much of the recording is done, from its beginning."""
        if self._progress is None or self._task is None:
            return
        done_s = max(done_s, self._before_s)
        self._progress.update(self._task, completed=done_s)
        speed = self._progress.tasks[0].speed
        amount = clock(done_s) if self._total_s is None else f"{clock(done_s)} of {clock(self._total_s)}"
        self._progress.update(self._task, amount=f"{amount}  {speed:.1f}x" if speed else amount)


def clock(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour; whole seconds, rounded down."""
    whole = int(seconds)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02}"
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
