# SPDX-License-Identifier: Apache-2.0
"""Good models and adapters with one thing wrong: what is wrong with each, and what must be said of it."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..gguf_bytes import Gguf, numbers, strings, u32, u64

Edit = Callable[[Gguf], None]


@dataclass(frozen=True)
class Spoilt:
    """One thing wrong. `line` is what is said of it; in a model directory, `ours` where that differs."""

    edit: Edit
    line: str
    ours: str | None = None

    def said(self, *, foreign: bool) -> str:
        """A regex for the error line."""
        return self.line if foreign or self.ours is None else self.ours


def both(*edits: Edit) -> Edit:
    def edit(g: Gguf) -> None:
        for one in edits:
            one(g)

    return edit


def key(name: str, kind: str, value: float | bool | str | bytes) -> Edit:
    return lambda g: g.set(name, kind, value)


def phi(name: str, kind: str, value: float | bool | str | bytes) -> Edit:
    return key(f"phi3.{name}", kind, value)


def dims(name: str, value: list[int]) -> Edit:
    return lambda g: setattr(g.part(name), "dims", value)


def replaced(name: str, shape: list[int], type_id: int, data: bytes) -> Edit:
    def edit(g: Gguf) -> None:
        part = g.part(name)
        part.dims, part.type_id, part.data = shape, type_id, data

    return edit


def without(name: str) -> Edit:
    return lambda g: g.parts.remove(g.part(name))


def renamed(old: str, new: bytes) -> Edit:
    return lambda g: setattr(g.part(old), "name", new)


def factors(values: list[float]) -> Edit:
    return replaced("rope_factors_long.weight", [len(values)], 0, struct.pack(f"<{len(values)}f", *values))


def tokens(change: Callable[[list[bytes]], object]) -> Edit:
    def edit(g: Gguf) -> None:
        values = g.string_array("tokenizer.ggml.tokens")
        change(values)
        g.set("tokenizer.ggml.tokens", "array", strings(values))

    return edit


def twice(g: Gguf) -> None:
    g.keys.append(g.keys[-1])


def extra(name: bytes, dims: list[int], type_id: int, data: bytes) -> Edit:
    def edit(g: Gguf) -> None:
        part = g.parts[-1]
        g.parts.append(type(part)(name, dims, type_id, data))

    return edit


def value_kind(kind: int, raw: bytes) -> Edit:
    return lambda g: g.keys.append((b"some.key", kind, raw))


def token_twice(values: list[bytes]) -> None:
    values[500] = values[400]


def zero_in_token(values: list[bytes]) -> None:
    values[500] = values[400] + b"\0x"


ROPE, QKV, UP = "rope_factors_long.weight", "blk.1.attn_qkv.weight", "blk.1.ffn_up.weight"
LENGTHS = {"2^31": 2**31, "2^63": 2**63, "2^64-1": 2**64 - 1}

# phi4-nano in Q8_0: width 256, 4 layers, 4 and 2 heads of 64, 48 dimensions rotated.
MODELS: Mapping[str, Spoilt] = {
    "version 1": Spoilt(lambda g: setattr(g, "version", 1), "has GGUF version 1, expected 2 or 3"),
    "version 4": Spoilt(lambda g: setattr(g, "version", 4), "has GGUF version 4"),
    "big-endian": Spoilt(lambda g: setattr(g, "version", 3 << 24), "is a big-endian GGUF file"),
    **{
        f"a text of {n} bytes": Spoilt(value_kind(8, u64(n)), "ends within|expected at most")
        for n in (2**31, 2**63, 2**64 - 1)
    },
    **{
        f"an array of {name}": Spoilt(value_kind(9, u32(0) + u64(n)), r"declares \d+ values in 'some\.key'")
        for name, n in LENGTHS.items()
    },
    **{
        f"an array of {name} texts": Spoilt(value_kind(9, u32(8) + u64(n)), r"declares \d+ strings in")
        for name, n in LENGTHS.items()
    },
    "an array of arrays": Spoilt(value_kind(9, u32(9) + u64(1) + u32(0) + u64(0)), "is an array of type 9"),
    "an unknown kind of value": Spoilt(value_kind(13, u64(0)), "has the unknown value type 13"),
    "a key twice": Spoilt(twice, "key 'tokenizer.chat_template' is there twice"),
    "a key without a name": Spoilt(lambda g: g.keys.append((b"", 0, b"1")), "expected printable"),
    # llama.cpp looks keys up by their C string: it would find this one.
    "a zero in a key": Spoilt(
        lambda g: g.keys.insert(0, (b"phi3.block_count\0x", 4, u32(0))), "with a zero in it"
    ),
    "a zero in a text": Spoilt(key("general.name", "string", "a\0b"), "with a zero in it"),
    "a key that is no text": Spoilt(lambda g: g.keys.append((b"\xff\xfe", 0, b"1")), "not UTF-8"),
    "alignment 0": Spoilt(key("general.alignment", "u32", 0), "has alignment 0, expected a power of two"),
    "alignment 3": Spoilt(key("general.alignment", "u32", 3), "has alignment 3"),
    "alignment 2^31": Spoilt(key("general.alignment", "u32", 2**31), "has alignment 2147483648"),
    "alignment as a text": Spoilt(key("general.alignment", "string", "32"), "has alignment 32"),
    "alignment of 64 bits": Spoilt(key("general.alignment", "u64", 32), "has alignment 32"),
    "alignment 16": Spoilt(
        both(key("general.alignment", "u32", 16), lambda g: setattr(g, "alignment", 16)),
        "has alignment 16, expected at least 32",
    ),
    "dimension 0": Spoilt(dims(QKV, [256, 0]), r"has shape \[256, 0\]"),
    "dimension -1": Spoilt(dims(QKV, [256, 2**64 - 1]), "has shape"),
    "a product of 2^64": Spoilt(dims(QKV, [2**42 + 32, 2**22]), "has shape"),
    "a product of 0 modulo 2^64": Spoilt(dims(QKV, [2**32, 2**32]), "has shape"),
    "no dimensions": Spoilt(dims(QKV, []), "has 0 dimensions"),
    "5 dimensions": Spoilt(dims(QKV, [256, 1, 1, 1, 1]), "has 5 dimensions, expected 1 to 4"),
    "crooked offset": Spoilt(lambda g: setattr(g.part(QKV), "offset", 7), "starts at 7 of the data"),
    "overlap": Spoilt(lambda g: setattr(g.part(QKV), "offset", 32), "starts at 32 of the data"),
    "offset past the end": Spoilt(lambda g: setattr(g.part(QKV), "offset", 2**40), "starts at"),
    "offset 2^64-32": Spoilt(lambda g: setattr(g.part(QKV), "offset", 2**64 - 32), "starts at"),
    "unknown tensor type": Spoilt(lambda g: setattr(g.part(QKV), "type_id", 43), "has the unknown type 43"),
    "removed tensor type": Spoilt(lambda g: setattr(g.part(QKV), "type_id", 31), "has the unknown type 31"),
    "a row of half a block": Spoilt(dims(QKV, [272, 2]), "has rows of 272 values, Q8_0 needs a multiple"),
    "a tensor twice": Spoilt(renamed(UP, QKV.encode()), "is there twice"),
    "a tensor name of 64 bytes": Spoilt(renamed(UP, b"x" * 64), "of 64 bytes, expected at most 63"),
    "a zero in a tensor name": Spoilt(renamed(UP, UP.encode() + b"\0"), "with a zero in it"),
    "a tensor too few": Spoilt(without(UP), f"has no tensor '{UP}'"),
    "a tensor under another name": Spoilt(renamed(UP, b"blk.1.ffn_top.weight"), "ffn_top|has no tensor"),
    "a matrix of integers": Spoilt(
        replaced(QKV, [256, 512], 24, bytes(256 * 512)), "is I8, not fit for a weight"
    ),
    "a matrix of Q8_K": Spoilt(
        replaced(QKV, [256, 512], 15, bytes(292 * 512)), "is Q8_K, not fit for a weight"
    ),
    "a matrix the wrong way round": Spoilt(dims(UP, [1536, 256]), r"has shape \[1536, 256\]"),
    "a norm in F16": Spoilt(replaced("blk.1.attn_norm.weight", [256], 1, bytes(512)), "is F16, expected F32"),
    "architecture": Spoilt(key("general.architecture", "string", "llama"), "has architecture 'llama'"),
    "no architecture": Spoilt(lambda g: g.drop("general.architecture"), "has architecture 'none'"),
    "architecture as a number": Spoilt(key("general.architecture", "u32", 3), "is of type u32"),
    "block_count 0": Spoilt(phi("block_count", "u32", 0), "has block_count 0"),
    "block_count 3": Spoilt(phi("block_count", "u32", 3), r"blk\.3|wrong", "has block_count 3, bundle"),
    "block_count 513": Spoilt(phi("block_count", "u32", 513), "expected at most 512", "has block_count 513"),
    "block_count 2^31": Spoilt(phi("block_count", "u32", 2**31), "has block_count"),
    "block_count -1": Spoilt(phi("block_count", "u32", 2**32 - 1), "has block_count"),
    "block_count as a text": Spoilt(phi("block_count", "string", "4"), "of type string, expected u32"),
    "block_count of 64 bits": Spoilt(phi("block_count", "u64", 4), "of type u64, expected u32"),
    "no block_count": Spoilt(lambda g: g.drop("phi3.block_count"), r"has no number 'phi3\.block_count'"),
    "3 heads": Spoilt(phi("attention.head_count", "u32", 3), "has 3 heads", "has attention.head_count 3"),
    "0 heads": Spoilt(phi("attention.head_count", "u32", 0), "has attention.head_count 0"),
    "3 heads for keys": Spoilt(
        phi("attention.head_count_kv", "u32", 3), "has 4 heads and 3", "has attention.head_count_kv 3"
    ),
    "0 heads for keys": Spoilt(phi("attention.head_count_kv", "u32", 0), "head_count_kv 0"),
    "heads by layer": Spoilt(
        phi("attention.head_count", "array", numbers("u32", [4, 4, 4, 0])), "of type array, expected u32"
    ),
    "width 0": Spoilt(phi("embedding_length", "u32", 0), "has embedding_length 0"),
    "width 2^31": Spoilt(phi("embedding_length", "u32", 2**31), "has embedding_length"),
    "width 512": Spoilt(phi("embedding_length", "u32", 512), "has shape", "has embedding_length 512"),
    "context_length 0": Spoilt(phi("context_length", "u32", 0), "has context_length 0"),
    "no context_length": Spoilt(lambda g: g.drop("phi3.context_length"), r"'phi3\.context_length'"),
    "feed-forward 0": Spoilt(phi("feed_forward_length", "u32", 0), "has feed_forward_length 0"),
    "epsilon NaN": Spoilt(phi("attention.layer_norm_rms_epsilon", "f32", math.nan), "expected a finite"),
    "epsilon -1": Spoilt(
        phi("attention.layer_norm_rms_epsilon", "f32", -1.0),
        "expected a number above 0",
        "epsilon -1, bundle",
    ),
    "epsilon as a whole number": Spoilt(phi("attention.layer_norm_rms_epsilon", "u32", 1), "expected f32"),
    "rope base 0": Spoilt(
        phi("rope.freq_base", "f32", 0.0), "rope.freq_base 0, expected a number above", "rope.freq_base 0, "
    ),
    "rope base inf": Spoilt(phi("rope.freq_base", "f32", math.inf), "rope.freq_base inf, expected a finite"),
    "47 rotated": Spoilt(phi("rope.dimension_count", "u32", 47), "rotates 47", "rope.dimension_count 47"),
    "66 rotated": Spoilt(phi("rope.dimension_count", "u32", 66), "rotates 66", "rope.dimension_count 66"),
    "unknown rope scaling": Spoilt(phi("rope.scaling.type", "string", "su"), "has rope.scaling.type 'su'"),
    "more next-token layers than layers": Spoilt(
        phi("nextn_predict_layers", "u32", 5), "has nextn_predict_layers 5, expected 0"
    ),
    "experts": Spoilt(phi("expert_count", "u32", 1000), "has expert_count 1000, expected 0"),
    "experts used": Spoilt(phi("expert_used_count", "u32", 2), "has expert_used_count 2, expected 0"),
    "experts used, by layer": Spoilt(
        phi("expert_used_count", "array", numbers("u32", [2, 2, 2, 2])), "has expert_used_count an array"
    ),
    "groups of experts": Spoilt(phi("expert_group_count", "u32", 2), "has expert_group_count 2"),
    "keys of another length": Spoilt(phi("attention.key_length", "u32", 32), "has attention.key_length 32"),
    "values of another length": Spoilt(phi("attention.value_length", "u32", 32), "attention.value_length 32"),
    "not causal": Spoilt(phi("attention.causal", "bool", False), "has attention.causal False"),
    "in several files": Spoilt(key("split.count", "u16", 2), "is one part of a model in several files"),
    "64 factors for 48 dimensions": Spoilt(factors([1.0] * 32), r"has shape \[32\], expected \[24\]"),
    "a factor NaN": Spoilt(factors([math.nan] + [1.0] * 23), "holds a factor that is not a number above 0"),
    "a factor 0": Spoilt(factors([0.0] + [1.0] * 23), "holds a factor"),
    "a factor -1": Spoilt(factors([-1.0] + [1.0] * 23), "holds a factor"),
    "factors in F16": Spoilt(replaced(ROPE, [24], 1, bytes(48)), "is F16, expected F32"),
    "only long factors": Spoilt(
        without("rope_factors_short.weight"), "has no tensor 'rope_factors_short.weight'"
    ),
    "no tokenizer": Spoilt(lambda g: g.drop("tokenizer.ggml.model"), "has tokenizer None, expected gpt2"),
    "another tokenizer": Spoilt(key("tokenizer.ggml.model", "string", "plamo2"), "has tokenizer 'plamo2'"),
    "no tokens": Spoilt(lambda g: g.drop("tokenizer.ggml.tokens"), r"has no 'tokenizer\.ggml\.tokens' that"),
    "tokens that are numbers": Spoilt(
        key("tokenizer.ggml.tokens", "array", numbers("i32", [1, 2])), "that is an array of string"
    ),
    "a token too many": Spoilt(tokens(lambda v: v.append(b"one more")), "tokens for 4096 rows"),
    "a token too few": Spoilt(tokens(lambda v: v.pop()), "tokens for 4096 rows"),
    "a token twice": Spoilt(tokens(token_twice), "is there twice"),
    "a token twice up to a zero": Spoilt(tokens(zero_in_token), "is there twice"),
    "types that are floats": Spoilt(
        key("tokenizer.ggml.token_type", "array", numbers("f32", [1.0])), "that is an array of i32"
    ),
    "a type too few": Spoilt(
        key("tokenizer.ggml.token_type", "array", numbers("i32", [1] * 9)), "has 9 token_type for"
    ),
    "scores that are bytes": Spoilt(
        key("tokenizer.ggml.scores", "array", numbers("u8", [1] * 4096)), "that is an array of f32 or i32"
    ),
    "a score too few": Spoilt(key("tokenizer.ggml.scores", "array", numbers("f32", [1.0])), "has 1 scores"),
    "no merges": Spoilt(lambda g: g.drop("tokenizer.ggml.merges"), r"'tokenizer\.ggml\.merges'"),
    "an adapter": Spoilt(key("general.type", "string", "adapter"), "is an adapter, expected a model"),
}

# What llama.cpp survives, and a foreign file may hold; ours may not.
ODDITIES: Mapping[str, Spoilt] = {
    "an unknown key": Spoilt(key("phi3.something.new", "f32", 1.0), "", ""),
    "bytes after the last tensor": Spoilt(
        lambda g: setattr(g, "tail", bytes(64)), "", "bytes after its last"
    ),
    "other factors": Spoilt(factors([2.0] * 24), "", "differs from bundle.json's long_factor"),
    "another rope base": Spoilt(phi("rope.freq_base", "f32", 500.0), "", "has rope.freq_base 500, bundle"),
    "another end of text": Spoilt(key("tokenizer.ggml.eos_token_id", "u32", 10**6), "", "_id is 1000000"),
    "a bias": Spoilt(
        extra(b"blk.0.attn_qkv.bias", [512], 0, bytes(2048)),
        "",
        "has the unknown tensor 'blk.0.attn_qkv.bias'",
    ),
}

A, B = "blk.1.attn_qkv.weight.lora_a", "blk.1.attn_qkv.weight.lora_b"


def swap(g: Gguf) -> None:
    a, b = g.part(A), g.part(B)
    a.name, b.name = b.name, a.name


def alone(g: Gguf) -> None:
    g.parts.remove(g.part(B))


def other_base(g: Gguf) -> None:
    g.set("pocketphi.source.fingerprint", "string", "0" * 64)


# phi4-nano's vision adapter in Q8_0: rank 32, alpha 64.
ADAPTERS: Mapping[str, Spoilt] = {
    "a model": Spoilt(key("general.type", "string", "model"), "is not an adapter"),
    "type as a number": Spoilt(key("general.type", "u32", 1), "is not an adapter"),
    "another kind of adapter": Spoilt(key("adapter.type", "string", "dora"), "adapter.type is 'dora'"),
    "kind as a number": Spoilt(key("adapter.type", "u32", 1), "adapter.type is 1"),
    "architecture": Spoilt(key("general.architecture", "string", "llama"), "general.architecture is 'llama'"),
    "alpha NaN": Spoilt(key("adapter.lora.alpha", "f32", math.nan), "expected a finite number"),
    "alpha 0": Spoilt(key("adapter.lora.alpha", "f32", 0.0), "has alpha 0, expected a number above 0"),
    "alpha -1": Spoilt(key("adapter.lora.alpha", "f32", -1.0), "has alpha -1"),
    "alpha as a whole number": Spoilt(key("adapter.lora.alpha", "u32", 64), "has no adapter.lora.alpha that"),
    "no alpha": Spoilt(lambda g: g.drop("adapter.lora.alpha"), "has no adapter.lora.alpha that is f32"),
    "rank 0": Spoilt(dims(A, [256, 0]), r"has shape \[256, 0\]"),
    "ranks that differ": Spoilt(replaced(B, [64, 512], 8, bytes(64 * 512 // 32 * 34)), "has shape"),
    "A and B swapped": Spoilt(swap, "has shape"),
    "only A": Spoilt(alone, "has only lora_a for 'blk.1.attn_qkv.weight'"),
    "A with a third dimension": Spoilt(
        replaced(A, [256, 32, 2], 8, bytes(256 * 64 // 32 * 34)), r"has shape \[256, 32, 2\]"
    ),
    "A of integers": Spoilt(replaced(A, [256, 32], 26, bytes(256 * 32 * 4)), "is I32, not fit"),
    "another checkpoint": Spoilt(other_base, "is an adapter of another checkpoint"),
    "an unknown tensor": Spoilt(renamed(A, b"blk.1.attn_qkv.weight.lora_c"), "is no part of an adapter"),
    "a layer that is not there": Spoilt(
        both(renamed(A, b"blk.9.x.lora_a"), renamed(B, b"blk.9.x.lora_b")),
        "adapts 'blk.9.x', which is no linear layer",
    ),
    "the embedding": Spoilt(
        both(
            replaced(A, [32, 4096], 0, bytes(32 * 4096 * 4)),
            replaced(B, [16, 256], 0, bytes(16 * 1024)),
            renamed(A, b"token_embd.weight.lora_a"),
            renamed(B, b"token_embd.weight.lora_b"),
        ),
        "adapts 'token_embd.weight', which is no linear",
    ),
    "a norm": Spoilt(
        both(renamed(A, b"blk.1.attn_norm.weight.lora_a"), renamed(B, b"blk.1.attn_norm.weight.lora_b")),
        "adapts 'blk.1.attn_norm.weight', which",
    ),
    "nothing": Spoilt(lambda g: g.parts.clear(), "holds no adapter at all"),
}  # fmt: skip
