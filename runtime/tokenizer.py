# SPDX-License-Identifier: Apache-2.0
"""Text and control tokens to token ids, and ids back to bytes, with one model's vocabulary.

The ids are those of Hugging Face's `tokenizers`, which does the byte-pair merges here too. What is
different: text and control tokens come apart already (`prompt.Piece`), and the encoder for text knows no
added tokens, so no text can spell its way to one.

Two kinds of vocabulary are known: byte-level BPE (o200k of the Phi-4-mini family, cl100k of Phi-4 14B) and
BPE made from a SentencePiece model (Phi-3.5: "▁" for a space, `<0xNN>` for a byte).
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import tokenizers

from .errors import BundleError, InputError, one_line
from .files import check_unicode
from .parts import Int32
from .prompt import Control, TextPiece
from .spec import SPLIT_PATTERNS

_MAX_FILE_BYTES = 64 << 20  # the largest real one, o200k, has 15 MB
# Rust's char::is_whitespace (Unicode White_Space), which decides what an rstrip token swallows.
# Python's str.isspace also counts U+001C to U+001F.
_WHITE_SPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    + ("\u2028\u2029\u202f\u205f\u3000")
)
_PIECE_CHARS = 1 << 16  # of a long text, encoded at once: tens of megabytes
_WORD_MAX_CHARS = 1 << 20  # that cannot be cut
# Where ids of two parts are those of the whole. No alternative of any of `SPLIT_PATTERNS` matches a space
# after what is no white space, nor a letter, digit or "_" after a line end. Their one look ahead,
# `\s+(?!\S)`, is not asked about such a place: the part before ends in no white space, or in a line end, and
# `\s*[\r\n]+` stands before it. Nothing looks back. (Python's \s has all of the regex's white space.)
_CUT = re.compile(r"(?<=\S)(?= )|(?<=\n)(?=\w)")
_LINE_END, _LINE_END_BYTE = "\n", "<0x0A>"
_SENTENCEPIECE_CUT = re.compile(r"(?=\n)")
_SENTENCEPIECE_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}


class Tokenizer:
    """One model's vocabulary, read from `tokenizer.json`.

    Attributes:
        vocab_size: rows of the model's embedding; ids are below it.
        control_tokens: content -> id of every added token, `special` or not.
        unassigned_ids: int32, the ids below `vocab_size` that have no token, ascending. The model has
            logits for them: mask those.
        strips_first_space: whether the first space of a decoded text is dropped (SentencePiece).
    """

    def __init__(self, path: Path, vocab_size: int) -> None:
        """Read and check a vocabulary.

        Args:
            path: `tokenizer.json` of a model directory.
            vocab_size: `TextSpec.vocab_size`.

        Raises:
            BundleError: the file is missing, damaged, over 64 MiB, of a kind that is not known, or has ids
                from `vocab_size` on.
        """
        full = _read(path)
        self._model: Any = full.model  # shared, not copied: the vocabulary is in memory once
        self.vocab_size = vocab_size
        self._added: dict[int, Any] = dict(sorted(full.get_added_tokens_decoder().items()))
        self.control_tokens: Mapping[str, int] = MappingProxyType(
            {token.content: i for i, token in self._added.items()}
        )
        vocabulary = full.get_vocab(with_added_tokens=True)
        ids = np.fromiter(vocabulary.values(), np.int64, len(vocabulary))
        if ids.size == 0 or int(ids.max()) >= vocab_size:
            raise BundleError(
                f"{path}: holds {ids.size} ids up to {ids.max(initial=-1)}, expected them below {vocab_size}"
            )
        if np.unique(ids).size != ids.size:
            raise BundleError(f"{path}: two tokens have the same id")
        self.unassigned_ids: Int32 = np.setdiff1d(np.arange(vocab_size, dtype=np.int32), ids).astype(np.int32)
        self.strips_first_space = _is_sentencepiece(full, path)
        self._byte_of = _sentencepiece_bytes() if self.strips_first_space else _byte_level_alphabet()
        missing = [token for token in self._byte_of if token not in vocabulary]
        if missing:
            raise BundleError(f"{path}: has no token for {len(missing)} of the 256 bytes")
        if not self.strips_first_space:
            ordinary = (token for token, i in vocabulary.items() if i not in self._added)
            strange = set("".join(ordinary)) - self._byte_of.keys()
            if strange:
                raise BundleError(f"{path}: a token holds {min(strange)!r}, which stands for no byte")
        self._text_encoder = _without_added_tokens(full, path, self.control_tokens)

    def encode(self, pieces: Sequence[TextPiece]) -> Int32:
        """Token ids of a prompt.

        Adjacent texts are joined first, so that how the text was put together does not show. White space
        beside a control token is swallowed where the vocabulary says so (`rstrip`, `lstrip`), as
        Hugging Face does: `<|user|>`, then "\\nHi", is read like "Hi".

        Returns:
            int32 [n]. No BOS is added.

        Raises:
            InputError: a control token that the vocabulary lacks, or text that is not Unicode.
        """
        ids: list[int] = []
        before: Any = None  # the added token that the text follows
        for text, control in _segments(pieces):
            token_id = None if control is None else self.token_id(control)
            behind = None if token_id is None else self._added[token_id]
            if before is not None and before.rstrip:
                text = text.lstrip(_WHITE_SPACE)
            if behind is not None and behind.lstrip:
                text = text.rstrip(_WHITE_SPACE)
            ids += self._encode(text)
            if token_id is not None:
                ids.append(token_id)
            before = behind
        return np.array(ids, np.int32)

    def encode_text(self, text: str) -> Int32:
        """Token ids of plain text: int32 [n]. Nothing in it becomes a control token.

        Raises:
            InputError: the text holds half a surrogate pair.
        """
        return np.array(self._encode(text), np.int32)

    def encode_pieces(self, text: str) -> Iterator[tuple[Int32, int]]:
        """The ids of `encode_text`, piece by piece: memory does not grow with the text.

        Yields:
            int32 [n], and how many characters of the text they stand for.

        Raises:
            InputError: half a surrogate pair, or too long a stretch without a space or line end to cut at.
        """
        check_unicode("the text", text)
        pattern, start = self._cut(), 0
        while start < len(text):
            end = stop = min(start + _WORD_MAX_CHARS, len(text))
            if pattern is not None and len(text) - start > _PIECE_CHARS:
                cut = pattern.search(text, start + _PIECE_CHARS, stop)
                if cut is None:  # the last one before
                    cut = max(pattern.finditer(text, start + 1, start + _PIECE_CHARS), key=_at, default=None)
                end = stop if cut is None else cut.start()
            if end - start == _WORD_MAX_CHARS and end < len(text):
                raise InputError(
                    f"the text has no space or line end to cut it at in {_WORD_MAX_CHARS} characters "
                    f"from character {start} on"
                )
            ids = self.encode_text(text[start:end])
            # SentencePiece begins with a "▁"; a piece after the first with a line end, which it cannot join.
            yield ids[1:] if start and self.strips_first_space else ids, end - start
            start = end

    def _cut(self) -> re.Pattern[str] | None:
        """Where a text can be cut."""
        if not self.strips_first_space:
            return _CUT
        # It has no words: a cut is where nothing merges across: at a character that no longer token has.
        alone = (_LINE_END, _LINE_END_BYTE)
        vocabulary = tokenizers.Tokenizer(self._model).get_vocab()
        joins = any(end in token and token != end for token in vocabulary for end in alone)
        return None if joins else _SENTENCEPIECE_CUT

    def _encode(self, text: str) -> list[int]:
        check_unicode("the text", text)
        ids: list[int] = self._text_encoder.encode(text, add_special_tokens=False).ids
        return ids

    def token_id(self, token: str) -> int:
        """The id of an added token, by its content.

        Raises:
            InputError: the vocabulary has no such token.
        """
        token_id = self.control_tokens.get(token)
        if token_id is None:
            raise InputError(f"this model's vocabulary has no control token {token[:60]!r}")
        return token_id

    def token_bytes(self, token_id: int) -> bytes:
        """What one id contributes to the text: often part of a character only.

        Empty for a `special` token (`<|end|>`) and for an id without a token; an added token that is not
        special (`<|tool_call|>`) is its own text.

        Raises:
            InputError: an id that is not in [0, vocab_size).
        """
        if not 0 <= token_id < self.vocab_size:
            raise InputError(f"token id {token_id} is not in [0, {self.vocab_size})")
        added = self._added.get(token_id)
        if added is not None:
            return b"" if added.special else added.content.encode("utf-8")
        token = self._model.id_to_token(token_id)
        if token is None:
            return b""
        if not self.strips_first_space:
            return bytes(self._byte_of[char] for char in token)
        byte = self._byte_of.get(token)
        return token.replace("▁", " ").encode("utf-8") if byte is None else bytes((byte,))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; what is not UTF-8 becomes U+FFFD.

        Raises:
            InputError: an id that is not in [0, vocab_size).
        """
        raw = b"".join(self.token_bytes(int(i)) for i in ids)
        if self.strips_first_space:
            raw = raw.removeprefix(b" ")
        return raw.decode("utf-8", "replace")


