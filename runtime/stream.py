# SPDX-License-Identifier: Apache-2.0
"""Generated ids as text while they come: whole characters, stop strings held back, reasoning told apart.

ids ─▶ bytes ─▶ whole UTF-8 ─▶ <think> … </think> | answer ─▶ stop strings ─▶ events
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Literal

from .errors import InputError
from .parts import TextEvent
from .tokenizer import Tokenizer

_OPEN, _CLOSE = "<think>", "</think>"


class TextStream:
    """One answer's token ids as text events.

    Args:
        tokenizer: the model's vocabulary.
        stop: strings that end the answer; they and what follows are not given out. They are looked for in
            the answer only: a blank line as stop must not end the reasoning before there is an answer.
        reasoning: tell a `<think>` block that opens the output apart from the answer. The tags, and the
            white space before and after the block, belong to neither. A later `<think>` is text.

    Raises:
        InputError: an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, *, stop: Sequence[str] = (), reasoning: bool = False) -> None:
        if any(not one for one in stop):
            raise InputError("a stop string is empty, expected at least one character")
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = tokenizer.strips_first_space
        self._part: Literal["before", "reasoning", "gap", "answer"] = "before" if reasoning else "answer"
        self._held = ""  # text whose meaning the next characters decide
        self._given: dict[str, list[str]] = {"answer": [], "reasoning": []}
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met; later ids are ignored."""
        return self._stopped

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self._given["answer"])

    @property
    def reasoning(self) -> str:
        """What stood inside `<think>…</think>` so far."""
        return "".join(self._given["reasoning"])

    def push(self, token_id: int) -> list[TextEvent]:
        """Take one id; gives the text that it makes certain, often none."""
        raw = self._tokenizer.token_bytes(token_id)
        if self._at_start and raw:
            raw = raw.removeprefix(b" ")
            self._at_start = False
        return self._take(self._decoder.decode(raw), last=False)

    def finish(self) -> list[TextEvent]:
        """The rest: what was held back, and U+FFFD for a character that was never completed."""
        return self._take(self._decoder.decode(b"", final=True), last=True)

    def _take(self, text: str, *, last: bool) -> list[TextEvent]:
        if self._stopped:
            return []
        self._held += text
        events: list[TextEvent] = []
        if self._part == "before":
            self._open_reasoning(last)
        if self._part == "reasoning":
            self._read_reasoning(events, last)
        if self._part == "gap":
            self._held = self._held.lstrip()
            if self._held:
                self._part = "answer"
        if self._part == "answer":
            self._read_answer(events, last)
        return events

    def _open_reasoning(self, last: bool) -> None:
        start = self._held.lstrip()
        if start.startswith(_OPEN):
            self._part, self._held = "reasoning", start.removeprefix(_OPEN)
        elif last or not _OPEN.startswith(start):
            self._part = "answer"

    def _read_reasoning(self, events: list[TextEvent], last: bool) -> None:
        inside, tag, after = self._held.partition(_CLOSE)
        if tag:
            self._part, self._held = "gap", after
        else:
            keep = 0 if last else held_back(inside, (_CLOSE,))
            self._held = inside[len(inside) - keep :]
            inside = inside[: len(inside) - keep]
        self._give("reasoning", inside, events)

    def _read_answer(self, events: list[TextEvent], last: bool) -> None:
        # The stop string that is complete first wins, so that how the text was cut into tokens is no matter.
        ends = [(at + len(one), at) for one in self._stop if (at := self._held.find(one)) >= 0]
        if ends:
            self._stopped = True
            cut = min(ends)[1]
        else:
            cut = len(self._held) - (0 if last else held_back(self._held, self._stop))
        self._give("answer", self._held[:cut], events)
        self._held = self._held[cut:]

    def _give(self, kind: Literal["answer", "reasoning"], text: str, events: list[TextEvent]) -> None:
        if text:
            self._given[kind].append(text)
            events.append(TextEvent(text, kind))


def held_back(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the start of one of the `stop` strings."""
    longest = 0
    for one in stop:
        for n in range(min(len(one) - 1, len(text)), longest, -1):
            if text.endswith(one[:n]):
                longest = n
                break
    return longest
