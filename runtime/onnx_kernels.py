# SPDX-License-Identifier: Apache-2.0
"""Our kernels under ONNX Runtime: register the library of operators, and have a graph use them.

`convert` writes graphs of ONNX Runtime's own operators, which every build of it runs. Here the products of
4-bit and 8-bit weights in such a graph, the gates between them and what an adapter adds to them are renamed
into our domain, when it is loaded. Whatever is wrong with the library leaves the graph as it was: slower,
never wrong. POCKETPHI_KERNELS=stock leaves it out on purpose.

Source: onnx.proto of onnx 1.21 (the numbers of fields), kernels/adapters/onnxruntime/ (what operators take).
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import BundleError, InputError, one_line

DOMAIN = "pocketphi"
ABI = 1  # PK_ORT_OWN_ABI of kernels/adapters/onnxruntime/library.c
COUNTS = ("products", "tokens", "gates", "packed_bytes", "loras")  # what pk_ort_counts fills, in order

_VARIABLE = "POCKETPHI_KERNELS"
_CHOICES = ("auto", "stock")
_LIB_DIR = Path(__file__).parent.parent / "lib"
_N_COUNTS = 8

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OnnxKernels:
    """Which code multiplies quantized matrices under ONNX Runtime in this process."""

    active: bool  # our library's; otherwise ONNX Runtime's
    reason: str  # why it is ONNX Runtime's; empty when active
    variant: str  # the instruction set of our matmul; empty when not active
    path: Path  # the library, whether it is there or not


class _Refused(Exception):
    """The library cannot be used; the message is why."""


def library_path() -> Path:
    """Where the installed package keeps the library, whether it is there or not."""
    suffix = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
    return _LIB_DIR / f"libpk_ort.{suffix}"


@functools.cache
def load(path: Path | None = None) -> OnnxKernels:
    """Open the library, or say why ONNX Runtime's own kernels run; a fallback is logged in one line.

    Args:
        path: the library; the installed package's own when None.

    Raises:
        InputError: POCKETPHI_KERNELS holds neither `auto` nor `stock`.
    """
    path = path or library_path()
    value = os.environ.get(_VARIABLE, "") or "auto"
    if value not in _CHOICES:
        raise InputError(f"{_VARIABLE} is {value[:40]!r}, expected one of {', '.join(_CHOICES)}")
    if value == "stock":
        return _stock(path, f"{_VARIABLE} is 'stock'", logging.INFO)
    if not path.is_file():
        return _stock(path, f"the package was built without {path.name}", logging.INFO)
    try:
        library = _open(path)
    except _Refused as exc:
        return _stock(path, str(exc), logging.WARNING)
    variant = library.pk_ort_variant()
    if variant is None:
        return _stock(path, "POCKETPHI_CPU_MASK names an unknown CPU feature", logging.WARNING)
    if variant == b"c":  # nothing that its owner could mend
        return _stock(path, "this CPU has none of the instruction sets that beat its own", logging.INFO)
    return OnnxKernels(True, "", variant.decode(), path)


def register(options: Any) -> bool:
    """Make our operators known to the sessions that these `onnxruntime.SessionOptions` will open.

    Returns:
        Whether they are. If not, the reason has been logged, and a graph must stay as it is.

    Raises:
        InputError: as `load`.
    """
    state = load()
    if state.active:
        try:
            options.register_custom_ops_library(str(state.path))
        except Exception as exc:  # ONNX Runtime's own exceptions have no public base class
            _stock(state.path, one_line(exc, 200), logging.WARNING)
            return False
    return state.active


def counts() -> Mapping[str, int]:
    """What the library has done in this process, by the names in `COUNTS`; empty while it is not used."""
    state = load()
    if not state.active:
        return {}
    numbers = (ctypes.c_uint64 * _N_COUNTS)()
    _open(state.path).pk_ort_counts(numbers)
    return dict(zip(COUNTS, numbers, strict=False))


def calls() -> int:
    """How many products of matrices the library has computed in this process."""
    return counts().get("products", 0)


def _stock(path: Path, reason: str, level: int) -> OnnxKernels:
    _log.log(level, "ONNX Runtime's own kernels: %s", reason)
    return OnnxKernels(False, reason, "", path)


def _open(path: Path) -> ctypes.CDLL:
    """The library, of our ABI, its functions declared; opened again it is the same, counters and all."""
    try:
        library = ctypes.CDLL(str(path))
        library.pk_ort_abi.restype, library.pk_ort_abi.argtypes = ctypes.c_int, []
        library.pk_ort_variant.restype, library.pk_ort_variant.argtypes = ctypes.c_char_p, []
        library.pk_ort_counts.restype = None
        library.pk_ort_counts.argtypes = [ctypes.POINTER(ctypes.c_uint64)]
    except (OSError, AttributeError) as exc:
        raise _Refused(f"{path.name} cannot be loaded: {one_line(exc)}") from None
    abi = library.pk_ort_abi()
    if abi != ABI:
        raise _Refused(f"{path.name} has ABI {abi}, this package needs {ABI}")
    return library


# ---- graphs ----

_MICROSOFT = "com.microsoft"
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_GRAPH, _OPSET = 7, 8  # fields of ModelProto
_NODE, _INITIALIZER, _INPUT, _OUTPUT = 1, 5, 11, 12  # of GraphProto
_IN, _OUT, _OP_TYPE, _ATTRIBUTE, _NODE_DOMAIN = 1, 2, 4, 5, 7  # of NodeProto
_FLOAT, _INT8, _FLOAT16 = 1, 3, 10  # of TensorProto.DataType
_BLOCK = 32  # weights that share a scale


def with_our_products(graph: bytes) -> bytes:
    """The same graph with the operators that our library has instead of ONNX Runtime's.

    MatMulNBits in blocks of 32 weights of 4 or 8 bits, without zero points or an order of groups, becomes
    ours; so do up · silu(gate) of the two halves of a value, and y + ((x A) · scale) B where A and B are
    inputs of the graph. Everything else keeps its bytes.

    Args:
        graph: a ModelProto that `onnx_check` has accepted.

    Raises:
        BundleError: it is none.
    """
    parts, changed = [], False
    for number, field, value in _fields(graph):
        if number == _GRAPH and isinstance(value, bytes):
            new = _graph(value)
            if new is not None:
                field, changed = _message(_GRAPH, new), True
        parts.append(field)
    if not changed:
        return graph
    opset = _message(1, DOMAIN.encode()) + b"\x10\x01"  # version 1
    return b"".join(parts) + _message(_OPSET, opset)


@dataclass(frozen=True, slots=True)
class _Node:
    """A node, as far as it matters here."""

    raw: bytes
    op: str  # domain.op_type for those of com.microsoft
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, int | bytes]  # an integer, or the bytes of what is none


def _graph(raw: bytes) -> bytes | None:
    """The graph with our operators; None where it has nothing for them."""
    fields = list(_fields(raw))
    held = [(number, value) for number, _, value in fields if isinstance(value, bytes)]
    nodes = [_node(value) for number, value in held if number == _NODE]
    tensors = [value for number, value in held if number == _INITIALIZER]
    outputs = {_text(_only(value, 1)) for number, value in held if number == _OUTPUT}
    inputs = {_text(_only(value, 1)): _end(value) for number, value in held if number == _INPUT}
    replaced = _gates(nodes, outputs, tensors) | _loras(nodes, outputs, inputs)
    for i, node in enumerate(nodes):
        if _is_ours(node):
            replaced[i] = _product(node)
    if not replaced:
        return None
    parts, at = [], 0
    for number, field, _ in fields:
        if number == _NODE:
            field, at = replaced.get(at, field), at + 1
        parts.append(field)
    return b"".join(parts)


def _is_ours(node: _Node) -> bool:
    get = node.attributes.get
    k = get("K", 0)
    return (
        node.op == f"{_MICROSOFT}.MatMulNBits"
        and get("block_size") == _BLOCK
        and get("bits", 4) in (4, 8)
        and isinstance(k, int)
        and k % _BLOCK == 0
        and 3 <= len(node.inputs) <= 6
        and all(node.inputs[:3])
        and not any(node.inputs[3:5])
    )


def _product(node: _Node) -> bytes:
    """MatMulNBits in our domain: what was its sixth input, the bias, is the fourth."""
    parts = [field for number, field, _ in _fields(node.raw) if number not in (_IN, _NODE_DOMAIN)]
    inputs = [_message(_IN, _bytes(name)) for name in (*node.inputs[:3], *node.inputs[5:]) if name]
    if "bits" not in node.attributes:  # 4, if it is not said; ours wants it said
        parts.append(_message(_ATTRIBUTE, _message(1, b"bits") + b"\x18\x04\xa0\x01\x02"))
    return _message(_NODE, b"".join([*inputs, *parts, _message(_NODE_DOMAIN, DOMAIN.encode())]))


def _gates(nodes: list[_Node], outputs: set[str], tensors: list[bytes]) -> dict[int, bytes]:
    """What stands for Split, QuickGelu and Mul where they are up · silu(gate), by the node's place."""
    maker = {name: i for i, node in enumerate(nodes) for name in node.outputs if name}
    uses = Counter(name for node in nodes for name in node.inputs)
    halves = {name for name in map(_equal_halves, tensors) if name}
    replaced: dict[int, bytes] = {}
    for i, node in enumerate(nodes):
        if node.op != "Mul" or len(node.inputs) != 2:
            continue
        silu = maker.get(node.inputs[0], i)
        if nodes[silu].op != f"{_MICROSOFT}.QuickGelu" or nodes[silu].attributes.get("alpha") != _ONE:
            continue
        split = maker.get(nodes[silu].inputs[0], i)
        if (
            nodes[split].op == "Split"
            and nodes[split].attributes == {"axis": -1}
            and nodes[split].outputs == (nodes[silu].inputs[0], node.inputs[1])
            and len(nodes[split].inputs) == 2
            and nodes[split].inputs[1] in halves
            and all(uses[name] == 1 and name not in outputs for name in (nodes[silu].inputs[0], *node.inputs))
        ):
            replaced[split] = replaced[silu] = b""
            replaced[i] = _fused("SwiGLU", nodes[split].inputs[:1], node.outputs[0])
    return replaced