def _at(found: re.Match[str]) -> int:
    return found.start()


def _read(path: Path) -> Any:
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):  # a pipe would wait for ever
            raise BundleError(f"{path}: is not a regular file")
        if about.st_size > _MAX_FILE_BYTES:
            raise BundleError(f"{path}: {about.st_size} bytes is too large for a vocabulary")
        return tokenizers.Tokenizer.from_buffer(path.read_bytes())  # from_file takes names in UTF-8 only
    except BundleError:
        raise
    except BaseException as exc:
        # A panic in the Rust library is no Exception, and its class has no importable name.
        if not isinstance(exc, Exception) and type(exc).__name__ != "PanicException":
            raise
        raise BundleError(f"{path}: cannot be read as a vocabulary: {one_line(exc)}") from None


def _is_sentencepiece(full: Any, path: Path) -> bool:
    """Which of the two known kinds a vocabulary is; BundleError for any other."""
    model = full.model
    if not isinstance(model, tokenizers.models.BPE):
        raise BundleError(f"{path}: is a {type(model).__name__} vocabulary, expected BPE")
    odd = (model.dropout, model.continuing_subword_prefix, model.end_of_word_suffix)
    if any(odd):
        raise BundleError(f"{path}: uses dropout or affixes, expected plain BPE")
    normalizer, words = _state(full.normalizer), _state(full.pre_tokenizer)
    if normalizer == _SENTENCEPIECE_NORMALIZER and words is None and model.byte_fallback:
        return True
    if normalizer is None and _splits_as_known(words):
        return False
    raise BundleError(
        f"{path}: its normalizer and pre-tokenizer are neither byte-level BPE's nor SentencePiece's"
    )


