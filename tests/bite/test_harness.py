# SPDX-License-Identifier: Apache-2.0
"""The tables' machinery sees what it is there to see: faults that are made on purpose are reported."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from .table import Case, differences, faults, listing
from .zygote import CAN_FORK, Limits, Zygote

CASE = Case("made", lambda place: [], 2, r"^error: picture\.png: is empty$", max_seconds=1, max_rss_mb=300)
SAID = "import sys; sys.stderr.write('error: picture.png: is empty\\n')\n"

FAULTY = [
    ("as it should be", SAID + "sys.exit(2)", []),
    ("a crash", SAID + "import os; os.abort()", [f"killed by signal {int(signal.SIGABRT)}"]),
    (
        "a wild pointer",
        SAID + "import ctypes; ctypes.string_at(0)",
        [f"killed by signal {int(signal.SIGSEGV)}"],
    ),
    ("a traceback", "1 / 0", ["exit code is 1, expected 2", "traceback", " lines, ", "begin with", "/"]),
    ("a hang", SAID + "import time; time.sleep(60)", ["still running after 1 s"]),
    ("a busy hang", SAID + "while True: pass", ["still running after 1 s"]),
    ("another exit code", SAID + "sys.exit(3)", ["exit code is 3, expected 2"]),
    ("two lines", SAID * 2 + "sys.exit(2)", ["2 lines, expected one", "/"]),
    ("another line", "import sys; sys.stderr.write('error: no\\n'); sys.exit(2)", ["expected /^error: pic"]),
    ("no line", "import sys; sys.exit(2)", ["0 lines, expected one", "begin with", "/"]),
]  # fmt: skip


@pytest.mark.parametrize(("code", "want"), [f[1:] for f in FAULTY], ids=[f[0] for f in FAULTY])
def test_a_fault_is_reported(
    code: str, want: list[str], zygote: Zygote, user: dict[str, str], tmp_path: Path
) -> None:
    limits = Limits(CASE.max_seconds, CASE.max_rss_mb)
    outcome = zygote.start([], env=user, cwd=tmp_path, limits=limits, code=code).wait()
    found = faults(CASE, outcome)
    assert len(found) == len(want), found
    assert all(part in said for part, said in zip(want, found, strict=True)), found


@pytest.mark.skipif(not CAN_FORK, reason="a peak is measured of forked processes")
def test_a_memory_hog_is_reported(zygote: Zygote, user: dict[str, str], tmp_path: Path) -> None:
    hog = SAID + f"b'x' * ({CASE.max_rss_mb} << 20); sys.exit(2)"
    limits = Limits(20, CASE.max_rss_mb)
    (said,) = faults(CASE, zygote.start([], env=user, cwd=tmp_path, limits=limits, code=hog).wait())
    assert said.startswith("took ")
    # Far more than is allowed is not to be had at all.
    glutton = "b'x' * (100 << 30)"
    outcome = zygote.start([], env=user, cwd=tmp_path, limits=limits, code=glutton).wait()
    assert b"MemoryError" in outcome.err
    assert outcome.peak_mb < CASE.max_rss_mb


def test_what_is_left_behind_is_reported(tmp_path: Path) -> None:
    (tmp_path / "input").write_bytes(b"1")
    (tmp_path / "folder").mkdir()
    before = listing(tmp_path)
    assert differences(before, listing(tmp_path)) == []
    (tmp_path / "folder" / "half").touch()
    assert differences(before, listing(tmp_path)) == ["folder/half was left behind"]
    assert differences(before, listing(tmp_path), allowed="^folder/half$") == []
    (tmp_path / "folder" / "half").unlink()
    os.utime(tmp_path / "input", ns=(0, 0))
    assert differences(before, listing(tmp_path)) == ["input was changed"]
    (tmp_path / "input").unlink()
    assert differences(before, listing(tmp_path)) == ["input is gone"]


def test_a_child_has_the_streams_and_the_environment_it_was_given(
    zygote: Zygote, user: dict[str, str], tmp_path: Path
) -> None:
    seen = "os.environ.get('WHERE'), os.getcwd(), sys.argv[1:], sys.stdin.read()"
    code = f"import os, sys; print(ascii(({seen})))"
    outcome = zygote.start(
        ["a", "\udcff"], env=user | {"WHERE": "here"}, cwd=tmp_path, stdin=b"said", code=code
    ).wait()  # fmt: skip
    assert outcome.out.decode() == f"('here', {str(tmp_path)!r}, ['a', '\\udcff'], 'said')\n"


def test_children_run_side_by_side(zygote: Zygote, user: dict[str, str], tmp_path: Path) -> None:
    codes = [f"import time; time.sleep(0.{9 - n}); import sys; sys.exit({n})" for n in range(5)]
    children = [zygote.start([], env=user, cwd=tmp_path, code=code) for code in codes]
    assert [child.wait().code for child in children] == [0, 1, 2, 3, 4]
