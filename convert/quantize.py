# SPDX-License-Identifier: Apache-2.0
"""Float rows to ggml blocks, by the `ggml_quantize_chunk` of the library that llama-cpp-python ships.

`libpk` gives the same bytes sooner for three types without importances, where the package has it.
A block depends on its own 32 or 256 values alone (and their importances), so rows can be quantized in
any pieces on any number of threads and give the same bytes. F32 and F16 need no library.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..runtime.errors import CheckpointError, KernelError
from . import libpk
from .ggml_types import F16, F32, TYPES, GgmlType

Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

# The largest float16. Block scales are float16, so larger weights could become infinite in all types but F32.
MAX_VALUE = 65504.0

# One file of the several copies that the wheel holds: libllama links to this one.
_LIBRARY = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}.get(sys.platform, "libggml-base.so.0")


class Quantizer:
    """The loaded library. Calls are thread-safe and run without the interpreter's lock."""

    def __init__(self) -> None:
        """Load the library and compare its block sizes with `ggml_types`.

        Raises:
            KernelError: it is missing, cannot be loaded, or lays out its blocks differently.
        """
        path = _library_path()
        try:
            library = ctypes.CDLL(str(path))
            blck_size, type_size = library.ggml_blck_size, library.ggml_type_size
            chunk, init = library.ggml_quantize_chunk, library.ggml_quantize_init
        except (OSError, AttributeError) as exc:
            raise KernelError(f"{path}: cannot be used: {' '.join(str(exc).split())}") from None
        blck_size.argtypes, blck_size.restype = [ctypes.c_int], ctypes.c_int64
        type_size.argtypes, type_size.restype = [ctypes.c_int], ctypes.c_size_t
        init.argtypes, init.restype = [ctypes.c_int], None
        for t in TYPES:
            found = (blck_size(t.id), type_size(t.id))
            if found != (t.block, t.block_bytes):
                raise KernelError(
                    f"{path}: {t.name} has blocks of {found}, expected {(t.block, t.block_bytes)}"
                )
            init(t.id)  # once, before there are threads
        chunk.argtypes = [
            ctypes.c_int,  # type
            ctypes.c_void_p,  # const float * source
            ctypes.c_void_p,  # void * destination
            ctypes.c_int64,  # first value
            ctypes.c_int64,  # rows
            ctypes.c_int64,  # values in a row
            ctypes.c_void_p,  # const float * importance of each column, or NULL
        ]
        chunk.restype = ctypes.c_size_t
        self._chunk = chunk
        self._faster = libpk.load()

    def quantize(self, rows: Float32, kind: GgmlType, importance: Float32 | None = None) -> Bytes:
        """Rows in a storage type.

        Args:
            rows: float32 [n, cols], C-contiguous, finite, cols a multiple of `kind.block`.
            importance: float32 [cols], not negative: the weight of each column's squared error.

        Returns:
            uint8 [n, bytes of a row].

        Raises:
            KernelError: a library refuses, e.g. as POCKETPHI_CPU_MASK has an unknown name.
        """
        n, cols = rows.shape
        if kind is F32:
            return rows.astype("<f4", copy=False).view(np.uint8).reshape(n, -1)
        if kind is F16:
            return rows.astype("<f2").view(np.uint8).reshape(n, -1)
        assert rows.dtype == np.float32 and rows.flags.c_contiguous and cols % kind.block == 0
        assert importance is None or (
            importance.shape == (cols,) and importance.dtype == np.float32 and importance.flags.c_contiguous
        )
        out: Bytes = np.empty((n, kind.row_bytes(cols)), np.uint8)
        if self._faster is not None and importance is None and kind in libpk.TYPES:
            self._faster.quantize(rows, kind, out)
            return out
        weight = None if importance is None else importance.ctypes.data
        written = self._chunk(kind.id, rows.ctypes.data, out.ctypes.data, 0, n, cols, weight)
        if written != out.nbytes:
            raise KernelError(
                f"ggml_quantize_chunk wrote {written} bytes of {kind.name}, expected {out.nbytes}"
            )
        return out


def check_values(rows: Float32, kind: GgmlType, name: str, file: Path) -> None:
    """Refuse what a type cannot hold: K-quants turn a NaN or infinity into garbage without a word.

    Raises:
        CheckpointError: NaN, an infinity, or (F32 aside) a value beyond float16's range.
    """
    # min and max pass a NaN on, and comparing with it is false.
    low, high = float(rows.min()), float(rows.max())
    limit = float(np.finfo(np.float32).max) if kind is F32 else MAX_VALUE
    if -limit <= low and high <= limit:
        return
    bad = low if not -limit <= low else high
    want = "a finite number" if kind is F32 or not np.isfinite(bad) else f"at most {limit:g} for {kind.name}"
    raise CheckpointError(f"{file}: tensor {name!r} holds {bad:g}, expected {want}")


def _library_path() -> Path:
    """Where the library is; llama_cpp itself is not imported, as that would load the whole engine."""
    try:
        spec = importlib.util.find_spec("llama_cpp")
    except (ImportError, ValueError):
        spec = None
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(place) / "lib" / _LIBRARY
        if path.is_file():
            return path
    raise KernelError(f"{_LIBRARY}: not found: install llama-cpp-python, whose quantizers the converter uses")
