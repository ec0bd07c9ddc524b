# SPDX-License-Identifier: Apache-2.0
"""Vocabularies against llama.cpp itself: it must load what is written and give Hugging Face's ids."""

from __future__ import annotations

import copy
import ctypes
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import pytest
import tokenizers

from pocketphi.convert.vocabulary import Vocabulary, add_to_gguf, read_vocabulary, stop_ids
from pocketphi.runtime.errors import CheckpointError

from .. import tiny_tokenizers
from ..tiny import GOLDEN, NANO

TEXTS: dict[str, list[str]] = json.loads((GOLDEN / "texts.json").read_text("utf-8"))
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
ENDOFTEXT = {f"{kind}_token": "<|endoftext|>" for kind in ("bos", "eos", "unk", "pad")}
PHI35 = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>", "pad_token": "<|endoftext|>"}
# llama.cpp's regex for gpt-4o lacks \p{M}: a combining mark ends a word there, so that a vocabulary that has
# learnt words across marks comes out otherwise. These are all the texts that show it.
MARKS_DIFFER = {
    "हिन्दी में लिखा हुआ वाक्य।",
    "नमस्ते दुनिया, आप कैसे हैं?",
    "भारत की राजधानी नई दिल्ली है।",
    "สวัสดีชาวโลก",
    "วันนี้อากาศดีมาก ไปเดินเล่นกันเถอะ",
    "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย",
    "العَرَبِيَّةُ بِالتَّشْكِيلِ",
    "বাংলা ভাষা",
    "தமிழ் மொழி",
}


def source(name: str) -> tuple[bytes, int, dict[str, str]]:
    """tokenizer.json, rows of the embedding and tokenizer_config.json of a test vocabulary."""
    if name == "o200k":
        packed = (GOLDEN / "tokenizer-phi-4-mini" / "tokenizer.json.gz").read_bytes()
        return gzip.decompress(packed), 200064, ENDOFTEXT
    if name == "nano":
        return (NANO / "tokenizer.json").read_bytes(), 4096, ENDOFTEXT
    if name == "phi4":
        raw = tiny_tokenizers.phi4_tokenizer()
        return json.dumps(raw).encode(), 420, ENDOFTEXT
    raw = tiny_tokenizers.phi35_tokenizer()
    if name == "phi35-spaces":
        add_runs_of_spaces(raw)
    return json.dumps(raw).encode(), 480, PHI35


def add_runs_of_spaces(raw: dict[str, Any]) -> None:
    """Runs of 2 to 6 spaces, as Phi-3.5 has them to 16: one score in the SentencePiece model, so that
    the conversion to merges sorted them by the length of their parts."""
    vocab, runs = raw["model"]["vocab"], range(2, 7)
    for n in runs:
        vocab["▁" * n] = len(vocab)
    for token in raw["added_tokens"][3:]:
        token["id"] += len(runs)
    parts = [(a, n - a) for n in runs for a in range(1, n)]
    raw["model"]["merges"] += [["▁" * a, "▁" * b] for a, b in sorted(parts, reverse=True)]


def read(raw: bytes | dict[str, Any], vocab_size: int, tokenizer_config: dict[str, Any]) -> Vocabulary:
    return read_vocabulary(
        raw if isinstance(raw, bytes) else json.dumps(raw).encode(),
        vocab_size,
        tokenizer_config=tokenizer_config,
        config={},
        generation_config={},
        chat_template=None,
        where="x/tokenizer.json",
    )


class Stock:
    """A vocabulary inside unmodified llama.cpp, and the same in Hugging Face tokenizers."""

    def __init__(self, name: str, folder: Path) -> None:
        raw, vocab_size, tokenizer_config = source(name)
        self.name = name
        self.vocabulary = read(raw, vocab_size, tokenizer_config)
        self.reference: Any = tokenizers.Tokenizer.from_str(raw.decode())
        path = folder / f"{name}.gguf"
        writer = gguf.GGUFWriter(path, "phi3")
        writer.add_name("a vocabulary")
        add_to_gguf(writer, self.vocabulary)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert self.model, "llama.cpp refused the file"
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)

    def ids(self, text: str, *, parse_special: bool) -> list[int]:
        raw = text.encode()
        room = len(raw) + 16  # an id for each byte, and the space in front
        out = (ctypes.c_int32 * room)()
        n = llama_cpp.llama_tokenize(self.vocab, raw, len(raw), out, room, False, parse_special)
        assert n >= 0
        return list(out[:n])

    def want(self, text: str) -> list[int]:
        ids: list[int] = self.reference.encode(text, add_special_tokens=False).ids
        return ids


