# SPDX-License-Identifier: Apache-2.0
"""Folders that are gone, full of something else or oddly called: one line, or an answer; nothing is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pocketphi.runtime.bundle import MANIFEST

from . import tiny
from .bite.table import copy_folder, listing
from .conftest import Converted
from .scoring import EVAL

CALL = [sys.executable, "-c", "import sys; sys.argv[0] = 'pocketphi'; from pocketphi.cli import main; main()"]
ONE = ["-t", "1"]
TEA = ["run", *ONE, "-p", "How do you spell tea?"]
CLIP = str(EVAL / "audio/asr-010.flac")
TEXT = "Tell me where a lion lives. A lion lives in the savanna. " * 100

Outcome = tuple[int, str, str]  # exit code, stdout, stderr

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="these folders and names are Linux's")


def call(env: dict[str, str], *args: str, cwd: Path | None = None, stdin: str = "") -> Outcome:
    done = subprocess.run(
        [*CALL, *args],
        env=env,
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def call_nowhere(env: dict[str, str], tmp_path: Path, *args: str) -> Outcome:
    """In a working directory that is removed before the program starts."""
    gone = tmp_path / "gone"
    gone.mkdir()
    script = 'rmdir "$PWD" && exec "$@"'
    done = subprocess.run(
        ["sh", "-c", script, "sh", *CALL, *args], env=env, cwd=gone, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert not gone.exists()
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("args", "code", "line"),
    [
        (["convert", str(tiny.NANO), "-o", "m"], 6, "error: m: there is no working directory to put it in: "),
        (["convert", ".", "-o", "m"], 5, "error: .: cannot be opened: "),
    ],
)
def test_convert_without_a_working_directory(
    args: list[str], code: int, line: str, env: dict[str, str], tmp_path: Path
) -> None:
    found = call_nowhere(env, tmp_path, *args)
    assert found[:2] == (code, "")
    assert found[2].startswith(line) and found[2].count("\n") == 1, found[2]


def test_doctor_without_a_working_directory(env: dict[str, str], tmp_path: Path) -> None:
    code, out, err = call_nowhere(env, tmp_path, "doctor", "--json")
    assert (code, err) == (1, "")
    checks = json.loads(out)["checks"].values()
    assert {check["status"] for check in checks} == {"fail"}
    assert all("cannot be started: " in check["detail"] for check in checks)


@pytest.fixture
def model(converted: Converted, tmp_path: Path) -> Path:
    """A model directory that may be lost."""
    return copy_folder(converted("phi4-nano", "Q8_0"), tmp_path / "model")


INTO_A_MODEL = {
    "imatrix": ["imatrix", "--data", "{tmp}/text.txt", "-o", "{model}/backbone-Q8_0.gguf", "--chunks", "1"],
    "logits": [
        "eval", "--metric", "ppl", "--data", "{tmp}/text.txt", "--save-logits", "{model}/tokenizer.json",
    ],
    "report": [
        "eval", "--metric", "exact", "--data", str(EVAL / "speech.jsonl"), "--limit", "1", "-o", "{model}",
    ],
    "transcript": ["transcribe", CLIP, "-o", "{model}"],
    "live transcript": ["live", "--file", CLIP, "-o", "{model}"],
    "recording": ["live", "--file", CLIP, "--save-audio", "{model}/speech.onnx"],
}  # fmt: skip


@pytest.mark.parametrize("what", INTO_A_MODEL)
def test_nothing_is_written_into_a_model(what: str, model: Path, env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, "utf-8")
    before = listing(model)
    args = [one.format(tmp=tmp_path, model=model) for one in INTO_A_MODEL[what]]
    code, out, err = call(env, *args, "-m", str(model), *ONE)
    assert (code, out) == (6, ""), err
    assert f"{str(model)!r}: is a model directory" in err and err.count("\n") == 1
    assert listing(model) == before


def test_a_chat_is_not_saved_into_a_model(model: Path, env: dict[str, str]) -> None:
    before = listing(model)
    code, _, err = call(env, "chat", "-m", str(model), *ONE, stdin=f"/save {model}/tokenizer.json\n")
    assert code == 0 and "is a model directory" in err
    assert listing(model) == before


def test_a_transcript_does_not_replace_a_recording(env: dict[str, str], tmp_path: Path) -> None:
    """Sound is known by its content: a clip may be called like the transcript of another."""
    for name in ("a", "a.txt"):
        (tmp_path / name).write_bytes(Path(CLIP).read_bytes())
    before = listing(tmp_path)
    code, _, err = call(env, "transcribe", "a", "a.txt", "-o", ".", *ONE, cwd=tmp_path)
    assert (code, err) == (2, "error: 'a.txt': is the data that is read, expected another file to write\n")
    assert listing(tmp_path) == before


def test_a_cache_whose_name_is_not_utf8(env: dict[str, str], tmp_path: Path) -> None:
    """Text, and a picture, whose graphs ONNX Runtime opens."""
    folder = tmp_path / os.fsdecode(b"ca\xffche")
    odd = env | {"POCKETPHI_CACHE": str(folder)}
    assert call(odd, *TEA) == (0, "T-E-A.\n", "")
    seen = ["run", *ONE, "--image", str(EVAL / "images/img-000.png"), "-p", "What is it?", "-n", "4"]
    assert call(odd, *seen) == call(env, *seen)
    assert folder.is_dir()


@pytest.mark.parametrize("home", ["", "relative"])
def test_a_home_that_is_none(home: str, env: dict[str, str], tmp_path: Path) -> None:
    homeless = {k: v for k, v in env.items() if k != "XDG_CACHE_HOME"} | {"HOME": home}
    code, out, err = call(homeless, *TEA, cwd=tmp_path)
    assert (code, out) == (6, "")
    assert "there is no home directory" in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_doctor_and_a_cache_that_is_a_file(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"somebody's")
    code, out, _ = call(env | {"POCKETPHI_CACHE": str(tmp_path / "cache")}, "doctor", "--json")
    found = json.loads(out)["checks"]["cache"]
    assert (code, found["status"]) == (1, "fail")
    assert "is not a folder" in found["detail"]


def test_offline_without_the_hub(env: dict[str, str], tmp_path: Path) -> None:
    code, _, err = call(env, "convert", str(tiny.NANO), "--offline", "-o", str(tmp_path / "m"))
    assert (code, err) == (2, "error: --offline needs --from-hub: a directory is never fetched\n")


@pytest.mark.parametrize("name", [MANIFEST, "tokenizer.json"])
@pytest.mark.parametrize("kind", ["pipe", "link to itself"])
def test_a_file_of_a_model_that_is_none(kind: str, name: str, model: Path, env: dict[str, str]) -> None:
    path = model / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path.name)
    code, _, err = call(env, *TEA, "-m", str(model))
    lost = "missing" if (name, kind) == ("tokenizer.json", "link to itself") else "is not a regular file"
    assert code == 3 and err.startswith(f"error: {path}: ") and err.endswith(f"{lost}\n"), err


def test_a_name_of_60_000_characters(env: dict[str, str]) -> None:
    code, _, err = call(env, "run", "-p", "Hi", "--image", "x" * 60_000)
    assert code == 2 and len(err) < 1100 and err.count("\n") == 1
    code, _, err = call(env, "x" * 60_000)
    assert code == 2 and len(err) < 1300 and err.count("\n") == 1
