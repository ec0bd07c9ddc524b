# SPDX-License-Identifier: Apache-2.0
"""Small ggml graphs on a chosen device, weights in its own buffer type: numpy arrays in and out.

    with Graph(device) as g:
        w = g.weight(blocks, Q4_0, 3072)                  # uint8 [rows, bytes of a row]
        y = g.op("mul_mat", w, g.input(x))                # float32 [tokens, 3072] -> [tokens, rows]
        (out,) = g.compute([y], threads=2)

It calls the copies of ggml that libllama itself uses: symbols are looked up from libllama's handle.
Shapes are numpy's, the reverse of ggml's `ne`; operations take ggml's own order of arguments.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from pocketphi.convert.ggml_types import F16, F32, TYPES, GgmlType
from pocketphi.runtime import ggml_plugin

Array = npt.NDArray[Any]

BF16 = GgmlType("BF16", 30, 1, 2)
I32 = GgmlType("I32", 26, 1, 4)
I64 = GgmlType("I64", 27, 1, 8)
PLUGIN = ggml_plugin.BACKEND  # of its registry, its device and its backend
ROPE_NEOX = 2  # GGML_ROPE_TYPE_NEOX
PREC_F32 = 10  # GGML_PREC_F32

_KINDS: Mapping[int, GgmlType] = {t.id: t for t in (*TYPES, BF16, I32, I64)}
_INPUTS: Mapping[str, GgmlType] = {"float32": F32, "float16": F16, "int32": I32, "int64": I64}
_DTYPES: Mapping[GgmlType, str] = {kind: name for name, kind in _INPUTS.items()}
_DEVICE_CPU = 0  # GGML_BACKEND_DEVICE_TYPE_CPU
_USAGE_WEIGHTS = 1  # GGML_BACKEND_BUFFER_USAGE_WEIGHTS
_NODES = 256  # in a graph, at most
_NO_WORK = ("NONE", "VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE")

_ABORT = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)  # ggml_abort_callback
_P, _I, _L, _Z, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t, ctypes.c_float
# What follows the context in ggml_<name>; _P is a tensor.
_OPS: Mapping[str, list[Any]] = {
    "add": [_P, _P],
    "add_inplace": [_P, _P],
    "cont": [_P],
    "flash_attn_ext": [_P, _P, _P, _P, _F, _F, _F],
    "get_rows": [_P, _P],
    "mul": [_P, _P],
    "mul_mat": [_P, _P],
    "permute": [_P, _I, _I, _I, _I],
    "reshape_2d": [_P, _L, _L],
    "rms_norm": [_P, _F],
    "rope_ext": [_P, _P, _P, _I, _I, _I, _F, _F, _F, _F, _F, _F],
    "scale": [_P, _F],
    "set_rows": [_P, _P, _P],
    "soft_max_ext": [_P, _P, _F, _F],
    "swiglu": [_P],
    "swiglu_split": [_P, _P],
    "view_2d": [_P, _L, _L, _Z, _Z],
    "view_3d": [_P, _L, _L, _L, _Z, _Z, _Z],
    "view_4d": [_P, _L, _L, _L, _L, _Z, _Z, _Z, _Z],
}
_CALLS: Mapping[str, tuple[Any, list[Any]]] = {
    "ggml_backend_alloc_ctx_tensors_from_buft": (_P, [_P, _P]),
    "ggml_backend_buffer_clear": (None, [_P, ctypes.c_uint8]),
    "ggml_backend_buffer_free": (None, [_P]),
    "ggml_backend_buft_alloc_buffer": (_P, [_P, _Z]),
    "ggml_backend_buffer_set_usage": (None, [_P, _I]),
    "ggml_backend_dev_backend_reg": (_P, [_P]),
    "ggml_backend_dev_buffer_type": (_P, [_P]),
    "ggml_backend_dev_by_name": (_P, [ctypes.c_char_p]),
    "ggml_backend_dev_by_type": (_P, [_I]),
    "ggml_backend_dev_init": (_P, [_P, ctypes.c_char_p]),
    "ggml_backend_dev_name": (ctypes.c_char_p, [_P]),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, [_P, _P]),
    "ggml_backend_free": (None, [_P]),
    "ggml_backend_graph_compute": (_I, [_P, _P]),
    "ggml_backend_load": (_P, [ctypes.c_char_p]),
    "ggml_backend_name": (ctypes.c_char_p, [_P]),
    "ggml_backend_reg_by_name": (_P, [ctypes.c_char_p]),
    "ggml_backend_reg_get_proc_address": (_P, [_P, ctypes.c_char_p]),
    "ggml_backend_sched_free": (None, [_P]),
    "ggml_backend_sched_get_tensor_backend": (_P, [_P, _P]),
    "ggml_backend_sched_graph_compute": (_I, [_P, _P]),
    "ggml_backend_sched_new": (_P, [_P, _P, _I, _Z, ctypes.c_bool, ctypes.c_bool]),
    "ggml_backend_tensor_get": (None, [_P, _P, _Z, _Z]),
    "ggml_backend_tensor_memset": (None, [_P, ctypes.c_uint8, _Z, _Z]),
    "ggml_backend_tensor_set": (None, [_P, _P, _Z, _Z]),
    "ggml_backend_unload": (None, [_P]),
    "ggml_build_forward_expand": (None, [_P, _P]),
    "ggml_free": (None, [_P]),
    "ggml_graph_n_nodes": (_I, [_P]),
    "ggml_graph_node": (_P, [_P, _I]),
    "ggml_graph_overhead_custom": (_Z, [_Z, ctypes.c_bool]),
    "ggml_nbytes": (_Z, [_P]),
    "ggml_new_graph_custom": (_P, [_P, _Z, ctypes.c_bool]),
    "ggml_new_tensor": (_P, [_P, _I, _I, ctypes.POINTER(_L)]),
    "ggml_op_desc": (ctypes.c_char_p, [_P]),
    "ggml_prec_set_acc": (ctypes.c_bool, [_P, _I]),
    "ggml_set_output": (None, [_P]),
    "ggml_tensor_overhead": (_Z, []),
}


class _InitParams(ctypes.Structure):
    """`struct ggml_init_params`."""

    _fields_ = [("mem_size", _Z), ("mem_buffer", _P), ("no_alloc", ctypes.c_bool)]


class _TensorHead(ctypes.Structure):
    """How `struct ggml_tensor` begins."""

    _fields_ = [("type", _I), ("buffer", _P), ("ne", _L * 4), ("nb", _Z * 4)]


def _open() -> Any:
    library = llama_cpp.llama_cpp._lib
    library.ggml_init.argtypes, library.ggml_init.restype = [_InitParams], _P
    for name, (result, arguments) in _CALLS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    for name, arguments in _OPS.items():
        function = getattr(library, f"ggml_{name}")
        function.argtypes, function.restype = [_P, *arguments], _P
    return library


GGML = _open()


class Tensor:
    """A tensor of a graph: ggml's pointer, and what its head says."""

    def __init__(self, handle: int) -> None:
        """Read the head; views and sizes do not change later."""
        head = _TensorHead.from_address(handle)
        self.handle = handle
        self.kind = _KINDS[head.type]
        self.ne: tuple[int, ...] = tuple(head.ne)
        self.nb: tuple[int, ...] = tuple(head.nb)

    @property
    def op(self) -> str:
        """ggml's name of what makes it."""
        name: bytes = GGML.ggml_op_desc(self.handle)
        return name.decode()