@llama_cpp.llama_log_callback
def silent(level: int, text: bytes, user_data: object) -> None:
    """llama.cpp's messages are not what these tests are about."""


@pytest.fixture(scope="module", params=["o200k", "nano", "phi4", "phi35", "phi35-spaces"])
def stock(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stock]:
    llama_cpp.llama_log_set(silent, None)
    made = Stock(request.param, tmp_path_factory.mktemp("vocabulary"))
    yield made
    llama_cpp.llama_model_free(made.model)


@pytest.mark.parametrize("group", TEXTS)
def test_llama_cpp_gives_the_same_ids(stock: Stock, group: str) -> None:
    known = MARKS_DIFFER if stock.name == "o200k" else set()
    for text in TEXTS[group]:
        if text in known:
            continue
        assert stock.ids(text, parse_special=False) == stock.want(text), text
        assert stock.ids(text, parse_special=True) == stock.want(text), text


def test_control_tokens_between_texts(stock: Stock) -> None:
    opening, end = ("<|im_start|>", "<|im_end|>") if stock.name == "phi4" else ("<|user|>", "<|end|>")
    for text in (t for group in TEXTS.values() for t in group):
        if text in MARKS_DIFFER or text != text.strip():  # white space beside a token: the test below
            continue
        prompt = f"{opening}{text}{end}{opening}"
        assert stock.ids(prompt, parse_special=True) == stock.want(prompt), text


def test_known_limits_of_llama_cpp(stock: Stock) -> None:
    """Where stock llama.cpp reads a text otherwise. The runtime does not use its tokenizer."""
    if stock.name == "o200k":
        for text in MARKS_DIFFER:
            ids = stock.ids(text, parse_special=True)
            assert ids != stock.want(text)
            assert stock.reference.decode(ids) == text  # another split of the same bytes
    if stock.name in ("o200k", "nano"):
        prompt = "<|user|>\nHi<|end|>"  # rstrip is not in a GGUF file
        user, end = (stock.vocabulary.added[token] for token in ("<|user|>", "<|end|>"))
        assert stock.want(prompt) == [user, *stock.want("Hi"), end]
        assert stock.ids(prompt, parse_special=True) == [user, *stock.want("\nHi"), end]
        # Tokens that are not `special` are markup for llama.cpp even where none is wanted.
        assert stock.ids("<|tool|>", parse_special=False) == [stock.vocabulary.added["<|tool|>"]]


def test_llama_cpp_ends_an_answer_where_we_do(stock: Stock) -> None:
    vocabulary = stock.vocabulary
    ends = {"<|end|>", "<|im_end|>", "<|endoftext|>"} & vocabulary.added.keys()
    for token in ends:
        assert llama_cpp.llama_vocab_is_eog(stock.vocab, vocabulary.added[token])
    found = stop_ids(
        vocabulary.added,
        len(vocabulary.tokens),
        config={"eos_token_id": vocabulary.eos},
        generation_config={},
        where="x",
    )
    assert set(found) == {vocabulary.added[token] for token in ends}


def test_the_real_vocabulary() -> None:
    vocabulary = read(*source("o200k"))
    assert (vocabulary.model, vocabulary.pre) == ("gpt2", "gpt-4o")
    assert len(vocabulary.tokens) == len(vocabulary.types) == 200064
    assert vocabulary.merges is not None and len(vocabulary.merges) == 446189
    assert vocabulary.tokens[199998] == "[PAD199998]" and vocabulary.types[199998] == UNUSED
    assert vocabulary.types.count(UNUSED) == 52
    assert vocabulary.types.count(CONTROL) == 9 and vocabulary.types.count(USER_DEFINED) == 5
    assert vocabulary.tokens[200020] == "<|end|>" and vocabulary.added["<|tool_call|>"] == 200025
    assert [vocabulary.bos, vocabulary.eos, vocabulary.unk, vocabulary.pad] == [199999] * 4
    assert not vocabulary.add_bos


