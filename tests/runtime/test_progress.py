# SPDX-License-Identifier: Apache-2.0
"""Progress bars on a real terminal: they come and go, and what else is printed stays whole."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from pocketphi.runtime.progress import clock

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no pseudo terminals there")

AUDIO = """
import sys
from pocketphi.runtime.progress import AudioBar
bar = AudioBar()
bar.start(TOTAL, "talk.wav", before_s=60)
for i in range(3):
    bar.reach(1200 * (i + 1))
    with bar.aside():
        sys.stdout.write(f"words {i}\\n")
        sys.stdout.flush()
bar.finish()
"""
BYTES = """
from pocketphi.runtime.progress import ProgressBar
bar = ProgressBar()
bar.start(1 << 20, "decoder")
bar.advance(1 << 19, "token_embd.weight")
bar.finish()
bar.finish()
"""


def run(script: str, *, stdout_too: bool, columns: int = 120) -> tuple[str, str]:
    """What a terminal receives that is stderr, and stdout if it is another file."""
    import pty

    ours, theirs = pty.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": str(columns)}
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stderr=theirs,
        stdout=theirs if stdout_too else subprocess.PIPE,
        env=env,
    ) as child:
        os.close(theirs)
        received = b""
        while piece := _read(ours):
            received += piece
        out = b"" if child.stdout is None else child.stdout.read()
        assert child.wait(timeout=60) == 0, received
    os.close(ours)
    return received.decode("utf-8"), out.decode("utf-8")


def _read(handle: int) -> bytes:
    try:
        return os.read(handle, 65536)
    except OSError:  # Linux says EIO where the other end is closed
        return b""


def screen(received: str) -> list[str]:
    """The rows in the end, as far as carriage return, line feed, up, and erase line go."""
    rows, row, column = [""], 0, 0
    for found in re.finditer(r"\x1b\[\??([\d;]*)([A-Za-z])|[\r\n]|[^\x1b\r\n]+", received):
        text = found[0]
        if text == "\r":
            column = 0
        elif text == "\n":
            row += 1
            rows += [""] * (row == len(rows))
        elif found[2] == "K":
            rows[row] = ""
        elif found[2] == "A":
            row -= int(found[1] or 1)
        elif found[2] is None:
            rows[row] = rows[row][:column].ljust(column) + text + rows[row][column + len(text) :]
            column += len(text)
    return [line for line in rows if line.strip()]


def test_words_on_the_same_terminal_stay_whole() -> None:
    received, _ = run(AUDIO.replace("TOTAL", "3725.5"), stdout_too=True)
    assert "talk.wav" in received
    assert "40:00 of 1:02:05" in received
    assert screen(received) == ["words 0", "words 1", "words 2"]


def test_words_in_a_pipe_stay_there() -> None:
    """The bar's library would redirect stdout to the terminal."""
    received, out = run(AUDIO.replace("TOTAL", "3725.5"), stdout_too=False)
    assert out == "words 0\nwords 1\nwords 2\n"
    assert "words" not in received
    assert screen(received) == []


def test_a_recording_of_unknown_length() -> None:
    received, _ = run(AUDIO.replace("TOTAL", "None"), stdout_too=False)
    assert "1:00:00" in received
    assert " of " not in received


def test_bytes() -> None:
    received, _ = run(BYTES, stdout_too=True)
    assert "decoder" in received
    assert screen(received) == []


def test_a_narrow_terminal_shows_the_time_that_is_left() -> None:
    """The name gives way. Without a speed the time is `-:--:--`, as wide as any."""
    waits = "\n    import time; time.sleep(0.2)\n    bar.reach"
    audio = AUDIO.replace("TOTAL", "3725.5").replace("talk.wav", "a-long-name-of-a-talk.wav")
    for script in (
        audio.replace("\n    bar.reach", waits),
        BYTES.replace("bar.advance", "bar.advance(1, 'x' * 40)\nbar.advance"),
    ):
        received, _ = run(script, stdout_too=True, columns=60)
        rows = re.findall(r"[^\r\n]*[━╸╺][^\r\n]*", re.sub(r"\x1b\[\??[\d;]*[a-zA-Z]", "", received))
        assert rows
        assert all(re.search(r" (\d+:\d\d|-:--):(\d\d|--)\s*$", row) for row in rows), rows
        assert "…" not in received


def test_nothing_where_there_is_no_terminal() -> None:
    for script in (AUDIO.replace("TOTAL", "9.0"), BYTES):
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
        )
        assert done.stderr == ""
        assert done.stdout in ("", "words 0\nwords 1\nwords 2\n")


def test_clock() -> None:
    assert [clock(s) for s in (0.0, 59.99, 60.0, 3599.0, 3600.0, 86_400.5)] == [
        "0:00", "0:59", "1:00", "59:59", "1:00:00", "24:00:00",
    ]  # fmt: skip
