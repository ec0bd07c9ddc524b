# SPDX-License-Identifier: Apache-2.0
"""What a person sees of live transcription: finished lines above, the running utterance and a meter below.

On a terminal the bottom lines are redrawn eight times a second by a thread of their own, so that the meter
moves while the model reads. That thread only reads attributes. Elsewhere stdout gets the finished lines and
nothing else, or every event as a line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import unicodedata
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from .live_events import LiveEvent

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from .sources import Source

_TICK_S = 1 / 8
_BAR_CELLS = 12
_QUIETEST_DBFS = -60.0  # the left end of the meter; the right end is full scale
_BEHIND_S = 1.0  # a backlog up to this is the rhythm of reading, not a delay
_NARROWEST = 4  # columns: the region needs some
_TURNS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class Pace(Protocol):
    """What the view reads of a listener."""

    @property
    def speaking(self) -> bool:
        """Whether an utterance is open."""

    @property
    def backlog_s(self) -> float:
        """Seconds of audio that wait."""

    @property
    def step_s(self) -> float:
        """Seconds between two readings, as of now."""

    @property
    def last_delay(self) -> float:
        """Of the latest event with text, in seconds; 0 before the first."""


def printable(text: str) -> str:
    """One line that is safe to show: control characters and what turns the writing direction are replaced.

    Text comes from a model, which may spell an escape sequence; a terminal would obey it.
    """
    spaced = " ".join(text.split())
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") or c in _TURNS else c for c in spaced)


def printable_part(text: str) -> str:
    """`printable`, with a space at either end kept: the parts of a line are put together again."""
    middle = printable(text)
    if not middle:
        return ""
    return (" " if text[:1].isspace() else "") + middle + (" " if text[-1:].isspace() else "")


def json_line(value: Any) -> str:
    """JSON on one line in which control characters are escapes, those above ASCII too."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(f"\\u{ord(c):04x}" if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)


def stamp(seconds: float) -> str:
    """[mm:ss], from an hour on [h:mm:ss]."""
    whole = int(seconds)
    minutes = f"{whole // 60 % 60:02}:{whole % 60:02}"
    return f"[{minutes}]" if whole < 3600 else f"[{whole // 3600}:{minutes}]"


def status(meter: Source, pace: Pace, first_step_s: float, *, ascii_only: bool = False) -> str:
    """The line under the text: state, level, delay, and what is not as it should be."""
    level = meter.level_dbfs
    share = 0.0 if math.isnan(level) else 1 - max(min(level, 0.0), _QUIETEST_DBFS) / _QUIETEST_DBFS
    full = round(share * _BAR_CELLS)
    bar = ("#" if ascii_only else "█") * full + ("." if ascii_only else "░") * (_BAR_CELLS - full)
    shown = f"{level:4.0f}" if math.isfinite(level) else " -∞".rjust(4) if not ascii_only else "-inf"
    parts = [f"{'speaking' if pace.speaking else 'listening':9} {bar} {shown} dBFS"]
    delay, backlog, step = pace.last_delay, pace.backlog_s, pace.step_s
    if delay > 0:
        parts.append(f"delay {delay:.1f} s")
    if backlog > _BEHIND_S:
        parts.append(f"{backlog:.1f} s behind")
    if step > first_step_s:
        parts.append(f"step {step:.1f} s")
    if meter.overruns:
        parts.append(f"{meter.overruns} overruns")
    if meter.underruns:
        parts.append(f"{meter.underruns} underruns")
    return "  ".join(parts)


