# SPDX-License-Identifier: Apache-2.0
"""Where this user's converted models, and what is known about files, are kept."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from .errors import OutputError

CACHE_VARIABLE = "POCKETPHI_CACHE"


def cache_directory() -> Path:
    """The cache: $POCKETPHI_CACHE, else the platform's place for caches. It need not be there yet.

    That is ~/Library/Caches/pocketphi on macOS, %LOCALAPPDATA%\\pocketphi\\Cache on Windows, and
    $XDG_CACHE_HOME/pocketphi or ~/.cache/pocketphi elsewhere.

    Raises:
        OutputError: there is no home directory.
    """
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    try:
        if sys.platform == "darwin":
            return _home() / "Library" / "Caches" / "pocketphi"
        if sys.platform == "win32":
            local = os.environ.get("LOCALAPPDATA")
            return (Path(local) if local else _home() / "AppData" / "Local") / "pocketphi" / "Cache"
        # The specification says to ignore a relative path here.
        shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
        return (shared if shared.is_absolute() else _home() / ".cache") / "pocketphi"
    except RuntimeError:
        raise OutputError(f"there is no home directory to keep the model in: set {CACHE_VARIABLE}") from None


def _home() -> Path:
    """RuntimeError where there is none; an empty $HOME would be the root, or the working directory."""
    home = Path.home()
    if not os.environ.get("HOME", "unset") or not home.is_absolute():
        raise RuntimeError
    return home
