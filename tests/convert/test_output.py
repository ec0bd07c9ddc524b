# SPDX-License-Identifier: Apache-2.0
"""Output directories: whole or not there, whatever goes wrong, and nobody else's work is touched."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pocketphi.convert import output
from pocketphi.convert.output import HashedFile, new_directory, one_at_a_time, write_file
from pocketphi.runtime.bundle import MANIFEST
from pocketphi.runtime.errors import OutputError

needs_flock = pytest.mark.skipif(sys.platform == "win32", reason="no flock")


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def test_appears_by_rename(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "out"
    with new_directory(out, 0, overwrite=False) as partial:
        assert partial.parent == out.parent and partial.name.startswith(".out.partial-")
        assert not out.exists()
        write_file(partial, "a", b"1")
    assert names(out) == ["a"] and names(out.parent) == ["out"]


@pytest.mark.parametrize("error", [OutputError, KeyboardInterrupt, SystemExit, ValueError])
def test_a_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), new_directory(tmp_path / "out", 0, overwrite=False) as partial:
        write_file(partial, "a", b"1")
        raise error
    assert names(tmp_path) == []


def test_a_full_directory_is_refused_and_an_empty_one_used(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with new_directory(out, 0, overwrite=False) as partial:
        write_file(partial, MANIFEST, b"1")
    with pytest.raises(OutputError, match="not empty"), new_directory(out, 0, overwrite=False):
        pytest.fail("the block must not run")
    assert (out / MANIFEST).read_bytes() == b"1"


def test_overwriting(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for content in (b"1", b"2"):
        with new_directory(out, 0, overwrite=True) as partial:
            write_file(partial, MANIFEST, content)
            write_file(partial, content.decode(), b"")
    assert names(out) == ["2", MANIFEST] and names(tmp_path) == ["out"]
    with pytest.raises(ValueError), new_directory(out, 0, overwrite=True) as partial:
        write_file(partial, MANIFEST, b"3")
        raise ValueError
    assert (out / MANIFEST).read_bytes() == b"2" and names(tmp_path) == ["out"]


def test_a_model_directory_with_something_else_in_it_is_not_overwritten(tmp_path: Path) -> None:
    """It may be the checkpoint that the model is made from."""
    out = tmp_path / "out"
    (out / "checkpoint").mkdir(parents=True)
    (out / "checkpoint" / "model.safetensors").write_bytes(b"weights")
    for manifest in ('{"files": [{"path": "a.gguf"}]}', "damaged"):
        (out / MANIFEST).write_text(manifest, "utf-8")
        with (
            pytest.raises(OutputError, match="checkpoint: no conversion wrote it"),
            new_directory(out, 0, overwrite=True),
        ):
            pass
        assert (out / "checkpoint" / "model.safetensors").read_bytes() == b"weights"


def test_only_model_directories_are_overwritten(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    with (
        pytest.raises(OutputError, match="not a model directory"),
        new_directory(tmp_path / "photos", 0, overwrite=True),
    ):
        pytest.fail("the block must not run")
    assert names(tmp_path / "photos") == ["cat.png"]


def test_places_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for out in (tmp_path / "file", tmp_path / "file" / "out", Path("/proc/nowhere/out")):
        with pytest.raises(OutputError) as caught, new_directory(out, 0, overwrite=False):
            pytest.fail("the block must not run")
        assert str(out) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_parent_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="ermission"), new_directory(tmp_path / "out", 0, overwrite=False):
        pytest.fail("the block must not run")
    tmp_path.chmod(0o700)


def test_a_small_disk_is_foreseen(tmp_path: Path) -> None:
    with pytest.raises(OutputError) as caught, new_directory(tmp_path / "out", 1 << 60, overwrite=False):
        pytest.fail("the block must not run")
    assert re.search(r"has [\d,]+ bytes free, the output needs 1,152,921,504,606,846,976", str(caught.value))
    assert names(tmp_path) == []


def test_hash_and_size_come_with_the_file(tmp_path: Path) -> None:
    with HashedFile(tmp_path, "a") as file:
        file.write(b"abc")
        file.pad(32)
        file.pad(32)
        file.write(memoryview(b"defg").cast("H"))
        made = file.finish()
    content = b"abc" + bytes(29) + b"defg"
    assert (tmp_path / "a").read_bytes() == content
    assert (made.path, made.size, made.sha256) == ("a", 36, hashlib.sha256(content).hexdigest())
    with pytest.raises(OutputError, match="exists"):
        HashedFile(tmp_path, "a")


def test_pushing_while_writing_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "_PUSH_BYTES", 1000)
    content = os.urandom(100_000)
    with HashedFile(tmp_path, "a") as file:
        for at in range(0, len(content), 700):
            file.write(content[at : at + 700])
        made = file.finish()
    assert (tmp_path / "a").read_bytes() == content
    assert (made.size, made.sha256) == (len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limit")
def test_a_write_that_fails_is_an_output_error(tmp_path: Path) -> None:
    """A file size limit stops a write half-way, as a full disk does; it binds the whole process."""
    script = """
