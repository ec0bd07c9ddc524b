# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's `tokenizer.json` as the vocabulary of a GGUF file, checked before llama.cpp sees it.

llama.cpp knows two of the kinds that the family uses: byte-level BPE (model `gpt2`) with a pre-tokeniser it
has by name, and SentencePiece BPE (model `llama`) with a score for each token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from ..runtime.errors import CheckpointError
from ..runtime.spec import SPLIT_PATTERNS
from .scores import scores_from_merges

if TYPE_CHECKING:
    import gguf

_MAX_BYTES = 64 << 20  # the largest real one, o200k, has 15 MB
_MAX_VOCAB = 1 << 20
_MAX_TOKEN_CHARS = 512  # the longest in o200k has 128
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType
_CONTROL_ANYWAY = ("</s>",)  # llama.cpp overrides the type, with a warning at each load
_TURN_ENDS = ("<|end|>", "<|im_end|>", "<|endoftext|>")
_SENTENCEPIECE_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The `tokenizer.*` metadata of a GGUF file."""

    model: Literal["gpt2", "llama"]
    pre: str  # llama.cpp's name of the pre-tokeniser
    tokens: list[str]  # one for each row of the embedding; "[PAD{id}]" where the checkpoint has none
    types: list[int]  # gguf.TokenType of each
    merges: list[str] | None  # "left right", best first; gpt2 only
    scores: list[float] | None  # higher merges first; llama only
    bos: int | None
    eos: int | None
    unk: int | None
    pad: int | None
    add_bos: bool
    chat_template: str | None
    added: dict[str, int]  # content -> id of every added token, special or not


def read_vocabulary(
    tokenizer_json: bytes,
    vocab_size: int,
    *,
    tokenizer_config: Mapping[str, Any],
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    chat_template: str | None,
    where: str,
) -> Vocabulary:
    """Read and check a vocabulary.

    Args:
        tokenizer_json: the file's bytes, in Hugging Face tokenizers' format.
        vocab_size: rows of the embedding; every id is below it.
        tokenizer_config, config, generation_config: the checkpoint's JSON files; the first names the bos,
            eos, unk and pad tokens, the others give their ids where it does not.
        chat_template: Jinja text to carry along; it is not run.
        where: the file, for messages.

    Raises:
        CheckpointError: damaged or hostile contents, a kind or pre-tokeniser that llama.cpp has no
            equal of, or an id twice or out of range.
    """
    if not 0 < vocab_size <= _MAX_VOCAB:
        raise CheckpointError(f"{where}: vocab_size is {vocab_size}, expected 1 to {_MAX_VOCAB}")
    raw = _parse(tokenizer_json, where)
    model = raw["model"]
    if model.get("type", "BPE") != "BPE":
        raise CheckpointError(f"{where}: is a {str(model.get('type'))[:40]!r} vocabulary, expected BPE")
    ordinary = _ordinary_tokens(model.get("vocab"), vocab_size, where)
    added = _added_tokens(raw.get("added_tokens"), ordinary, vocab_size, where)
    merges = _merges(model.get("merges"), ordinary, where)
    _check_reader(tokenizer_json, added, where)
    if chat_template is not None and any("\ud800" <= char <= "\udfff" for char in chat_template):
        raise CheckpointError(f"{where}: the chat template holds half of a surrogate pair")
    ids = {**ordinary, **{token: i for token, (i, _) in added.items()}}
    name_of = {i: token for token, i in ids.items()}
    tokens = [name_of.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    if len(set(tokens)) != vocab_size:
        raise CheckpointError(f"{where}: a token has the name that marks an unused id, like '[PAD7]'")
    sentencepiece = _is_sentencepiece(raw, where)
    byte_ids = _byte_tokens(ordinary, sentencepiece, where)
    bytes_, scores = [], None  # a type and scores of their own: in SentencePiece only
    if sentencepiece:
        bytes_ = byte_ids
        scores = scores_from_merges(merges, ordinary, {i for i, _ in added.values()}, vocab_size, where)
    special_ids = _SpecialIds(ids, vocab_size, tokenizer_config, {**config, **generation_config}, where)
    return Vocabulary(
        model="llama" if sentencepiece else "gpt2",
        pre="default" if sentencepiece else _pre_tokenizer(raw, where),
        tokens=tokens,
        types=_types(tokens, set(name_of), added, bytes_, model.get("unk_token") if sentencepiece else None),
        merges=None if sentencepiece else [f"{left} {right}" for left, right in merges],
        scores=scores,
        bos=special_ids.find("bos"),
        eos=special_ids.find("eos"),
        unk=special_ids.find("unk"),
        pad=special_ids.find("pad"),
        add_bos=tokenizer_config.get("add_bos_token") is True,
        chat_template=chat_template,
        added={token: i for token, (i, _) in added.items()},
    )


def add_to_gguf(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    """Add the `tokenizer.*` keys to a GGUF file that is being written."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    for add, token_id in (
        (writer.add_bos_token_id, vocabulary.bos),
        (writer.add_eos_token_id, vocabulary.eos),
        (writer.add_unk_token_id, vocabulary.unk),
        (writer.add_pad_token_id, vocabulary.pad),
    ):
        if token_id is not None:
            add(token_id)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(False)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def stop_ids(
    added: Mapping[str, int],
    vocab_size: int,
    *,
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    where: str,
) -> tuple[int, ...]:
    """The ids that end an answer, such as (200020, 199999).

    No single file is to be trusted: Phi-4-mini's config.json names `<|endoftext|>` only, and generation that
    does not stop at `<|end|>` runs on. So it is all that the two configurations list, and every
    end-of-turn token of the vocabulary.

    Args:
        added: `Vocabulary.added`.
        vocab_size: rows of the embedding.
        config, generation_config: the checkpoint's JSON files.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: none at all, or one that is not an id of this model.
    """
    found: dict[int, None] = {}  # a set that keeps its order
    for listed in (generation_config.get("eos_token_id"), config.get("eos_token_id")):
        for token_id in listed if isinstance(listed, list) else [listed]:
            if token_id is not None:
                found[_check_id(token_id, vocab_size, f"{where}: eos_token_id")] = None
    found |= {added[token]: None for token in _TURN_ENDS if token in added}
    if not found:
        raise CheckpointError(f"{where}: names no token that ends an answer (eos_token_id)")
    return tuple(found)


