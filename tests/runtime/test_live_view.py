# SPDX-License-Identifier: Apache-2.0
"""What the view writes, read back by a small terminal: a screen that obeys cursor moves and wraps."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import struct
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fcntl import ioctl
from pathlib import Path
from typing import TextIO

import pytest

from pocketphi.runtime.live_events import LiveEvent
from pocketphi.runtime.live_view import LiveView, json_line, printable, stamp, status

HOSTILE = "one\x1b[2Jtwo\x9b31mthree\x07 \u202efour\nfive\ud800"


class Source:
    level_dbfs = -30.0
    overruns = underruns = 0


class Pace:
    speaking = False
    backlog_s = 0.0
    step_s = 1.0
    last_delay = 0.0


class Screen:
    """The part of a terminal that the view relies on: text, newline, \\r, cursor up, erasing, wrapping."""

    def __init__(self, columns: int) -> None:
        self.columns, self.rows, self.row, self.column = columns, [""], 0, 0

    def feed(self, text: str) -> None:
        for part in re.findall(r"\x1b\[\d*[a-zA-Z]|[\s\S]", re.sub(r"\x1b\[[\d;]*m", "", text)):
            if part == "\n" or (part == "\r\n"):
                self.row, self.column = self.row + 1, 0
            elif part == "\r":
                self.column = 0
            elif part == "\x1b[J":
                self.rows[self.row] = self.rows[self.row][: self.column]
                del self.rows[self.row + 1 :]
            elif part.startswith("\x1b["):
                assert part[-1] == "A", f"a move that this screen does not know: {part!r}"
                self.row -= int(part[2:-1])
                assert self.row >= 0
            else:
                assert part >= " ", f"a control character: {part!r}"
                if self.column == self.columns:
                    self.row, self.column = self.row + 1, 0
                self._grow()
                line = self.rows[self.row].ljust(self.column)
                self.rows[self.row] = line[: self.column] + part + line[self.column + 1 :]
                self.column += 1
            self._grow()

    def _grow(self) -> None:
        self.rows += [""] * (self.row + 1 - len(self.rows))


@contextmanager
def terminal(columns: int, rows: int = 24) -> Iterator[tuple[TextIO, Callable[[], str]]]:
    """A real terminal of this size: its stream, and what has been written to it so far."""
    master, slave = pty.openpty()
    ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    raw = bytearray()

    def collect() -> None:
        try:
            while chunk := os.read(master, 4096):
                raw.extend(chunk)
        except OSError:  # closed
            return

    reader = threading.Thread(target=collect)
    reader.start()
    out = open(slave, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115

    def text() -> str:
        if not out.closed:
            out.close()
            os.close(slave)
            reader.join()
        return raw.decode("utf-8")

    try:
        yield out, text
    finally:
        text()
        os.close(master)


def partial(text: str, committed: str = "") -> LiveEvent:
    return LiveEvent("partial", 1, text, 0.0, 1.0, committed=committed)


def final(text: str, t0: float = 0.0, translation: str | None = None) -> LiveEvent:
    return LiveEvent("final", 1, text, t0, t0 + 1, committed=text, translation=translation)


def test_finals_stay_above_and_the_region_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    long = " ".join(f"word{i}" for i in range(30))
    with terminal(40) as (out, text):
        with LiveView(Source(), Pace(), out=out, err=io.StringIO()) as view:
            for i in range(1, 30):
                view.show(partial(" ".join(f"word{k}" for k in range(i)), "word0"))
            view.show(final(long, t0=65))
            view.show(partial("and", ""))
            view.show(LiveEvent("silence", None, "", 66.0, 67.0))
            view.show(final("Short.", t0=3671, translation="Kurz."))
        shown = text()
    screen = Screen(40)
    screen.feed(shown)
    whole = f"[01:05] {long}"
    wrapped = [whole[i : i + 40] for i in range(0, len(whole), 40)]
    assert [r.rstrip() for r in screen.rows if r.strip()] == [
        *[w.rstrip() for w in wrapped],
        "[1:01:11] Short.",
        "          Kurz.",
    ]


def test_the_tail_is_dim_and_colours_can_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with terminal(80) as (out, text):
        with LiveView(Source(), Pace(), out=out, err=io.StringIO()) as view:
            view.show(partial("so far and on", "so far"))
        assert "so far\x1b[2m and on\x1b[0m" in text()
    monkeypatch.setenv("NO_COLOR", "1")
    with terminal(80) as (out, text):
        with LiveView(Source(), Pace(), out=out, err=io.StringIO()) as view:
            view.show(partial("so far and on", "so far"))
            view.show(final("so far and on"))
        assert "so far and on" in text()
        assert not re.search(r"\x1b\[[\d;]*m", text())


def test_a_terminal_that_becomes_narrower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its broken lines are counted: what was above is not erased, what was below does not stay."""
    monkeypatch.setenv("TERM", "xterm-256color")
    words = " ".join(["word"] * 30)
    with terminal(60) as (out, text):
        view = LiveView(Source(), Pace(), out=out, err=io.StringIO())  # no thread: the order is the test's
        view.show(final("First."))
        view.show(partial(words))
        before = Screen(60)
        ioctl(out.fileno(), termios.TIOCSWINSZ, struct.pack("HHHH", 24, 25, 0, 0))
        out.write("\x00")  # where the width changes
        view.show(final("Second."))
        wide, narrow = text().split("\x00")
    before.feed(wide)
    after = Screen(25)  # the emulator wraps the old lines anew, as terminals do
    after.feed("\r\n".join(before.rows))
    after.row, after.column = len(after.rows) - 1, len(after.rows[-1])
    after.feed(narrow)
    assert [r.strip() for r in after.rows][:2] == ["[00:00] First.", "[00:00] Second."]
    assert "word" not in "".join(after.rows)


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_a_terminal_too_narrow_for_a_region(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    with terminal(columns) as (out, text):
        view = LiveView(Source(), Pace(), out=out, err=io.StringIO())
        view.show(partial("A word"))
        view.show(final("A word."))
        shown = re.sub(r"\x1b\[[\d;]*m", "", text())
    assert shown == "[00:00] A word.\r\n"


def test_a_terminal_that_becomes_too_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The region goes, and comes back with the room."""
    monkeypatch.setenv("TERM", "xterm-256color")
    with terminal(40) as (out, text):
        view = LiveView(Source(), Pace(), out=out, err=io.StringIO())
        for columns in (1, 40):
            view.show(partial("A word"))
            ioctl(out.fileno(), termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
            out.write("\x00")
        view.show(partial("A word"))
        wide, narrow, again = text().split("\x00")
    assert "A word" in wide
    assert "A word" not in narrow
    assert narrow.endswith("\x1b[J")
    assert "A word" in again


def test_more_text_than_rows_shows_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    with terminal(20, rows=5) as (out, text):
        view = LiveView(Source(), Pace(), out=out, err=io.StringIO())
        view.show(partial(" ".join(f"w{i}" for i in range(60))))
        shown = text()
    screen = Screen(20)
    screen.feed(shown)
    assert len(screen.rows) <= 4
    assert "w59" in shown
    assert "w0 " not in shown


def test_the_meter_moves_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is shown, the level changes: the thread draws it. It ends with the view."""
    monkeypatch.setenv("TERM", "xterm-256color")
    moved = threading.Event()

    class Moving(Source):
        n = 0

        @property
        def level_dbfs(self) -> float:  # type: ignore[override]
            self.n += 1
            if self.n > 3:
                moved.set()
            return -60.0 + self.n

    before = threading.active_count()
    with terminal(80) as (out, text):
        with LiveView(Moving(), Pace(), out=out, err=io.StringIO()):
            assert moved.wait(20)
        shown = text()
    assert len(set(re.findall(r"-\d+ dBFS", shown))) >= 3
    assert threading.active_count() == before


def test_elsewhere_stdout_holds_finals_and_nothing_else() -> None:
    out, err = io.StringIO(), io.StringIO()
    with LiveView(Source(), Pace(), out=out, err=err) as view:
        view.show(partial("Hel"))
        view.show(final("Hello\nthere.", translation="Hallo."))
        view.show(final("  "))
        view.show(LiveEvent("silence", None, "", 1.0, 2.0))
        view.say("a comment")
    assert out.getvalue() == "Hello there.\nHallo.\n"
    assert err.getvalue() == "a comment\n"


def test_the_meter_is_on_stderr_where_stdout_goes_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    out = io.StringIO()
    drawn = threading.Event()

    class Watched(Source):
        @property
        def overruns(self) -> int:  # type: ignore[override]
            drawn.set()
            return 2

    with terminal(80) as (err, text):
        with LiveView(Watched(), Pace(), out=out, err=err) as view:
            assert drawn.wait(20)
            view.show(partial("Hel"))
            view.show(final("Hello."))
        shown = text()
    assert out.getvalue() == "Hello.\n"
    assert "2 overruns" in shown
    assert "Hel" not in shown


@pytest.mark.parametrize("name", ["dumb", "unknown"])
def test_a_terminal_without_cursor_moves(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", name)
    with terminal(80) as (out, text):
        with LiveView(Source(), Pace(), out=out, err=io.StringIO()) as view:
            view.show(partial("Hel"))
            view.show(final("Hello."))
        assert text() == "Hello.\r\n"


def test_json_lines() -> None:
    out = io.StringIO()
    events = [partial("a b", "a"), final("ä b"), LiveEvent("silence", None, "", 1.0, 2.0)]
    with LiveView(Source(), Pace(), out=out, err=io.StringIO(), as_json=True) as view:
        for event in events:
            view.show(event)
    assert [json.loads(line) for line in out.getvalue().splitlines()] == [e.to_object() for e in events]
    assert "ä" in out.getvalue()


def test_json_has_no_raw_control_characters() -> None:
    line = json_line({"text": HOSTILE})
    assert json.loads(line) == {"text": HOSTILE}
    assert all(c >= " " and not "\x7f" <= c <= "\x9f" for c in line)
    line.encode("utf-8")


def test_text_that_would_drive_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = printable(HOSTILE)
    assert shown == "one\ufffd[2Jtwo\ufffd31mthree\ufffd \ufffdfour five\ufffd"
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    with terminal(200) as (out, text):
        view = LiveView(Source(), Pace(), out=out, err=io.StringIO())
        view.show(partial(HOSTILE, "one"))
        view.show(final(HOSTILE))
        written = text()
    assert re.sub(r"\x1b\[\d*[AJ]", "", written).count("\x1b") == 0
    assert "\x9b" not in written


def test_the_status_line_says_what_is_not_as_it_should_be() -> None:
    pace = Pace()
    assert status(Source(), pace, 1.0) == "listening ██████░░░░░░  -30 dBFS"
    pace.speaking, pace.last_delay, pace.backlog_s, pace.step_s = True, 0.84, 3.25, 2.5
    line = status(Source(), pace, 1.0, ascii_only=True)
    assert line == "speaking  ######......  -30 dBFS  delay 0.8 s  3.2 s behind  step 2.5 s"


@pytest.mark.parametrize(
    ("level", "full"), [(float("-inf"), 0), (float("nan"), 0), (-99.0, 0), (0.0, 12), (9.0, 12)]
)
def test_the_meter_holds_every_level(level: float, full: int) -> None:
    class Loud(Source):
        level_dbfs = level

    assert status(Loud(), Pace(), 1.0).count("█") == full


def test_times() -> None:
    assert [stamp(s) for s in (0, 59.99, 60, 3599, 3600, 360000)] == [
        "[00:00]", "[00:59]", "[01:00]", "[59:59]", "[1:00:00]", "[100:00:00]",
    ]  # fmt: skip


def test_a_stream_that_nobody_reads() -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", encoding="utf-8") as out:  # noqa: PTH123
        with LiveView(Source(), Pace(), out=out, err=io.StringIO()) as view, pytest.raises(BrokenPipeError):
            view.show(final("Hello."))
        os.dup2(os.open(Path(os.devnull), os.O_WRONLY), out.fileno())
