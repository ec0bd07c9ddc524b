# SPDX-License-Identifier: Apache-2.0
"""The system's own Chromium, without a window, driven by Playwright: nothing is downloaded for it."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Playwright

REQUIRED = "POCKETPHI_REQUIRE_BROWSER"  # set to 1: where it cannot be had the tests fail
_NAMES = ("chromium", "chromium-browser", "google-chrome")
_PACKAGES = ("playwright", "pydantic", "starlette", "uvicorn", "websockets")


def program() -> str | None:
    """Where the browser is."""
    return next((found for name in _NAMES if (found := shutil.which(name))), None)


def missing() -> str:
    """What this machine lacks, or nothing."""
    lacks = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if program() is None:
        lacks.append("Chromium (Debian: chromium)")
    return f"needs {', '.join(lacks)}" if lacks else ""


def launch(
    playwright: Playwright,
    env: Mapping[str, str],
    *,
    sound: Path | None = None,
    picture: Path | None = None,
) -> Browser:
    """A browser with a microphone and a camera of software, which pages may use without asking.

    Args:
        playwright: the driver.
        env: of the browser's processes.
        sound: a WAV file. The microphone hears it once, from when a page begins to listen, then silence.
            None: beeps.
        picture: a Y4M file, what the camera sees. None: a pattern.
    """
    found = program()
    assert found is not None
    flags = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    if sound is not None:
        flags.append(f"--use-file-for-fake-audio-capture={sound}%noloop")
    if picture is not None:
        flags.append(f"--use-file-for-fake-video-capture={picture}")
    clean: dict[str, str | float | bool] = dict(env)
    return playwright.chromium.launch(executable_path=found, args=flags, env=clean)


def required() -> bool:
    """Whether a machine without a browser is a failure."""
    return os.environ.get(REQUIRED) == "1"