def _check_id(value: object, vocab_size: int, what: str) -> int:
    if type(value) is not int or not 0 <= value < vocab_size:
        raise CheckpointError(f"{what} is {str(value)[:60]}, expected a whole number below {vocab_size}")
    return value


def _parse(tokenizer_json: bytes, where: str) -> dict[str, Any]:
    if len(tokenizer_json) > _MAX_BYTES:
        raise CheckpointError(f"{where}: {len(tokenizer_json)} bytes is too large for a vocabulary")
    try:
        raw = json.loads(tokenizer_json.decode("utf-8"))
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{where}: is not JSON: {' '.join(str(exc).split())[:120]}") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("model"), dict):
        raise CheckpointError(f"{where}: is not a tokenizer: it has no 'model' object")
    return raw


def _ordinary_tokens(vocab: object, vocab_size: int, where: str) -> dict[str, int]:
    if not isinstance(vocab, dict) or not vocab:
        raise CheckpointError(f"{where}: model.vocab is not an object of tokens")
    if len(vocab) > vocab_size:
        raise CheckpointError(f"{where}: holds {len(vocab)} tokens, the embedding has {vocab_size} rows")
    for token, token_id in vocab.items():
        _check_id(token_id, vocab_size, f"{where}: the id of token {token[:40]!r}")
        _check_token(token, where)
    if len(set(vocab.values())) != len(vocab):
        raise CheckpointError(f"{where}: two tokens of model.vocab have the same id")
    return vocab


