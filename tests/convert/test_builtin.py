# SPDX-License-Identifier: Apache-2.0
"""The built-in model: made once, shared by processes, made anew when damaged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pocketphi.convert.builtin import builtin_bundle
from pocketphi.runtime import bundle
from pocketphi.runtime.cache import cache_directory
from pocketphi.runtime.errors import OutputError


def test_made_once(tmp_path: Path) -> None:
    first = builtin_bundle(tmp_path)
    made = bundle.load(first)
    assert (made.name, made.recipe, made.licence) == ("phi4-nano", "Q8_0", "Apache-2.0")
    assert set(made.adapters) == {"vision", "speech"}
    assert len(list(made.check_hashes())) == len(made.files)
    stamp = (first / bundle.MANIFEST).stat().st_mtime_ns
    assert builtin_bundle(tmp_path) == first
    assert (first / bundle.MANIFEST).stat().st_mtime_ns == stamp


def test_damage_is_repaired(tmp_path: Path) -> None:
    path = builtin_bundle(tmp_path)
    (path / bundle.load(path).decoder).write_bytes(b"cut")
    assert builtin_bundle(tmp_path) == path
    assert len(list(bundle.load(path).check_hashes())) > 0
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_processes_at_once(tmp_path: Path) -> None:
    script = "import sys; from pathlib import Path; from pocketphi.convert.builtin import builtin_bundle; "
    script += "print(builtin_bundle(Path(sys.argv[1])))"
    command = [sys.executable, "-c", script, str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    found = {(p.communicate()[0].strip(), p.returncode) for p in running}
    assert len(found) == 1
    path, code = found.pop()
    assert code == 0 and [p.name for p in tmp_path.iterdir()] == [Path(path).name]
    assert len(list(bundle.load(Path(path)).check_hashes())) > 0


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="POCKETPHI_CACHE") as caught:
        builtin_bundle(tmp_path / "file" / "cache")
    assert "\n" not in str(caught.value)


def test_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("POCKETPHI_CACHE", "/chosen")
    assert cache_directory() == Path("/chosen")
    monkeypatch.setenv("POCKETPHI_CACHE", "")
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
        assert cache_directory() == Path("/shared/pocketphi")
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        assert cache_directory() == tmp_path / ".cache" / "pocketphi"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert cache_directory() == tmp_path / ".cache" / "pocketphi"
    else:
        assert os.fspath(cache_directory()).startswith(os.fspath(tmp_path))