def test_a_sentencepiece_vocabulary() -> None:
    vocabulary = read(*source("phi35"))
    assert (vocabulary.model, vocabulary.pre, vocabulary.merges) == ("llama", "default", None)
    assert vocabulary.types[0] == UNKNOWN and vocabulary.types[1] == CONTROL
    assert vocabulary.types[3:259] == [BYTE] * 256 and vocabulary.tokens[3 + 10] == "<0x0A>"
    assert vocabulary.tokens[2] == "</s>" and vocabulary.types[2] == CONTROL
    assert (vocabulary.bos, vocabulary.unk, vocabulary.eos) == (1, 0, 448)
    assert vocabulary.scores is not None and max(vocabulary.scores) == 0.0
    assert read(*source("phi4")).pre == "dbrx"


def test_merges_in_either_form_are_the_same() -> None:
    raw, size, names = source("nano")
    pairs = json.loads(raw)
    pairs["model"]["merges"] = [" ".join(pair) for pair in pairs["model"]["merges"]]
    assert read(pairs, size, names) == read(raw, size, names)


def test_special_ids_by_number() -> None:
    raw, size, _ = source("nano")
    vocabulary = read_vocabulary(
        raw,
        size,
        tokenizer_config={"eos_token": {"content": "<|end|>"}, "add_bos_token": True},
        config={"bos_token_id": 2848, "eos_token_id": 5},
        generation_config={"pad_token_id": [7, 8]},
        chat_template="t",
        where="x",
    )
    assert (vocabulary.bos, vocabulary.eos, vocabulary.pad, vocabulary.unk) == (2848, 2853, 7, None)
    assert vocabulary.add_bos and vocabulary.chat_template == "t"


def test_added_ids_are_those_that_tokenizers_counts_to() -> None:
    """Hugging Face's reader ignores an added token's id in the file and counts on; so a gap is refused."""
    raw, size, names = source("nano")
    moved = json.loads(raw)
    moved["added_tokens"][-1]["id"] += 1
    counted = tokenizers.Tokenizer.from_str(json.dumps(moved)).token_to_id("<|tag|>")
    assert counted == 2861
    with pytest.raises(CheckpointError, match=r"'<\|tag\|>' has id 2862, its reader takes 2861"):
        read(moved, size, names)


def damaged() -> dict[str, Callable[[dict[str, Any]], object]]:
    def set_(*path: str | int) -> Callable[[object], Callable[[dict[str, Any]], object]]:
        def with_(value: object) -> Callable[[dict[str, Any]], object]:
            def act(raw: Any) -> None:
                for key in path[:-1]:
                    raw = raw[key]
                raw[path[-1]] = value

            return act

        return with_

    return {
        "no model": lambda raw: raw.pop("model"),
        "wordpiece": set_("model", "type")("WordPiece"),
        "vocab a list": set_("model", "vocab")(["a"]),
        "no vocab": set_("model", "vocab")({}),
        "id too large": set_("model", "vocab", "!")(4096),
        "id negative": set_("model", "vocab", "!")(-1),
        "id a float": set_("model", "vocab", "!")(1.0),
        "id true": set_("model", "vocab", "!")(True),
        "id twice": set_("model", "vocab", "!")(1),
        "empty token": set_("model", "vocab", "")(3000),
        "NUL in a token": set_("model", "vocab", "a\0b")(3000),
        "surrogate in a token": set_("model", "vocab", "\ud800")(3000),
        "endless token": set_("model", "vocab", "x" * 600)(3000),
        "named like a gap": set_("model", "vocab", "[PAD3001]")(3000),
        "too many tokens": lambda raw: raw["model"]["vocab"].update({f"x{i}": i for i in range(4097)}),
        "merges missing": set_("model", "merges")(None),
        "merge of three": set_("model", "merges", 0)(["a", "b", "c"]),
        "merge of numbers": set_("model", "merges", 0)([1, 2]),
        "merge of nothing": set_("model", "merges", 0)(["zzz", "qqq"]),
        "merge twice": set_("model", "merges", 1)(["h", "e"]),
        "merge a string of one": set_("model", "merges", 0)("he"),
        "byte without a token": lambda raw: raw["model"]["vocab"].pop("Ā"),
        "prefix": set_("model", "continuing_subword_prefix")("abc"),
        "a field that the reader misses": lambda raw: raw["added_tokens"][0].pop("rstrip"),
        "decoder": set_("decoder")({"type": "?"}),
        "dropout": set_("model", "dropout")(0.1),
        "ignore_merges": set_("model", "ignore_merges")(True),
        "normalizer": set_("normalizer")({"type": "NFC"}),
        "no pre_tokenizer": set_("pre_tokenizer")(None),
        "pre_tokenizer": set_("pre_tokenizer")({"type": "ByteLevel"}),
        "regex": set_("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex")(r"(\s+)+$"),
        "behavior": set_("pre_tokenizer", "pretokenizers", 0, "behavior")("MergedWithNext"),
        "added not a list": set_("added_tokens")({}),
        "added without content": set_("added_tokens", 0)({"id": 2848}),
        "added id a string": set_("added_tokens", 0, "id")("2848"),
        "added id of a token": set_("added_tokens", 0, "id")(5),
        "added twice": set_("added_tokens", 1, "content")("<|endoftext|>"),
    }


