# SPDX-License-Identifier: Apache-2.0
"""A file with one writer: whole or unchanged, never through a link, free again when its writer is gone."""

from __future__ import annotations

import os
from io import FileIO
from pathlib import Path
from typing import BinaryIO

import pytest

from pocketphi.runtime.errors import InputError, InUseError, OutputError
from pocketphi.runtime.growing_file import GrowingFile, _lock, check_free


def test_text_and_bytes_and_a_new_beginning(tmp_path: Path) -> None:
    file = GrowingFile(tmp_path / "a")
    file.append("größer")
    file.append(b"\xff")
    file.rewrite(b"GR")
    file.append("!")
    file.sync()
    file.close()
    file.close()
    assert (tmp_path / "a").read_bytes() == "GRößer".encode() + b"\xff!"


def test_what_is_no_text_changes_nothing(tmp_path: Path) -> None:
    file = GrowingFile(tmp_path / "a")
    file.append("a")
    with pytest.raises(OutputError, match="the text is not Unicode"):
        file.append("\ud800")
    file.close()
    assert (tmp_path / "a").read_bytes() == b"a"


def test_going_on_after_what_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"onetwo")
    file = GrowingFile(tmp_path / "a", keep=3)
    file.append("!")
    file.close()
    assert (tmp_path / "a").read_bytes() == b"one!"


def test_a_reader_says_what_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one\ntwo")

    def first_line(file: BinaryIO) -> int:
        with pytest.raises(InUseError):
            check_free(tmp_path / "a")
        return len(file.readline())

    file = GrowingFile(tmp_path / "a", keep=first_line)
    assert file.size == 4
    file.append("!")
    file.close()
    assert (tmp_path / "a").read_bytes() == b"one\n!"

    def refuses(file: BinaryIO) -> int:
        raise InputError("no")

    for run in (
        lambda: GrowingFile(tmp_path / "a", keep=refuses),
        lambda: check_free(tmp_path / "a", read=refuses),
    ):
        with pytest.raises(InputError, match=r"^no$"):
            run()
        check_free(tmp_path / "a")  # nobody holds it


def test_another_name_of_the_old_file_keeps_its_content(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"kept")
    (tmp_path / "a").hardlink_to(tmp_path / "precious")
    GrowingFile(tmp_path / "a").close()
    assert (tmp_path / "precious").read_bytes() == b"kept"
    assert (tmp_path / "a").read_bytes() == b""


@pytest.mark.skipif(os.name == "nt", reason="the system keeps open files there")
def test_one_writer(tmp_path: Path) -> None:
    """A lock belongs to whom opened the file, so that two of one process are as two processes are."""
    path = tmp_path / "a"
    check_free(path)
    file = GrowingFile(path)
    file.append("one")
    for keep in (None, 0):
        with pytest.raises(InUseError, match="is being written by another process"):
            GrowingFile(path, keep=keep)
    with pytest.raises(InUseError):
        check_free(path)
    file.close()
    assert path.read_bytes() == b"one"
    check_free(path)
    GrowingFile(path, keep=3).close()


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none" / "a", tmp_path / "a\0"):
        with pytest.raises(OutputError, match="cannot be written: "):
            GrowingFile(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="the system keeps open files there")
def test_a_lock_on_what_has_lost_its_name_is_worth_nothing(tmp_path: Path) -> None:
    """Between opening and locking, another process may have put a file of its own in the place."""
    path = tmp_path / "a"
    path.touch()
    with FileIO(path, "r+b") as file:
        (tmp_path / "other").touch()
        (tmp_path / "other").replace(path)
        with pytest.raises(InUseError):
            _lock(file, path)
        path.unlink()
        with pytest.raises(InUseError):
            _lock(file, path)
