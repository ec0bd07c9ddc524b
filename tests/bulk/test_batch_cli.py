# SPDX-License-Identifier: Apache-2.0
"""`batch` as people meet it: one line for each item whatever ends it, flags, errors, exit codes."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pocketphi.cli.program import app
from pocketphi.runtime.engine import Model
from pocketphi.runtime.errors import PocketPhiError
from pocketphi.runtime.sampler import Sampling

from .batch_items import CALL, QUESTIONS, mixed, plain, read_lines, user, write_lines

needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="signals are sent to a process")
ONE = ["-t", "1"]


def call(env: dict[str, str], *args: str | Path) -> tuple[int, str, str]:
    done = subprocess.run(
        [*CALL, "batch", *map(str, args)], capture_output=True, env=env, timeout=120, check=False
    )
    return done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8")


def failed(env: dict[str, str], *args: str | Path) -> tuple[int, str]:
    """Exit code and the one line of an error."""
    code, out, err = call(env, *args)
    assert (out, err.count("\n")) == ("", 1), err
    assert err.startswith("error: ")
    return code, err


def some(n: int) -> list[dict[str, Any]]:
    """Items of every kind, over and over, with ids of their own."""
    kinds = mixed()
    return [{**kinds[i % len(kinds)], "id": f"{i}-{kinds[i % len(kinds)]['id']}"} for i in range(n)]


def test_mixed_items(
    nano: Path, env: dict[str, str], tmp_path: Path, expected: dict[str, dict[str, Any]]
) -> None:
    path, out = write_lines(tmp_path / "in.jsonl", mixed()), tmp_path / "out.jsonl"
    job = (path, "-o", out, "-m", nano, "--workers", "2", "--keep-order", *ONE)
    code, printed, err = call(env, *job, "--json")
    summary = json.loads(printed)
    assert (code, err, printed.count("\n")) == (0, "", 1)
    found = read_lines(out)
    assert list(found) == [item["id"] for item in mixed()]
    assert {name: plain(record) for name, record in found.items()} == expected
    answered = [record["usage"]["completion_tokens"] for record in found.values() if "usage" in record]
    assert {key: summary[key] for key in ("items", "before", "ok", "failed", "tokens")} == {
        "items": 8, "before": 0, "ok": 8, "failed": 0, "tokens": sum(answered),
    }  # fmt: skip
    assert summary["audio_seconds"] == sum(one.get("audio_seconds", 0.0) for one in found.values()) > 0
    assert summary["tokens_per_second"] * summary["seconds"] == pytest.approx(summary["tokens"])

    before = out.read_bytes()
    code, printed, err = call(env, *job, "--json")
    assert (code, json.loads(printed)["before"], out.read_bytes()) == (0, 8, before)
    assert err == f"{out}: goes on after 8 of 8 items\n"


def test_penalties_and_bias_are_heeded(nano: Path, env: dict[str, str], tmp_path: Path) -> None:
    story, limit = user("Tell me a story."), {"max_tokens": 30}
    with Model(nano, n_threads=1) as model:
        word = model.chat(user(QUESTIONS[3])).token_ids[0]
        biased = model.tokenizer.decode([word] * 3)
        told = [
            model.chat(story, sampling=Sampling(frequency_penalty=penalty), max_tokens=30).text
            for penalty in (0.0, 1.5)
        ]
    assert told[0] != told[1]
    items = [
        {"id": "plain", "messages": story, **limit},
        {"id": "fewer", "messages": story, **limit, "frequency_penalty": 1.5},
        {"id": "biased", "messages": user(QUESTIONS[0]), "max_tokens": 3, "logit_bias": {str(word): 100}},
        {"id": "none", "messages": story, "logit_bias": {"123456789": 1}},
    ]
    path, out = write_lines(tmp_path / "in.jsonl", items), tmp_path / "out.jsonl"
    code, _, _ = call(env, path, "-o", out, "-m", nano, "--workers", "1", *ONE)
    found = read_lines(out)
    assert [found[name]["text"] for name in ("plain", "fewer", "biased")] == [*told, biased]
    assert (code, found["none"]["error"]["kind"]) == (1, "input")
    assert "logit bias: token is 123456789" in found["none"]["error"]["message"]


@needs_signals
def test_killed_again_and_again(
    nano: Path, env: dict[str, str], tmp_path: Path, expected: dict[str, dict[str, Any]]
) -> None:
    """kill -9 at moments drawn at random, also before the first item; each item is there once in the end."""
    items = some(24)
    path, out = write_lines(tmp_path / "in.jsonl", items), tmp_path / "out.jsonl"
    job = [*CALL, "batch", *map(str, (path, "-o", out, "-m", nano, "--workers", "2", *ONE))]
    rng, killed = random.Random(9), 0
    for wanted in (0, 3, 8, 14):
        with subprocess.Popen(job, env=env, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and (lines_of(out) < wanted or not out.exists()):
                time.sleep(0.005)
            time.sleep(rng.random() * 0.1)
            children = children_of(process.pid)
            killed += process.poll() is None
            process.kill()
        for child in children:
            while is_running(child):  # its input has ended, so it does
                time.sleep(0.005)
    assert killed >= 3
    done = out.read_bytes().splitlines(keepends=True)
    assert subprocess.run(job, env=env, check=False, timeout=120).returncode == 0
    assert out.read_bytes().splitlines(keepends=True)[: len(done) - 1] == done[:-1]
    found = read_lines(out)
    assert found.keys() == {item["id"] for item in items}
    for name, record in found.items():
        assert plain(record) == {**expected[name.partition("-")[2]], "id": name}


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def children_of(pid: int) -> list[int]:
    """The processes that it has started, where the system tells."""
    try:
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except OSError:
        return []


def is_running(pid: int) -> bool:
    """Whether there is such a process that has not ended; nobody may have waited for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@needs_signals
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_and_going_on(
    number: int, code: int, nano: Path, env: dict[str, str], tmp_path: Path
) -> None:
    endless = {"id": "endless", "messages": user("x"), "grammar": 'root ::= "x" root', "max_tokens": 8000}
    items = [{"id": "first", "messages": user("Hello!")}, endless]
    path, out = write_lines(tmp_path / "in.jsonl", items), tmp_path / "out.jsonl"
    job = [*map(str, (path, "-o", out, "-m", nano, "--workers", "1", *ONE))]
    with subprocess.Popen([*CALL, "batch", *job], env=env, stderr=subprocess.PIPE) as process:
        while not lines_of(out):
            assert process.poll() is None
            time.sleep(0.005)
        children = children_of(process.pid)
        process.send_signal(number)
        err = process.communicate(timeout=60)[1].decode("utf-8")
    assert process.returncode == code
    assert (
        err
        == f"in.jsonl: interrupted after 1 of 2 items, kept in {out}; the same command goes on from there\n"
    )
    assert not any(map(is_running, children))
    assert list(read_lines(out)) == ["first"]
    write_lines(path, [items[0], {**endless, "max_tokens": 4}])  # not done yet: may change
    code, _, err = call(env, *job)
    assert (code, err.splitlines()[0]) == (0, f"{out}: goes on after 1 of 2 items")
    assert list(read_lines(out)) == ["first", "endless"]