def _loras(nodes: list[_Node], outputs: set[str], ends: Mapping[str, tuple[int, int]]) -> dict[int, bytes]:
    """What stands for the nodes of `convert`'s add_lora, by the node's place."""
    maker = {name: i for i, node in enumerate(nodes) for name in node.outputs if name}
    uses = Counter(name for node in nodes for name in node.inputs)
    replaced: dict[int, bytes] = {}

    def made(name: str, op: str, n: int, gone: list[int]) -> tuple[str, ...]:
        """What the value is made from by this operator, for one use alone; otherwise n times nothing."""
        found = nodes[maker.get(name, 0)]
        alone = name in found.outputs and uses[name] == 1 and name not in outputs
        wanted = (op, {"to": _FLOAT} if op == "Cast" else {}, n)
        if not alone or (found.op, found.attributes, len(found.inputs)) != wanted:
            return ("",) * n
        gone.append(maker[name])
        return found.inputs

    for i, node in enumerate(nodes):
        gone: list[int] = []
        last = node.inputs[-1] if node.op == "Add" and len(node.inputs) == 2 else ""
        inner, b = made(last, "MatMul", 2, gone)
        product, scale = made(inner, "Mul", 2, gone)
        x, a = made(product or inner, "MatMul", 2, gone)
        a, b = (made(name, "Cast", 1, gone)[0] or name for name in (a, b))
        kind, scaled = ends.get(a, (0, 0)), ends.get(scale) == (_FLOAT, 1)
        # as many nodes as this type has: two products; two casts of what is not float32; a scale of int8
        n_nodes = {(_FLOAT, 2): 2, (_FLOAT16, 2): 4, (_INT8, 2): 5}.get(kind)
        if kind == ends.get(b) and len(gone) == n_nodes and scaled == (kind[0] == _INT8):
            replaced |= dict.fromkeys(gone, b"")
            replaced[i] = _fused("Lora", [x, node.inputs[0], a, b, scale][: 4 + scaled], node.outputs[0])
    return replaced


