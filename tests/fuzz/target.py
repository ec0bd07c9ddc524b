# SPDX-License-Identifier: Apache-2.0
"""What a fuzz target is, and what every one of them holds its reader to.

A target takes bytes from anywhere, gives them to a reader, and raises where a promise is broken: an exception
that is not the documented one, a message of more than a line, or an accepted input that contradicts itself.
Memory and time are bounded by the process that runs it: see campaign.py.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pocketphi.runtime.errors import PocketPhiError

T = TypeVar("T")
SCRATCH = "POCKETPHI_FUZZ_SCRATCH"  # for who ends the process without a chance to remove it
SEEDS = Path(__file__).parent / "seeds"
_MOST_MESSAGE = 1200  # characters: a path, what was found, what was wanted


class BrokenPromise(AssertionError):
    """A reader did what it must not."""


@dataclass(frozen=True)
class Target:
    """A reader under test. Its seeds are the files of `seeds/<name>`, or of the folder that `seeds` names."""

    name: str
    one_input: Callable[[bytes], object]
    runs: int = 2000  # in the short run
    seeds: str = ""

    @property
    def folder(self) -> Path:
        """Where its seeds are."""
        return SEEDS / (self.seeds or self.name)


def attempt(call: Callable[[], T], *kinds: type[Exception]) -> T | None:
    """The result, or None where the reader refuses as documented: one of `kinds`, in one printable line."""
    try:
        return call()
    except kinds as exc:
        text = str(exc)
        if not text or not text.isprintable() or len(text) > _MOST_MESSAGE:
            raise BrokenPromise(f"the message is not one short printable line: {text[:2000]!r}") from exc
        if isinstance(exc, PocketPhiError) and type(exc) is PocketPhiError:
            raise BrokenPromise(f"the error has no kind: {text!r}") from exc
        return None


def promise(holds: bool, what: str) -> None:
    """Something that an accepted input must be."""
    if not holds:
        raise BrokenPromise(what)


@functools.cache
def scratch() -> Path:
    """A folder for the process's files: the one it was told, or in memory where there is such a place."""
    told = os.environ.get(SCRATCH)
    if told is not None:
        Path(told).mkdir(parents=True, exist_ok=True)
        return Path(told)
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="pocketphi-fuzz-", dir=memory if memory.is_dir() else None))


def remove_scratch() -> None:
    """Remove that folder."""
    if scratch.cache_info().currsize:
        shutil.rmtree(scratch(), ignore_errors=True)


def file_with(data: bytes, name: str) -> Path:
    """A file of that name with these bytes; the next one replaces it."""
    path = scratch() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
