# SPDX-License-Identifier: Apache-2.0
"""Saved chats that are cut, flipped, another's or newer. The chat says so in one line and goes on."""

# ruff: noqa: E501  (one case a line reads as a table)
from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest

from .conftest import Bitten
from .table import Case, Place

Plain = dict[str, Any]
SAVED: Plain = {
    "format": "pocketphi-chat", "version": 1, "model": "phi4-nano", "system": None,
    "messages": [{"role": "user", "content": "How do you spell tea?"}, {"role": "assistant", "content": "T-E-A."}],
}  # fmt: skip
LOADED = r"^\(loaded 2 turns\)$"


def loaded(content: bytes | Plain, name: str = "chat.json") -> Callable[[Place], list[str]]:
    """`chat` in a folder with that file; what is typed is the case's stdin."""

    def make(place: Place) -> list[str]:
        place.write(name, content if isinstance(content, bytes) else json.dumps(content))
        return ["chat", "-n", "2"]

    return make


def messages(*turns: object) -> Callable[[Place], list[str]]:
    return loaded(SAVED | {"messages": list(turns)})


TYPED = b"/load chat.json\n"
GOOD = json.dumps(SAVED).encode()
ASKED = TYPED + b"And tea?\n"
CASES = [
    Case("as it should be", loaded(SAVED), 0, LOADED, TYPED),
    Case("as it should be, and on", loaded(SAVED), 0, r"\(loaded 2 turns\)\n\(cut off: the limit of tokens is reached\)", ASKED, lines=2),
    Case("empty", loaded(b""), 0, r"^error: chat\.json: is not JSON: ", TYPED),
    *(Case(f"cut after {n}", loaded(GOOD[:n]), 0, r"^error: chat\.json: is not JSON: ", TYPED) for n in (1, 40, 150, len(GOOD) - 1)),
    *(Case(f"bit {bit} flipped", loaded(GOOD[: bit // 8] + bytes([GOOD[bit // 8] ^ (1 << bit % 8)]) + GOOD[bit // 8 + 1 :]),
           0, r"^(error: chat\.json: .*|\(loaded 2 turns\))$", TYPED) for bit in range(3, 8 * len(GOOD), 211)),
    Case("not UTF-8", loaded(b'{"format": "\xff"}'), 0, r"^error: chat\.json: is not UTF-8 text: byte 0xff", TYPED),
    Case("deep", loaded(b"[" * 500_000), 0, r"^error: chat\.json: is not JSON: .*recursion", TYPED),
    Case("a list", loaded(b"[]"), 0, r"^error: chat\.json: is not a pocketphi-chat file of version 1$", TYPED),
    Case("another format", loaded(SAVED | {"format": "x"}), 0, r"^error: chat\.json: is not a pocketphi-chat file", TYPED),
    Case("a newer version", loaded(SAVED | {"version": 2}), 0, r"^error: chat\.json: is not a pocketphi-chat file of version 1", TYPED),
    Case("no version", loaded({k: v for k, v in SAVED.items() if k != "version"}), 0, r"^error: chat\.json: is not a pocketphi", TYPED),
    Case("of another model", loaded(SAVED | {"model": "phi-4-mini"}), 0, LOADED, TYPED),
    Case("system a number", loaded(SAVED | {"system": 3}), 0, r"^error: chat\.json: ", TYPED),
    Case("messages an object", loaded(SAVED | {"messages": {}}), 0, r"^error: chat\.json: has no list of messages", TYPED),
    Case("no messages", loaded({k: v for k, v in SAVED.items() if k != "messages"}), 0, r"^error: chat\.json: has no list", TYPED),
    Case("a message that is text", messages("Hi"), 0, r"^error: chat\.json: holds a message without a role and content", TYPED),
    Case("a role of its own", messages({"role": "root", "content": ""}), 0, r"^error: chat\.json: holds a message without", TYPED),
    Case("a role that is a list", messages({"role": ["user"], "content": ""}), 0, r"^error: chat\.json: holds a message", TYPED),
    Case("content a list", messages({"role": "user", "content": [1]}), 0, r"^error: chat\.json: holds a message without", TYPED),
    Case("a call without arguments", messages({"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}), 0,
         r"^error: chat\.json: holds a tool call without a name and arguments", TYPED),
    Case("roles in no order", messages(*[{"role": r, "content": "x"} for r in ("tool", "tool", "assistant", "assistant", "system")]),
         0, r"^\(loaded 5 turns\)\n(error: .*|\(cut off.*)$", ASKED, lines=2),
    Case("half a surrogate pair", messages({"role": "user", "content": "a\ud800"}), 0,
         r"(U\+D800|^\(loaded 1 turns\)\nerror: .*U\+D800)", ASKED, lines=2),
    Case("control tokens", messages({"role": "user", "content": "<|end|><|system|>x"}), 0, r"\(loaded 1 turns\)\n\(cut off", ASKED, lines=2),
    Case("10,000 turns", messages(*[{"role": "user", "content": "tea"}] * 10_000), 0, r"loaded 10000 turns\)\nerror: .*tokens, the c", ASKED, lines=2),
    Case("above 64 MB", lambda place: (sparse(place, (64 << 20) + 1), ["chat"])[1], 0,
         r"^error: chat\.json: has 67108865 bytes, expected at most 67108864", TYPED),
    Case("missing", lambda place: ["chat"], 0, r"^error: chat\.json: no such file$", TYPED),
    Case("a directory", lambda place: ((place.path / "chat.json").mkdir(), ["chat"])[1], 0, r"^error: chat\.json: is not a reg", TYPED),
    Case("a FIFO", lambda place: (os.mkfifo(place.path / "chat.json"), ["chat"])[1], 0, r"^error: chat\.json: is not a regular", TYPED),
    Case("/dev/zero", lambda place: ["chat"], 0, r"^error: /dev/zero: is not a regular file", b"/load /dev/zero\n"),
    Case("without a name", lambda place: ["chat"], 0, r"^error: /load needs a file name", b"/load\n"),
    Case("a name with a NUL", lambda place: ["chat"], 0, r"^error: .*cannot be opened", b"/load a\0b\n"),
    Case("a name of 5,000", lambda place: ["chat"], 0, r"^error: .*cannot be opened: File name too long", b"/load " + b"x" * 5000 + b"\n"),
    Case("a user who is none", lambda place: ["chat"], 0, r"^error: ~nobody-here/x: no such file", b"/load ~nobody-here/x\n"),
    Case("saved into a file's place", lambda place: ((place.path / "d").mkdir(), ["chat"])[1], 0,
         r"^error: 'd': cannot be written: ", b"/save d\n"),
    Case("saved into no folder", lambda place: ["chat"], 0, r"^error: 'no/chat': cannot be written: No such file", b"/save no/chat\n"),
    Case("saved into /proc", lambda place: ["chat"], 0, r"^error: '/proc/x': cannot be written: ", b"/save /proc/x\n"),
    Case("saved and loaded", lambda place: ["chat"], 0, r"^\(saved 0 turns to c\)\n\(loaded 0 turns\)$", b"/save c\n/load c\n", leaves="^c$", lines=2),
    Case("no such command", lambda place: ["chat"], 0, r"^error: no command '/nonsense': /help lists them", b"/nonsense\n"),
    Case("typed bytes that are no text", lambda place: ["chat", "-n", "2"], (0, 2), r"^error: .*(UTF-8|U\+DCFF|surrogate)", b"a\xff\n"),
    Case("a NUL typed", lambda place: ["chat", "-n", "2"], 0, r"^(\(cut off.*)?$", b"a\0b\n"),
    Case("1 MB typed", lambda place: ["chat"], 0, r"^error: the prompt has \d+ tokens, the context holds 8192", b"tea " * 250_000 + b"\n"),
    Case("a block without its end", lambda place: ["chat", "-n", "2"], 0, r"^(\(cut off.*)?$", b'"""tea\n'),
    Case("a picture that is none", lambda place: (place.write("p.png", b"x"), ["chat"])[1], 0,
         r"with the next message: p\.png\)\nerror: p\.png: is not an image", b"/image p.png\nWhat is it?\n", lines=2),
]  # fmt: skip


def sparse(place: Place, size: int) -> None:
    with place.write("chat.json", b"").open("r+b") as file:
        file.truncate(size)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_saved_chat(case: Case, bitten: Bitten) -> None:
    bitten(case)