def _end(value: int | bytes) -> tuple[int, int]:
    """Of a graph's input, the type, by TensorProto.DataType, and how many dimensions; zeros where unknown."""
    for number in (2, 1):  # TypeProto, Tensor
        value = _only(value, number) if isinstance(value, bytes) else b""
    kind, shape = (_only(value, number) if isinstance(value, bytes) else b"" for number in (1, 2))
    n_dims = sum(number == 1 for number, _, _ in _fields(shape)) if isinstance(shape, bytes) else 0
    return (kind, n_dims) if isinstance(kind, int) else (0, 0)


_ONE = b"\x00\x00\x80\x3f"  # float32


def _fused(op: str, inputs: Sequence[str], out: str) -> bytes:
    texts = [(_IN, name) for name in inputs]
    texts += [(_OUT, out), (3, f"{out}:{op}"), (_OP_TYPE, op), (_NODE_DOMAIN, DOMAIN)]
    return _message(_NODE, b"".join(_message(number, _bytes(text)) for number, text in texts))


def _equal_halves(tensor: bytes) -> str:
    """The name of an int64 tensor of twice the same number; empty where it is another."""
    if len(tensor) > 1024:
        return ""
    found: dict[int, list[int | bytes]] = {}
    for number, _, value in _fields(tensor):
        found.setdefault(number, []).append(value)
    raw = found.get(9, [b""])[0]
    same = isinstance(raw, bytes) and len(raw) == 16 and raw[:8] == raw[8:]
    return _text(found.get(8, [b""])[0]) if same and found.get(2) == [7] and found.get(1) == [2] else ""


