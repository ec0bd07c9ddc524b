# SPDX-License-Identifier: Apache-2.0
"""Ids and bytes against Hugging Face's tokenizers on the same files, and text that tries to be markup."""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from pocketphi.runtime import tokenizer
from pocketphi.runtime.errors import BundleError, InputError
from pocketphi.runtime.prompt import Control, Piece, Text, parse_raw
from pocketphi.runtime.tokenizer import Tokenizer

from .. import tiny_tokenizers
from ..tiny import GOLDEN, NANO

TEXTS: dict[str, list[str]] = json.loads((GOLDEN / "texts.json").read_text("utf-8"))
ALL_TEXTS = [text for group in TEXTS.values() for text in group]
# Unicode's White_Space; U+001C to U+001F, which Python strips too, and U+200B are not in it.
WHITE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2005\u200a\u2028\u2029\u202f\u205f\u3000"
NOT_WHITE = "\x1c\x1d\x1e\x1f\u200b\ufeff\u180e"
USER: dict[str, str] = {"phi4": "<|im_start|>"}  # else <|user|>
SIZES = {"o200k": 200064, "nano": 4096, "phi4": 420, "phi35": 480}


class Both:
    """A vocabulary as ours and as the reference's."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.path = name, folder / "tokenizer.json"
        if name == "o200k":
            packed = (GOLDEN / "tokenizer-phi-4-mini" / "tokenizer.json.gz").read_bytes()
            self.path.write_bytes(gzip.decompress(packed))
        elif name == "nano":
            self.path.write_bytes((NANO / "tokenizer.json").read_bytes())
        else:
            make = tiny_tokenizers.phi4_tokenizer if name == "phi4" else tiny_tokenizers.phi35_tokenizer
            self.path.write_text(json.dumps(make()), "utf-8")
        self.ours = Tokenizer(self.path, SIZES[name])
        self.reference: Any = tokenizers.Tokenizer.from_file(str(self.path))
        self.user = USER.get(name, "<|user|>")

    def want(self, markup: str) -> list[int]:
        ids: list[int] = self.reference.encode(markup, add_special_tokens=False).ids
        return ids


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Both]:
    return functools.cache(lambda name: Both(name, tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module", params=list(SIZES))
def both(request: pytest.FixtureRequest, made: Callable[[str], Both]) -> Both:
    return made(request.param)


@pytest.fixture(scope="module")
def nano() -> Tokenizer:
    return Tokenizer(NANO / "tokenizer.json", 4096)


def test_texts(both: Both) -> None:
    for text in ALL_TEXTS:
        ids = both.ours.encode_text(text)
        assert ids.dtype == np.int32
        assert ids.tolist() == both.want(text), text
        assert both.ours.decode(ids) == text
        assert both.ours.encode([Text(text)]).tolist() == ids.tolist()


def test_encoding_in_pieces(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut at every place where it may be: the ids of the whole, of texts made to be cut badly."""
    monkeypatch.setattr(tokenizer, "_PIECE_CHARS", 1)
    rng, n_pieces = np.random.default_rng(8), 0
    parts = [
        *" \n\r\t/.'_\u3000\x1c\x85\xa0\u0301", "a", "Ab", "É", "字。", "12345", "'s", "n't", "...", "://",
        "▁", "<0x0A>", "  ", "\n\n", " \n", "\r\n", "\n ", "\U0001f600",
    ]  # fmt: skip
    texts = ["".join(rng.choice(parts, 60)) for _ in range(300)]
    for text in (*ALL_TEXTS, *texts):
        pieces = list(both.ours.encode_pieces(text))
        n_pieces += len(pieces)
        assert [i for ids, _ in pieces for i in ids.tolist()] == both.ours.encode_text(text).tolist(), text
        assert sum(n for _, n in pieces) == len(text)
    assert n_pieces > 3 * len(texts)


def test_a_text_that_cannot_be_cut(nano: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "_PIECE_CHARS", 100)
    monkeypatch.setattr(tokenizer, "_WORD_MAX_CHARS", 1000)
    before = "a b" * 100  # the last space is character 298
    assert sum(n for _, n in nano.encode_pieces(before + "x" * 998)) == 1298
    line = "^the text has no space or line end to cut it at in 1000 characters from character 298 on$"
    with pytest.raises(InputError, match=line):
        list(nano.encode_pieces(before + "x" * 999))
    with pytest.raises(InputError, match="half a surrogate pair"):
        list(nano.encode_pieces("a b" * 100 + "\ud800"))


