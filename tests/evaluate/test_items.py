# SPDX-License-Identifier: Apache-2.0
"""Items are checked before anything is made of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from pocketphi.evaluate import items as items_module
from pocketphi.evaluate.items import in_order_of_modes, media_sha256, read_items
from pocketphi.runtime.errors import InputError

from .. import scoring

GOOD: dict[str, Any] = {"id": "a", "prompt": "<|user|>Hi<|end|><|assistant|>", "reference": "Hello."}
HEARD = "<|user|><|audio_1|>What?<|end|><|assistant|>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with a medium, and beside it a file that is none of its."""
    here = tmp_path / "data"
    (here / "media").mkdir(parents=True)
    (here / "media" / "clip.wav").write_bytes(b"RIFF")
    (tmp_path / "secret.wav").write_bytes(b"RIFF")
    (here / "out.wav").symlink_to(tmp_path / "secret.wav")
    (here / "loop.wav").symlink_to(here / "loop.wav")
    (here / "up").symlink_to(tmp_path)
    return here


def written(folder: Path, *lines: bytes | str | dict[str, Any]) -> Path:
    raw = [
        one if isinstance(one, bytes) else (one if isinstance(one, str) else json.dumps(one)).encode()
        for one in lines
    ]
    path = folder / "items.jsonl"
    path.write_bytes(b"\n".join(raw) + b"\n")
    return path


def test_the_evaluation_set_of_phi4_nano() -> None:
    for name in scoring.SETS:
        path = scoring.EVAL / f"{name}.jsonl"
        found, rows = read_items(path), scoring.rows(name)
        assert [item.id for item in found.items] == [row["id"] for row in rows]
        assert [item.prompt for item in found.items] == [row["prompt"] for row in rows]
        for item, row in zip(found.items, rows, strict=True):
            assert [m.source for m in item.media] == [m.source for m in scoring.media_of(row)]
        assert (found.sha256, found.n_bytes) == (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_size,
        )


def test_too_many_media_are_refused_before_any_is_looked_for(folder: Path) -> None:
    """None of these files is there, and nobody looks."""
    n = 65
    turns = [{"role": "user", "content": [{"type": "image", "image": f"{i}.png"} for i in range(n)]}]
    for row in (
        {**GOOD, "images": [f"{i}.png" for i in range(n)]},
        {**GOOD, "images": [f"{i}.png" for i in range(60)], "audio": ["a.wav"] * 5},
        {"id": "a", "reference": "", "messages": turns},
    ):
        with pytest.raises(
            InputError, match=r"line 1: item 'a': has 65 images and clips, expected at most 64"
        ):
            read_items(written(folder, row))
    with pytest.raises(InputError, match="no such file"):  # one fewer is looked for
        read_items(written(folder, {**GOOD, "images": [f"{i}.png" for i in range(64)]}))


def test_media_are_known_by_what_is_in_them(folder: Path) -> None:
    seen = {**GOOD, "prompt": "What?", "images": ["media/clip.wav"]}
    turns = [{"role": "user", "content": [{"type": "audio", "audio": "media/clip.wav"}]}]
    for row in (seen, {"id": "a", "reference": "", "messages": turns}):
        items = read_items(written(folder, row)).items
        (folder / "media" / "clip.wav").write_bytes(b"RIFF")
        before = media_sha256(items)
        assert media_sha256(items) == before != media_sha256(())
        (folder / "media" / "clip.wav").write_bytes(b"RIFX")
        assert media_sha256(items) != before
    (folder / "media" / "clip.wav").unlink()
    with pytest.raises(InputError, match=r"line 1: item 'a': .*clip\.wav: no such file"):
        media_sha256(items)


