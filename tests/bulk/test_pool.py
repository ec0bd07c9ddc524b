# SPDX-License-Identifier: Apache-2.0
"""Workers in processes of their own: the library's answers, and what happens when one dies."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pocketphi.bulk.lines import ChangedError, LineFile, Task
from pocketphi.bulk.pool import Pool
from pocketphi.bulk.process import DiedError, WorkerProcess
from pocketphi.bulk.records import Outcome
from pocketphi.runtime.errors import BundleError, InputError, MemoryShortError

from .batch_items import QUESTIONS, mixed, plain, settings, user, write_lines

needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="processes are ended by signals")


@pytest.fixture
def questions(tmp_path: Path) -> Iterator[LineFile]:
    items = [{"id": f"q{i}", "messages": user(text)} for i, text in enumerate(QUESTIONS)]
    with LineFile(write_lines(tmp_path / "in.jsonl", items)) as file:
        yield file


def answers(pool: Pool, file: LineFile) -> dict[str, Outcome]:
    """All outcomes, each item's once."""
    found: dict[str, Outcome] = {}
    for entry, outcome in pool.run(file.entries):
        assert entry.id not in found
        found[entry.id] = outcome
        pool.taken()
    assert found.keys() == {entry.id for entry in file.entries}
    return found


def dying(monkeypatch: pytest.MonkeyPatch, name: str, times: int) -> list[int]:
    """Workers get SIGKILL as soon as they have that item, so often; gives their process ids."""
    killed: list[int] = []
    ask = WorkerProcess.ask

    def kill(self: WorkerProcess, task: Task) -> Outcome:
        if task.id == name and len(killed) < times:
            killed.append(self.pid)
            threading.Timer(0.0, os.kill, (self.pid, signal.SIGKILL)).start()
        return ask(self, task)

    monkeypatch.setattr(WorkerProcess, "ask", kill)
    return killed


def test_every_kind_is_what_the_library_answers(
    nano: Path, tmp_path: Path, expected: dict[str, dict[str, Any]]
) -> None:
    """In two processes at once, each item as if it were the only one."""
    with (
        LineFile(write_lines(tmp_path / "in.jsonl", mixed())) as file,
        Pool(file, *settings(nano, file), 2) as pool,
    ):
        found = answers(pool, file)
        assert pool.pids == [] or len(pool.pids) <= 2
    assert {name: plain(one.record) for name, one in found.items()} == expected
    assert found["text"].tokens == found["text"].record["usage"]["completion_tokens"] > 0
    assert found["said"].audio_s == found["said"].record["audio_seconds"] > 0


def test_bad_items_are_in_nobodys_way(nano: Path, tmp_path: Path) -> None:
    (tmp_path / "noise.wav").write_bytes(b"RIFF not really")
    picture = {"type": "image", "path": "noise.wav"}
    items: list[Any] = [
        b"{", {"id": "a", "messages": user("Hello!")}, {"id": "b", "audio": "noise.wav"},
        {"id": "c", "messages": user([picture])}, 
        {"id": "d", "messages": user("Hello!"), "grammar": "root ="},
        {"id": "e", "messages": user("x " * 20_000)}, {"id": "f", "messages": user("Hello!")},
    ]  # fmt: skip
    with (
        LineFile(write_lines(tmp_path / "in.jsonl", items)) as file,
        Pool(file, *settings(nano, file), 1) as pool,
    ):
        found = answers(pool, file)
    assert {name: one.ok for name, one in found.items()} == {
        "line-1": False, "a": True, "b": False, "c": False, "d": False, "e": False, "f": True,
    }  # fmt: skip
    errors = {name: one.record["error"] for name, one in found.items() if not one.ok}
    assert {error["kind"] for error in errors.values()} == {"input"}
    assert all("\n" not in error["message"] for error in errors.values())
    assert "the context holds 8192" in errors["e"]["message"]
    assert plain(found["a"].record) | {"id": "f"} == plain(found["f"].record)