def test_pieces(both: Both) -> None:
    """However a text is cut into pieces, it is read whole; beside a control token as the reference does."""
    rng = np.random.default_rng(5)
    for text in ALL_TEXTS:
        cut = int(rng.integers(0, len(text) + 1))
        pieces: list[Piece] = [Text(text[:cut]), Text(""), Text(text[cut:]), Control(both.user), Text(text)]
        assert both.ours.encode(pieces).tolist() == both.want(f"{text}{both.user}{text}"), text
    assert both.ours.encode([]).tolist() == [] == both.ours.encode([Text("")]).tolist()


@pytest.mark.parametrize("char", [*WHITE, *NOT_WHITE], ids=lambda c: f"{ord(c):04X}")
def test_white_space_beside_a_control_token(both: Both, char: str) -> None:
    for text in (char, char * 3, f"{char}a{char}", f"a{char}", f" {char}\n"):
        markup = f"{text}{both.user}{text}{both.user}{both.user}{text}"
        pieces = parse_raw(markup, both.ours.control_tokens)
        assert both.ours.encode(pieces).tolist() == both.want(markup)


def test_no_text_becomes_a_control_token(both: Both) -> None:
    added = set(both.ours.control_tokens.values())
    assert len(added) >= 14
    for token in both.ours.control_tokens:
        for text in (token, f"x{token}", f"{token}{token}", f" {token}\n"):
            ids = both.ours.encode_text(text).tolist()
            assert not added & set(ids), text
            assert both.ours.decode(ids) == text


def test_merges_to_a_control_token_are_not_used(tmp_path: Path) -> None:
    """A SentencePiece vocabulary may hold "</" + "s>"; then text could spell the end of the sequence."""
    raw = tiny_tokenizers.phi35_tokenizer()
    vocab, last = raw["model"]["vocab"], raw["model"]["vocab"]
    for piece in ("<", "/", "s", ">", "</", "s>"):
        vocab.setdefault(piece, len(last))
    for i, token in enumerate(raw["added_tokens"][3:]):
        token["id"] = len(vocab) + i
    raw["model"]["merges"] += [["<", "/"], ["s", ">"], ["</", "s>"]]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(raw), "utf-8")
    model = tokenizers.Tokenizer.from_file(str(path)).model
    assert [part.id for part in model.tokenize("</s>")] == [2]  # the trap is set

    ours = Tokenizer(path, 500)

    assert 2 not in ours.encode_text("a</s>b").tolist()
    assert ours.decode(ours.encode_text("a</s>b")) == "a</s>b"
    assert ours.encode([Control("</s>")]).tolist() == [2]


def test_token_bytes_of_every_id(both: Both) -> None:
    ours, unassigned = both.ours, set(both.ours.unassigned_ids.tolist())
    names = {i: token for token, i in ours.control_tokens.items()}
    decoder = both.reference.get_added_tokens_decoder()
    for i in range(SIZES[both.name]):
        raw = ours.token_bytes(i)
        if i in unassigned:
            assert raw == b"" and both.reference.id_to_token(i) is None
        elif i in names:
            assert raw == (b"" if decoder[i].special else names[i].encode())
        else:
            assert raw  # every ordinary token says something
    assert len(unassigned) == SIZES[both.name] - both.reference.get_vocab_size()


def test_decode_of_random_ids(both: Both) -> None:
    """Byte-level vocabularies: equal to the reference, broken UTF-8 included. SentencePiece: whole UTF-8.

    (Hugging Face makes a U+FFFD of each byte of a broken run there; a stream could not.)
    """
    rng = np.random.default_rng(6)
    assigned = np.setdiff1d(np.arange(SIZES[both.name]), both.ours.unassigned_ids)
    compared = 0
    for _ in range(300):
        ids = rng.choice(assigned, int(rng.integers(1, 12))).tolist()
        want = both.reference.decode(ids, skip_special_tokens=True)
        if both.name != "phi35" or "\ufffd" not in want:
            assert both.ours.decode(ids) == want
            compared += 1
    assert compared > 30


def test_the_real_vocabulary(made: Callable[[str], Both]) -> None:
    ours = made("o200k").ours
    # A known prompt of Phi-4-multimodal and its published ids.
    text = "Based on the attached audio, generate a comprehensive text transcription of the spoken content."
    pieces = [Control("<|user|>"), *[Control("<|endoftext11|>")] * 3, Text(text), Control("<|end|>")]
    words = [28326, 402, 290, 18618, 11065, 11, 10419, 261, 16796, 2201, 66912, 328, 290, 36116, 3100, 13]
    assert ours.encode(pieces).tolist() == [200021, 200011, 200011, 200011, *words, 200020]
    assert ours.unassigned_ids.tolist()[:3] == [199998, 200000, 200001]
    assert ours.unassigned_ids.tolist()[-1] == 200063 and len(ours.unassigned_ids) == 52
    assert ours.unassigned_ids.dtype == np.int32
    assert ours.token_id("<|end|>") == 200020
    assert ours.token_bytes(200025) == b"<|tool_call|>" and ours.token_bytes(200020) == b""