def _check_token(token: str, where: str) -> None:
    # llama.cpp reads tokens as C strings, and gives an empty one another name.
    if not 0 < len(token) <= _MAX_TOKEN_CHARS:
        raise CheckpointError(
            f"{where}: a token has {len(token)} characters, expected 1 to {_MAX_TOKEN_CHARS}"
        )
    if "\0" in token or any("\ud800" <= char <= "\udfff" for char in token):
        raise CheckpointError(f"{where}: the token {token[:40]!r} holds NUL or half of a surrogate pair")


def _added_tokens(
    entries: object, ordinary: Mapping[str, int], vocab_size: int, where: str
) -> dict[str, tuple[int, bool]]:
    """content -> (id, special)."""
    if not isinstance(entries, list) or len(entries) > vocab_size:
        raise CheckpointError(f"{where}: added_tokens is not a list of at most {vocab_size} tokens")
    found: dict[str, tuple[int, bool]] = {}
    names = {i: token for token, i in ordinary.items()}
    for entry in entries:
        content = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(content, str):
            raise CheckpointError(f"{where}: an entry of added_tokens has no content: {str(entry)[:60]!r}")
        _check_token(content, where)
        token_id = _check_id(entry.get("id"), vocab_size, f"{where}: the id of added token {content[:40]!r}")
        if content in found or names.get(token_id, content) != content:
            raise CheckpointError(
                f"{where}: added token {content[:40]!r} or its id {token_id} is there twice"
            )
        names[token_id] = content
        found[content] = (token_id, entry.get("special") is True)
    return found


def _check_reader(tokenizer_json: bytes, added: Mapping[str, tuple[int, bool]], where: str) -> None:
    """Check that Hugging Face's reader, which the runtime uses, takes the file and means the same ids.

    It ignores the id that an added token has in the file, and counts on from the last one.
    """
    import tokenizers

    try:
        reader = tokenizers.Tokenizer.from_str(tokenizer_json.decode("utf-8"))
    except BaseException as exc:
        # A panic in the Rust library is no Exception, and its class has no importable name.
        if not isinstance(exc, Exception) and type(exc).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{where}: cannot be read: {' '.join(str(exc).split())[:200]}") from None
    for token, (token_id, _) in added.items():
        if reader.token_to_id(token) != token_id:
            got = reader.token_to_id(token)
            raise CheckpointError(
                f"{where}: added token {token[:40]!r} has id {token_id}, its reader takes {got}"
            )


def _merges(entries: object, ordinary: Mapping[str, int], where: str) -> list[tuple[str, str]]:
    """Pairs, best first; the file has them as "left right" or as ["left", "right"]."""
    if not isinstance(entries, list):
        raise CheckpointError(f"{where}: model.merges is not a list")
    pairs: list[tuple[str, str]] = []
    for entry in entries:
        pair = entry.split(" ") if isinstance(entry, str) else entry
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise CheckpointError(f"{where}: merge {len(pairs)} is {str(entry)[:60]!r}, expected two tokens")
        left, right = pair
        if left not in ordinary or right not in ordinary or left + right not in ordinary:
            raise CheckpointError(
                f"{where}: merge {len(pairs)} {str(pair)[:60]} names a token that does not exist"
            )
        pairs.append((left, right))
    if len(set(pairs)) != len(pairs):
        raise CheckpointError(f"{where}: model.merges holds a pair twice")
    return pairs


def _is_sentencepiece(raw: Mapping[str, Any], where: str) -> bool:
    """Whether it is SentencePiece BPE; anything but that and byte-level BPE is refused."""
    model, normalizer = raw["model"], raw.get("normalizer")
    affixes = [
        model.get(k) for k in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    ]
    if any(affixes):
        raise CheckpointError(f"{where}: uses dropout, affixes or ignore_merges, expected plain BPE")
    if normalizer is None and raw.get("pre_tokenizer") is not None:
        return False
    if (
        normalizer == _SENTENCEPIECE_NORMALIZER
        and raw.get("pre_tokenizer") is None
        and model.get("byte_fallback")
    ):
        return True
    raise CheckpointError(
        f"{where}: the normalizer and pre_tokenizer are neither byte-level BPE's nor SentencePiece's"
    )