@needs_signals
@pytest.mark.parametrize("n_workers", [1, 2])
def test_a_worker_that_dies_loses_nothing(
    n_workers: int, nano: Path, questions: LineFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = dying(monkeypatch, "q2", 1)
    with Pool(questions, *settings(nano, questions), n_workers) as pool:
        found = answers(pool, questions)
    assert len(killed) == 1
    assert all(one.ok for one in found.values())


@needs_signals
def test_an_item_that_kills_twice_is_failed(
    nano: Path, questions: LineFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = dying(monkeypatch, "q2", 2)
    with Pool(questions, *settings(nano, questions), 2) as pool:
        found = answers(pool, questions)
    assert len(set(killed)) == 2
    assert [name for name, one in found.items() if not one.ok] == ["q2"]
    error = found["q2"].record["error"]
    assert error["kind"] == "worker"
    assert error["message"].startswith("line 3: the worker was ended by SIGKILL")
    assert error["message"].endswith(", 2 times")


@needs_signals
def test_lanes_that_get_no_worker_leave_the_rest_to_others(
    nano: Path, questions: LineFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two lanes one's workers die while they load. When there is none left, the run ends."""
    wait_ready, first = WorkerProcess.wait_ready, threading.Event()

    def dies(self: WorkerProcess) -> None:
        if threading.current_thread().name.endswith(victims):
            self.kill()
            first.set()
        else:
            first.wait()
        wait_ready(self)

    monkeypatch.setattr(WorkerProcess, "wait_ready", dies)
    victims: tuple[str, ...] = ("-0",)
    with Pool(questions, *settings(nano, questions), 2) as pool:
        assert all(one.ok for one in answers(pool, questions).values())
    victims = ("-0", "-1")
    with (
        Pool(questions, *settings(nano, questions), 2) as pool,
        pytest.raises(MemoryShortError, match="while it loaded the model; fewer --workers"),
    ):
        answers(pool, questions)


def test_another_model_there_is_refused(nano: Path, questions: LineFile) -> None:
    model, items = settings(nano, questions)
    with (
        Pool(questions, replace(model, manifest_sha256="0" * 64), items, 2) as pool,
        pytest.raises(BundleError, match="is another model than where the run was started"),
    ):
        answers(pool, questions)
    with (
        Pool(questions, replace(model, n_ctx=1 << 30), items, 2) as pool,
        pytest.raises(InputError, match="context is 1073741824 tokens"),
    ):
        answers(pool, questions)


def test_a_changed_file_ends_the_run(nano: Path, tmp_path: Path, questions: LineFile) -> None:
    (tmp_path / "in.jsonl").write_text("")
    with (
        Pool(questions, *settings(nano, questions), 1) as pool,
        pytest.raises(ChangedError, match="has changed while it was worked on"),
    ):
        answers(pool, questions)


@needs_signals
def test_workers_do_not_see_ctrl_c(nano: Path, questions: LineFile) -> None:
    """A terminal sends it to all: it is for the one that started them."""
    process = WorkerProcess(*settings(nano, questions))
    try:
        for _ in range(3):
            os.kill(process.pid, signal.SIGINT)
        process.wait_ready()
        os.kill(process.pid, signal.SIGINT)
        assert process.ask(questions.task(questions.entries[0])).ok
    finally:
        process.close()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())


def test_leaving_ends_the_processes(nano: Path, questions: LineFile) -> None:
    """At once, whatever they do, and whether or not outcomes were taken."""
    with Pool(questions, *settings(nano, questions), 2) as pool:
        found = pool.run(questions.entries)
        next(found)
        pids = pool.pids
    assert pids
    for pid in pids if sys.platform != "win32" else ():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_worker_whose_parent_is_gone_ends(nano: Path, questions: LineFile) -> None:
    """In the middle of an item that would never end."""
    process = WorkerProcess(*settings(nano, questions))
    try:
        process.wait_ready()
        endless = {"messages": user("x"), "grammar": 'root ::= "x" root'}
        process._send({"id": "a", "number": 1, "text": json.dumps(endless)})
        stdin = process._process.stdin
        assert stdin is not None
        stdin.close()
        assert process._process.wait(timeout=60) == 0
    finally:
        process.close()
    with pytest.raises(DiedError):
        process.ask(Task("a", 1, "{}"))