def test_a_megabyte_of_text(made: Callable[[str], Both]) -> None:
    for name in ("o200k", "phi35"):
        for text in ("a" * 1_000_000, "Hello, world! " * 70_000):
            assert made(name).ours.decode(made(name).ours.encode_text(text)) == text


def test_text_that_is_not_unicode(nano: Tokenizer) -> None:
    for text in ("ab\ud800c", "\udfff", "\ud83d"):
        with pytest.raises(InputError, match=r"half a surrogate pair") as caught:
            nano.encode([Control("<|user|>"), Text(text)])
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"U\+D800 at character 2"):
        nano.encode_text("ab\ud800c")
    assert nano.decode(nano.encode_text("a\0b")) == "a\0b"


def test_unknown_tokens_and_ids(nano: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"no control token '<\|im_start\|>'"):
        nano.encode([Control("<|im_start|>")])
    for bad in (-1, 4096):
        with pytest.raises(InputError, match="token id"):
            nano.token_bytes(bad)
    with pytest.raises(TypeError):
        nano.control_tokens["x"] = 1  # type: ignore[index]


def damaged() -> dict[str, Callable[[dict[str, Any]], object]]:
    def change(*path: str | int, to: object) -> Callable[[dict[str, Any]], object]:
        def act(raw: Any) -> None:
            for key in path[:-1]:
                raw = raw[key]
            raw[path[-1]] = to

        return act

    return {
        "no model": lambda raw: raw.pop("model"),
        "model of another kind": change(
            "model", to={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
        ),
        "empty vocab": lambda raw: raw["model"].update(vocab={}, merges=[]),
        "merge of nothing": change("model", "merges", 0, to=["zzz", "qqq"]),
        "id over vocab_size": change("model", "vocab", "!", to=4096),
        "id negative": change("model", "vocab", "!", to=-1),
        "id twice": change("model", "vocab", "!", to=1),
        "a prefix that makes the reader panic": change("model", "continuing_subword_prefix", to="abc"),
        "a byte without a token": lambda raw: raw["model"]["vocab"].pop("Ā"),
        "a character for no byte": lambda raw: raw["model"]["vocab"].update({"漢": 3000}),
        "dropout": change("model", "dropout", to=0.5),
        "normalizer": change("normalizer", to={"type": "NFC"}),
        "no pre-tokenizer": change("pre_tokenizer", to=None),
        "another regex": change("pre_tokenizer", "pretokenizers", 0, "pattern", to={"Regex": r"(\s+)+$"}),
        "a regex that is none": change("pre_tokenizer", "pretokenizers", 0, "pattern", to={"Regex": "("}),
        "another behavior": change("pre_tokenizer", "pretokenizers", 0, "behavior", to="MergedWithNext"),
        "prefix space": change("pre_tokenizer", "pretokenizers", 1, "add_prefix_space", to=True),
        "added token without content": change("added_tokens", 0, to={"id": 2848}),
    }


@pytest.mark.parametrize("name", damaged())
def test_damaged_files(name: str, tmp_path: Path) -> None:
    raw = json.loads((NANO / "tokenizer.json").read_text("utf-8"))
    damaged()[name](raw)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(raw), "utf-8")
    with pytest.raises(BundleError, match=r"tokenizer\.json: [^\n]+\Z"):
        Tokenizer(path, 4096)


@pytest.mark.parametrize("raw", [b"", b"\xff\xfe", b"[]", b"{}", b"null", b"[" * 100_000, b'{"model":'])
def test_not_a_vocabulary(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(raw)
    with pytest.raises(BundleError, match=r"tokenizer\.json: cannot be read as a vocabulary: [^\n]*\Z"):
        Tokenizer(path, 4096)


def test_missing_and_endless_files(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no\.json"):
        Tokenizer(tmp_path / "no.json", 4096)
    with pytest.raises(BundleError):
        Tokenizer(tmp_path, 4096)
    with (tmp_path / "endless.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BundleError, match="too large"):
        Tokenizer(tmp_path / "endless.json", 4096)


def test_a_vocabulary_larger_than_the_model() -> None:
    with pytest.raises(BundleError, match="expected them below 2861"):
        Tokenizer(NANO / "tokenizer.json", 2861)
    assert Tokenizer(NANO / "tokenizer.json", 2862).unassigned_ids.size == 0