def _types(
    tokens: list[str],
    assigned: set[int],
    added: Mapping[str, tuple[int, bool]],
    bytes_: list[int],
    unk_token: object,
) -> list[int]:
    """The gguf.TokenType of each token."""
    types = [_NORMAL if i in assigned else _UNUSED for i in range(len(tokens))]
    for token_id in bytes_:
        types[token_id] = _BYTE
    for token, (token_id, special) in added.items():
        types[token_id] = _CONTROL if special or token in _CONTROL_ANYWAY else _USER_DEFINED
    if isinstance(unk_token, str) and unk_token in added:
        types[added[unk_token][0]] = _UNKNOWN
    return types


def _byte_tokens(ordinary: Mapping[str, int], sentencepiece: bool, where: str) -> list[int]:
    """The ids of the 256 tokens that stand for one byte each; without one, some text could not be read."""
    # GPT-2's alphabet: printable Latin-1 stands for itself, the rest of the bytes for U+0100 and on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = [chr(byte) for byte in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]
    names = [f"<0x{byte:02X}>" for byte in range(256)] if sentencepiece else alphabet
    missing = [name for name in names if name not in ordinary]
    if missing:
        raise CheckpointError(
            f"{where}: has no token for {len(missing)} of the 256 bytes, such as {missing[0]!r}"
        )
    return [ordinary[name] for name in names]


def _pre_tokenizer(raw: Mapping[str, Any], where: str) -> str:
    """llama.cpp's name for the regex that cuts text into words."""
    try:
        split, byte_level = raw["pre_tokenizer"]["pretokenizers"]
        regex = split["pattern"]["Regex"]
        mode = (split["type"], split["behavior"], split["invert"])
        bytes_mode = (byte_level["type"], byte_level["add_prefix_space"], byte_level["use_regex"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{where}: the pre_tokenizer is not a regex split followed by bytes") from None
    # "Isolated" and the inverted "Removed" are the same here: the patterns leave no character out.
    known_mode = mode in (("Split", "Isolated", False), ("Split", "Removed", True))
    for name, pattern in SPLIT_PATTERNS.items():
        if regex == pattern and known_mode and bytes_mode == ("ByteLevel", False, False):
            return name
    raise CheckpointError(
        f"{where}: the pre_tokenizer's regex is none of {', '.join(SPLIT_PATTERNS)}: {str(regex)[:60]!r}"
    )


class _SpecialIds:
    """Finds the bos, eos, unk and pad ids: by the name in tokenizer_config.json, else by number."""

    def __init__(
        self,
        ids: Mapping[str, int],
        vocab_size: int,
        tokenizer_config: Mapping[str, Any],
        numbers: Mapping[str, Any],
        where: str,
    ) -> None:
        self._ids, self._vocab_size, self._where = ids, vocab_size, where
        self._names, self._numbers = tokenizer_config, numbers

    def find(self, kind: str) -> int | None:
        name = self._names.get(f"{kind}_token")
        if isinstance(name, dict):  # an AddedToken written out
            name = name.get("content")
        if name is not None:
            if not isinstance(name, str) or name not in self._ids:
                raise CheckpointError(
                    f"{self._where}: the {kind} token {str(name)[:40]!r} is not in the vocabulary"
                )
            return self._ids[name]
        number = self._numbers.get(f"{kind}_token_id")
        if isinstance(number, list) and number:
            number = number[0]
        if number is None:
            return None
        return _check_id(cast(object, number), self._vocab_size, f"{self._where}: {kind}_token_id")