class Device:
    """A backend device with one backend of its own."""

    def __init__(self, handle: int) -> None:
        """Start the backend."""
        self.handle = handle
        self.name = GGML.ggml_backend_dev_name(handle).decode()
        self.backend: int = GGML.ggml_backend_dev_init(handle, None)
        assert self.backend, f"{self.name}: no backend"
        self._set_n_threads = self._function("ggml_backend_set_n_threads", _P, _I)
        self._set_abort = self._function("ggml_backend_set_abort_callback", _P, _ABORT, _P)
        self._abort = _ABORT()  # ggml keeps no reference to it

    def _function(self, name: str, *arguments: Any) -> Any:
        registry = GGML.ggml_backend_dev_backend_reg(self.handle)
        address = GGML.ggml_backend_reg_get_proc_address(registry, name.encode())
        assert address, f"{self.name}: no {name}"
        return ctypes.CFUNCTYPE(None, *arguments)(address)

    def set_abort(self, asked: Callable[[], bool] | None) -> None:
        """What graphs ask between their steps; True ends one. None: nothing."""
        self._abort = _ABORT(lambda _: asked()) if asked else _ABORT()
        self._set_abort(self.backend, self._abort, None)

    def set_threads(self, n: int) -> None:
        """How many threads the next graph runs on."""
        self._set_n_threads(self.backend, n)

    def close(self) -> None:
        """Stop the backend."""
        GGML.ggml_backend_free(self.backend)


@contextmanager
def cpu() -> Iterator[Device]:
    """ggml's CPU device."""
    device = Device(GGML.ggml_backend_dev_by_type(_DEVICE_CPU))
    yield device
    device.close()


