# SPDX-License-Identifier: Apache-2.0
"""Text files: what is refused on the way in, and that nothing half-written is left on the way out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pocketphi.runtime.errors import InputError, OutputError
from pocketphi.runtime.files import check_not_model, decode_text, read_text, write_text


def test_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffgrün\n".encode())
    assert read_text(path, max_bytes=100) == "grün\n"


def test_refusals(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"ab\xff")
    with pytest.raises(InputError, match="byte 0xff at offset 2"):
        read_text(path, max_bytes=100)
    with pytest.raises(InputError, match="at most 2"):
        read_text(path, max_bytes=2)
    with pytest.raises(InputError, match="no such file"):
        read_text(tmp_path / "gone", max_bytes=2)
    with pytest.raises(InputError, match="not a regular file"):
        read_text(tmp_path, max_bytes=2)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a regular file"):
        read_text(tmp_path / "pipe", max_bytes=2)
    with pytest.raises(InputError, match="standard input"):
        decode_text(b"\xc3", "standard input")


def test_writing_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    write_text(path, "one")
    write_text(path, "two")
    assert path.read_text("utf-8") == "two"
    with pytest.raises(OutputError, match="not Unicode"):
        write_text(path, "\ud800")
    assert path.read_text("utf-8") == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]
    with pytest.raises(OutputError, match="No such file"):
        write_text(tmp_path / "no" / "x", "y")


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_a_model_directory_takes_no_outputs(kind: str, tmp_path: Path) -> None:
    check_not_model(tmp_path)
    check_not_model(tmp_path / "gone")
    manifest = tmp_path / "bundle.json"
    manifest.write_text("{}") if kind == "file" else manifest.symlink_to("gone")
    with pytest.raises(OutputError, match="is a model directory"):
        check_not_model(tmp_path)
