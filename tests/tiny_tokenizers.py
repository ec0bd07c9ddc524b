# SPDX-License-Identifier: Apache-2.0
"""Tiny tokenizers in the styles that phi4-nano's does not cover: Phi-4's cl100k, Phi-3.5's SentencePiece.

Both are real `tokenizer.json` contents with the structure, flags and relative ids of the published ones; only
the vocabulary is small. The merges are learnt from the text below with plain BPE, ties broken by the
pair's spelling, so the result is the same everywhere.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

TEXT = (
    "the cat and the dog went to the market on Monday morning. What is the name of the capital of France? "
    "You are a helpful assistant. Hello there, how are you today? I am fine, thank you. The answer is 42. "
    "one two three four five six seven eight nine ten. Tell me a story about a small boat on the open sea. "
    "There was a house in the forest where an old man and his horse lived. It's raining; they're waiting. "
    "Explain the weather in Paris, London and Berlin: warm, cold, windy. 1 2 3 10 20 2024 3.14 x = y + z"
)

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PHI4_BASE = 320  # ids below are ordinary; the real one has 100256
PHI35_BASE = 448  # ids below are ordinary; the real one has 32000
_PHI4_NAMED = {  # offset from PHI4_BASE, as 100256 + offset in the published tokenizer
    1: "<|endoftext|>",
    2: "<|fim_prefix|>",
    3: "<|fim_middle|>",
    4: "<|fim_suffix|>",
    8: "<|im_start|>",
    9: "<|im_end|>",
    10: "<|im_sep|>",
    20: "<|endofprompt|>",
}
_PHI4_ADDED = 96  # 100256..100351
_PHI35_ADDED = (
    "<|endoftext|>",
    "<|assistant|>",
    "<|placeholder1|>",
    "<|placeholder2|>",
    "<|placeholder3|>",
    "<|placeholder4|>",
    "<|system|>",
    "<|end|>",
    "<|placeholder5|>",
    "<|placeholder6|>",
    "<|user|>",
)


def phi4_added() -> list[str]:
    """The 96 added tokens of Phi-4 14B in id order, from PHI4_BASE on; the gaps are `<|dummy_n|>`."""
    names, dummies = [], 0
    for offset in range(_PHI4_ADDED):
        if offset in _PHI4_NAMED:
            names.append(_PHI4_NAMED[offset])
        else:
            names.append(f"<|dummy_{dummies}|>")
            dummies += 1
    return names


def phi4_tokenizer() -> dict[str, Any]:
    """`tokenizer.json` of the tiny Phi-4 14B: byte-level BPE over 320 pieces, 96 added tokens."""
    alphabet = _byte_alphabet()
    words = Counter(" ".join(TEXT.split()).replace(" ", " \u0120").split(" "))
    pieces, merges = _train(words, PHI4_BASE - len(alphabet))
    split = {"type": "Split", "pattern": {"Regex": CL100K}, "behavior": "Removed", "invert": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(PHI4_BASE + i, name, lstrip=True, rstrip=True) for i, name in enumerate(phi4_added())
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True, "use_regex": True},
        "model": _bpe(alphabet + pieces, merges, unk=None, byte_fallback=False),
    }


def phi35_tokenizer() -> dict[str, Any]:
    """`tokenizer.json` of the tiny Phi-3.5: SentencePiece BPE, 448 pieces, 11 added tokens."""
    head = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    words = Counter("\u2581" + w for w in TEXT.split())
    letters = sorted({c for w in words for c in w})
    pieces, _ = _train(words, PHI35_BASE - len(head) - len(letters))
    vocab = head + pieces + letters  # as in Llama's vocabulary: merged pieces first, then single letters
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(0, "<unk>", lstrip=False, rstrip=False),
            _added(1, "<s>", lstrip=False, rstrip=False),
            {**_added(2, "</s>", lstrip=False, rstrip=True), "special": False},
            *(
                _added(PHI35_BASE + i, name, lstrip=False, rstrip=i > 0)
                for i, name in enumerate(_PHI35_ADDED)
            ),
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": _bpe(vocab, _all_splits(vocab), unk="<unk>", byte_fallback=True),
    }


def _added(token_id: int, content: str, *, lstrip: bool, rstrip: bool) -> dict[str, Any]:
    return {
        "id": token_id,
        "content": content,
        "single_word": False,
        "lstrip": lstrip,
        "rstrip": rstrip,
        "normalized": False,
        "special": True,
    }


def _bpe(
    vocab: list[str], merges: list[tuple[str, str]], *, unk: str | None, byte_fallback: bool
) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": byte_fallback,
        "byte_fallback": byte_fallback,
        "ignore_merges": False,
        "vocab": {piece: i for i, piece in enumerate(vocab)},
        "merges": [list(pair) for pair in merges],
    }


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in the order of their vocabulary."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in plain] + [chr(0x100 + i) for i in range(256 - len(plain))]


def _train(words: Counter[str], n_merges: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Plain BPE: merge the commonest pair `n_merges` times; the smaller spelling wins a tie."""
    symbols = {word: list(word) for word in words}
    pieces: list[str] = []
    merges: list[tuple[str, str]] = []
    while len(merges) < n_merges:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in symbols.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += words[word]
        left, right = min(pairs, key=lambda p: (-pairs[p], p))
        merges.append((left, right))
        if left + right not in pieces:
            pieces.append(left + right)
        for parts in symbols.values():
            for i in range(len(parts) - 2, -1, -1):
                if parts[i : i + 2] == [left, right]:
                    parts[i : i + 2] = [left + right]
    return pieces, merges


def _all_splits(vocab: list[str]) -> list[tuple[str, str]]:
    """Every way to merge two pieces into a third, in the third's order: SentencePiece scores as ranks."""
    rank = {piece: i for i, piece in enumerate(vocab)}
    found = []
    for piece in vocab[259:]:
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        found += sorted(
            (s for s in splits if s[0] in rank and s[1] in rank), key=lambda s: (rank[s[0]], rank[s[1]])
        )
    return found