class Region:
    """The bottom lines of a terminal, redrawn in place; what is written above them scrolls away as usual."""

    def __init__(self, out: TextIO) -> None:
        """
        Args:
            out: a terminal.
        """
        from rich.console import Console

        self._out = out
        self._console: Console = Console(file=out, force_terminal=True, highlight=False, markup=False)
        self._drawn: list[int] = []  # cells of each line that is on the screen
        self._last = ""

    @property
    def usable(self) -> bool:
        """Whether the cursor can be moved here."""
        return not (self._console.is_dumb_terminal or self._console.legacy_windows)

    @property
    def ascii_only(self) -> bool:
        """Whether the stream's encoding lacks the meter's blocks."""
        return self._console.options.ascii_only

    def draw(self, running: Text, status_line: str, above: Text | None = None) -> None:
        """Replace the region, and write `above` where it began.

        Args:
            running: wrapped; where it is taller than the terminal its end is shown.
            status_line: cut at the terminal's width. A terminal of next to none shows neither.
            above: left to the terminal to wrap, so that it copies as one line and follows a new width.
        """
        from rich.text import Text

        width, height = self._size()
        if width < _NARROWEST:
            self.clear()
            if above is not None:
                self._write(self._ansi(above) + "\n")
            return
        lines = list(running.wrap(self._console, width - 1)) if running.plain else []
        last = Text(status_line)
        last.truncate(width - 1)
        lines = [*lines[-max(0, height - 2) :], last] if height > 2 else [last]
        for line in lines:
            line.rstrip()
        text = "\n".join(map(self._ansi, lines))
        if above is None and text == self._last and self._rows(width) == len(self._drawn):
            return
        self._write(self._erase(width) + ("" if above is None else self._ansi(above) + "\n") + text)
        self._drawn, self._last = [line.cell_len for line in lines], text

    def clear(self) -> None:
        """Take the region away; the cursor is where it began."""
        if self._drawn:
            self._write(self._erase(self._size()[0]))
            self._drawn, self._last = [], ""

    def _size(self) -> tuple[int, int]:
        """Columns and rows of this very terminal, now."""
        try:
            found = os.get_terminal_size(self._out.fileno())
        except (OSError, ValueError):
            return 80, 24
        return (found.columns or 80, found.lines or 24)  # a terminal nobody has given a size says 0

    def _rows(self, width: int) -> int:
        """Rows the region takes: a terminal made narrower has broken its lines anew."""
        return sum(max(1, -(-cells // width)) for cells in self._drawn)

    def _erase(self, width: int) -> str:
        up = self._rows(width) - 1
        return "\r" + (f"\x1b[{up}A" if up > 0 else "") + "\x1b[J"

    def _ansi(self, text: Text) -> str:
        with self._console.capture() as captured:
            self._console.print(text, end="", soft_wrap=True)
        return captured.get()

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


class LiveView:
    """Shows events. A context manager; `show` may raise BrokenPipeError when the reader has left."""

    def __init__(self, meter: Source, pace: Pace, *, out: TextIO, err: TextIO, as_json: bool = False) -> None:
        """
        Args:
            meter: the source.
            pace: the listener; its `step_s` is now as the person chose it.
            out: stdout: the product.
            err: stderr: the meter, where `out` goes elsewhere.
            as_json: every event as one line of JSON; otherwise finals as lines of text.
        """
        self._meter, self._pace, self._out, self._err, self._as_json = meter, pace, out, err, as_json
        self._first_step_s = pace.step_s
        self._styled = "NO_COLOR" not in os.environ
        self._committed = self._tail = ""
        self._lock = threading.RLock()  # held for one drawing, never while the model works
        self._ended = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="live view", daemon=True)
        terminal = out if out.isatty() and not as_json else err if err.isatty() and not out.isatty() else None
        region = None if terminal is None else Region(terminal)
        self._region = region if region is not None and region.usable else None
        self._with_text = self._region is not None and terminal is out

    def __enter__(self) -> LiveView:
        if self._region is not None:
            self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._region is not None:
            self._ticker.join()
            with self._lock, contextlib.suppress(OSError, ValueError):
                self._region.clear()

    def show(self, event: LiveEvent) -> None:
        """Take one event in.

        Raises:
            OSError: the stream cannot be written (BrokenPipeError: nobody reads it any more).
        """
        with self._lock:
            if self._as_json:
                self._line(json_line(event.to_object()))
            elif event.type == "partial":
                self._committed, self._tail = event.committed, event.text[len(event.committed) :]
            else:
                self._committed = self._tail = ""
                if event.type == "final" and event.text.strip():
                    self._final(event)
            if self._with_text:
                self._draw()

    def say(self, line: str) -> None:
        """A comment on stderr, above the region."""
        with self._lock:
            if self._region is not None:
                self._region.clear()
            self._err.write(printable(line) + "\n")
            self._err.flush()

    def _final(self, event: LiveEvent) -> None:
        lines = [printable(line) for line in (event.text, event.translation or "") if line.strip()]
        if not self._with_text:
            for line in lines:
                self._line(line)
            return
        from rich.text import Text

        when = stamp(event.t0)
        above = Text.assemble((when, self._dim), " ", lines[0])
        for line in lines[1:]:
            above.append("\n" + " " * (len(when) + 1) + line)
        self._draw(above)

    def _line(self, text: str) -> None:
        if self._region is not None:
            self._region.clear()  # `out` may well end on the same screen, through a pipe
        self._out.write(text + "\n")
        self._out.flush()

    @property
    def _dim(self) -> str:
        return "dim" if self._styled else ""

    def _draw(self, above: Text | None = None) -> None:
        from rich.text import Text

        assert self._region is not None
        running = Text()
        if self._with_text:
            running = Text.assemble(printable_part(self._committed), (printable_part(self._tail), self._dim))
        line = status(self._meter, self._pace, self._first_step_s, ascii_only=self._region.ascii_only)
        self._region.draw(running, line, above)

    def _tick(self) -> None:
        """Redraw until the end. A terminal that is gone ends the drawing; `show` finds out by itself."""
        with contextlib.suppress(OSError, ValueError):
            while not self._ended.wait(_TICK_S):
                with self._lock:
                    if not self._ended.is_set():
                        self._draw()
