# SPDX-License-Identifier: Apache-2.0
"""What a row of the bad-input tables says, what it may use, and what can be wrong with how it went."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pocketphi.runtime.bundle import MANIFEST

from .zygote import Outcome

Listing = Mapping[str, tuple[int, int]]  # what lies in a folder: relative name -> (size, mtime in ns)


@dataclass(frozen=True)
class Place:
    """A folder of a case's own, and models to spoil."""

    path: Path  # empty at first; what the case's input is made of goes here
    copy_model: Callable[[Path, str, str], Path]  # (into, member, recipe)
    copy_checkpoint: Callable[[Path, str], Path]  # (into, member)
    shared_model: Callable[[str, str], Path]  # (member, recipe); everybody's, to read only

    def model(self, member: str = "phi4-nano", recipe: str = "Q8_0", name: str = "model") -> Path:
        """A copy of a converted model directory; `member` as in tests/tiny.py."""
        return self.copy_model(self.path / name, member, recipe)

    def checkpoint(self, member: str = "phi4-mini", name: str = "checkpoint") -> Path:
        """A copy of a source checkpoint."""
        return self.copy_checkpoint(self.path / name, member)

    def write(self, name: str, content: bytes | str) -> Path:
        """A file of that content."""
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return file


@dataclass(frozen=True)
class Case:
    """One input, and what the program has to make of it."""

    id: str
    make: Callable[[Place], list[str]]  # writes its files under place.path; returns the program's arguments
    code: int | tuple[int, ...]
    line: str  # a regex for the one line on stderr; "": nothing may be there
    stdin: bytes = b""
    max_seconds: float = 20
    max_rss_mb: int = 600  # the peak of the whole process, libraries included
    out: str | None = None  # a regex for stdout; None: not looked at
    leaves: str | None = None  # a regex for the names of what it may write beside its input
    env: Mapping[str, str] = field(default_factory=dict)
    lines: int = 1  # how many of them, where `line` is not ""


def seal(model: Path) -> Path:
    """Make a spoilt model directory's list of files right again, so that what is spoilt gets its turn."""
    manifest = model / MANIFEST
    plain: dict[str, Any] = json.loads(manifest.read_text("utf-8"))
    plain.pop("sha256", None)  # of the manifest itself
    for entry in plain["files"]:
        raw = (model / entry["path"]).read_bytes()
        entry["size"], entry["sha256"] = len(raw), hashlib.sha256(raw).hexdigest()
    manifest.write_text(json.dumps(plain, indent=1, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
    return model


def listing(folder: Path, but: str | None = None) -> Listing:
    """Everything in a folder, links not followed, without the file called `but`."""
    found = {}
    for path in folder.rglob("*"):
        name, about = path.relative_to(folder).as_posix(), path.lstat()
        if stat.S_ISDIR(about.st_mode):
            found[f"{name}/"] = (0, 0)  # its time is its content's, which is listed
        elif name != but:
            found[name] = (about.st_size, about.st_mtime_ns)
    return found


def faults(case: Case, outcome: Outcome) -> list[str]:
    """All that is wrong with how it went, each as a sentence; none is as it should be."""
    found = []
    codes = case.code if isinstance(case.code, tuple) else (case.code,)
    error = outcome.err.decode("utf-8", "replace")
    if outcome.timed_out:
        found.append(f"was still running after {case.max_seconds} s")
    elif outcome.code < 0:
        found.append(f"was killed by signal {-outcome.code}")
    elif outcome.code not in codes:
        found.append(f"exit code is {outcome.code}, expected {case.code}")
    if "Traceback" in error:
        found.append("shows a traceback")
    if outcome.peak_mb > case.max_rss_mb:
        found.append(f"took {outcome.peak_mb:.0f} MB, expected at most {case.max_rss_mb}")
    found += _about_lines(case, outcome.code, error)
    out = outcome.out.decode("utf-8", "replace")
    if case.out is not None and not re.search(case.out, out):
        found.append(f"stdout is {out[:300]!r}, expected /{case.out}/")
    return found


def _about_lines(case: Case, code: int, error: str) -> list[str]:
    if not case.line:
        return [f"stderr is {error[-600:]!r}, expected nothing"] if error else []
    found = []
    if error.count("\n") != case.lines or not error.endswith("\n"):
        wanted = "one" if case.lines == 1 else str(case.lines)
        found.append(f"stderr has {error.count(chr(10))} lines, expected {wanted}: {error[-600:]!r}")
    if code not in (0, 130) and not error.startswith("error: "):
        found.append(f"stderr is {error[:300]!r}, expected it to begin with 'error: '")
    if not re.search(case.line, error):
        found.append(f"stderr is {error[-600:]!r}, expected /{case.line}/")
    return found


def differences(before: Listing, after: Listing, allowed: str | None = None) -> list[str]:
    """What became of a folder's content, but for new files whose names match `allowed`."""
    gone = [f"{name} is gone" for name in before.keys() - after.keys()]
    changed = [f"{name} was changed" for name in before.keys() & after.keys() if before[name] != after[name]]
    new = [
        f"{name} was left behind"
        for name in after.keys() - before.keys()
        if allowed is None or not re.search(allowed, name)
    ]
    return sorted(gone + changed + new)


def copy_folder(source: Path, into: Path) -> Path:
    """A copy with modification times of its own."""
    shutil.copytree(source, into, copy_function=shutil.copyfile)
    return into
