# SPDX-License-Identifier: Apache-2.0
"""Clients that nobody here wrote: curl, with the lines of docs/server.md, and `llm`."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .served import LONG_S, Server

ROOT = Path(__file__).resolve().parent.parent.parent
MANUAL = ROOT / "docs/server.md"
BASE = "http://127.0.0.1:8080"


def lines() -> list[tuple[str, str]]:
    """Commands with curl in them, and what the manual says they print."""
    found: list[tuple[str, str]] = []
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", MANUAL.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    for kind, block in blocks:
        for part in re.split(r"^\$ ", "" if kind else block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            if "curl" in command:
                found.append((command, output))
    return found


def test_there_are_lines() -> None:
    assert len(lines()) >= 14


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize(("command", "output"), lines())
def test_a_line_of_the_manual(server: Server, command: str, output: str) -> None:
    assert BASE in command
    done = subprocess.run(
        ["bash", "-c", command.replace(BASE, server.url)],
        cwd=ROOT, capture_output=True, text=True, timeout=LONG_S, check=False,
    )  # fmt: skip
    assert done.stdout.rstrip("\n") == output.rstrip("\n"), done.stderr


@pytest.mark.skipif(importlib.util.find_spec("llm") is None, reason="needs llm")
@pytest.mark.parametrize("flags", [[], ["--no-stream"]], ids=["stream", "whole"])
def test_llm(server: Server, user: dict[str, str], tmp_path: Path, flags: list[str]) -> None:
    """With the manual's entry."""
    (entry,) = re.findall(r"```yaml\n(.*?)```", MANUAL.read_text("utf-8"), re.DOTALL)
    (tmp_path / "extra-openai-models.yaml").write_text(entry.replace(BASE, server.url), "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "llm", "-m", "pocketphi", "--key", "unused", "--no-log", *flags,
         "What is the capital of France?"],
        env=user | {"LLM_USER_PATH": str(tmp_path)},
        capture_output=True, text=True, timeout=LONG_S, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "The capital of France is Paris.\n"), done.stderr
