# SPDX-License-Identifier: Apache-2.0
"""The vision encoder as onnxruntime-genai's `phi4mm` wants it: from its processor's crops to rows.

    genai-vision.onnx  pixel_values float32 [images, crops, 3, 448, 448]; the first is not read,
                       image_attention_mask float32 [images, crops, 32, 32], 1 for each patch of the picture,
                       image_sizes int64 [images, 2], height and width of the crops together, in pixels
                       -> image_features float32 [all images' rows, d_model + 2]

It is vision.onnx, crop by crop, and vision-projector.onnx, with what runtime/hd.py does in between. The last
two columns are 1 and 0: see genai_decoder.py.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import onnx

from .genai_config import N_FLAGS, VISION
from .onnx_compose import FLOAT, Composition, Scope, read_part

_CROP, _PATCH, _SIDE = 448, 14, 32  # pixels, pixels, patches
_ROWS = _SIDE // 2  # of features, a side of a crop
_CROP_FEATURES = _ROWS * _ROWS
_SUB, _GLOBAL, _FIRST = 0, 1, 2  # of the projector's `rows`: the separators, the first feature

Parts = Mapping[str, onnx.GraphProto]


def vision(directory: Path, graphs: Mapping[str, str], d_model: int) -> Composition:
    """genai-vision.onnx over the graphs of `directory`, "tower" and "projector"."""
    parts = {key: read_part(directory / file) for key, file in graphs.items()}
    whole = Composition(VISION.removesuffix(".onnx"))
    g = whole.main
    pixels = whole.input("pixel_values", "float32", ("images", "crops", 3, _CROP, _CROP))
    masks = whole.input("image_attention_mask", "float32", ("images", "crops", _SIDE, _SIDE))
    sizes = whole.input("image_sizes", "int64", ("images", 2))

    def picture(inner: Scope, n: str, state: list[str]) -> list[str]:
        own = [inner.op("Gather", x, n) for x in (pixels, masks, sizes)]
        rows = _picture(inner, parts, own[0], own[1], own[2])
        return [inner.op("Concat", state[0], rows, axis=0)]

    none = g.op("ConstantOfShape", g.ints(0, d_model))
    count = g.op("Squeeze", g.size(pixels, 0))
    (rows,) = g.loop(count, [(none, FLOAT, ("rows", d_model))], picture)
    flags = g.op(
        "Expand", g.constant([[1, 0]], "float32"), g.op("Concat", g.size(rows, 0), g.ints(1), axis=0)
    )
    rows = g.op("Concat", rows, flags, axis=1)
    whole.output(rows, "image_features", "float32", ("image_rows", d_model + N_FLAGS))
    return whole


def _picture(g: Scope, parts: Parts, pixels: str, masks: str, size: str) -> str:
    """Rows for one picture: float32 [rows, d_model]."""
    grid = g.op("Div", size, g.ints(_CROP))
    down, across = g.ops("Split", grid, g.ints(1, 1), n_outputs=2, axis=0)
    count = g.op("Add", g.op("Mul", down, across), g.ints(1))
    pixels = _with_view(g, g.slice(pixels, g.ints(1), count, 0), grid)
    width = parts["tower"].output[0].type.tensor_type.shape.dim[1].dim_value
    (features,) = g.loop(
        g.op("Squeeze", count),
        [],
        functools.partial(_crop, parts["tower"], pixels, masks),
        [(FLOAT, (_CROP_FEATURES, width))],
    )
    features = g.op("Reshape", features, g.ints(-1, width))
    rows = _assembly(g, g.slice(masks, g.ints(1), count, 0), down, across)
    (found,) = g.inline(parts["projector"], "vision-projector", features=features, rows=rows)
    return found


def _with_view(g: Scope, crops: str, grid: str) -> str:
    """The crops with the global view in front: float32 [1 + crops, 3, 448, 448].

    genai's processor gives a view that is smoothed as it is made smaller; the model has learned from one that
    is not, so it is made here: bicubic with a = -0.75, as torch's `interpolate`.
    """
    sides = g.ints(3, _CROP, _CROP)
    canvas = g.op("Reshape", crops, g.op("Concat", grid, sides, axis=0))
    canvas = g.op("Transpose", canvas, perm=[2, 0, 3, 1, 4])
    shape = g.op("Concat", g.ints(1, 3), g.op("Mul", grid, g.ints(_CROP)), axis=0)
    canvas = g.op("Reshape", canvas, shape)
    view = g.op(
        "Resize",
        canvas,
        "",
        "",
        g.ints(1, 3, _CROP, _CROP),
        mode="cubic",
        cubic_coeff_a=-0.75,
        coordinate_transformation_mode="half_pixel",
    )
    return g.op("Concat", view, crops, axis=0)


def _crop(tower: onnx.GraphProto, pixels: str, masks: str, g: Scope, n: str, state: list[str]) -> list[str]:
    """Features of one crop, [16 · 16, d]: only the patches of the picture are computed, the others are 0."""
    mask = g.op("Cast", g.op("Gather", masks, n), to=onnx.TensorProto.INT64)
    valid, even = [], []
    for axis in (0, 1):
        line = g.op("Gather", mask, g.number(0), axis=1 - axis)
        valid.append(g.op("ReduceSum", line, g.ints(0), keepdims=1))
        even.append(g.op("Add", valid[-1], g.op("Mod", valid[-1], g.ints(2))))
    side = g.ints(3, _SIDE, _PATCH, _SIDE, _PATCH)
    patches = g.op("Transpose", g.op("Reshape", g.op("Gather", pixels, n), side), perm=[1, 3, 0, 2, 4])
    for axis in (0, 1):
        patches = g.slice(patches, g.ints(0), even[axis], axis)
    patches = g.op("Reshape", patches, g.ints(1, -1, 3 * _PATCH * _PATCH))
    ids, keys = _places(g, valid, even)
    halves = [g.op("Div", x, g.ints(2)) for x in even]
    grid = g.op("Concat", *halves, axis=0)
    (found,) = g.inline(tower, "vision", patches=patches, position_ids=ids, keys=keys, grid=grid)
    found = g.op("Reshape", found, g.op("Concat", grid, g.ints(-1), axis=0))
    missing = g.op("Sub", g.ints(_ROWS, _ROWS), grid)
    found = g.op("Pad", found, g.op("Concat", g.ints(0, 0, 0), missing, g.ints(0), axis=0))
    return [g.op("Reshape", found, g.ints(_CROP_FEATURES, -1))]


def _places(g: Scope, valid: list[str], even: list[str]) -> tuple[str, str]:
    """Each patch's row of the position embedding, and the patches that are attended to: see hd.Window."""
    buckets, lines = [], []
    for n in valid:
        line = g.op("Range", g.number(0), g.op("Squeeze", n), g.number(1))
        lines.append(line)
        buckets.append(g.op("Div", g.op("Mul", line, g.number(_SIDE)), n))
    flat = g.ints(-1)
    ids = g.op("Add", g.op("Mul", g.op("Unsqueeze", buckets[0], g.ints(1)), g.number(_SIDE)), buckets[1])
    keys = g.op("Add", g.op("Mul", g.op("Unsqueeze", lines[0], g.ints(1)), even[1]), lines[1])
    odd = [g.op("Sub", e, v) for e, v in zip(even, valid, strict=True)]
    ids = g.op("Pad", ids, g.op("Concat", g.ints(0, 0), *odd, axis=0))
    return g.op("Reshape", ids, flat), g.op("Reshape", keys, flat)