def _splits_as_known(words: Any) -> bool:
    """Whether a pre-tokenizer is one of `SPLIT_PATTERNS`, then bytes. An unknown regex might never end."""
    try:
        split, byte_level = words["pretokenizers"]
        # "Isolated" and the inverted "Removed" are the same here: the patterns leave no character out.
        mode = (split["behavior"], split["invert"])
        return (
            split["pattern"]["Regex"] in SPLIT_PATTERNS.values()
            and mode in (("Isolated", False), ("Removed", True))
            and byte_level["type"] == "ByteLevel"
            and not byte_level["add_prefix_space"]
            and not byte_level["use_regex"]
        )
    except (KeyError, TypeError, ValueError):
        return False


def _state(component: Any) -> Any:
    return None if component is None else json.loads(component.__getstate__())


def _without_added_tokens(full: Any, path: Path, control_tokens: Mapping[str, int]) -> Any:
    """An encoder on the same model that knows no added tokens.

    SentencePiece vocabularies can hold merges that end in one ("</" + "s>"). Byte pairs merge inside a
    stretch as they would in that stretch alone, so a token that its own text does not merge to is never
    reached; if one is, those merges are taken out.
    """
    model = full.model
    ids = set(control_tokens.values())
    if any(part.id in ids for token in control_tokens for part in model.tokenize(token)):
        plain = json.loads(full.to_str())
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in plain["model"]["merges"])
        plain["model"]["merges"] = [pair for pair in pairs if "".join(pair) not in control_tokens]
        model = tokenizers.Tokenizer.from_str(json.dumps(plain)).model
        if any(part.id in ids for token in control_tokens for part in model.tokenize(token)):
            raise BundleError(f"{path}: ordinary text can spell a control token")
    encoder = tokenizers.Tokenizer(model)
    if full.normalizer is not None:
        encoder.normalizer = full.normalizer
    if full.pre_tokenizer is not None:
        encoder.pre_tokenizer = full.pre_tokenizer
    return encoder


def _segments(pieces: Sequence[TextPiece]) -> Iterator[tuple[str, str | None]]:
    """Each stretch of text, adjacent ones made one and often empty, and the control token it ends at."""
    texts: list[str] = []
    for piece in pieces:
        if isinstance(piece, Control):
            yield "".join(texts), piece.token
            texts.clear()
        else:
            texts.append(piece.text)
    yield "".join(texts), None


def _byte_level_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary.

    Printable Latin-1 stands for itself, the other bytes, in order, for the characters from U+0100 on.
    Source: `bytes_to_unicode` in openai/gpt-2.
    """
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in itself]
    return {chr(byte): byte for byte in itself} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _sentencepiece_bytes() -> dict[str, int]:
    return {f"<0x{byte:02X}>": byte for byte in range(256)}
