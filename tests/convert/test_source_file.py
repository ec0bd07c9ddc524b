# SPDX-License-Identifier: Apache-2.0
"""Files of every wrong kind, JSON of every wrong kind, and reads while the file changes."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from pocketphi.convert.source_file import (
    SourceFile,
    parse_json_object,
    quoted,
    read_bytes,
    read_json_object,
    shown,
)
from pocketphi.runtime.errors import CheckpointError


def message(error: pytest.ExceptionInfo[CheckpointError]) -> str:
    """The error's text, after what holds for every one of them."""
    text = str(error.value)
    assert error.value.exit_code == 5
    assert text and len(text.splitlines()) == 1 and text.isprintable() and len(text) < 1000
    return text


def refused(raw: bytes) -> str:
    with pytest.raises(CheckpointError) as error:
        parse_json_object(raw, "some.json")
    text = message(error)
    assert text.startswith("some.json: ")
    return text


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"a": 1} x', "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"a": 1,}', "not valid JSON"),
        (b'{"a": "\n"}', "not valid JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "not valid JSON"),  # a byte order mark
        (b'{"a": "\xff"}', "is not UTF-8 at byte 7"),
        (b'{"a": "\xc0\xaf"}', "is not UTF-8 at byte 7"),  # an overlong slash
        (b'{"a": "\xed\xa0\x80"}', "is not UTF-8 at byte 7"),  # a surrogate in UTF-8
        ('{"a": 1}'.encode("utf-16"), "is not UTF-8 at byte 0"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b'{"\\uDFff": 1}', "half of a surrogate pair"),
        (b'{"a": 1, "b": 2, "a": 3}', "key 'a' stands twice"),
        (b'{"x": {"a": 1, "\\u0061": 1}}', "key 'a' stands twice"),  # the same after unescaping
        (b'{"a": NaN}', "'NaN' is not finite"),
        (b'{"a": -Infinity}', "'-Infinity' is not finite"),
        (b'{"a": 1e999}', "'1e999' is not finite"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number has 5000 digits"),
        (b'{"a": ' + b"9" * 4000 + b".5}", "is not finite"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a":[' + b"[]," * 4_000_001 + b"0]}", "more than 4000000 JSON values"),
        (b"[1]", "is a JSON array, expected an object"),
        (b'"a"', "is a JSON string, expected an object"),
        (b"null", "is a JSON null, expected an object"),
        (b"true", "is a JSON boolean, expected an object"),
        (b"1.5", "is a JSON number, expected an object"),
    ],
    ids=range(28),
)
def test_json_that_is_refused(raw: bytes, said: str) -> None:
    assert said in refused(raw)


def test_json_that_is_taken() -> None:
    raw = (
        '{"a": [1, -2.5, true, null], "é": "\\ud83d\\ude00", "deep": {"a": 1}, '
        '"big": 1000000000000000019884624838656}'
    )
    assert parse_json_object(raw.encode(), "x") == {
        "a": [1, -2.5, True, None],
        "é": "😀",
        "deep": {"a": 1},
        "big": 1000000000000000019884624838656,  # what tokenizers write for "no limit"
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain.name", "'plain.name'"),
        ("two\nlines\x1b[31m", "'two\\nlines\\x1b[31m'"),
        ("\ud800\u2028\u202e", "'\\ud800\\u2028\\u202e'"),
        ("a" * 60 + "b" * 1000 + "c" * 19, "'" + "a" * 60 + "…" + "c" * 19 + "'"),
        (12, "12"),
        (None, "None"),
        ([1, "x\n"], "[1, 'x\\n']"),
        ([[1]], "a list of 1"),
        ([0] * 9, "a list of 9"),
        ({"a": 1}, "an object of 1 keys"),
    ],
    ids=range(10),
)
def test_quoted(value: object, text: str) -> None:
    assert quoted(value) == text


def test_shown_escapes_what_does_not_print() -> None:
    assert shown(Path("a\nb\x1b\udc80é.json")) == "a\\nb\\x1b\\udc80é.json"


def test_kinds_of_file_that_are_refused(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)  # opening it for reading would wait for a writer for ever
    with socket.socket(socket.AF_UNIX) as listener, pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)  # a socket's path is limited to about 100 bytes
        listener.bind("socket")
        for path, kind in [
            (tmp_path, "is a directory"),
            (fifo, "is a pipe"),
            (tmp_path / "socket", "is a socket"),
            (Path("/dev/zero"), "is a device"),
        ]:
            with pytest.raises(CheckpointError) as error:
                SourceFile(path)
            assert message(error) == f"{path}: {kind}, expected a regular file"


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("absent", "dangling", "loop", "n" * 5000, "nul\0byte", "line\nend"):
        with pytest.raises(CheckpointError) as error:
            SourceFile(tmp_path / name[:300])
        assert "cannot be opened: " in message(error)


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b"{}")
    path.chmod(0)
    with pytest.raises(CheckpointError) as error:
        SourceFile(path)
    assert "Permission denied" in message(error)


def test_a_file_above_its_cap_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "big.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: reading it would take a terabyte
    with pytest.raises(CheckpointError) as error:
        read_bytes(path, 4096)
    assert message(error) == f"{path}: has {1 << 40} bytes, expected at most 4096"


def test_a_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 15524095\n")
    with pytest.raises(CheckpointError) as error:
        read_json_object(path, 4096)
    assert message(error).startswith(f"{path}: is a Git LFS pointer")


@pytest.fixture(params=["preadv", "seek"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of reading; Windows has only the second."""
    if request.param == "seek":
        monkeypatch.delattr(os, "preadv", raising=False)
    elif not hasattr(os, "preadv"):
        pytest.skip("this system has no preadv")
    return str(request.param)


def test_a_file_that_shrinks_is_an_error(tmp_path: Path, way: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(range(100)))
    with SourceFile(path) as file:
        os.truncate(path, 40)
        assert file.read(30, 10) == bytes(range(30, 40))
        with pytest.raises(CheckpointError) as error:
            file.read(30, 20)
    assert message(error) == f"{path}: ends at byte 40, expected 100 bytes: the file has become shorter"


def test_threads_read_their_own_bytes(tmp_path: Path, way: str) -> None:
    path, size = tmp_path / "x", 1 << 20
    whole = os.urandom(size)
    path.write_bytes(whole)
    wrong: list[int] = []

    def read(start: int) -> None:
        for step in range(200):
            at = (start * 7919 + step * 104_729) % (size - 4096)
            if file.read(at, 4096) != whole[at : at + 4096]:
                wrong.append(at)

    with SourceFile(path) as file:
        threads = [threading.Thread(target=read, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    file.close()  # twice is harmless
