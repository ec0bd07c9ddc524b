# SPDX-License-Identifier: Apache-2.0
"""What the ONNX backbone needs in memory: its weights by their type, and a pass's buffers.

Measured as `ram_model` says, on graphs of `convert/write_onnx_decoder.py` with full-size matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .spec import TextSpec

BATCH = 512  # tokens in one pass, as in decoder_onnx
_SCORES = 1 << 26  # and its limit on what attention computes at once
_WHOLE = ("qkv", "linear", "down", "head")


@dataclass(frozen=True, slots=True)
class _Kept:
    """Bytes for each weight."""

    file: float  # with its share of the scales
    packed: float  # in memory of its own
    mapped: float = 0.0  # of the file, when that is done


# ONNX Runtime keeps float32 scales and the sums of blocks beside them, and gives back all of the file but the
# scales. Ours keep scales of 16 bits; what they have read stays mapped. fp16 is computed in float32.
_FLOAT: Mapping[str, _Kept] = {"fp16": _Kept(2.0, 4.0), "fp32": _Kept(4.0, 4.0)}
_STOCK = {**_FLOAT, "int4": _Kept(0.625, 0.75, 0.125), "int8": _Kept(1.125, 1.25, 0.125)}
_OURS = {**_FLOAT, "int4": _Kept(0.625, 0.5625, 0.625), "int8": _Kept(1.125, 1.0625, 1.125)}
LORA_BYTES: Mapping[str, float] = {"int8": 1.0, "fp16": 2.0, "fp32": 4.0}  # of one of its weights
_WIDTHS, _LORA_WIDTHS = 7.4, 8.7  # of gate and up together, float32: what a token of a pass has alive at most


def weights(text: TextSpec, quant: Mapping[str, str], n_bytes: int, packed: bool) -> tuple[int, int, int]:
    """Bytes that are packed, those of the file that stay mapped, and those mapped while it is read.

    Args:
        quant: as in `bundle.OnnxInfo`.
        n_bytes: of the file.
        packed: by our kernels.
    """
    table = _OURS if packed else _STOCK
    kept = {group: table.get(quant.get(group, ""), table["fp32"]) for group in _WHOLE}
    values = _matrices(text)
    private = sum(kept[group].packed * n for group, n in values.items())
    mapped = min(int(sum(kept[group].mapped * n for group, n in values.items())), n_bytes)
    # The head is the largest, and the last to be packed: it is read when all the others are.
    reading = (kept["head"].file - (kept["head"].mapped if packed else 0.0)) * values["head"]
    return int(private), mapped, mapped + int(reading)


def compute_bytes(text: TextSpec, n_ctx: int, lora: bool, rows: int = BATCH) -> int:
    """What a pass of `rows` tokens takes beside weights and cache."""
    n = max(1, min(rows, BATCH, n_ctx, _SCORES // (text.n_heads * n_ctx)))
    scores = n * n_ctx * text.n_heads * 4  # while they are there, the MLP is not
    return max(int(n * 2 * text.d_ff * 4 * (_LORA_WIDTHS if lora else _WIDTHS)), scores) + 4 * text.vocab_size


def _matrices(text: TextSpec) -> dict[str, int]:
    """How many weights each group has, all layers together."""
    return {
        "qkv": text.n_layers * (text.d_q + 2 * text.d_kv) * text.d_model,
        "linear": text.n_layers * (text.d_q + 2 * text.d_ff) * text.d_model,
        "down": text.n_layers * text.d_ff * text.d_model,
        "head": text.vocab_size * text.d_model,
    }
