# SPDX-License-Identifier: Apache-2.0
"""Builds an ONNX graph node by node while its weights stream into an external data file.

A graph is one `NAME.onnx` and, when it holds large tensors, one `NAME.onnx.data` beside it. Every weight
is written as soon as it is added, so that memory is one tensor and not the model. Same calls, same bytes.
Parts of a graph can be files of their own: they refer to the whole one's data.

Linear layers come in four kinds:

* fp32: as it is.
* fp16: stored as float16, cast by a node that ONNX Runtime folds when it loads; the arithmetic is float32.
* int8: DynamicQuantizeMatMul: signed weights with one scale per output channel, activations quantized to
  unsigned 8 bits with one range per call. This is the fast kind on CPUs.
* int4: MatMulNBits: blocks of 32 weights with one scale each, a float16's number kept as float32. This is
  the small kind.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from ..runtime.bundle import BundleFile
from .encoder_quant import ENCODER_QUANTS as ENCODER_QUANTS
from .encoder_quant import EncoderQuant as EncoderQuant
from .encoder_quant import named_quant as named_quant
from .output import HashedFile, write_file

Float32 = npt.NDArray[np.float32]

OPSET = 21  # the newest that ONNX Runtime 1.20, the oldest we accept, implements in full
IR_VERSION = 10  # the one that came with opset 21
MICROSOFT = "com.microsoft"  # ONNX Runtime's own operators: fused attention, quantized products
ALIGNMENT = 4096  # bytes; external tensors start on a page so that they can be mapped
INLINE_BYTES = 4096  # smaller tensors stay in the graph's own file
INT4_BLOCK = 32  # weights
_CACHED_VALUES = 1 << 18  # weights rounded at a time: 1 MB of float32 stays in the cache

Dim = int | str  # a name for a dimension that the caller chooses at run time
_TYPES: Mapping[str, int] = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "int64": onnx.TensorProto.INT64,
    "int32": onnx.TensorProto.INT32,
    "int8": onnx.TensorProto.INT8,
    "uint8": onnx.TensorProto.UINT8,
    "bool": onnx.TensorProto.BOOL,
}


class OnnxGraph:
    """One graph under construction. A context manager: leaving it closes the data file.

    Values are named by strings: what `input`, `constant`, `weight`, `op` and `linear` return is what the
    next node takes. Names count upwards, so they depend on nothing but the order of the calls.
    """

    def __init__(self, directory: Path, name: str, producer: str = "") -> None:
        """Begin `directory / name.onnx`, which must not exist; `producer` goes into its metadata."""
        self._directory, self._name, self._producer = directory, name, producer
        self._nodes: list[onnx.NodeProto] = []
        self._tensors: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._data: HashedFile | None = None
        self._data_size = 0

    def __enter__(self) -> OnnxGraph:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._data is not None:
            self._data.__exit__(kind, exc, trace)

    def input(
        self, name: str, dtype: str, shape: Iterable[Dim], default: npt.NDArray[Any] | None = None
    ) -> str:
        """Declare a graph input; `dtype` is numpy's name. With a default, small, it may be left out."""
        self._inputs.append(helper.make_tensor_value_info(name, _TYPES[dtype], list(shape)))
        if default is not None:
            self._tensors[name] = _tensor(name, default)
        return name

    def output(self, value: str, name: str, dtype: str, shape: Iterable[Dim]) -> None:
        """Give a value to the outside as output `name`; without a copy if `named` has named it so."""
        if value != name:
            self._nodes.append(helper.make_node("Identity", [value], [name], name=f"{name}:Identity"))
        self._outputs.append(helper.make_tensor_value_info(name, _TYPES[dtype], list(shape)))

    @property
    def outputs(self) -> list[onnx.ValueInfoProto]:
        """What the graph gives to the outside so far."""
        return list(self._outputs)

    def named(self, value: str, name: str) -> str:
        """Give an output of the latest node a name of its own."""
        outputs = self._nodes[-1].output
        outputs[list(outputs).index(value)] = name
        return name

    def op(self, op: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output. An input of "" is an optional one left out."""
        return self.ops(op, *inputs, n_outputs=1, domain=domain, **attributes)[0]

    def ops(
        self,
        op: str,
        *inputs: str,
        n_outputs: int,
        unused: Container[int] = (),
        domain: str = "",
        **attributes: Any,
    ) -> tuple[str, ...]:
        """Add a node with several outputs; those of `unused` are "", not to be computed."""
        name = f"{len(self._nodes)}:{op}"
        outputs = tuple("" if i in unused else f"{name}.{i}" for i in range(n_outputs))
        self._nodes.append(
            helper.make_node(op, list(inputs), list(outputs), name=name, domain=domain, **attributes)
        )
        return outputs

    def constant(self, value: npt.ArrayLike, dtype: str) -> str:
        """A small tensor; equal ones are stored once."""
        array = np.asarray(value, dtype)
        shape = "x".join(map(str, array.shape)) or "scalar"
        name = f"const:{dtype}:{shape}:{array.tobytes().hex()}"
        if name not in self._tensors:
            self._tensors[name] = _tensor(name, array)
        return name

    def weight(self, name: str, array: npt.NDArray[Any]) -> str:
        """A tensor of the model under a name of its own. It is written now and may be freed after the call.

        Raises:
            OutputError: the data file cannot be written.
        """
        array = np.ascontiguousarray(array)
        if array.nbytes <= INLINE_BYTES:
            assert name not in self._tensors, f"{name} is added twice"
            self._tensors[name] = _tensor(name, array)
            return name
        return self.stream(name, array.dtype.name, array.shape, [array])

    def stream(
        self, name: str, dtype: str, shape: tuple[int, ...], pieces: Iterable[npt.NDArray[Any]]
    ) -> str:
        """A weight that comes in pieces, one after the other along its first axis.

        Raises:
            OutputError: the data file cannot be written.
        """
        assert name not in self._tensors, f"{name} is added twice"
        if self._data is None:
            self._data = HashedFile(self._directory, self._data_name)
        self._data.pad(ALIGNMENT)
        offset = self._data_size + -self._data_size % ALIGNMENT
        size = 0
        for piece in pieces:
            little = np.ascontiguousarray(piece, np.dtype(dtype).newbyteorder("<"))
            self._data.write(little.reshape(-1).view(np.uint8).data)
            size += little.nbytes
        assert size == math.prod(shape) * np.dtype(dtype).itemsize, f"{name} is not whole"
        self._data_size = offset + size
        proto = onnx.TensorProto(
            name=name, data_type=_TYPES[dtype], dims=shape, data_location=onnx.TensorProto.EXTERNAL
        )
        for key, value in (("location", self._data_name), ("offset", str(offset)), ("length", str(size))):
            proto.external_data.add(key=key, value=value)
        self._tensors[name] = proto
        return name

    def reshaped(self, name: str, of: str, shape: tuple[int, ...]) -> str:
        """The same stored numbers a second time, in another shape."""
        proto = onnx.TensorProto()
        proto.CopyFrom(self._tensors[of])
        assert name not in self._tensors and math.prod(proto.dims) == math.prod(shape)
        proto.name, proto.dims[:] = name, shape
        self._tensors[name] = proto
        return name

    def half(self, name: str, array: Float32) -> str:
        """A weight stored as float16 and used as float32."""
        return self.op("Cast", self.weight(name, array.astype(np.float16)), to=_TYPES["float32"])

    def linear(
        self, x: str, name: str, weight: Float32, bias: Float32 | None = None, *, quant: EncoderQuant = "fp32"
    ) -> str:
        """y = x Wᵀ + b over the last axis of x, a float32 value of any rank.

        Args:
            name: prefix of the tensors' names.
            weight: float32 [out, in], as PyTorch keeps it.
            bias: float32 [out].
            quant: see the top of this file.
        """
        shift = "" if bias is None else self.weight(f"{name}.bias", bias.astype(np.float32, copy=False))
        if quant == "int8":
            q, scale = quantize_int8(weight)
            return self.op(
                "DynamicQuantizeMatMul",
                x,
                self.weight(f"{name}.weight", np.ascontiguousarray(q.T)),
                self.weight(f"{name}.scale", scale),
                "",
                shift,
                domain=MICROSOFT,
            )
        if quant == "int4":
            blocks, scale = quantize_int4(weight)
            return self.op(
                "MatMulNBits",
                x,
                self.weight(f"{name}.weight", blocks),
                self.weight(f"{name}.scale", scale),
                "",
                "",
                shift,
                domain=MICROSOFT,
                K=weight.shape[1],
                N=weight.shape[0],
                bits=4,
                block_size=INT4_BLOCK,
                accuracy_level=4,  # products of 8-bit integers
            )
        store = self.half if quant == "fp16" else self.weight
        y = self.op("MatMul", x, store(f"{name}.weight", np.ascontiguousarray(weight.T)))
        return self.op("Add", y, shift) if shift else y

    def finish(self) -> list[BundleFile]:
        """Write the graph; the files it consists of, the graph first.

        Raises:
            OutputError: a file cannot be written.
        """
        graph = self._write(self._name, self._nodes, self._inputs, self._outputs, self._tensors.values())
        return [graph, self._data.finish()] if self._data is not None else [graph]

    def part(
        self, name: str, inputs: Iterable[onnx.ValueInfoProto], outputs: Iterable[onnx.ValueInfoProto]
    ) -> BundleFile:
        """Write `name.onnx` beside the graph, with its nodes that lead from `inputs` to `outputs`.

        Inputs of the whole graph that those nodes read are inputs of the part as well.

        Raises:
            OutputError: the file cannot be written.
        """
        cut, ends = list(inputs), list(outputs)
        known, wanted = {i.name for i in cut}, {o.name for o in ends}
        nodes: list[onnx.NodeProto] = []
        for node in reversed(self._nodes):
            if not wanted.isdisjoint(o for o in node.output if o and o not in known):
                nodes.insert(0, node)
                wanted.update(node.input)
        kept = [i for i in self._inputs if i.name in wanted and i.name not in known]
        tensors = [t for t in self._tensors.values() if t.name in wanted]
        return self._write(name, nodes, cut + kept, ends, tensors)

    def _write(
        self,
        name: str,
        nodes: list[onnx.NodeProto],
        inputs: list[onnx.ValueInfoProto],
        outputs: list[onnx.ValueInfoProto],
        tensors: Iterable[onnx.TensorProto],
    ) -> BundleFile:
        domains = {"", *(node.domain for node in nodes)}
        model = helper.make_model(
            helper.make_graph(nodes, name, inputs, outputs, list(tensors)),
            producer_name=self._producer,
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid(d, 1 if d else OPSET) for d in sorted(domains)],
        )
        return write_file(self._directory, f"{name}.onnx", model.SerializeToString(deterministic=True))

    @property
    def _data_name(self) -> str:
        return f"{self._name}.onnx.data"


def quantize_int8(weight: Float32) -> tuple[npt.NDArray[np.int8], Float32]:
    """Symmetric int8 with one scale per output channel: weight ≈ q · scale[:, None].

    Returns:
        int8 [out, in] within ±127, and float32 [out]. A row of zeros has scale 1.
    """
    largest = np.abs(weight).max(axis=1)
    scale = np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype(np.float32)
    q = np.rint(weight / scale[:, None])
    return np.clip(q, -127, 127).astype(np.int8), scale


def quantize_int4(weight: Float32) -> tuple[npt.NDArray[np.uint8], Float32]:
    """`quantize_blocks` with 4 bits in blocks of 32."""
    return quantize_blocks(weight, 4, INT4_BLOCK)


def quantize_blocks(weight: Float32, bits: int, block: int) -> tuple[npt.NDArray[np.uint8], Float32]:
    """Blocks along each row, as MatMulNBits reads them: weight ≈ (q - half) · scale, half = 2^(bits - 1).

    The value of largest magnitude in a block has q = 0, as in ggml's Q4_0: that uses all levels. A scale is
    a number that float16 has, so that kernels which keep it as one compute with the same weights; a
    bfloat16 weight's eight bits give one as they are. It is rounded away from zero: none is zero, and every
    weight is within half of it, or within all of it at the end of the range that has a level less. The last
    block of a row is filled up with zeros.

    Args:
        weight: float32 [out, in], every |weight| at most 65504.
        bits: 4 or 8.
        block: weights in a block, even.

    Returns:
        uint8 [out, n_blocks, block · bits / 8], the earlier of two weights in the low half of a byte, and
        float32 [out, n_blocks].
    """
    n_out, n_in = weight.shape
    n_blocks = -(-n_in // block)
    packed = np.empty((n_out, n_blocks, block * bits // 8), np.uint8)
    scale = np.empty((n_out, n_blocks), np.float32)
    step = max(1, _CACHED_VALUES // n_in)
    for start in range(0, n_out, step):
        rows = weight[start : start + step]
        if n_in % block:
            rows = np.pad(rows, ((0, 0), (0, n_blocks * block - n_in)))
        q, scales = _blocks(rows.reshape(-1, block), bits)
        packed[start : start + step] = q.reshape(len(rows), n_blocks, -1)
        scale[start : start + step] = scales.reshape(len(rows), n_blocks)
    return packed, scale


def _blocks(blocks: Float32, bits: int) -> tuple[npt.NDArray[np.uint8], Float32]:
    """Blocks, float32 [n, block], as `quantize_blocks` says: uint8 [n, block · bits / 8] and float32 [n]."""
    half = np.float32(1 << (bits - 1))
    columns = np.ascontiguousarray(blocks.T)  # the fastest way to a block's extremes
    high, low = columns.max(axis=0), columns.min(axis=0)
    step = np.where(high >= -low, high, low) / -half
    scale = _half_away(np.where(step != 0, step, np.float32(1)))  # all zeros, or nearly
    q = blocks / scale[:, None]
    np.rint(q, out=q)
    q += half
    np.clip(q, 0, 2 * half - 1, out=q)
    bytes_ = q.astype(np.uint8)
    if bits == 8:
        return bytes_, scale
    pairs = bytes_.view("<u2")  # the earlier weight in the low byte
    return (pairs | pairs >> 4).astype(np.uint8), scale


def _half_away(values: Float32) -> Float32:
    """The nearest float16 that is not nearer to zero, as float32: no zero, no infinity below 65504."""
    half = values.astype(np.float16)
    # Sign and magnitude: one more in the bits is one step away from zero.
    half.view(np.uint16)[np.abs(half) < np.abs(values)] += 1
    return half.astype(np.float32)


def _tensor(name: str, array: npt.NDArray[Any]) -> onnx.TensorProto:
    """An inline tensor."""
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return helper.make_tensor(name, _TYPES[array.dtype.name], array.shape, little.tobytes(), raw=True)
