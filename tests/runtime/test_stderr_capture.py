# SPDX-License-Identifier: Apache-2.0
"""Whose lines on stderr are taken, and whose are not."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from pocketphi.runtime.stderr_capture import Unheard


def _call() -> int:
    """Writes as a C library does."""
    os.write(2, b"first\nsecond\n")
    return 7


def test_one_thread(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = [threading.current_thread()]  # libraries of other tests may have left threads that sleep
    monkeypatch.setattr(threading, "enumerate", lambda: here)
    unheard = Unheard()
    assert unheard(_call) == 7
    assert unheard(_call) == 7
    unheard.report("x.mp3")
    assert capfd.readouterr().err == ""
    assert caplog.messages == ["x.mp3: was read, but its decoder complained: first"]


def test_silence_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    unheard = Unheard()
    assert unheard(lambda: 3) == 3
    unheard.report("x.mp3")
    assert caplog.messages == []


def test_what_another_thread_may_write_is_not_taken(capfd: pytest.CaptureFixture[str]) -> None:
    ended = threading.Event()
    other = threading.Thread(target=ended.wait)
    other.start()
    try:
        assert Unheard()(_call) == 7
    finally:
        ended.set()
        other.join()
    assert capfd.readouterr().err == "first\nsecond\n"


def test_without_a_temporary_folder(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is no reason not to read a clip."""
    with monkeypatch.context() as patched:
        patched.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
        assert Unheard()(_call) == 7
    assert capfd.readouterr().err == "first\nsecond\n"
