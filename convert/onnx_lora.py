# SPDX-License-Identifier: Apache-2.0
"""How a LoRA enters an ONNX graph: as inputs that may be left out, of rank 0 then.

For a linear layer NAME, [out, in], the graph computes y + ((x A) · scale) B with

    NAME.lora_A      [in, rank]
    NAME.lora_B      [rank, out], times alpha / rank
    NAME.lora_scale  float32 [rank], of int8 alone: A's step for each column times B's for each row

ONNX Runtime takes them from an adapter file when the run names one. A product over rank 0 is zero, exactly.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from .decoder_quant import LoraKind as LoraKind
from .onnx_graph import OnnxGraph

DTYPES: Mapping[LoraKind, str] = {"fp32": "float32", "fp16": "float16", "int8": "int8"}


def add_lora(graph: OnnxGraph, x: str, y: str, name: str, shape: tuple[int, ...], kind: LoraKind) -> str:
    """y and what an adapter adds to it.

    Args:
        x, y: float32 [b, s, in] and [b, s, out].
        shape: (out, in).
    """
    d_out, d_in = shape
    dtype = DTYPES[kind]
    a = graph.input(f"{name}.lora_A", dtype, (d_in, "rank"), default=np.zeros((d_in, 0), dtype))
    b = graph.input(f"{name}.lora_B", dtype, ("rank", d_out), default=np.zeros((0, d_out), dtype))
    if kind != "fp32":
        a, b = (graph.op("Cast", part, to=onnx.TensorProto.FLOAT) for part in (a, b))
    inner = graph.op("MatMul", x, a)
    if kind == "int8":
        scale = graph.input(f"{name}.lora_scale", "float32", ("rank",), default=np.zeros(0, np.float32))
        inner = graph.op("Mul", inner, scale)
    return graph.op("Add", y, graph.op("MatMul", inner, b))
