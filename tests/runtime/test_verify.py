# SPDX-License-Identifier: Apache-2.0
"""Files that are not what the manifest says are named; files that are known are not read again."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pocketphi.convert.builtin import builtin_bundle
from pocketphi.runtime import bundle as bundles
from pocketphi.runtime import verify
from pocketphi.runtime.bundle import Bundle
from pocketphi.runtime.cache import CACHE_VARIABLE
from pocketphi.runtime.engine import Model
from pocketphi.runtime.errors import BundleError

LONG_AGO_S = 10.0
SETTLED_S = 0.15  # more than what `verify` waits for before it trusts a file's times


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    return folder


@pytest.fixture
def bundle(tmp_path: Path, cache: Path) -> Bundle:
    """phi4-nano as a user has it, some time after it was converted."""
    loaded = bundles.load(builtin_bundle(tmp_path))
    for entry in loaded.files:
        age(loaded.path(entry.path))
    time.sleep(SETTLED_S)  # nothing sets a ctime
    return loaded


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read whole from now on."""
    found: list[str] = []
    real = bundles.sha256_of

    def counted(path: Path, on_read: Callable[[int], None] | None = None) -> str:
        found.append(path.name)
        return real(path, on_read)

    monkeypatch.setattr(bundles, "sha256_of", counted)
    return found


def age(path: Path) -> None:
    """As if its content had been written long ago."""
    when = time.time_ns() - int(LONG_AGO_S * 1e9)
    os.utime(path, ns=(when, when))


def flip(path: Path, at: int = -1) -> None:
    """One bit, and the times as they were: what a disk does, and what somebody may do on purpose."""
    before = path.stat()
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def names(bundle: Bundle) -> list[str]:
    return sorted(entry.path for entry in bundle.files)


def test_files_are_read_once(bundle: Bundle, cache: Path, read: list[str]) -> None:
    verify.check(bundle)
    assert sorted(read) == names(bundle)
    assert len(json.loads((cache / verify.FILE).read_text("utf-8"))) == len(bundle.files)
    read.clear()
    verify.check(bundle)
    assert read == []


def test_the_same_files_elsewhere_are_known(bundle: Bundle, tmp_path: Path, read: list[str]) -> None:
    verify.check(bundle)
    read.clear()
    moved = tmp_path / "moved"
    bundle.root.rename(moved)
    verify.check(bundles.load(moved))
    assert read == [], "renaming the folder touches none of its files"