def test_the_mode_is_what_the_media_say(folder: Path) -> None:
    heard = {**GOOD, "id": "b", "prompt": HEARD, "audio": "media/clip.wav", "task": "asr", "extra": [1]}
    both = {**GOOD, "id": "c", "prompt": "What?", "audio": ["media/clip.wav"], "images": ["media/clip.wav"]}
    seen = {**GOOD, "id": "d", "prompt": "What?", "images": ["media/clip.wav"]}
    found = read_items(
        written(folder, b"\xef\xbb\xbf" + json.dumps(heard).encode(), both, "", GOOD, seen)
    ).items
    assert [item.mode for item in found] == ["speech", "vision_speech", "language", "vision"]
    assert [m.kind for m in found[1].media] == ["image", "audio"]
    assert (found[0].task, found[2].task) == ("asr", "")
    assert [item.id for item in in_order_of_modes(found)] == ["a", "d", "c", "b"]


def test_messages(folder: Path) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "audio", "audio": "media/clip.wav"}, {"type": "text", "text": "?"}],
        },
    ]
    tools = [{"name": "clock"}]
    (item,) = read_items(
        written(folder, {"id": "m", "messages": turns, "reference": "x", "tools": tools})
    ).items
    assert (item.prompt, item.mode, item.tools) == (None, "speech", '[{"name": "clock"}]')
    assert item.messages[1].media[0].source == folder / "media" / "clip.wav"


def test_limit_does_not_look_at_what_follows(folder: Path) -> None:
    path = written(folder, GOOD, b"not JSON")
    assert [item.id for item in read_items(path, limit=1).items] == ["a"]
    with pytest.raises(InputError, match="line 2"):
        read_items(path, limit=2)


def without(*keys: str, **more: Any) -> dict[str, Any]:
    return {k: v for k, v in GOOD.items() if k not in keys} | more


def heard(name: object) -> dict[str, Any]:
    return {**GOOD, "prompt": HEARD, "audio": name}


def said(content: object, role: str = "user") -> dict[str, Any]:
    return without("prompt", messages=[{"role": role, "content": content}])


