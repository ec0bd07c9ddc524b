# SPDX-License-Identifier: Apache-2.0
"""The kinds of numbers that the ONNX backbone's matrices and its adapters can be stored in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

from ..runtime.errors import InputError
from .mapping import Group

DecoderKind = Literal["fp32", "fp16", "int8", "int4"]
LoraKind = Literal["fp32", "fp16", "int8"]
"""Of A and B. The arithmetic is float32; int8 has one step for each of the rank's rows and columns."""

DECODER_KINDS: tuple[DecoderKind, ...] = get_args(DecoderKind)
LORA_KINDS: tuple[LoraKind, ...] = get_args(LoraKind)
PURE = "int4-pure"  # --onnx-quant's name for int4 without exceptions, after llama-quantize's --pure
BITS: Mapping[DecoderKind, int] = {"int8": 8, "int4": 4}  # the kinds that are blocks


@dataclass(frozen=True, slots=True)
class DecoderQuant:
    """How the matrices are stored. Norms, KV cache, softmax and everything added up are float32 always.

    int4 and int8 are MatMulNBits, blocks of weights with one scale each; fp16 is widened when the graph
    is loaded.
    """

    linear: DecoderKind = "int4"  # attn_output and ffn_up
    # Of nano/eval/text.jsonl's references on phi4-nano the mean KL divergence from fp32 is 0.00033, with int4
    # here 0.0014; of tools.jsonl's 0.00015 and 0.0011 (`eval --metric kld`).
    qkv: DecoderKind = "int8"
    down: DecoderKind = "int8"  # uniform 4-bit is reported to break Phi-4-mini there
    head: DecoderKind = "int8"  # and the embedding, tied to it or not
    block: int = 32  # weights
    accuracy_level: int = 4  # 4 rounds activations to 8 bits, block by block; 0 does not, and is slow at int8
    lora: LoraKind = "fp16"

    @classmethod
    def uniform(cls, kind: DecoderKind, lora: LoraKind = "fp16") -> DecoderQuant:
        """Everything in one kind."""
        return cls(kind, kind, kind, kind, lora=lora)

    def of(self, group: Group) -> DecoderKind:
        """The kind of one group of matrices."""
        if group in ("token_embd", "output"):
            return self.head
        return {"attn_qkv": self.qkv, "ffn_down": self.down}.get(group, self.linear)

    @property
    def name(self) -> str:
        """What it is called by one word: the kind of most of its weights; pure, if int4 of all."""
        return PURE if set(self.kinds().values()) == {"int4"} else self.linear

    def kinds(self) -> dict[str, str]:
        """What bundle.json says of it."""
        return {"linear": self.linear, "qkv": self.qkv, "down": self.down, "head": self.head}


def named_decoder_quant(name: str, lora: str) -> DecoderQuant:
    """What --onnx-quant and --onnx-lora mean, in upper or lower case: int4 makes exceptions, int4-pure none.

    Raises:
        InputError: no such type.
    """
    for what, given, known in (
        ("backbone", name, (*map(str, DECODER_KINDS), PURE)),
        ("adapter", lora, tuple(map(str, LORA_KINDS))),
    ):
        if given.lower() not in known:
            raise InputError(
                f"ONNX {what} type {given[:40]!r} is not known, expected one of {', '.join(known)}"
            )
    lora_kind = cast(LoraKind, lora.lower())
    if name.lower() == PURE:
        return DecoderQuant.uniform("int4", lora_kind)
    kind = cast(DecoderKind, name.lower())
    return DecoderQuant(lora=lora_kind) if kind == "int4" else DecoderQuant.uniform(kind, lora_kind)
