# SPDX-License-Identifier: Apache-2.0
"""Whether an ONNX graph may be given to ONNX Runtime: it is one that `convert` writes, and opens one file.

The protobuf is walked here, field by field, with bounds. What the converter never writes is refused: another
file, sparse tensors, functions, graphs within nodes (so no loop), operators and their versions. A graph that
passes may still be nonsense; ONNX Runtime says so with an exception.

The data file may be a hard link, which is a file like any other, and a symbolic link that stays in the
directory. Source: onnx.proto of onnx 1.21 (the numbers of fields), convert/onnx_graph.py (what is used).
"""

from __future__ import annotations

import math
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NoReturn

from .errors import BundleError

MAX_GRAPH_BYTES = 16 << 20  # the largest of ours has 2.9 MB: large weights are in the data file beside
_MAX_FIELDS = 150_000  # ours have up to 36,600
_MAX_NODES = 12_000  # ours have up to 3,345; 30,000 take ONNX Runtime 11 s to load
_MAX_VALUES = 1 << 40  # in a tensor

_VARINT, _BYTES, _FIXED32 = 0, 2, 5  # wire types; there is no 64-bit one in our graphs
_IR_VERSION = 10
_OPSETS = {"": 21, "com.microsoft": 1}
_ITEM_BYTES = {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 9: 1, 10: 2}  # TensorProto.DataType: float32 … float16
_OPERATORS: Mapping[str, tuple[str, ...]] = {
    "": ("Abs", "Add", "Cast", "Clip", "Concat", "ConstantOfShape", "Conv", "Div", "DynamicQuantizeLinear",
         "Flatten", "Gather", "Gelu", "Identity", "LayerNormalization", "MatMul", "Max", "Mul",
         "QuantizeLinear", "Range", "ReduceMax", "ReduceMean", "Relu", "Reshape", "Shape", "Softmax", "Split",
         "Squeeze", "Sub", "Transpose", "Unsqueeze"),
    "com.microsoft": ("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulNBits", "MultiHeadAttention",
                      "QuickGelu"),
}  # fmt: skip

# The fields of each message that the converter writes: number -> wire type.
_MODEL = {1: _VARINT, 2: _BYTES, 7: _BYTES, 8: _BYTES}  # ir_version, producer_name, graph, opset_import
_OPSET = {1: _BYTES, 2: _VARINT}  # domain, version
_GRAPH = {1: _BYTES, 2: _BYTES, 5: _BYTES, 11: _BYTES, 12: _BYTES}  # node, name, initializer, input, output
_NODE = dict.fromkeys((1, 2, 3, 4, 5, 7), _BYTES)  # input, output, name, op_type, attribute, domain
_ATTRIBUTE = {1: _BYTES, 2: _FIXED32, 3: _VARINT, 4: _BYTES, 5: _BYTES, 8: _VARINT, 20: _VARINT}
_TENSOR = {1: _VARINT, 2: _VARINT, 4: _BYTES, 8: _BYTES, 9: _BYTES, 13: _BYTES, 14: _VARINT}
_ENTRY = {1: _BYTES, 2: _BYTES}  # key, value
_VALUE_INFO = {1: _BYTES, 2: _BYTES}  # name, type
_TYPE = {1: _BYTES}  # tensor_type
_TENSOR_TYPE = {1: _VARINT, 2: _BYTES}  # elem_type, shape
_SHAPE = {1: _BYTES}  # dim
_DIM = {1: _VARINT, 2: _BYTES}  # dim_value, dim_param

Span = tuple[int, int]  # a message's bytes within the file: from, to
Fields = Mapping[int, list[Span]]  # a message: field -> what it holds; a number's span is (the number, 0)


def check_graph(path: Path, inputs: Mapping[str, int], output: str) -> None:
    """Refuse a graph that is not one of the converter's.

    Args:
        path: `NAME.onnx`. It may refer to `NAME.onnx.data` beside it, and to no other file.
        inputs: the name of each input, and how many dimensions it has.
        output: the name of the one output.

    Raises:
        BundleError: missing, damaged, with other inputs or outputs, or holding what is never written.
    """
    raw = _read(path)
    _Graph(path, raw, _data_size(path)).check(inputs, output)