def test_every_damaged_file_is_named_before_anything_reads_it(bundle: Bundle) -> None:
    for entry in bundle.files:
        path = bundle.path(entry.path)
        whole = path.read_bytes()
        flip(path, len(whole) // 2)
        with pytest.raises(BundleError, match=r"SHA-256 is .*…, bundle\.json says ") as caught:
            Model(bundle.root)
        assert str(caught.value).startswith(f"{path}: ")
        path.write_bytes(whole)
    Model(bundle.root).close()


def test_damage_after_it_was_known(bundle: Bundle) -> None:
    verify.check(bundle)
    victim = bundle.path(bundle.decoder)
    before = victim.stat()
    flip(victim)
    after = victim.stat()
    assert (before.st_size, before.st_mtime_ns, before.st_ino) == (
        after.st_size,
        after.st_mtime_ns,
        after.st_ino,
    )
    with pytest.raises(BundleError, match="SHA-256"):
        verify.check(bundle)
    with pytest.raises(BundleError, match="SHA-256"):
        verify.check(bundle)


def test_another_manifest_over_known_files(bundle: Bundle) -> None:
    verify.check(bundle)
    manifest = bundle.root / bundles.MANIFEST
    raw = json.loads(manifest.read_text("utf-8"))
    raw["files"][0]["sha256"] = "0" * 64
    del raw["sha256"]  # of the manifest itself
    manifest.write_text(json.dumps(raw), "utf-8")
    with pytest.raises(BundleError, match="says 0000000000000000"):
        verify.check(bundles.load(bundle.root))


def test_a_file_written_just_now_is_not_remembered(bundle: Bundle, read: list[str]) -> None:
    """It could be written again within the same tick of the file system's clock."""
    fresh = bundle.path(bundle.tokenizer)
    now = time.time_ns()
    os.utime(fresh, ns=(now, now))
    verify.check(bundle)
    read.clear()
    verify.check(bundle)
    assert read == [fresh.name]
    age(fresh)  # by its mtime alone
    verify.check(bundle)
    read.clear()
    verify.check(bundle)
    assert read == [fresh.name]
    time.sleep(SETTLED_S)
    verify.check(bundle)
    read.clear()
    verify.check(bundle)
    assert read == []


DAMAGE = {
    "empty": b"",
    "not JSON": b"{",
    "not text": b"\xff",
    "a list": b"[]",
    "a number for a text": b'{"1:1": 1}',
    "deep": b"[" * 100_000,
    "long": b" " * (2 << 20),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_memory_is_written_anew(name: str, bundle: Bundle, cache: Path, read: list[str]) -> None:
    cache.mkdir()
    (cache / verify.FILE).write_bytes(DAMAGE[name])
    verify.check(bundle)
    assert sorted(read) == names(bundle)
    read.clear()
    verify.check(bundle)
    assert read == []


def test_memory_is_bounded_and_keeps_the_latest(bundle: Bundle, cache: Path) -> None:
    cache.mkdir()
    old = {f"9:{i}": "x" for i in range(2000)}
    (cache / verify.FILE).write_text(json.dumps(old), "utf-8")
    verify.check(bundle)
    kept = json.loads((cache / verify.FILE).read_text("utf-8"))
    assert len(kept) == 1024
    assert sum(not key.startswith("9:") for key in kept) == len(bundle.files)
    assert "9:1999" in kept and "9:0" not in kept


def test_without_a_cache_all_is_read_each_time_and_said(
    bundle: Bundle,
    tmp_path: Path,
    read: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Files of any size: a hole of 65 MiB takes no room, and is read like the others."""
    large = bundle.path("large.bin")
    with large.open("wb") as file:
        file.truncate(65 << 20)
    raw = json.loads((bundle.root / bundles.MANIFEST).read_text("utf-8"))
    raw["files"].append({"path": large.name, "size": 65 << 20, "sha256": bundles.sha256_of(large)})
    del raw["sha256"]  # of the manifest itself
    (bundle.root / bundles.MANIFEST).write_text(json.dumps(raw), "utf-8")
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    loaded = bundles.load(bundle.root)
    read.clear()
    for _ in range(2):
        with caplog.at_level(logging.INFO):
            verify.check(loaded)
        assert sorted(read) == names(loaded)
        assert caplog.text.count("all files are checked each time") == 1
        read.clear()
        caplog.clear()
    with large.open("r+b") as file:
        file.seek(40 << 20)
        file.write(b"x")
    with pytest.raises(BundleError, match=r"large\.bin: SHA-256"):
        verify.check(loaded)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that opens and cannot be read")
def test_a_file_that_cannot_be_read(bundle: Bundle) -> None:
    """Its first page is not mapped: reading it is the I/O error of a bad disk."""
    victim = bundle.path(bundle.tokenizer)
    entry = next(f for f in bundle.files if f.path == bundle.tokenizer)
    victim.unlink()
    victim.symlink_to("/proc/self/mem")
    with pytest.raises(BundleError, match="cannot be read: Input/output error"):
        bundle.check_hash(entry)


def test_two_processes_at_once(bundle: Bundle, cache: Path) -> None:
    script = "import sys; from pathlib import Path; from pocketphi.runtime import bundle, verify; "
    script += "verify.check(bundle.load(Path(sys.argv[1])))"
    command = [sys.executable, "-c", script, str(bundle.root)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(4)]
    assert [(p.communicate()[1], p.returncode) for p in running] == [(b"", 0)] * 4
    assert [p.name for p in cache.iterdir()] == [verify.FILE]
    assert len(json.loads((cache / verify.FILE).read_text("utf-8"))) == len(bundle.files)


class Bar:
    """What the command line's bar is told."""

    def __init__(self) -> None:
        self.total = self.done = 0
        self.finished = False

    def start(self, total_bytes: int, what: str) -> None:
        assert what == "checking"
        self.total = total_bytes

    def advance(self, n_bytes: int, what: str) -> None:
        self.done += n_bytes

    def finish(self) -> None:
        self.finished = True


def test_progress_is_told_when_it_takes_long(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of work that is done at once; of slow work all that was read before the last look."""
    bar = Bar()
    verify.check(bundle, bar)
    assert (bar.total, bar.done) == (0, 0)
    for entry in bundle.files:
        age(bundle.path(entry.path))  # another ctime: not known any more
    real = bundles.sha256_of

    def slow(path: Path, on_read: Callable[[int], None] | None = None) -> str:
        found = real(path, on_read)
        time.sleep(0.05)
        return found

    monkeypatch.setattr(bundles, "sha256_of", slow)
    monkeypatch.setattr(verify, "_BAR_AFTER_S", 0.0)
    monkeypatch.setattr(verify, "_BAR_EVERY_S", 0.01)
    verify.check(bundle, bar)
    assert bar.total == sum(f.size for f in bundle.files)
    assert 0 < bar.done <= bar.total
    assert bar.finished


class Interrupted(Exception):
    pass


def test_an_interrupt_ends_it(bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a bar raises (Ctrl-C comes there) ends the threads, and nothing is remembered."""

    class Broken(Bar):
        def start(self, total_bytes: int, what: str) -> None:
            raise Interrupted

    monkeypatch.setattr(verify, "_BAR_AFTER_S", 0.0)
    with pytest.raises(Interrupted):
        verify.check(bundle, Broken())
    assert not (cache / verify.FILE).exists()