import resource, sys
from pathlib import Path
from pocketphi.convert.output import new_directory, write_file
from pocketphi.runtime.errors import OutputError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with new_directory(Path(sys.argv[1]) / "out", 0, overwrite=False) as partial:
        write_file(partial, "a", bytes(2000))
except OutputError as exc:
    sys.exit(str(exc))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert re.fullmatch(r".*/a: cannot be written: File too large\n", done.stderr)
    assert names(tmp_path) == []


HOLD = """
import sys, time
from pathlib import Path
from pocketphi.convert.output import new_directory, write_file
with new_directory(Path(sys.argv[1]), 0, overwrite=False) as partial:
    write_file(partial, "a", b"1")
    print(partial.name, flush=True)
    sys.stdin.read()
"""


@needs_flock
def test_leavings_of_the_dead_are_removed_and_the_living_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out[1]"  # brackets mean something to glob
    command = [sys.executable, "-c", HOLD, str(out)]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as dead,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as living,
    ):
        assert dead.stdout and living.stdout and living.stdin
        of_dead, of_living = dead.stdout.readline().strip(), living.stdout.readline().strip()
        dead.kill()
        dead.wait()
        assert names(tmp_path) == sorted([of_dead, of_living])
        with pytest.raises(ValueError), new_directory(out, 0, overwrite=False):
            assert of_living in names(tmp_path) and of_dead not in names(tmp_path)
            raise ValueError
        living.stdin.close()
        assert living.wait() == 0
    assert names(tmp_path) == [out.name] and names(out) == ["a"]


@needs_flock
def test_the_second_of_two_does_not_win(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="not empty"), new_directory(out, 0, overwrite=False) as slow:
        write_file(slow, "slow", b"")
        with new_directory(out, 0, overwrite=False) as fast:
            write_file(fast, "fast", b"")
    assert names(out) == ["fast"] and names(tmp_path) == ["out"]


def test_a_name_too_long(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be looked into") as caught:
        output.check_free(tmp_path / ("x" * 300), overwrite=False)
    assert "\n" not in str(caught.value)


HOLDER = """
import sys
from pathlib import Path
from pocketphi.convert.output import one_at_a_time
with one_at_a_time(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
    (Path(sys.argv[1]) / "done").touch()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks there")
def test_one_at_a_time(tmp_path: Path) -> None:
    """The second waits for the first; for one that does not end it does not wait for ever."""
    folder = tmp_path / "new" / "folder"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as first:
        assert first.stdin is not None and first.stdout is not None
        assert first.stdout.readline() == b"held\n"
        with one_at_a_time(folder, patience=0.1):
            assert not (folder / "done").exists()
        first.stdin.write(b"\n")
        first.stdin.flush()
        with one_at_a_time(folder):
            assert (folder / "done").exists()


def test_what_cannot_be_locked_is_no_reason_to_stop(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with one_at_a_time(tmp_path / "file" / "folder"):
        pass
