# SPDX-License-Identifier: Apache-2.0
"""What a file of items is taken for, whatever is in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pocketphi.bulk import lines
from pocketphi.bulk.lines import ChangedError, LineFile, in_order_of_modes
from pocketphi.runtime.errors import InputError

from .batch_items import mixed, user, write_lines


def test_ids_modes_and_lines(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", mixed())
    path.write_bytes(b"\xef\xbb\xbf\n" + path.read_bytes() + b'  {"messages": []}')  # no end of line
    with LineFile(path) as file:
        assert [(one.id, one.number, one.mode) for one in file.entries] == [
            ("text", 2, "language"), ("said", 3, "speech"), ("seen", 4, "vision"), ("tools", 5, "language"),
            ("both", 6, "vision_speech"), ("french", 7, "speech"), ("drawn", 8, "language"),
            ("schema", 9, "language"), ("line-10", 10, "language"),
        ]  # fmt: skip
        assert [json.loads(file.task(one).text) for one in reversed(file.entries)][1:] == mixed()[::-1]
        modes = [one.mode for one in in_order_of_modes(file.entries)]
    assert modes == ["language"] * 5 + ["vision", "vision_speech"] + ["speech"] * 2


def test_both_forms_have_ids(tmp_path: Path) -> None:
    items = [{"custom_id": "x", "body": {"messages": user("Hi")}}, {"id": "custom_id", "custom_id": "x"}]
    with LineFile(write_lines(tmp_path / "in.jsonl", items)) as file:
        assert [(one.id, one.in_openai_form) for one in file.entries] == [("x", True), ("custom_id", False)]


@pytest.mark.parametrize(
    ("second", "number"), [({"id": "a"}, 2), ({"custom_id": "a", "body": {}}, 2), ({"id": "line-1"}, 3)]
)
def test_two_of_one_id_end_all(second: dict[str, object], number: int, tmp_path: Path) -> None:
    first: list[object] = [{"id": "a"}] if number == 2 else [{}, {"id": "b"}]
    path = write_lines(tmp_path / "in.jsonl", [*first, second])
    with pytest.raises(InputError, match=f"line {number}: has the id .* of line 1, expected one of its own"):
        LineFile(path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"not json", "is 'not json', expected a JSON object"),
        (b"[1]", "is a JSON list, expected an object"),
        (b'{"a": NaN}', "expected a JSON object"),
        (b'{"a": ' + b"9" * 5000 + b"}", "expected a JSON object"),
        (b"[" * 100_000, "expected a JSON object"),
        (b'{"a": "\xff"}', "is not UTF-8 text: byte 0xff at offset 7"),
        (b'{"id": 7}', "id is int, expected text"),
        (b'{"id": " "}', "expected 1 to 200 characters that can be printed"),
        (b'{"id": "a\\u0007"}', "expected 1 to 200 characters"),
        (b'{"id": "\\ud800"}', "expected 1 to 200 characters"),
        (b'{"id": "' + b"x" * 201 + b'"}', "expected 1 to 200 characters"),
    ],
)
def test_a_bad_line_is_an_item_of_its_own(line: bytes, said: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", [{"id": "good"}, line, {"id": "last"}])
    with LineFile(path) as file:
        assert [one.id for one in file.entries] == ["good", "line-2", "last"]
        with pytest.raises(InputError, match=said) as caught:
            file.task(file.entries[1])
        assert "line 2" in str(caught.value)
        assert file.task(file.entries[2]).text == '{"id": "last"}'


def test_long_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One over the limit is passed over in pieces; what follows is found."""
    long = json.dumps({"id": "long", "x": "y" * 10_000_000}).encode()
    path = write_lines(tmp_path / "in.jsonl", [{"id": "a"}, long, {"id": "b"}])
    with LineFile(path) as file:
        assert [one.id for one in file.entries] == ["a", "long", "b"]
    monkeypatch.setattr(lines, "LINE_MAX_BYTES", 1000)
    with LineFile(path) as file:
        assert [one.id for one in file.entries] == ["a", "line-2", "b"]
        with pytest.raises(InputError, match="line 2: is over 1000 bytes long"):
            file.task(file.entries[1])
        assert file.task(file.entries[2]).text == '{"id": "b"}'


def test_a_file_that_changes_is_found_out(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", [{"id": "a"}, {"id": "b"}])
    with LineFile(path) as file:
        write_lines(path, [{"id": "a"}, {"id": "c"}])
        assert file.task(file.entries[0]).id == "a"
        with pytest.raises(ChangedError, match="line 2 has changed while it was worked on"):
            file.task(file.entries[1])


def test_no_items(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"\n \n")
    with pytest.raises(InputError, match="has no items"):
        LineFile(tmp_path / "in.jsonl")
    with pytest.raises(InputError, match="no such file"):
        LineFile(tmp_path / "other.jsonl")
    with pytest.raises(InputError, match="is not a regular file"):
        LineFile(tmp_path)
