# SPDX-License-Identifier: Apache-2.0
"""Streams against decoding the whole: whatever the tokens, the same text and whole characters only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pocketphi.runtime.errors import InputError
from pocketphi.runtime.parts import TextEvent
from pocketphi.runtime.stream import TextStream, held_back
from pocketphi.runtime.tokenizer import Tokenizer

from .. import tiny_tokenizers
from ..tiny import GOLDEN, NANO

TEXTS = [t for g in json.loads((GOLDEN / "texts.json").read_text("utf-8")).values() for t in g]


@pytest.fixture(scope="module", params=["nano", "phi35"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "nano":
        return Tokenizer(NANO / "tokenizer.json", 4096)
    path: Path = tmp_path_factory.mktemp("stream") / "tokenizer.json"
    path.write_text(json.dumps(tiny_tokenizers.phi35_tokenizer()), "utf-8")
    return Tokenizer(path, 480)


@pytest.fixture(scope="module")
def nano() -> Tokenizer:
    return Tokenizer(NANO / "tokenizer.json", 4096)


def byte_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token for each byte: the finest cut there is."""
    of = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    raw = (" " if tokenizer.strips_first_space else "") + text
    return [of[bytes((byte,))] for byte in raw.encode()]


def run(
    tokenizer: Tokenizer, ids: Sequence[int], *, stop: Sequence[str] = (), reasoning: bool = False
) -> tuple[TextStream, list[TextEvent]]:
    stream = TextStream(tokenizer, stop=stop, reasoning=reasoning)
    events = [event for i in ids for event in stream.push(i)] + stream.finish()
    assert all(event.text for event in events)
    assert stream.text == "".join(e.text for e in events if e.kind == "answer")
    assert stream.reasoning == "".join(e.text for e in events if e.kind == "reasoning")
    return stream, events


def cuts(tokenizer: Tokenizer, text: str) -> list[list[int]]:
    """The text as one token for each byte, and as the tokenizer cuts it."""
    return [byte_ids(tokenizer, text), tokenizer.encode_text(text).tolist()]


