# SPDX-License-Identifier: Apache-2.0
"""The output's file: what is in it counts, half a line does not, and nothing of another job mixes in."""

from __future__ import annotations

from pathlib import Path

import pytest

from pocketphi.bulk.output import Output
from pocketphi.bulk.records import Outcome, failed
from pocketphi.runtime.errors import InputError, InUseError

JOB = {"model_sha256": "a", "max_tokens": None}


def outcome(name: str, digest: str = "d") -> Outcome:
    return Outcome({"id": name, "status": "ok", "text": "é", "item_sha256": digest}, True)


def write(path: Path, *names: str) -> None:
    with Output(path, JOB) as output:
        for name in names:
            output.add(name, outcome(name))


def done(path: Path) -> list[str]:
    with Output(path, JOB) as output:
        return list(output.done)


def test_it_goes_on_after_any_end(tmp_path: Path) -> None:
    """Cut at every byte of the last two lines: whole lines count, and the rest is as if never written."""
    path = tmp_path / "out.jsonl"
    write(path, "a", "b", "c")
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for size in range(len(lines[0]), len(whole) + 1):
        path.write_bytes(whole[:size])
        n = whole[:size].count(b"\n")
        left = ["a", "b", "c"][n:]
        assert done(path) == ["a", "b", "c"][:n]
        write(path, *left)
        assert path.read_bytes() == whole


def test_an_empty_one_is_begun(tmp_path: Path) -> None:
    """Killed before the first line: with no job yet, or an older run's."""
    path = tmp_path / "out.jsonl"
    path.touch()
    write(path, "a")
    path.write_bytes(b'{"id": "half')
    with Output(path, {"other": 1}) as output:
        assert output.done == {}
        output.add("b", outcome("b"))
    with Output(path, {"other": 1}) as output:
        assert list(output.done) == ["b"]


def test_only_of_the_same_job(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, "a")
    before = path.read_bytes()
    with pytest.raises(InputError, match='another job: \'model_sha256\' is "a", expected "b"; --restart'):
        Output(path, {**JOB, "model_sha256": "b"})
    assert path.read_bytes() == before
    with Output(path, {**JOB, "model_sha256": "b"}, restart=True) as output:
        assert output.done == {}


def test_what_is_no_output_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("my notes\n")
    with pytest.raises(InputError, match=r"is there without out\.jsonl\.job: .*--restart replaces it"):
        Output(path, JOB)
    assert path.read_text() == "my notes\n"
    write(tmp_path / "other.jsonl", "a")
    (tmp_path / "other.jsonl.job").rename(tmp_path / "out.jsonl.job")
    with pytest.raises(InputError, match="line 1: is not JSON"):
        Output(path, JOB)
    assert path.read_text() == "my notes\n"


def test_damaged_lines_are_not_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, "a", "b")
    whole = path.read_bytes()
    for line, said in (
        (b'{"id": "c"}\n', "line 3: is no item's"),
        (whole.splitlines(True)[0], "second time"),
    ):
        path.write_bytes(whole + line)
        with pytest.raises(InputError, match=said):
            Output(path, JOB)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Output(path, JOB) as output:
        output.add("a", outcome("a"))
        for restart in (False, True):
            with pytest.raises(InUseError, match="is being written by another process"):
                Output(path, JOB, restart=restart)
    assert done(path) == ["a"]


def test_items_have_to_be_what_they_were(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, "a", "b")
    with Output(path, JOB) as output:
        output.check({"a": "d", "b": "d", "new": "e"}.get)
        with pytest.raises(
            InputError, match="item 'b' or a file of it has changed since it was done; --restart"
        ):
            output.check({"a": "d", "b": "x"}.get)
        with pytest.raises(InputError, match="item 'b' is not in the input any more; --restart"):
            output.check({"a": "d"}.get)


def test_failed_ones_can_be_done_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Output(path, JOB) as output:
        output.add("a", outcome("a"))
        output.add("b", failed("b", "input", "no", "d"))
        output.add("c", outcome("c"))
    path.write_bytes(path.read_bytes() + b'{"id": "cut')
    assert done(path) == ["a", "b", "c"]
    with Output(path, JOB, retry_failed=True) as output:
        assert list(output.done) == ["a", "c"]
        output.add("b", outcome("b"))
    assert done(path) == ["a", "c", "b"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.job"]