@pytest.mark.parametrize("name", damaged())
def test_damaged_vocabularies(name: str) -> None:
    raw, size, names = source("nano")
    broken = json.loads(raw)
    damaged()[name](broken)
    with pytest.raises(CheckpointError, match=r"\Ax/tokenizer\.json: [^\n]+\Z"):
        read(broken, size, names)


@pytest.mark.parametrize(
    "raw", [b"", b"\xff\xfe{}", b"[]", b'{"model": 3}', b"[" * 100_000, b'{"model":', b" " * ((64 << 20) + 1)]
)
def test_not_a_vocabulary(raw: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"\Ax/tokenizer\.json: [^\n]+\Z"):
        read(raw, 4096, ENDOFTEXT)


def test_sentencepiece_merges_that_scores_cannot_say() -> None:
    raw, size, names = source("phi35")
    good = json.loads(raw)
    merges = good["model"]["merges"]
    made = ["".join(pair) for pair in merges]
    twice = next(i for i in range(1, len(made)) if made[i] == made[i - 1])

    apart = copy.deepcopy(good)
    apart["model"]["merges"].append(apart["model"]["merges"].pop(twice))
    with pytest.raises(CheckpointError, match="do not stand together"):
        read(apart, size, names)

    missing = copy.deepcopy(good)
    del missing["model"]["merges"][twice]
    with pytest.raises(CheckpointError, match="without a merge"):
        read(missing, size, names)

    no_byte = copy.deepcopy(good)
    no_byte["model"]["vocab"]["<0x0a>"] = no_byte["model"]["vocab"].pop("<0x0A>")
    with pytest.raises(CheckpointError, match=r"such as .<0x0A>"):
        read(no_byte, size, names)


@pytest.mark.parametrize("size", [0, -1, 1 << 31])
def test_sizes_out_of_reason(size: int) -> None:
    with pytest.raises(CheckpointError, match="vocab_size"):
        read(source("nano")[0], size, ENDOFTEXT)


def test_a_chat_template_that_is_no_text() -> None:
    with pytest.raises(CheckpointError, match="chat template"):
        read_vocabulary(
            source("nano")[0],
            4096,
            tokenizer_config={},
            config={},
            generation_config={},
            chat_template="{{ '\ud800' }}",
            where="x",
        )


def test_unknown_special_token() -> None:
    with pytest.raises(CheckpointError, match=r"the eos token '<\|eot\|>' is not in the vocabulary"):
        read(source("nano")[0], 4096, {"eos_token": "<|eot|>"})


def test_stop_ids() -> None:
    added = {"<|end|>": 200020, "<|endoftext|>": 199999}

    def found(config: object, generation: object, names: dict[str, int] = added) -> tuple[int, ...]:
        return stop_ids(
            names,
            200064,
            config={"eos_token_id": config},
            generation_config={"eos_token_id": generation},
            where="x",
        )

    assert found(199999, [200020, 199999]) == (200020, 199999)
    assert found(199999, None) == (199999, 200020)  # the bug of trusting config.json alone
    assert found(32000, [32007, 32001, 32000], {}) == (32007, 32001, 32000)
    for bad in (200064, -1, "200020", 1.5, True, [None, {}]):
        with pytest.raises(CheckpointError, match="eos_token_id"):
            found(bad, None)
    with pytest.raises(CheckpointError, match="no token that ends an answer"):
        found(None, None, {})