def _assembly(g: Scope, masks: str, down: str, across: str) -> str:
    """int64 [rows]: which feature, or separator, stands where; see hd.Layout.assembly."""
    crops = g.op("Concat", down, across, axis=0)
    shape = g.op("Concat", crops, g.ints(_SIDE, _SIDE), axis=0)
    mask = g.op("Cast", g.op("Reshape", masks, shape), to=onnx.TensorProto.INT64)
    useful = []
    for axis in (0, 1):
        line = g.op("Gather", g.op("Gather", mask, g.number(0), axis=1 - axis), g.number(0), axis=2 - axis)
        count = g.op("Reshape", g.op("ReduceSum", line, keepdims=0), g.ints(1))
        useful.append(g.op("Div", g.op("Add", count, g.ints(1)), g.ints(2)))
    total = g.op("Mul", g.op("Mul", down, across), g.ints(_CROP_FEATURES))
    first, end = g.number(_FIRST + _CROP_FEATURES), g.op("Add", total, g.ints(_FIRST + _CROP_FEATURES))
    mosaic = g.op("Range", first, g.op("Squeeze", end), g.number(1))
    mosaic = g.op("Reshape", mosaic, g.op("Concat", crops, g.ints(_ROWS, _ROWS), axis=0))
    mosaic = g.op("Transpose", mosaic, perm=[0, 2, 1, 3])
    mosaic = g.op("Reshape", mosaic, g.op("Mul", crops, g.ints(_ROWS, _ROWS)))
    for axis in (0, 1):
        mosaic = g.slice(mosaic, g.ints(0), useful[axis], axis)
    view = g.op("Range", g.number(_FIRST), first, g.number(1))
    view = g.op("Reshape", view, g.ints(_ROWS, _ROWS))
    parts = [
        g.op("Reshape", g.op("Pad", x, g.ints(0, 0, 0, 1), g.number(_SUB)), g.ints(-1))
        for x in (mosaic, view)
    ]
    return g.op("Concat", parts[0], g.ints(_GLOBAL), parts[1], axis=0)