def _read(path: Path) -> bytes:
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):  # a pipe would wait for ever
            raise BundleError(f"{path}: is not a regular file")
        if about.st_size > MAX_GRAPH_BYTES:
            raise BundleError(f"{path}: has {about.st_size:,} bytes, expected at most {MAX_GRAPH_BYTES:,}")
        with path.open("rb") as file:
            return file.read(about.st_size)
    except FileNotFoundError:
        raise BundleError(f"{path}: no such file") from None
    except OSError as exc:
        raise BundleError(f"{path}: cannot be read: {exc.strerror}") from None


def _data_size(path: Path) -> int:
    """Bytes of the data file; 0 where there is none."""
    data = path.with_name(f"{path.name}.data")
    try:
        about = data.stat()
        if not stat.S_ISREG(about.st_mode) or not data.resolve().is_relative_to(path.parent.resolve()):
            raise BundleError(f"{data}: is not a regular file of this directory")
    except FileNotFoundError:
        return 0
    except OSError as exc:
        raise BundleError(f"{data}: cannot be read: {exc.strerror}") from None
    return about.st_size


class _Graph:
    """One graph's bytes, and how much of them has been walked."""

    def __init__(self, path: Path, raw: bytes, data_size: int) -> None:
        self._path, self._raw, self._data_size = path, raw, data_size
        self._fields_left = _MAX_FIELDS
        self._domains: set[str] = set()  # of operators, as the graph declares them

    def check(self, inputs: Mapping[str, int], output: str) -> None:
        model = self._message((0, len(self._raw)), _MODEL, "model")
        if [v for v, _ in model.get(1, [])] != [_IR_VERSION]:
            self._fail(f"is not an ONNX graph of IR version {_IR_VERSION}")
        for span in model.get(8, []):
            opset = self._message(span, _OPSET, "opset")
            domain, versions = self._text(opset, 1), [v for v, _ in opset.get(2, [])]
            if versions != [_OPSETS.get(domain)]:
                known = ", ".join(f"{name or 'ai.onnx'} {n}" for name, n in _OPSETS.items())
                found = f"{domain[:40] or 'ai.onnx'} {', '.join(map(str, versions))}"
                self._fail(f"uses the operators {found!r}, expected {known}")
            self._domains.add(domain)
        if len(model.get(7, [])) != 1:
            self._fail("holds no graph, or more than one")
        graph = self._message(model[7][0], _GRAPH, "graph")
        nodes = graph.get(1, [])
        if len(nodes) > _MAX_NODES:
            self._fail(f"has {len(nodes)} operators, expected at most {_MAX_NODES}")
        for span in nodes:
            self._node(span)
        names = [self._tensor(span, inline=False) for span in graph.get(5, [])]
        if len(set(names)) != len(names):
            self._fail("holds a tensor twice")
        self._ends(graph, inputs, output)

    def _ends(self, graph: Fields, inputs: Mapping[str, int], output: str) -> None:
        found = [self._end(span) for span in graph.get(11, [])]
        outputs = [name for name, _ in (self._end(span) for span in graph.get(12, []))]
        if sorted(found) != sorted(inputs.items()) or outputs != [output]:
            self._fail(
                f"has inputs {_names(found)} and outputs {', '.join(outputs)[:60] or 'none'}, expected "
                f"{_names(inputs.items())} and {output}: it is not the graph that the converter writes"
            )

    def _end(self, span: Span) -> tuple[str, int]:
        """An input's or output's name, and how many dimensions it has."""
        value = self._message(span, _VALUE_INFO, "value")
        try:
            kind = self._message(value[2][0], _TYPE, "type")
            tensor = self._message(kind[1][0], _TENSOR_TYPE, "tensor type")
            dims = self._message(tensor[2][0], _SHAPE, "shape").get(1, [])
            element = tensor[1][0][0]
        except (KeyError, IndexError):
            self._fail("has an input or output without a shape")
        if element not in _ITEM_BYTES:
            self._fail(f"has an input or output of the unknown type {element}")
        for dim in dims:
            for n, _ in self._message(dim, _DIM, "dimension").get(1, []):
                if not 1 <= n < 1 << 31:
                    self._fail(f"has an input or output with a dimension of {n}")
        return self._text(value, 1), len(dims)

    def _node(self, span: Span) -> None:
        node = self._message(span, _NODE, "node")
        op, domain = self._text(node, 4), self._text(node, 7)
        if domain not in self._domains or op not in _OPERATORS.get(domain, ()):
            self._fail(f"uses the operator {f'{domain}.{op}'[:80]!r}, which the converter does not write")
        for attribute in node.get(5, []):
            for tensor in self._message(attribute, _ATTRIBUTE, "attribute").get(5, []):
                self._tensor(tensor, inline=True)

    def _tensor(self, span: Span, *, inline: bool) -> str:
        """A tensor's name. It has as many bytes as its shape needs, here or in the data file."""
        tensor = self._message(span, _TENSOR, "tensor")
        name, dims = self._text(tensor, 8), [n for n, _ in tensor.get(1, [])]
        where, kinds = f"tensor {name[:60]!r}", [n for n, _ in tensor.get(2, [])]
        if len(kinds) != 1 or kinds[0] not in _ITEM_BYTES:
            self._fail(f"{where} is of no type that the converter writes")
        count = math.prod(dims)
        if any(not 0 <= n < _MAX_VALUES for n in dims) or count > _MAX_VALUES:
            self._fail(f"{where} has the impossible shape {str(dims)[:80]}")
        n_bytes = count * _ITEM_BYTES[kinds[0]]
        if tensor.get(14, [(0, 0)]) == [(0, 0)]:
            parts = tensor.get(4, []) + tensor.get(9, [])
            found = sum(end - start for start, end in parts)
            if 13 in tensor or found != n_bytes or len(parts) > 1:
                self._fail(f"{where} holds {found} bytes, its shape needs {n_bytes}")
        elif inline or 4 in tensor or 9 in tensor or tensor[14] != [(1, 0)]:
            self._fail(f"{where} is partly here and partly elsewhere")
        else:
            self._external(where, tensor, n_bytes)
        return name

    def _external(self, where: str, tensor: Fields, n_bytes: int) -> None:
        entries: dict[str, str] = {}
        for span in tensor.get(13, []):
            entry = self._message(span, _ENTRY, "entry")
            key = self._text(entry, 1)
            if key in entries or key not in ("location", "offset", "length"):
                self._fail(f"{where} has {key[:40]!r} twice, or for no reason")
            entries[key] = self._text(entry, 2)
        if entries.get("location") != f"{self._path.name}.data":
            self._fail(
                f"refers to a file other than {self._path.name}.data: it was not made by the converter"
            )
        at, length = (entries.get(key, "") for key in ("offset", "length"))
        if not all(text.isascii() and text.isdecimal() and len(text) < 16 for text in (at, length)):
            self._fail(f"{where} has no offset and length in the data file")
        if int(length) != n_bytes or int(at) + n_bytes > self._data_size:
            self._fail(
                f"{where} takes {length[:20]} bytes from {at[:20]}, its shape needs {n_bytes} of the "
                f"{self._data_size} that {self._path.name}.data has"
            )

    def _text(self, message: Fields, field: int) -> str:
        """A field that is a text, empty where it is not there."""
        spans = message.get(field, [(0, 0)])
        if len(spans) != 1:
            self._fail("holds a name twice")
        try:
            return self._raw[slice(*spans[0])].decode("utf-8")
        except UnicodeDecodeError:
            self._fail("holds a name that is not UTF-8")

    def _message(self, span: Span, known: Mapping[int, int], what: str) -> Fields:
        """The fields of the message at `span`; what is not known of it is an error."""
        raw, (at, end) = self._raw, span
        found: dict[int, list[Span]] = {}
        while at < end:
            self._fields_left -= 1
            tag, at = self._varint(at, end) if raw[at] & 0x80 else (raw[at], at + 1)
            number, wire = tag >> 3, tag & 7
            if known.get(number) != wire or self._fields_left < 0:
                self._fail(f"holds field {number} ({what}), or too many: the converter does not write that")
            if wire == _VARINT:
                value, at = self._varint(at, end)
                found.setdefault(number, []).append((value, 0))
                continue
            size, at = self._varint(at, end) if wire == _BYTES else (4, at)
            if size > end - at:
                self._fail(f"ends within a {what}")
            found.setdefault(number, []).append((at, at + size))
            at += size
        return found

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """A number of up to 64 bits, and where it ends. Negative ones come as large ones."""
        value = 0
        for i, byte in enumerate(self._raw[at : min(end, at + 10)]):
            value |= (byte & 0x7F) << 7 * i
            if byte < 0x80:
                return value, at + i + 1
        self._fail("ends within a number, or holds one that does not end")

    def _fail(self, what: str) -> NoReturn:
        raise BundleError(f"{self._path}: {what}")


def _names(values: Iterable[tuple[str, int]]) -> str:
    """Each with how many dimensions it has."""
    return ", ".join(f"{name}[{n}]" for name, n in sorted(values))[:120] or "none"
