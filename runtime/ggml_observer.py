# SPDX-License-Identifier: Apache-2.0
"""What goes into the decoder's matrix products: llama.cpp's evaluation callback, as arrays.

ggml gives a callback its own `ggml_tensor`, a struct without accessors for what we need. So its layout is
tried out on a product that ggml itself makes, before any pointer of a real graph is followed.

The callback sees the same inputs with our plug-in as with stock ggml. The scheduler cuts a graph behind each
node that is asked for, so a product that is observed is the last of its piece: the plug-in has nothing after
it to fuse, and fuses nothing into a product from before it. `tests/evaluate/test_imatrix.py` compares both.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import llama_cpp.llama_cpp
import numpy as np

from .errors import KernelError
from .parts import Float32

_DIMS, _SOURCES, _NAME, _PARAMS = 4, 10, 64, 16  # GGML_MAX_*; _PARAMS in int32
_F32 = 0  # GGML_TYPE_F32

Sink = Callable[[str, Float32], None]
Filter = Callable[[str], bool]


class _Tensor(ctypes.Structure):
    """`struct ggml_tensor` of ggml.h."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * _DIMS),
        ("nb", ctypes.c_size_t * _DIMS),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * _PARAMS),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * _SOURCES),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * _NAME),
    )


class _InitParams(ctypes.Structure):
    """`struct ggml_init_params` of ggml.h."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class MatmulObserver:
    """Tells a sink the inputs of every product whose weight it wants, inside its `with` block.

    The sink runs on the thread that decodes. What it raises does not go through C code: the block's end
    raises it.
    """

    def __init__(self, sink: Sink, wants: Filter) -> None:
        """
        Args:
            sink: gets a weight's name and its inputs, float32 [n, row length], one row a token; the array
                is its own to keep.
            wants: whether the sink is to hear of the weight of this name.

        Raises:
            KernelError: this build's `ggml_tensor` is not laid out as expected.
        """
        self._active = False
        self._sink, self._wants = sink, wants
        self._ggml = _ggml()
        self._mul_mat = _try_layout(self._ggml)
        self._failure: Exception | None = None
        self.callback: Any = llama_cpp.ggml_backend_sched_eval_callback(self._receive)  # C keeps it: so do we

    def __enter__(self) -> None:
        self._active, self._failure = True, None

    def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        self._active = False
        if exc is None and self._failure is not None:
            raise self._failure

    def _receive(self, address: int, ask: bool, _user_data: object) -> bool:
        """`ggml_backend_sched_eval_callback`: first whether the node's data is wanted, then the data."""
        if not self._active or self._failure is not None:
            return not ask
        try:
            node = _Tensor.from_address(address)
            if node.op != self._mul_mat:
                return not ask
            name = _Tensor.from_address(node.src[0]).name.decode("utf-8", "replace")
            if ask:
                return self._wants(name)
            self._sink(name, self._rows(node.src[1], name))
        except Exception as exc:  # not into C: see __exit__
            self._failure = exc
        return not ask

    def _rows(self, address: int, name: str) -> Float32:
        """A tensor's values, from wherever its backend keeps them."""
        tensor = _Tensor.from_address(address)
        rows = int(np.prod(tensor.ne[1:]))
        found: Float32 = np.empty((rows, tensor.ne[0]), np.float32)
        dense = tuple(4 * int(np.prod(tensor.ne[:i])) for i in range(_DIMS))
        size = self._ggml.ggml_nbytes(address)
        if tensor.type != _F32 or tuple(tensor.nb) != dense or size != found.nbytes:
            raise KernelError(
                f"the input of {name} is of type {tensor.type}, {list(tensor.ne)} with strides "
                f"{list(tensor.nb)}, expected dense F32"
            )
        self._ggml.ggml_backend_tensor_get(address, found.ctypes.data, 0, found.nbytes)
        return found


def _ggml() -> SimpleNamespace:
    """ggml through the handle of the libllama that llama_cpp has loaded: see `ggml_plugin`."""
    size, pointer, number = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int64
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ggml_version": (ctypes.c_char_p, []),
        "ggml_tensor_overhead": (size, []),
        "ggml_op_desc": (ctypes.c_char_p, [pointer]),
        "ggml_init": (pointer, [_InitParams]),
        "ggml_free": (None, [pointer]),
        "ggml_new_tensor_2d": (pointer, [pointer, ctypes.c_int, number, number]),
        "ggml_set_name": (pointer, [pointer, ctypes.c_char_p]),
        "ggml_mul_mat": (pointer, [pointer, pointer, pointer]),
        "ggml_nbytes": (size, [pointer]),
        "ggml_backend_tensor_get": (None, [pointer, pointer, size, size]),
    }
    lib: Any = llama_cpp.llama_cpp._lib
    functions = SimpleNamespace()
    for name, (result, arguments) in signatures.items():
        try:
            function = lib[name]
        except AttributeError:
            raise KernelError(f"this build of llama-cpp-python does not export {name}") from None
        function.restype, function.argtypes = result, arguments
        setattr(functions, name, function)
    return functions


def _try_layout(ggml: SimpleNamespace) -> int:
    """Make the product of a 3 x 32 weight and 5 rows, and find all of it where `_Tensor` says.

    Gives the number of its operation, GGML_OP_MUL_MAT, which moves between ggml's releases.
    """
    weight_name = b"pocketphi.weight"
    mismatch = KernelError(
        f"ggml {ggml.ggml_version().decode()} lays out its tensors differently from what is known here: "
        "use the llama-cpp-python that this version was made for"
    )
    if ggml.ggml_tensor_overhead() < ctypes.sizeof(_Tensor):
        raise mismatch
    context = ggml.ggml_init(_InitParams(1 << 16, None, True))
    if not context:
        raise KernelError("ggml could not make a context")
    try:
        weight = ggml.ggml_new_tensor_2d(context, _F32, 32, 3)
        rows = ggml.ggml_new_tensor_2d(context, _F32, 32, 5)
        ggml.ggml_set_name(weight, weight_name)
        made = ggml.ggml_mul_mat(context, weight, rows)
        product, what = _Tensor.from_address(made), ggml.ggml_op_desc(made)
        mul_mat = int(product.op)
        w, x = _Tensor.from_address(weight), _Tensor.from_address(rows)
        found = (
            *(mul_mat > 0, what, *product.src[:3], *product.ne),
            *(w.type, w.op, w.name, *w.ne, *w.nb),
            *(x.type, *x.ne, *x.nb),
        )
        wanted = (
            *(True, b"MUL_MAT", weight, rows, None, 3, 5, 1, 1),
            *(_F32, 0, weight_name, 32, 3, 1, 1, 4, 128, 384, 384),
            *(_F32, 32, 5, 1, 1, 4, 128, 640, 640),
        )
    finally:
        ggml.ggml_free(context)
    if found != wanted:
        raise mismatch
    return mul_mat
