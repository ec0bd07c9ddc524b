# SPDX-License-Identifier: Apache-2.0
"""What an encoder needs in memory: its weights, what it keeps from its first run on, what it takes at work.

Measured as `ram_model` says.
"""

from __future__ import annotations

from dataclasses import dataclass

from .hd import Layout, layout

TOKENS_PER_SECOND = 12.5  # of audio
_CROP_BYTES = 3 * 448 * 448 * 4
_CROP_FEATURES = 256


@dataclass(frozen=True, slots=True)
class FileSize:
    """An adapter or an encoder on disk."""

    n_bytes: int
    quant: str  # Q8_0, …; int8, int4, fp16 or fp32


@dataclass(frozen=True, slots=True)
class _Cost:
    """An encoder at full size, by the type of its weights."""

    file: int  # bytes of its graphs
    resident: float  # loaded, for each byte of the file
    work: int  # bytes of ONNX Runtime's arena after the first crop, or for a clip's first tokens
    mapped: float = 0.0  # for each byte of the file: pages of it that stay in use, and can be taken back
    least: int = 0  # of the arena at any width: phi4-nano's, which is a ninth as wide


# fp16 is computed in fp32; int4 keeps some of what is mapped beside what it packs.
_VISION = {
    "int8": _Cost(429_900_000, 1.17, 150_000_000, least=42_000_000),
    "int4": _Cost(319_800_000, 1.00, 230_000_000, 0.42),
    "fp16": _Cost(824_200_000, 2.12, 235_000_000),
    "fp32": _Cost(1_645_500_000, 1.01, 235_000_000, least=7_000_000),
}
_SPEECH = {
    "int8": _Cost(470_700_000, 1.01, 46_000_000),
    "int4": _Cost(309_400_000, 1.00, 45_000_000, 0.35),
    "fp16": _Cost(935_400_000, 2.10, 60_000_000),
    "fp32": _Cost(1_866_500_000, 1.00, 50_000_000),
}
_VISION_WIDTH, _SPEECH_WIDTH = 1152, 1024
_PROJECTOR_BYTES = 50_000_000  # of 2,048 rows in the vision projector
_SPEECH_TOKEN_BYTES, _BLOCK_TOKENS = 280_000, 500  # for a token of a block, and a block's most
_PAIR_BYTES = 32  # for two of its tokens: attention's scores and their softmax, of the fewest heads, four


def vision_bytes(size: FileSize, d_model: int, image: tuple[int, int], max_crops: int) -> tuple[int, int]:
    """The vision encoder loaded with what it keeps, and what it takes while it reads a picture."""
    cost, (width, height) = _cost("vision", size), image
    made = layout(width, height, max_crops)
    scale = _scale(size, cost)
    rows = made.n_tokens * d_model * 4
    features = int(made.n_crops * _CROP_FEATURES * _VISION_WIDTH * scale) * 4
    arena = cost.least + int((cost.work - cost.least) * scale)
    work = width * height * 3 + made.n_crops * _CROP_BYTES + 2 * features + int(_PROJECTOR_BYTES * scale)
    before = picture_bytes(width, height, made) - arena  # which comes with the first crop
    return int(cost.resident * size.n_bytes) + arena + rows, max(work + rows, before)


def mapped_bytes(name: str, size: FileSize) -> int:
    """Of an encoder's file, what stays in use; the system may take it back."""
    return int(_cost(name, size).mapped * size.n_bytes)


def weights_of(name: str, size: FileSize) -> float:
    """How many weights an encoder has."""
    return float(_cost(name, FileSize(0, "int8")).file * _scale(size, _cost(name, size)) ** 2)


def picture_bytes(width: int, height: int, made: Layout) -> int:
    """The most that `image` holds while it decodes a picture, scales it, or cuts the canvas into crops."""
    pixels, scaled = 3 * width * height, 3 * made.width * made.height
    canvas = (made.n_crops - 1) * _CROP_BYTES // 4  # 8 bits; then float32 for the global view, which is
    # shrunk across, then down: by an even factor with a sum, a term and what the term is made of.
    across = canvas * 4 // made.columns
    shrunk = across * (1 if made.columns % 2 else 3)
    shrunk = max(shrunk, across + across // made.rows * (1 if made.rows % 2 else 3))
    cutting = scaled + 5 * canvas + made.n_crops * _CROP_BYTES + shrunk
    return pixels + max(pixels + 3 * height * made.width + scaled, cutting)


def speech_bytes(size: FileSize, d_model: int, seconds: float) -> tuple[int, int]:
    """The speech encoder loaded with what it keeps, and what it takes while it reads a clip."""
    cost = _cost("speech", size)
    scale = _scale(size, cost)
    tokens = int(seconds * TOKENS_PER_SECOND) + 1
    rows = tokens * d_model * 4
    hidden = int(tokens * _SPEECH_WIDTH * scale) * 4
    clip = int(seconds * 24_000 * 4)  # 16,000 samples and 8,000 log-mel features a second
    block = min(tokens, _BLOCK_TOKENS)
    arena = int((cost.work + block * _SPEECH_TOKEN_BYTES) * scale)
    arena += int(block * block * _PAIR_BYTES * (1 - scale))  # at full size it is in the line above
    return int(cost.resident * size.n_bytes) + arena + rows + hidden, clip + rows


def _scale(size: FileSize, cost: _Cost) -> float:
    """A smaller encoder is narrower by about the root of its weights, and so is what it computes."""
    return float(min(1.0, (size.n_bytes / cost.file) ** 0.5))


def _cost(name: str, size: FileSize) -> _Cost:
    costs = _VISION if name.startswith("vision") else _SPEECH
    return costs.get(size.quant, costs["fp32"])