def test_failed_items_and_openai_form(nano: Path, env: dict[str, str], tmp_path: Path) -> None:
    body = {"model": "x", "messages": user(QUESTIONS[1]), "max_tokens": 20}
    items: list[Any] = [
        b"not json",
        {"custom_id": "o1", "method": "POST", "url": "/v1/chat/completions", "body": body},
        {"custom_id": "o2", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": 3}},
        {"id": "later", "type": "transcribe", "audio": "clip.flac"},
    ]
    path, out = write_lines(tmp_path / "in.jsonl", items), tmp_path / "out.jsonl"
    job = (path, "-o", out, "-m", nano, *ONE)
    code, printed, err = call(env, *job)
    assert (code, printed) == (1, "")
    assert err.startswith(f"{out}: 1 done, 3 failed, ")
    found = read_lines(out)
    assert found["line-1"]["error"] == {
        "kind": "input", "message": "line 1: is 'not json', expected a JSON object",
    }  # fmt: skip
    completion = found["o1"]["response"]["body"]
    assert found["o1"]["error"] is None
    assert completion["choices"][0]["message"] == {"role": "assistant", "content": "T-E-A."}
    assert (completion["object"], completion["model"]) == ("chat.completion", "phi4-nano")
    chat = pytest.importorskip("openai.types.chat")
    assert chat.ChatCompletion.model_validate(completion, strict=True).choices[0].finish_reason == "stop"
    assert (found["o2"]["response"], found["o2"]["error"]["code"]) == (None, "input")
    assert found["later"]["error"]["message"].endswith("clip.flac: no such file")

    from ..scoring import EVAL

    (tmp_path / "clip.flac").write_bytes((EVAL / "audio/asr-003.flac").read_bytes())
    code, printed, err = call(env, *job)  # a failure is an outcome: nothing is left to do
    assert (code, err.splitlines()[1][:60]) == (
        1,
        f"{out}: 0 done, 0 failed, 4 done before (3 failed), 0.0 s"[:60],
    )
    code, printed, err = call(env, *job, "--retry-failed", "--json")
    assert (code, json.loads(printed)["ok"], json.loads(printed)["failed"]) == (1, 1, 2)
    assert read_lines(out)["later"]["text"] == "Send a message to Grace."
    (tmp_path / "clip.flac").write_bytes(b"another")
    code, line = failed(env, *job)
    assert code == 2
    assert "item 'later' or a file of it has changed since it was done; --restart begins anew" in line


def test_it_grows_with_its_input_and_nothing_else(nano: Path, env: dict[str, str], tmp_path: Path) -> None:
    items = [{"id": f"q{i}", "messages": user(text)} for i, text in enumerate(QUESTIONS)]
    path, out = write_lines(tmp_path / "in.jsonl", items[:2]), tmp_path / "out.jsonl"
    job = (path, "-o", out, "-m", nano, *ONE)
    assert call(env, *job)[0] == 0
    before = out.read_bytes()
    write_lines(path, items[:3])
    assert call(env, *job)[0] == 0
    assert out.read_bytes().startswith(before)
    assert set(read_lines(out)) == {"q0", "q1", "q2"}
    for changed, said in (
        ([{**items[0], "seed": 1}, *items[1:3]], "item 'q0' or a file of it has changed"),
        (items[1:3], "item 'q0' is not in the input any more"),
    ):
        write_lines(path, changed)
        code, line = failed(env, *job)
        assert (code, said in line) == (2, True), line
    write_lines(path, items[:3])
    code, line = failed(env, *job, "-n", "5")
    assert (code, "'max_tokens' is null, expected 5; --restart begins anew" in line) == (2, True), line
    assert call(env, path, "-o", out, *ONE, "--restart")[0] == 0  # the built-in model
    assert '"recipe": "F32"' not in (tmp_path / "out.jsonl.job").read_text()
    code, line = failed(env, *job)
    assert (code, "is of another job: 'recipe'" in line) == (2, True), line


def test_what_cannot_be_asked_for(nano: Path, env: dict[str, str], tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", [{"id": "a"}, {"id": "a"}])
    out = tmp_path / "out.jsonl"
    for args, code, said in (
        ((path,), 2, "-o is missing"),
        ((path, "10.0.0.1:6379", "-o", out), 2, "an address goes with --ray"),
        ((path, "-o", out, "-n", "0"), 2, "-n is 0"),
        ((path, "-o", out, "--restart", "--retry-failed"), 2, "both given, expected one"),
        ((path, "-o", path), 2, "is the data that is read"),
        ((path, "-o", tmp_path / "no" / "out.jsonl"), 6, "there is no folder"),
        ((path, "-o", tmp_path), 6, "it is a folder"),
        ((path, "-o", nano / "out.jsonl"), 6, "is a model directory"),
        ((tmp_path / "none.jsonl", "-o", out), 2, "no such file"),
        ((path, "-o", out), 2, "line 2: has the id 'a' of line 1, expected one of its own"),
        ((path, "-o", out, "-m", tmp_path), 2, "line 2: has the id"),
    ):
        with pytest.raises(PocketPhiError, match=said) as caught:
            app(["batch", *map(str, args)], standalone_mode=False)
        assert caught.value.exit_code == code
        assert not out.exists()
    good = write_lines(tmp_path / "good.jsonl", [{"id": "a", "messages": user("Hi")}])
    for args, code, said in (
        ((good, "-o", out, "--workers", "0"), 2, "--workers is 0, expected at least 1"),
        ((good, "-o", out, "-m", tmp_path), 3, "not a model directory"),
        ((good, "-o", out, "-m", nano, "-c", "99999999"), 2, "context is 99999999 tokens"),
        ((good, "-o", out, "-m", nano, "--cache-type", "q3"), 2, "q3"),
    ):
        found, line = failed(env, *args)
        assert (found, said in line) == (code, True), line


def test_one_run_at_a_time(nano: Path, env: dict[str, str], tmp_path: Path) -> None:
    from pocketphi.bulk.output import Output

    path = write_lines(tmp_path / "in.jsonl", [{"id": "a", "messages": user("Hi")}])
    out = tmp_path / "out.jsonl"
    with Output(out, {}):
        code, line = failed(env, path, "-o", out, "-m", nano, *ONE)
    assert (code, "is being written by another process" in line) == (6, True)
