# SPDX-License-Identifier: Apache-2.0
"""What is done stays done, and belongs to one job."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from pocketphi.evaluate import journal as journal_module
from pocketphi.evaluate.journal import Answered, Journal, Took, finished, row, unfinished
from pocketphi.runtime.errors import InputError, InUseError, OutputError
from pocketphi.runtime.growing_file import check_free

JOB = {"model": "m", "metric": "wer", "limit": None}
IDS = ["a", "b", "c"]
TOOK = Took(1.0, 2, 3.0, 4, 5.0, 6.0)


def answer(name: str) -> Answered:
    return Answered(name, f"said {name}\n«»", "stop", TOOK)


def begun(folder: Path, *names: str) -> Path:
    with Journal(folder, JOB, IDS) as journal:
        for name in names:
            journal.add(answer(name), {"score": 1.0})
    return journal.path


def test_it_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = begun(tmp_path, "b")
    with path.open("ab") as file:
        file.write(b'{"id": "c", "half')  # the process was killed
    assert unfinished(tmp_path, JOB, IDS) == 1
    with Journal(tmp_path, JOB, IDS, resume=True) as journal:
        assert (journal.resumed, journal.done) == (True, {"b": answer("b")})
        journal.add(answer("a"), {})
        journal.add(answer("c"), {})
        rows = [row(journal.done[name], {"score": 0.5}) for name in IDS]
        journal.finish(rows, json.dumps({"job": JOB}), "# wer\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["eval.json", "eval.md", "items.jsonl"]
    lines = (tmp_path / "items.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["id"] for line in lines] == IDS
    assert finished(tmp_path, JOB, IDS) == {name: answer(name) for name in IDS}
    assert unfinished(tmp_path, JOB, IDS) is None


def test_nothing_to_resume_begins(tmp_path: Path) -> None:
    with Journal(tmp_path, JOB, IDS, resume=True) as journal:
        assert (journal.resumed, journal.done) == (False, {})
    assert unfinished(tmp_path, JOB, IDS) is None  # nothing is lost


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"metric": "cer"}, '\'metric\' is "wer", expected "cer"'),
        ({"limit": 3}, "'limit' is null, expected 3"),
        ({"more": 1}, "'more' is not given, expected 1"),
    ],
)
def test_another_job_says_what_differs(change: dict[str, Any], expected: str, tmp_path: Path) -> None:
    begun(tmp_path, "a")
    with pytest.raises(InputError, match=expected):
        unfinished(tmp_path, {**JOB, **change}, IDS)
    with pytest.raises(InputError, match=expected):
        Journal(tmp_path, {**JOB, **change}, IDS, resume=True)
    (tmp_path / "items.jsonl.part").unlink()
    (tmp_path / "eval.json").write_text(json.dumps({"job": JOB}), "utf-8")
    with pytest.raises(InputError, match=expected):
        finished(tmp_path, {**JOB, **change}, IDS)


GOOD = row(answer("a"), {})
DAMAGED = {
    "not JSON": (b"{", "line 2: is not JSON"),
    "a list": (b"[]", "line 2: is a JSON list"),
    "digits": (b'{"id": ' + b"9" * 5000 + b"}", "line 2: is not JSON"),
    "no text": (json.dumps({**GOOD, "hypothesis": 3}).encode(), "line 2: id, hypothesis"),
    "surrogate": (json.dumps({**GOOD, "hypothesis": "\ud800"}).encode(), "line 2: id, hypothesis"),
    "no timings": (json.dumps({**GOOD, "timings": {}}).encode(), "line 2: timings has"),
    "infinite": (json.dumps(GOOD).replace("6.0", "1e999").encode(), "line 2: ttft_ms is 'inf'"),
    "true": (json.dumps(GOOD).replace("6.0", "true").encode(), "line 2: ttft_ms is 'True'"),
    "unknown": (json.dumps({**GOOD, "id": "z"}).encode(), "line 2: has the id 'z' and no such item"),
    "twice": (b"\n".join([json.dumps(GOOD).encode()] * 2), "line 3: has the id 'a' a second time"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_journal(name: str, tmp_path: Path) -> None:
    line, expected = DAMAGED[name]
    path = begun(tmp_path)
    with path.open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(InputError, match=expected):
        Journal(tmp_path, JOB, IDS, resume=True)
    assert path.read_bytes().endswith(line + b"\n")  # it is as it was


def test_one_process_writes_it(tmp_path: Path) -> None:
    with Journal(tmp_path, JOB, IDS):
        with pytest.raises(InUseError):
            Journal(tmp_path, JOB, IDS)
        with pytest.raises(InUseError):
            unfinished(tmp_path, JOB, IDS)


def test_it_is_locked_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read is what is gone on with: nobody can write in between, nor put another in its place."""
    path = begun(tmp_path, "a")
    real, read = journal_module._answers, []

    def locked(file: BinaryIO, *rest: Any) -> Any:
        with pytest.raises(InUseError):
            check_free(path)
        read.append(os.path.samestat(os.fstat(file.fileno()), path.stat()))
        return real(file, *rest)

    monkeypatch.setattr(journal_module, "_answers", locked)
    assert unfinished(tmp_path, JOB, IDS) == 1
    with Journal(tmp_path, JOB, IDS, resume=True) as journal:
        assert set(journal.done) == {"a"}
    assert read == [True, True]


def test_a_journal_without_a_whole_line_begins_anew(tmp_path: Path) -> None:
    path = begun(tmp_path)
    path.write_bytes(path.read_bytes()[:9])
    with Journal(tmp_path, JOB, IDS, resume=True) as journal:
        assert (journal.resumed, journal.done) == (False, {})
        journal.add(answer("c"), {})
    assert unfinished(tmp_path, JOB, IDS) == 1


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "eval.json").mkdir()
    with pytest.raises(OutputError, match="is a directory"):
        unfinished(tmp_path, JOB, IDS)