def test_texts_byte_by_byte_and_token_by_token(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        for ids in cuts(tokenizer, text):
            stream, events = run(tokenizer, ids)
            assert stream.text == text == tokenizer.decode(ids)
            assert not stream.stopped
            assert "\ufffd" not in "".join(event.text for event in events)


def test_each_character_comes_with_its_last_byte(nano: Tokenizer) -> None:
    for text in TEXTS:
        stream = TextStream(nano)
        raw = b""
        for i in byte_ids(nano, text):
            raw += nano.token_bytes(i)
            stream.push(i)
            assert stream.text == raw.decode("utf-8", "ignore")  # drops the unfinished end only
        assert stream.finish() == []


def test_random_ids(tokenizer: Tokenizer) -> None:
    """Broken UTF-8, special tokens and ids without a token: as decoding them all at once."""
    rng = np.random.default_rng(7)
    broken = 0
    for _ in range(500):
        ids = rng.integers(0, tokenizer.vocab_size, int(rng.integers(1, 15))).tolist()
        stream, _ = run(tokenizer, ids)
        assert stream.text == tokenizer.decode(ids)
        broken += "\ufffd" in stream.text
    assert broken > 20


def test_an_unfinished_character_is_given_at_the_end(nano: Tokenizer) -> None:
    ids = byte_ids(nano, "a🙂")[:-1]
    stream = TextStream(nano)
    assert [e for i in ids for e in stream.push(i)] == [TextEvent("a")]
    assert stream.finish() == [TextEvent("\ufffd")]


@pytest.mark.parametrize(
    "stop", [["STOP"], ["TO", "STOP"], ["OP", "STO"], ["\n\n", "P\n"], ["é🙂"], ["never"]]
)
def test_stop_strings_wherever_the_tokens_are_cut(tokenizer: Tokenizer, stop: list[str]) -> None:
    """The stop string that is complete first ends the answer, found here by growing the text."""
    texts = [
        "abcSTOPdef",
        "SSTOPSTOP",
        "STSTOSTOP",
        "ST",
        "xSTO",
        "a\n\nb",
        "SSTOP\n",
        "aé🙂STOP",
        "",
        "x" * 50,
    ]
    for text in texts:
        ends = [n for n in range(len(text) + 1) if any(text[:n].endswith(s) for s in stop)]
        want = text
        if ends:
            longest = max((s for s in stop if text[: ends[0]].endswith(s)), key=len)
            want = text[: ends[0] - len(longest)]
        for ids in cuts(tokenizer, text):
            stream, _ = run(tokenizer, ids, stop=stop)
            assert (stream.text, stream.stopped) == (want, bool(ends)), text


def test_random_stop_strings(nano: Tokenizer) -> None:
    """Over two letters, so that starts of stop strings are everywhere."""
    rng = np.random.default_rng(8)
    met = 0
    for _ in range(300):
        text = "".join(rng.choice(["a", "b"], 30))
        stop = ["".join(rng.choice(["a", "b"], int(rng.integers(2, 7)))) for _ in range(2)]
        ends = [n for n in range(31) if any(text[:n].endswith(s) for s in stop)]
        want = text
        if ends:
            want = text[: ends[0] - max(len(s) for s in stop if text[: ends[0]].endswith(s))]
        for ids in cuts(nano, text):
            assert run(nano, ids, stop=stop)[0].text == want
        met += bool(ends)
    assert 50 < met < 300


def test_nothing_is_given_that_may_be_a_stop_string(nano: Tokenizer) -> None:
    stream = TextStream(nano, stop=["</end>"])
    a, b = byte_ids(nano, "a</en"), byte_ids(nano, "x")
    assert [e.text for i in a for e in stream.push(i)] == ["a"]
    assert [e.text for i in b for e in stream.push(i)] == ["</enx"]
    for i in byte_ids(nano, "</end>"):
        assert stream.push(i) == []
    assert stream.stopped and stream.text == "a</enx"
    assert stream.push(b[0]) == [] == stream.finish()  # nothing after the stop


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("<think>why</think>because", "why", "because"),
        ("\n<think>\nwhy\n</think>\n\nbecause\n", "\nwhy\n", "because\n"),
        ("<think></think>x", "", "x"),
        ("<think>a < b </thin> c</think> <think>x</think>", "a < b </thin> c", "<think>x</think>"),
        ("<think>cut sho", "cut sho", ""),
        ("<think>cut</thi", "cut</thi", ""),
        ("<think>done</think>  \n", "done", ""),
        ("<thin> air", "", "<thin> air"),
        ("  no tags", "", "  no tags"),
        ("a<think>b</think>", "", "a<think>b</think>"),
        ("<thi", "", "<thi"),
        ("  ", "", "  "),
        ("", "", ""),
        ("<think>ü🙂</think>é🙂", "ü🙂", "é🙂"),
    ],
)
def test_reasoning(tokenizer: Tokenizer, text: str, reasoning: str, answer: str) -> None:
    for ids in cuts(tokenizer, text):
        stream, _ = run(tokenizer, ids, reasoning=True)
        assert (stream.reasoning, stream.text) == (reasoning, answer)
        assert run(tokenizer, ids)[0].text == text  # not asked for: plain text


def test_stop_strings_end_the_answer_and_not_the_reasoning(tokenizer: Tokenizer) -> None:
    for ids in cuts(tokenizer, "<think>a\n\nb</think>c\n\nd"):
        stream, _ = run(tokenizer, ids, stop=["\n\n"], reasoning=True)
        assert (stream.reasoning, stream.text, stream.stopped) == ("a\n\nb", "c", True)


def test_an_empty_stop_string(nano: Tokenizer) -> None:
    with pytest.raises(InputError, match="stop string is empty"):
        TextStream(nano, stop=["a", ""])


@pytest.mark.parametrize(
    ("text", "stop", "want"),
    [("xab", ["abc"], 2), ("xab", ["abc", "b!"], 2), ("abc", ["abc"], 0), ("", ["a"], 0), ("aa", ["aaa"], 2)],
)
def test_held_back(text: str, stop: list[str], want: int) -> None:
    assert held_back(text, stop) == want
