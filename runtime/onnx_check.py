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
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from .errors import BundleError
from .spec import BACKBONE_DATA, TextSpec

MAX_GRAPH_BYTES = 16 << 20  # the largest of ours has 2.9 MB: large weights are in the data file beside
_MAX_FIELDS = 150_000  # ours have up to 36,600
_MAX_NODES = 12_000  # ours have up to 3,345; 30,000 take ONNX Runtime 11 s to load
_MAX_VALUES = 1 << 40  # in a tensor

_VARINT, _BYTES, _FIXED32 = 0, 2, 5  # wire types; there is no 64-bit one in our graphs
_IR_VERSION = 10
_OPSETS = {"": 21, "com.microsoft": 1}
_DTYPES = {  # of TensorProto.DataType
    1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16"
}  # fmt: skip
_ITEM_BYTES = {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 9: 1, 10: 2}  # of each
_OPERATORS: Mapping[str, tuple[str, ...]] = {
    "": ("Abs", "Add", "Cast", "Clip", "Concat", "ConstantOfShape", "Conv", "Div", "DynamicQuantizeLinear",
         "Flatten", "Gather", "Gelu", "Greater", "Identity", "LayerNormalization", "MatMul", "Max", "Mul",
         "Neg", "QuantizeLinear", "Range", "ReduceMax", "ReduceMean", "ReduceSum", "Relu", "Reshape", "Shape",
         "SimplifiedLayerNormalization", "Slice", "Softmax", "Split", "Squeeze", "Sub", "Transpose",
         "Unsqueeze", "Where"),
    "com.microsoft": ("DynamicQuantizeMatMul", "FusedMatMul", "GatherBlockQuantized", "GroupQueryAttention",
                      "MatMulIntegerToFloat", "MatMulNBits", "MultiHeadAttention", "QuickGelu",
                      "SkipSimplifiedLayerNormalization"),
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
Shapes = Mapping[str, tuple[int, ...]]  # tensors by name
Fields = Mapping[int, list[Span]]  # a message: field -> what it holds; a number's span is (the number, 0)


@dataclass(frozen=True, slots=True)
class End:
    """An input or an output of a graph."""

    dtype: str  # numpy's name
    dims: tuple[int | None, ...]  # None: as large as the caller makes it
    has_default: bool = False  # it may be left out

    def __str__(self) -> str:
        dims = ", ".join("any" if n is None else str(n) for n in self.dims)
        return f"{self.dtype} [{dims}]{' with a default' if self.has_default else ''}"


def decoder_ends(text: TextSpec, lora_quant: str | None) -> tuple[dict[str, End], dict[str, End]]:
    """The inputs and the outputs of the backbone's decoder.onnx, see convert/write_onnx_decoder.py.

    Args:
        lora_quant: "fp32", "fp16" or "int8", what its adapters are; None: there are none.
    """
    cache = End("float32", (None, text.n_kv_heads, None, text.head_dim))
    layers = [f"{n}.{part}" for n in range(text.n_layers) for part in ("key", "value")]
    inputs = {
        "inputs_embeds": End("float32", (None, None, text.d_model)),
        "attention_mask": End("int64", (None, None)),
        "n_logits": End("int64", (1,), has_default=True),
        **{f"past_key_values.{name}": cache for name in layers},
    }
    if text.rope.is_long_rope:
        inputs["rope_tokens"] = End("int64", (1,), has_default=True)
    if lora_quant is not None:
        inputs |= lora_ends(text, lora_quant, None)
    outputs = {"logits": End("float32", (None, None, text.vocab_size))}
    return inputs, outputs | {f"present.{name}": cache for name in layers}


def embedding_ends(text: TextSpec) -> tuple[dict[str, End], dict[str, End]]:
    """The same of embedding.onnx."""
    return {"input_ids": End("int64", (None, None))}, {
        "inputs_embeds": End("float32", (None, None, text.d_model))
    }


def lora_ends(text: TextSpec, quant: str, rank: int | None) -> dict[str, End]:
    """What an adapter of the backbone consists of, by the names of the graph's inputs for it."""
    shapes = {
        "attn_qkv": (text.d_model, text.d_q + 2 * text.d_kv),
        "attn_output": (text.d_q, text.d_model),
        "ffn_up": (text.d_model, 2 * text.d_ff),
        "ffn_down": (text.d_ff, text.d_model),
    }
    dtype = {"fp32": "float32", "fp16": "float16"}.get(quant, "int8")
    ends = {}
    for layer in range(text.n_layers):
        for name, (d_in, d_out) in shapes.items():
            ends[f"blk.{layer}.{name}.lora_A"] = End(dtype, (d_in, rank), has_default=True)
            ends[f"blk.{layer}.{name}.lora_B"] = End(dtype, (rank, d_out), has_default=True)
            if dtype == "int8":
                ends[f"blk.{layer}.{name}.lora_scale"] = End("float32", (rank,), has_default=True)
    return ends


def rope_tables(text: TextSpec) -> Shapes:
    """The shapes of the tensors in decoder.onnx that hold RoPE's tables: a row for each position."""
    rope = text.rope
    rows = text.context_length + (rope.original_context if rope.is_long_rope else 0)
    return dict.fromkeys(("rope.cos", "rope.sin"), (rows, rope.dims // 2))


def check_backbone(
    path: Path, inputs: Mapping[str, End], outputs: Mapping[str, End], tensors: Shapes | None = None
) -> bytes:
    """Refuse a graph that is not the converter's decoder.onnx or embedding.onnx.

    Args:
        path: the graph. It may refer to BACKBONE_DATA beside it, and to no other file.
        tensors: shapes that some of its tensors must have.

    Returns:
        what was checked: the file's bytes.

    Raises:
        BundleError: as for `check_graph`.
    """
    raw = _read(path)
    data = path.with_name(BACKBONE_DATA)
    graph = _Graph(path, raw, data.name, _data_size(data))
    graph.check_ends(graph.check(), inputs, outputs)
    graph.check_shapes(tensors or {})
    return raw


def check_graph(path: Path, inputs: Mapping[str, int], output: str) -> bytes:
    """Refuse a graph that is not one of the converter's.

    Args:
        path: `NAME.onnx`. It may refer to `NAME.onnx.data` beside it, and to no other file.
        inputs: the name of each input, and how many dimensions it has.
        output: the name of the one output.

    Returns:
        what was checked: the file's bytes.

    Raises:
        BundleError: missing, damaged, with other inputs or outputs, or holding what is never written.
    """
    data = path.with_name(f"{path.name}.data")
    raw = _read(path)
    graph = _Graph(path, raw, data.name, _data_size(data))
    graph.check_ranks(graph.check(), inputs, output)
    return raw


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


def _data_size(data: Path) -> int:
    """Bytes of the data file; 0 where there is none."""
    try:
        about = data.stat()
        if not stat.S_ISREG(about.st_mode) or not data.resolve().is_relative_to(data.parent.resolve()):
            raise BundleError(f"{data}: is not a regular file of this directory")
    except FileNotFoundError:
        return 0
    except OSError as exc:
        raise BundleError(f"{data}: cannot be read: {exc.strerror}") from None
    return about.st_size


_Ends = tuple[list[tuple[str, End]], list[tuple[str, End]]]  # inputs and outputs


class _Graph:
    """One graph's bytes, and how much of them has been walked."""

    def __init__(self, path: Path, raw: bytes, data_name: str, data_size: int) -> None:
        self._path, self._raw, self._data_name, self._data_size = path, raw, data_name, data_size
        self._fields_left = _MAX_FIELDS
        self._shapes: dict[str, tuple[int, ...]] = {}  # of what it has been given as tensors
        self._domains: set[str] = set()  # of operators, as the graph declares them

    def check(self) -> _Ends:
        """Walk everything."""
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
        inputs, outputs = ([self._end(s, set(names)) for s in graph.get(field, [])] for field in (11, 12))
        return inputs, outputs

    def check_ranks(self, ends: _Ends, inputs: Mapping[str, int], output: str) -> None:
        """Are these its inputs, with so many dimensions, and its one output?"""
        found = [(name, len(end.dims)) for name, end in ends[0]]
        outputs = [name for name, _ in ends[1]]
        if sorted(found) != sorted(inputs.items()) or outputs != [output]:
            self._fail(
                f"has inputs {_names(found)} and outputs {', '.join(outputs)[:60] or 'none'}, expected "
                f"{_names(inputs.items())} and {output}: it is not the graph that the converter writes"
            )

    def check_ends(self, ends: _Ends, inputs: Mapping[str, End], outputs: Mapping[str, End]) -> None:
        """Are these its inputs and outputs, exactly?"""
        for what, found, wanted in (("input", ends[0], inputs), ("output", ends[1], outputs)):
            if len(dict(found)) != len(found):
                self._fail(f"has an {what} twice")
            for name, end in found:
                if name not in wanted:
                    self._fail(f"has the {what} {name[:60]!r}, which the converter does not write")
                if end != wanted[name]:
                    self._fail(f"{what} {name!r} is {str(end)[:80]}, expected {wanted[name]}")
            missing = sorted(wanted.keys() - dict(found).keys())
            if missing:
                self._fail(f"has no {what} {missing[0]!r}")

    def check_shapes(self, tensors: Shapes) -> None:
        """Has it these tensors, of these shapes?"""
        for name, wanted in tensors.items():
            if (found := self._shapes.get(name)) != wanted:
                self._fail(f"tensor {name!r} is {str(found)[:80]}, bundle.json means {wanted}")

    def _end(self, span: Span, defaults: Container[str]) -> tuple[str, End]:
        """An input or output by its name."""
        value = self._message(span, _VALUE_INFO, "value")
        try:
            kind = self._message(value[2][0], _TYPE, "type")
            tensor = self._message(kind[1][0], _TENSOR_TYPE, "tensor type")
            dims = self._message(tensor[2][0], _SHAPE, "shape").get(1, [])
            element = tensor[1][0][0]
        except (KeyError, IndexError):
            self._fail("has an input or output without a shape")
        if element not in _DTYPES:
            self._fail(f"has an input or output of the unknown type {element}")
        sizes: list[int | None] = []
        for dim in dims:
            fields = self._message(dim, _DIM, "dimension")
            for n, _ in fields.get(1, []):
                if not 1 <= n < 1 << 31:
                    self._fail(f"has an input or output with a dimension of {n}")
            sizes.append(fields[1][-1][0] if 1 in fields else None)
        name = self._text(value, 1)
        return name, End(_DTYPES[element], tuple(sizes), name in defaults)

    def _node(self, span: Span) -> None:
        node = self._message(span, _NODE, "node")
        op, domain = self._text(node, 4), self._text(node, 7)
        for field in (1, 2, 3):
            for name in node.get(field, []):
                self._text({field: [name]}, field)
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
        if not inline:
            self._shapes[name] = tuple(dims)
        return name

    def _external(self, where: str, tensor: Fields, n_bytes: int) -> None:
        entries: dict[str, str] = {}
        for span in tensor.get(13, []):
            entry = self._message(span, _ENTRY, "entry")
            key = self._text(entry, 1)
            if key in entries or key not in ("location", "offset", "length"):
                self._fail(f"{where} has {key[:40]!r} twice, or for no reason")
            entries[key] = self._text(entry, 2)
        if entries.get("location") != self._data_name:
            self._fail(f"refers to a file other than {self._data_name}: it was not made by the converter")
        at, length = (entries.get(key, "") for key in ("offset", "length"))
        if not all(text.isascii() and text.isdecimal() and len(text) < 16 for text in (at, length)):
            self._fail(f"{where} has no offset and length in the data file")
        if int(length) != n_bytes or int(at) + n_bytes > self._data_size:
            self._fail(
                f"{where} takes {length[:20]} bytes from {at[:20]}, its shape needs {n_bytes} of the "
                f"{self._data_size} that {self._data_name} has"
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
