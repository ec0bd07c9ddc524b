# SPDX-License-Identifier: Apache-2.0
"""The speech encoder as onnxruntime-genai's `phi4mm` wants it: from its processor's features to rows.

    genai-speech.onnx  audio_embeds float32 [clips, frames, 80], log-mel,
                       audio_attention_mask bool [clips, frames], true for each frame of the clip,
                       audio_sizes int64 [clips], tokens, which follow from the mask,
                       audio_projection_mode int64 [1], 3 where there are pictures too
                       -> audio_features float32 [all clips' tokens, d_model + 2]

It is speech-front.onnx, speech.onnx and a projector, in the pieces and blocks of runtime/speech_encoder.py.
The last two columns are 0 and 1: see genai_decoder.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx

from .genai_config import N_FLAGS, SPEECH
from .onnx_compose import FLOAT, Composition, Scope, read_part

_BLOCK_TOKENS, _PIECE_TOKENS, _TOKEN_FRAMES, _HALO = 500, 32, 8, 8  # as in runtime/speech_encoder.py
_WITH_PICTURES = 3  # genai's number of the mode

Parts = Mapping[str, onnx.GraphProto]


def speech(directory: Path, graphs: Mapping[str, str], n_mels: int, d_model: int) -> Composition:
    """genai-speech.onnx over the graphs of `directory`, named as in bundle.ENCODER_GRAPHS."""
    parts = {key: read_part(directory / file) for key, file in graphs.items()}
    whole = Composition(SPEECH.removesuffix(".onnx"))
    g = whole.main
    features = whole.input("audio_embeds", "float32", ("clips", "frames", n_mels))
    masks = whole.input("audio_attention_mask", "bool", ("clips", "frames"))
    whole.input("audio_sizes", "int64", ("clips",))
    mode = whole.input("audio_projection_mode", "int64", (1,))
    with_pictures = g.op("Squeeze", g.op("Equal", mode, g.ints(_WITH_PICTURES)))

    def clip(inner: Scope, n: str, state: list[str]) -> list[str]:
        mask = inner.op("Cast", inner.op("Gather", masks, n), to=onnx.TensorProto.INT64)
        frames = inner.op("ReduceSum", mask, inner.ints(0), keepdims=1)
        own = inner.slice(inner.op("Gather", features, n), inner.ints(0), frames, 0)
        return [_clip(inner, parts, own, frames, (with_pictures, state[0], d_model))]

    none = g.op("ConstantOfShape", g.ints(0, d_model))
    count = g.op("Squeeze", g.size(features, 0))
    (rows,) = g.loop(count, [(none, FLOAT, ("rows", d_model))], clip)
    flags = g.op(
        "Expand", g.constant([[0, 1]], "float32"), g.op("Concat", g.size(rows, 0), g.ints(1), axis=0)
    )
    rows = g.op("Concat", rows, flags, axis=1)
    whole.output(rows, "audio_features", "float32", ("audio_rows", d_model + N_FLAGS))
    return whole


def _clip(g: Scope, parts: Parts, features: str, frames: str, rest: tuple[str, str, int]) -> str:
    """The rows so far and one clip's behind them: float32 [rows, d_model]."""
    with_pictures, rows, d_model = rest
    d = parts["front"].output[0].type.tensor_type.shape.dim[1].dim_value
    tokens = g.op("Div", g.op("Add", frames, g.ints(_TOKEN_FRAMES - 1)), g.ints(_TOKEN_FRAMES))
    features = g.op("Unsqueeze", features, g.ints(0))

    def piece(inner: Scope, n: str, state: list[str]) -> list[str]:
        first = inner.op(
            "Mul", inner.op("Unsqueeze", n, inner.ints(0)), inner.ints(_PIECE_TOKENS * _TOKEN_FRAMES)
        )
        start = inner.op("Max", inner.op("Sub", first, inner.ints(_HALO)), inner.ints(0))
        end = inner.op("Add", first, inner.ints(_PIECE_TOKENS * _TOKEN_FRAMES))
        part = inner.slice(features, start, end, 1)
        (made,) = inner.inline(parts["front"], "speech-front", features=part)
        surplus = inner.op("Div", inner.op("Sub", first, start), inner.ints(_TOKEN_FRAMES))
        made = inner.slice(made, surplus, inner.ints(_PIECE_TOKENS + 1), 0)
        return [inner.op("Concat", state[0], made, axis=0)]

    def block(inner: Scope, n: str, state: list[str]) -> list[str]:
        start = inner.op("Mul", inner.op("Unsqueeze", n, inner.ints(0)), inner.ints(_BLOCK_TOKENS))
        some = inner.slice(subsampled, start, inner.op("Add", start, inner.ints(_BLOCK_TOKENS)), 0)
        length = inner.size(some, 0)
        # The reference fills a long clip's last block up with zeros and lets attention see them.
        is_long = inner.op("Greater", tokens, inner.ints(_BLOCK_TOKENS))
        missing = inner.op("Sub", inner.ints(_BLOCK_TOKENS), length)
        missing = inner.op("Where", is_long, missing, inner.ints(0))
        some = inner.op("Pad", some, inner.op("Concat", inner.ints(0, 0), missing, inner.ints(0), axis=0))
        (hidden,) = inner.inline(parts["trunk"], "speech", tokens=some)
        hidden = inner.slice(hidden, inner.ints(0), length, 0)
        made = inner.choose(
            with_pictures,
            lambda s: s.inline(parts["vision-projector"], "speech-vision-projector", hidden=hidden)[0],
            lambda s: s.inline(parts["speech-projector"], "speech-projector", hidden=hidden)[0],
            FLOAT,
            ("block", d_model),
        )
        return [inner.op("Concat", state[0], made, axis=0)]

    none = g.op("ConstantOfShape", g.ints(0, d))
    (subsampled,) = g.loop(_pieces(g, tokens, _PIECE_TOKENS), [(none, FLOAT, ("tokens", d))], piece)
    (found,) = g.loop(_pieces(g, tokens, _BLOCK_TOKENS), [(rows, FLOAT, ("rows", d_model))], block)
    return found


def _pieces(g: Scope, count: str, size: int) -> str:
    """How many pieces of `size` a number int64 [1] has, as a number: rounded up."""
    return g.op("Squeeze", g.op("Div", g.op("Add", count, g.ints(size - 1)), g.ints(size)))
