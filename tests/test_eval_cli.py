# SPDX-License-Identifier: Apache-2.0
"""`eval` as people and scripts meet it: its own process, files, signals, one line for each refusal."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from pocketphi.runtime import ggml_plugin

from . import scoring
from .conftest import Converted
from .test_cli import CALL, call, failed

SHORT = ["-n", "80"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One item of every set, then text that takes a while."""
    folder = tmp_path_factory.mktemp("data")
    rows = [scoring.rows(name)[0] for name in ("speech", "vision", "vision_speech")] + scoring.rows("text")
    for row in rows:
        for media in scoring.media_of(row):
            path = Path(str(media.source))
            (folder / path.parent.name).mkdir(exist_ok=True)
            shutil.copy(path, folder / path.parent.name)
    path = folder / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(scope="module")
def whole(env: dict[str, str], nano: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run that nobody interrupted."""
    out = tmp_path_factory.mktemp("whole")
    code, text, err = call(
        env, "eval", "-m", nano, "--data", data, "--metric", "exact", "-o", out, *SHORT, "--json"
    )
    assert (code, err, text.count("\n")) == (0, "", 1)
    assert json.loads(text) == json.loads((out / "eval.json").read_text("utf-8"))
    return out


def steady(path: Path) -> dict[str, Any]:
    """A report or an item without what differs between runs."""
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    del found["timings"]
    return found


def items(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "items.jsonl").read_text("utf-8").splitlines()]


def test_one_object(whole: Path, data: Path) -> None:
    found = steady(whole / "eval.json")
    n = len(data.read_text("utf-8").splitlines())
    assert (found["metric"], found["items"], found["normalizer"]) == ("exact", n, "none")
    assert found["score"] == found["exact"]
    assert found["ci95"][0] <= found["score"] <= found["ci95"][1]
    right = [row["hypothesis"] == row["reference"] for row in items(whole)]
    assert found["score"] == sum(right) / n
    assert [row["mode"] for row in items(whole)][:4] == ["speech", "vision", "vision_speech", "language"]
    assert sorted(p.name for p in whole.iterdir()) == ["eval.json", "eval.md", "items.jsonl"]


def test_ctrl_c_then_resume(env: dict[str, str], nano: Path, data: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = ["eval", "-m", str(nano), "--data", str(data), "--metric", "exact", "-o", str(out), *SHORT]
    part = out / "items.jsonl.part"
    with subprocess.Popen(
        [*CALL, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:  # fmt: skip
        while process.poll() is None and (not part.exists() or part.read_bytes().count(b"\n") < 3):
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        text, err = process.communicate(timeout=120)
    done = part.read_bytes().count(b"\n") - 1
    assert (process.returncode, text) == (130, b"")
    assert b"interrupted after" in err
    assert 2 <= done < len(items(whole))
    assert [p.name for p in out.iterdir()] == ["items.jsonl.part"]

    before = part.read_bytes()
    code, line = failed(env, *args)
    assert (code, part.read_bytes()) == (2, before)
    assert f"was interrupted after {done} of" in line
    assert "--resume goes on, --restart begins anew" in line
    code, line = failed(env, *args, "--resume", "--limit", "3")
    assert (code, part.read_bytes()) == (2, before)
    assert "'limit' is null, expected 3" in line

    code, text_again, err_again = call(env, *args, "--resume", "--json")
    assert (code, f"goes on after {done} of" in err_again) == (0, True)
    assert steady(out / "eval.json") == steady(whole / "eval.json")
    assert json.loads(text_again)["score"] == steady(whole / "eval.json")["score"]
    pairs = zip(items(out), items(whole), strict=True)
    assert all({**a, "timings": 0} == {**b, "timings": 0} for a, b in pairs)

    report = (out / "eval.json").read_bytes()
    code, table, err_again = call(env, *args, "--resume")
    assert (code, "left as it is" in err_again, (out / "eval.json").read_bytes()) == (0, True, report)
    assert table.startswith("| metric | score | ci95 | items |\n")


def test_perplexity_and_divergence_of_a_text(env: dict[str, str], nano: Path, tmp_path: Path) -> None:
    """The metrics have tests of their own: here the flags arrive, and one object comes out."""
    (tmp_path / "text.txt").write_text("The capital of France is Paris. " * 30, "utf-8")
    args = ["eval", "-m", nano, "--json", "--metric"]
    text = [
        "--data",
        tmp_path / "text.txt",
        "-c",
        "64",
        "--chunks",
        "2",
        "--save-logits",
        tmp_path / "logits",
    ]
    code, out, err = call(env, *args, "ppl", *text)
    found = json.loads(out)
    assert (code, err, found["metric"], found["items"]) == (0, "", "ppl", 62)
    assert found["score"] == found["ppl"] > 1
    code, out, err = call(env, *args, "kld", "--logits", tmp_path / "logits", "--chunks", "1")
    found = json.loads(out)
    assert (code, err, found["metric"], found["items"]) == (0, "", "kld", 31)
    assert found["score"] == found["kld"]


@pytest.mark.parametrize("metric", ["ppl", "kld"])
def test_likelihoods_of_items(
    metric: str, env: dict[str, str], nano: Path, data: Path, tmp_path: Path, converted: Converted
) -> None:
    """One item of each mode, in a file that says so in capitals; what is done is not done again."""
    shutil.copytree(data.parent, tmp_path / "data")
    upper = (tmp_path / "data" / data.name).rename(tmp_path / "data" / "ITEMS.JSONL")
    out = tmp_path / "out"
    base = ["--base", converted("phi4-nano", "F16")] if metric == "kld" else []
    args = ["eval", "-m", nano, "--data", upper, "--metric", metric, *base, "--limit", "4", "-o", out]
    code, text, err = call(env, *args, "--json")
    found = json.loads(text)
    assert (code, err, text.count("\n"), found["metric"], found["items"]) == (0, "", 1, metric, 4)
    assert found["score"] == found[metric]
    assert found["ci95"][0] <= found["score"] <= found["ci95"][1]
    assert found == json.loads((out / "eval.json").read_text("utf-8"))
    assert [row["mode"] for row in items(out)] == ["speech", "vision", "vision_speech", "language"]
    assert found["positions"] == sum(len(row["positions"]["nll"]) for row in items(out))
    assert ("base_recipe" in found["job"], "max_tokens" in found["job"]) == (metric == "kld", False)

    report = (out / "eval.json").read_bytes()
    code, _, err = call(env, *args, "--resume")
    assert (code, "left as it is" in err, (out / "eval.json").read_bytes()) == (0, True, report)
    first, *rest = (out / "items.jsonl").read_text("utf-8").splitlines(keepends=True)
    head = {"format": "pocketphi evaluation journal", "version": 1, **found["job"]}
    (out / "items.jsonl.part").write_text(json.dumps(head) + "\n" + first, "utf-8")
    code, text, err = call(env, *args, "--resume", "--json")
    assert (code, "goes on after 1 of 4" in err) == (0, True)
    assert {**json.loads(text), "timings": 0} == {**found, "timings": 0}
    assert len(rest) == 3


def test_a_base_of_another_checkpoint(
    env: dict[str, str], nano: Path, data: Path, converted: Converted
) -> None:
    other = converted("phi4-mini", "F32")
    code, line = failed(env, "eval", "-m", nano, "--data", data, "--metric", "kld", "--base", other)
    assert (code, "base has vocabulary size 2880, expected 4096 as in" in line) == (2, True), line
    code, line = failed(env, "eval", "-m", nano, "--data", data, "--metric", "kld", "--base", data.parent)
    assert (code, "not a model directory" in line) == (3, True), line


def test_data_is_not_overwritten(env: dict[str, str], nano: Path, tmp_path: Path) -> None:
    """Under another name too; and what is no name of a file is one line."""
    data, link = tmp_path / "text.txt", tmp_path / "link"
    data.write_text("The capital of France is Paris. " * 30, "utf-8")
    link.hardlink_to(data)
    before = data.read_bytes()
    ppl = ["eval", "-m", nano, "--metric", "ppl", "--data", data, "-c", "64", "--save-logits"]
    for args in ([*ppl, data], [*ppl, link], ["imatrix", "-m", nano, "--data", data, "-o", link]):
        code, line = failed(env, *args)
        assert (code, "is the data that is read, expected another file to write" in line) == (2, True), line
    for place in (".", "/"):
        code, line = failed(env, *ppl, place)
        assert (code, f"'{place}': cannot be written: is not a regular file" in line) == (6, True), line
    assert data.read_bytes() == before


def test_media_that_were_replaced_are_noticed(
    env: dict[str, str], nano: Path, data: Path, whole: Path, tmp_path: Path
) -> None:
    """--resume goes on with the same pictures, and the same of what else an answer depends on."""
    folder, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(data.parent, folder)
    shutil.copytree(whole, out)
    args = ["eval", "-m", nano, "--data", folder / data.name, "--metric", "exact", "-o", out, *SHORT]
    args.append("--resume")
    assert call(env, *args)[0] == 0
    report = out / "eval.json"
    mine = report.read_text("utf-8")
    report.write_text(mine.replace('"gpu_layers": 0', '"gpu_layers": 1'), "utf-8")
    code, line = failed(env, *args)
    assert (code, "'gpu_layers' is 1, expected 0" in line) == (2, True), line
    report.write_text(mine, "utf-8")
    if ggml_plugin.load().active:
        code, line = failed(env | {"POCKETPHI_KERNELS": "stock"}, *args)
        assert (code, "is of another job: 'kernels' is" in line) == (2, True), line
    picture = min((folder / "images").iterdir())
    picture.write_bytes(picture.read_bytes() + b"\0")
    code, line = failed(env, *args)
    assert (code, "is of another job: 'media_sha256' is" in line) == (2, True), line


USAGE: list[tuple[list[str], str]] = [
    ([], "--metric is missing"),
    (["--metric", "mer"], "mer"),
    (["--metric", "wer"], "name it with --data"),
    (["--metric", "ppl"], "name it with --data"),
    (["--metric", "kld"], "name it with --logits"),
    (["--metric", "wer", "--data", "DATA", "--logits", "x"], "--logits does not go with --metric wer"),
    (
        ["--metric", "wer", "--data", "DATA", "--save-logits", "x"],
        "--save-logits does not go with --metric wer",
    ),
    (["--metric", "wer", "--data", "DATA", "--chunks", "2"], "--chunks does not go with --metric wer"),
    (
        ["--metric", "kld", "--data", "x.txt", "--logits", "x"],
        "--data does not go with --metric kld of a text",
    ),
    (
        ["--metric", "ppl", "--data", "x.txt", "--logits", "x"],
        "--logits does not go with --metric ppl of a text",
    ),
    (["--metric", "ppl", "--data", "x.txt", "-n", "256"], "-n does not go with --metric ppl"),
    (["--metric", "ppl", "--data", "x.txt", "--max-crops", "36"], "--max-crops does not go with"),
    (["--metric", "ppl", "--data", "x.txt", "-o", "x"], "-o does not go with --metric ppl of a text"),
    (["--metric", "ppl", "--data", "DATA", "--normalizer", "none"], "--normalizer does not go with"),
    (
        ["--metric", "ppl", "--data", "DATA", "--save-logits", "x"],
        "--save-logits does not go with --metric ppl of items",
    ),
    (["--metric", "ppl", "--data", "DATA", "--base", "x"], "--base does not go with --metric ppl of items"),
    (["--metric", "ppl", "--data", "x.txt", "--base", "x"], "--base does not go with --metric ppl of a text"),
    (["--metric", "kld", "--data", "DATA"], "name it with --base"),
    (["--metric", "kld", "--base", "x"], "--metric kld reads a file: name it with --data"),
    (["--metric", "kld", "--data", "x.txt", "--base", "x"], "x.txt: is a text, --base compares items"),
    (
        ["--metric", "kld", "--data", "DATA", "--base", "x", "--logits", "y"],
        "--logits does not go with --metric kld of items",
    ),
    (["--metric", "wer", "--data", "DATA", "--base", "x"], "--base does not go with --metric wer"),
    (["--metric", "wer", "--data", "DATA", "--resume"], "--resume is about the files of an earlier run"),
    (["--metric", "wer", "--data", "DATA", "--restart"], "--restart is about the files of an earlier run"),
    (["--metric", "wer", "--data", "DATA", "-o", "x", "--resume", "--restart"], "are both given"),
    (["--metric", "wer", "--data", "DATA", "-n", "0"], "-n is 0"),
    (["--metric", "wer", "--data", "none.jsonl"], "none.jsonl: no such file"),
    (["--metric", "wer", "--data", ""], "is empty, expected a path"),
    (["--metric", "tool-call", "--data", "DATA"], "line 1: item 'asr-000': reference holds no tool call"),
]


@pytest.mark.parametrize(("args", "expected"), USAGE)
def test_usage(args: list[str], expected: str, env: dict[str, str], data: Path) -> None:
    """Before a model is opened: there is none where -m says."""
    code, line = failed(env, "eval", "-m", "/nowhere", *(str(data) if one == "DATA" else one for one in args))
    assert (code, expected in line) == (2, True), line