def _node(raw: bytes) -> _Node:
    texts: dict[int, list[str]] = {_IN: [], _OUT: [], _OP_TYPE: [""], _NODE_DOMAIN: [""]}
    attributes: dict[str, int | bytes] = {}
    for number, _, value in _fields(raw):
        if number in texts:
            texts[number].append(_text(value))
        elif number == _ATTRIBUTE and isinstance(value, bytes):
            name, content = _attribute(value)
            attributes[name] = content
    op, domain = texts[_OP_TYPE][-1], texts[_NODE_DOMAIN][-1]
    name = f"{domain}.{op}" if domain else op
    return _Node(raw, name, tuple(texts[_IN]), tuple(texts[_OUT]), attributes)


def _attribute(raw: bytes) -> tuple[str, int | bytes]:
    """Its name; an integer, signed, or the bytes of a float32, or all of what is neither."""
    name, content = "", raw
    result: int | bytes = content
    for number, _, value in _fields(raw):
        if number == 1:
            name = _text(value)
        elif number in (2, 3):
            result = value - (1 << 64) if isinstance(value, int) and value >> 63 else value
    return name, result


def _only(raw: bytes, wanted: int) -> int | bytes:
    return next((value for number, _, value in _fields(raw) if number == wanted), b"")


def _text(value: int | bytes) -> str:
    if isinstance(value, int):
        raise BundleError("the graph holds a number for a name")
    return value.decode("utf-8", "surrogateescape")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _fields(raw: bytes) -> Iterator[tuple[int, bytes, int | bytes]]:
    """The fields of a message: number, all of its bytes, and what it holds."""
    at = 0
    while at < len(raw):
        start = at
        tag, at = _varint(raw, at)
        value: int | bytes
        if tag & 7 == _VARINT:
            value, at = _varint(raw, at)
        else:
            size = {_FIXED64: 8, _FIXED32: 4}.get(tag & 7, -1)
            if tag & 7 == _BYTES:
                size, at = _varint(raw, at)
            if not 0 <= size <= len(raw) - at:
                raise BundleError("the graph ends within a field, or holds one of an unknown kind")
            value, at = raw[at : at + size], at + size
        yield tag >> 3, raw[start:at], value


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = 0
    for i, byte in enumerate(raw[at : at + 10]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, at + i + 1
    raise BundleError("the graph ends within a number, or holds one that does not end")


def _message(number: int, content: bytes) -> bytes:
    """A field of bytes: its tag, its length and they."""
    size, length = len(content), bytearray()
    while size >= 0x80:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([number << 3 | _BYTES, *length, size]) + content