REFUSED: dict[str, tuple[bytes | str | dict[str, Any], str]] = {
    "not-utf8": (b'{"id": "\xff"}', r"line 1: is not UTF-8 text: byte 0xff"),
    "not-json": ("{'id': 1}", r"line 1: is \"\{'id': 1\}\", expected a JSON object"),
    "nan": ('{"id": "a", "x": NaN}', r"line 1: NaN is not JSON"),
    "many-digits": ('{"x": ' + "9" * 5000 + "}", r"line 1: is .*expected a JSON object"),
    "deep": ("[" * 100_000, r"line 1: is .*expected a JSON object"),
    "list": ("[1]", r"line 1: is a JSON list, expected an object"),
    "no-id": (without("id"), r"line 1: id is missing, expected text"),
    "id-number": ({**GOOD, "id": 7}, r"line 1: id is int, expected text"),
    "id-empty": ({**GOOD, "id": " "}, r"line 1: id is ' '"),
    "id-lines": ({**GOOD, "id": "a\nb"}, r"line 1: id is 'a\\nb'"),
    "id-long": ({**GOOD, "id": "a" * 201}, r"line 1: id is 'aaa"),
    "id-surrogate": ('{"id": "\\ud800", "prompt": "x", "reference": "y"}', r"line 1: id has half"),
    "no-reference": (without("reference"), r"item 'a': reference is missing"),
    "reference-long": ({**GOOD, "reference": "x" * ((1 << 18) + 1)}, r"item 'a': reference has 262145 char"),
    "task-list": ({**GOOD, "task": ["asr"]}, r"item 'a': task is list, expected text"),
    "task-bell": ({**GOOD, "task": "a\x07"}, r"item 'a': task is 'a\\x07'"),
    "no-question": (without("prompt"), r"item 'a': has no prompt and messages, expected one"),
    "two-questions": ({**GOOD, "messages": []}, r"item 'a': has both prompt and messages"),
    "empty-prompt": ({**GOOD, "prompt": " "}, r"item 'a': prompt is empty"),
    "prompt-tools": ({**GOOD, "tools": []}, r"item 'a': has prompt and tools"),
    "no-medium": ({**GOOD, "prompt": HEARD}, r"item 'a': prompt has 1 <\|audio_n\|>, expected 0"),
    "no-place": ({**heard("media/clip.wav"), "images": "media/clip.wav"}, r"has 0 <\|image_n\|>, expected 1"),
    "audio-number": (heard(3), r"item 'a': audio is not a path or a list of paths"),
    "medium-empty": (heard(""), r"medium is '', expected a path inside"),
    "medium-absolute": (heard("/etc/passwd"), r"medium is '/etc/passwd', expected a path inside"),
    "medium-drive": (heard("C:\\x.wav"), r"medium is .*expected a path inside"),
    "medium-up": (heard("media/../../secret.wav"), r"medium is .*expected a path inside"),
    "medium-backslash": (heard("..\\secret.wav"), r"medium is .*expected a path inside"),
    "medium-nul": (heard("a\0.wav"), r"item 'a': .*cannot be opened"),
    "medium-missing": (heard("media/none.wav"), r"item 'a': .*none\.wav: no such file"),
    "medium-folder": (heard("media"), r"item 'a': .*is not a regular file"),
    "medium-link-out": (heard("out.wav"), r"item 'a': .*leads out of the file's folder"),
    "medium-folder-link-out": (heard("up/secret.wav"), r"item 'a': .*leads out of the file's folder"),
    "medium-link-loop": (heard("loop.wav"), r"item 'a': .*cannot be opened"),
    "medium-long": (heard("a" * 5000), r"item 'a': .*cannot be opened"),
    "messages-text": (without("prompt", messages="hi"), r"item 'a': messages is not a list of objects"),
    "messages-none": (without("prompt", messages=[]), r"item 'a': there is no message"),
    "messages-role": (said("hi", "boss"), r"item 'a': message role is 'boss'"),
    "messages-part": (said([{"type": "video"}]), r"item 'a': message part of type 'video'"),
    "messages-bytes": (said([{"type": "image", "image": [1]}]), r"item 'a': image is list"),
    "messages-medium": (said([{"type": "image", "image": "../secret.wav"}]), r"item 'a': medium is"),
    "messages-surrogate": (said("\ud800"), r"item 'a': messages has half a surrogate"),
    "messages-audio": ({**said("hi"), "audio": "media/clip.wav"}, r"item 'a': has messages beside"),
    "messages-tools": ({**said("hi"), "tools": [3]}, r"item 'a': tools: entry 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, folder: Path) -> None:
    line, expected = REFUSED[name]
    path = written(folder, line)
    with pytest.raises(InputError, match=expected) as caught:
        read_items(path)
    assert str(caught.value).startswith(f"{path}: line 1: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_an_id_is_there_once(folder: Path) -> None:
    with pytest.raises(InputError, match=r"line 3: item 'a': has the id of an item before it"):
        read_items(written(folder, GOOD, {**GOOD, "id": "b"}, GOOD))


def test_files_that_are_none(folder: Path) -> None:
    for path, expected in [
        (folder / "none.jsonl", "no such file"),
        (folder, "is not a regular file"),
        (Path("/dev/zero"), "is not a regular file"),
        (written(folder, "", " "), "has no items"),
    ]:
        with pytest.raises(InputError, match=expected):
            read_items(path)


def test_sizes_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(folder, {**GOOD, "x": "x" * 500}, {**GOOD, "id": "b"})
    for name, most, expected in [
        ("LINE_MAX_BYTES", 400, "line 1: is over 400 bytes long"),
        ("FILE_MAX_BYTES", 600, "has over 600 bytes"),
        ("MAX_ITEMS", 1, "line 2: item 'b': is one more than 1 items"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(items_module, name, most)
            with pytest.raises(InputError, match=expected):
                read_items(path)
    assert len(read_items(path).items) == 2