@contextmanager
def plugin() -> Iterator[Device]:
    """The plug-in's device; if nobody had loaded the plug-in, it is unloaded at the end."""
    mine = None
    if not GGML.ggml_backend_reg_by_name(PLUGIN.encode()):
        path = ggml_plugin.library_path()
        mine = GGML.ggml_backend_load(str(path).encode())
        assert mine, f"{path} was not loaded"
    device = Device(GGML.ggml_backend_dev_by_name(PLUGIN.encode()))
    yield device
    device.close()
    if mine is not None:
        GGML.ggml_backend_unload(mine)


class Graph:
    """A graph to be computed once. All but its weights lies in plain CPU memory, unless it is scheduled."""

    def __init__(self, device: Device) -> None:
        """An empty graph for one device."""
        self.device = device
        self.placement: list[tuple[str, str]] = []  # (operation, backend), of a scheduled graph
        overhead = GGML.ggml_tensor_overhead() * _NODES
        size = overhead + GGML.ggml_graph_overhead_custom(_NODES, False)
        sizes = (overhead, overhead, overhead, size)
        contexts = [GGML.ggml_init(_InitParams(n, None, True)) for n in sizes]
        self._weights, self._adapters, self._leaves, self._nodes = contexts
        self._data: list[tuple[Tensor, Array]] = []
        self._buffers: list[int] = []
        self._graph: int = GGML.ggml_new_graph_custom(self._nodes, _NODES, False)
        self._scheduler: int | None = None
        # Views alone would not be initialised: a context needs something to allocate.
        GGML.ggml_new_tensor(self._nodes, F32.id, 1, (_L * 1)(1))

    def __enter__(self) -> Graph:
        """The graph itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give all memory back."""
        if self._scheduler:
            GGML.ggml_backend_sched_free(self._scheduler)
        for buffer in self._buffers:
            GGML.ggml_backend_buffer_free(buffer)
        for context in (self._nodes, self._leaves, self._adapters, self._weights):
            GGML.ggml_free(context)

    def weight(self, data: Array, kind: GgmlType, columns: int) -> Tensor:
        """A matrix in the device's buffer type: uint8 [rows, kind.row_bytes(columns)]."""
        assert data.dtype == np.uint8 and data.shape[1] == kind.row_bytes(columns)
        return self._leaf(self._weights, kind, (columns, len(data)), data)

    def adapter(self, data: Array, kind: GgmlType, columns: int) -> Tensor:
        """A LoRA's matrix: in the device's buffer type, but llama.cpp does not call that buffer weights."""
        return self._leaf(self._adapters, kind, (columns, len(data)), data)

    def vector(self, values: Array) -> Tensor:
        """float32 [n] in the device's buffer type: a norm's weights, or rope factors."""
        return self._leaf(self._weights, F32, (len(values),), np.asarray(values, np.float32))

    def input(self, values: Array) -> Tensor:
        """Any shape of float32, float16, int32 or int64."""
        return self._leaf(self._leaves, _INPUTS[values.dtype.name], values.shape[::-1], values)

    def blocks(self, data: Array, kind: GgmlType, columns: int) -> Tensor:
        """Rows of a quantized type that are no weights, such as a KV cache: uint8 [rows, bytes of a row]."""
        return self._leaf(self._leaves, kind, (columns, len(data)), data)

    def op(self, name: str, *args: Tensor | float | None) -> Tensor:
        """`ggml_<name>` of these arguments; None is a tensor that is not there."""
        plain = [a.handle if isinstance(a, Tensor) else a for a in args]
        node = Tensor(getattr(GGML, f"ggml_{name}")(self._nodes, *plain))
        if name == "flash_attn_ext":
            GGML.ggml_prec_set_acc(node.handle, PREC_F32)  # as llama.cpp does
        return node

    def expand(self, node: Tensor) -> None:
        """Order a node, and what it needs, behind all that are in the graph already."""
        GGML.ggml_build_forward_expand(self._graph, node.handle)

    def compute(self, outputs: Sequence[Tensor], *, threads: int = 1, scheduled: bool = False) -> list[Array]:
        """Run it, and copy some nodes out.

        Args:
            outputs: contiguous nodes.
            threads: for this run.
            scheduled: place the nodes as llama.cpp does, by a scheduler over [the device, CPU] that owns
                their memory and is told nothing of them; `placement` says what it made of it.
        """
        for node in outputs:
            GGML.ggml_set_output(node.handle)
            self.expand(node)
        self.load()
        self.device.set_threads(threads)
        if scheduled:
            self._run_scheduled(threads)
        else:
            refused = [n.op for n in self._working() if not self.supports(n)]
            assert not refused, f"{self.device.name} refuses {refused}"
            self._allocate(self._nodes, None)
            assert GGML.ggml_backend_graph_compute(self.device.backend, self._graph) == 0
        return [self.read(node) for node in outputs]

    def again(self) -> int:
        """Compute what `compute` has allocated once more: ggml's status."""
        return int(GGML.ggml_backend_graph_compute(self.device.backend, self._graph))

    def load(self) -> None:
        """Allocate what is given and copy it in; `compute` does this."""
        self._allocate(self._weights, self.device)
        self._allocate(self._adapters, self.device)
        self._allocate(self._leaves, None)
        for tensor, values in self._data:
            data = np.ascontiguousarray(values)
            assert data.nbytes == GGML.ggml_nbytes(tensor.handle)
            GGML.ggml_backend_tensor_set(tensor.handle, data.ctypes.data, 0, data.nbytes)

    def supports(self, node: Tensor) -> bool:
        """Whether the device says it can compute a node; asked after `load`."""
        return bool(GGML.ggml_backend_dev_supports_op(self.device.handle, node.handle))

    def supports_with(self, node: Tensor, weight: Tensor) -> bool:
        """What llama.cpp asks before a weight has memory: whether it may lie in the device's buffer type."""
        buffer_type = GGML.ggml_backend_dev_buffer_type(self.device.handle)
        head = _TensorHead.from_address(weight.handle)
        head.buffer = GGML.ggml_backend_buft_alloc_buffer(buffer_type, 0)
        supported = self.supports(node)
        GGML.ggml_backend_buffer_free(head.buffer)
        head.buffer = None
        return supported

    def read(self, tensor: Tensor) -> Array:
        """A tensor's values, or uint8 [rows, bytes of a row] where numpy has no such type."""
        raw = self.read_bytes(tensor, 0, GGML.ggml_nbytes(tensor.handle))
        shape = tensor.ne[::-1]
        while len(shape) > 2 and shape[0] == 1:
            shape = shape[1:]
        if tensor.kind in _DTYPES:
            return raw.view(_DTYPES[tensor.kind]).reshape(shape)
        return raw.reshape(math.prod(tensor.ne[1:]), -1)

    def read_bytes(self, tensor: Tensor, offset: int, size: int) -> Array:
        """uint8 [size] from somewhere in a tensor."""
        out = np.empty(size, np.uint8)
        GGML.ggml_backend_tensor_get(tensor.handle, out.ctypes.data, offset, size)
        return out

    def write_bytes(self, tensor: Tensor, offset: int, data: Array) -> None:
        """Replace part of a tensor."""
        GGML.ggml_backend_tensor_set(tensor.handle, data.ctypes.data, offset, data.nbytes)

    def fill_bytes(self, tensor: Tensor, offset: int, size: int, value: int) -> None:
        """Replace part of a tensor with one value."""
        GGML.ggml_backend_tensor_memset(tensor.handle, value, offset, size)

    def clear_weights(self) -> None:
        """All bytes of the buffer that `weight` allocates from: zero."""
        GGML.ggml_backend_buffer_clear(self._buffers[0], 0)

    def _leaf(self, context: int, kind: GgmlType, ne: tuple[int, ...], data: Array) -> Tensor:
        tensor = Tensor(GGML.ggml_new_tensor(context, kind.id, len(ne), (_L * len(ne))(*ne)))
        self._data.append((tensor, data))
        return tensor

    def _allocate(self, context: int, device: Device | None) -> None:
        """Buffers for a context's tensors; results that nobody writes stay NaN."""
        where = device.handle if device else GGML.ggml_backend_dev_by_type(_DEVICE_CPU)
        buffer = GGML.ggml_backend_alloc_ctx_tensors_from_buft(
            context, GGML.ggml_backend_dev_buffer_type(where)
        )
        if not buffer:  # no tensor in it, or only views
            return
        self._buffers.append(buffer)
        if context == self._weights:
            GGML.ggml_backend_buffer_set_usage(buffer, _USAGE_WEIGHTS)
        elif device is None:
            GGML.ggml_backend_buffer_clear(buffer, 0xFF)

    def _working(self) -> list[Tensor]:
        """The nodes that are more than another look at the same memory."""
        n = GGML.ggml_graph_n_nodes(self._graph)
        nodes = [Tensor(GGML.ggml_graph_node(self._graph, i)) for i in range(n)]
        return [node for node in nodes if node.op not in _NO_WORK]

    def _run_scheduled(self, threads: int) -> None:
        with cpu() as last:
            last.set_threads(threads)
            backends = (_P * 2)(self.device.backend, last.backend)
            self._scheduler = GGML.ggml_backend_sched_new(backends, None, 2, _NODES, False, False)
            assert GGML.ggml_backend_sched_graph_compute(self._scheduler, self._graph) == 0
            for node in self._working():
                backend = GGML.ggml_backend_sched_get_tensor_backend(self._scheduler, node.handle)
                self.placement.append((node.op, GGML.ggml_backend_name(backend).decode()))
