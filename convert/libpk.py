# SPDX-License-Identifier: Apache-2.0
"""Q4_K, Q5_K and Q6_K without importances, by our own library: ggml's bytes, several times sooner.

The library is the file that `runtime.kernels` loads. Here it is optional: without it, with one of another
ABI, or where ggml's bytes are not those of x86-64, `load` says None and the caller goes on with ggml.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..runtime.errors import KernelError
from .ggml_types import Q4_K, Q5_K, Q6_K, GgmlType

ABI = 1  # PK_ABI of kernels/include/pk.h
TYPES = (Q4_K, Q5_K, Q6_K)
LIBRARY = (
    Path(__file__).parent.parent
    / "lib"
    / {"darwin": "libpk.dylib", "win32": "libpk.dll"}.get(sys.platform, "libpk.so")
)


class BlockQuantizer:
    """The loaded library. Calls are thread-safe and run without the interpreter's lock."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Declare the two calls that `quantize` makes. AttributeError: the library lacks one."""
        self._quantize, self._status = library.pk_quantize, library.pk_status
        self._quantize.argtypes = [
            ctypes.c_void_p,  # uint8_t * destination
            ctypes.c_size_t,  # its bytes
            ctypes.c_void_p,  # const float * source
            ctypes.c_size_t,  # how many values
            ctypes.c_int,  # type
            ctypes.c_char_p,  # variant, or NULL for the fastest
        ]
        self._quantize.restype = ctypes.c_int
        self._status.argtypes, self._status.restype = [ctypes.c_int], ctypes.c_char_p

    def quantize(
        self,
        rows: npt.NDArray[np.float32],
        kind: GgmlType,
        out: npt.NDArray[np.uint8],
        variant: str | None = None,
    ) -> None:
        """Rows as blocks of `kind`.

        Args:
            rows: float32 [n, cols], C-contiguous, every |value| at most 65504, cols a multiple of 256.
            kind: one of `TYPES`.
            out: uint8 [n, bytes of a row], C-contiguous: where to put them.
            variant: a variant of the kernel "quantize"; the fastest when None.

        Raises:
            KernelError: the library refuses, e.g. as POCKETPHI_CPU_MASK has an unknown name.
        """
        assert rows.dtype == np.float32 and rows.flags.c_contiguous
        assert out.dtype == np.uint8 and out.flags.c_contiguous and out.flags.writeable
        name = None if variant is None else variant.encode()
        status = self._quantize(out.ctypes.data, out.nbytes, rows.ctypes.data, rows.size, kind.id, name)
        if status:
            raise KernelError(
                f"quantizing {list(rows.shape)} to {kind.name}: {self._status(status).decode()}"
            )


def load(path: Path | None = None) -> BlockQuantizer | None:
    """The library at `path`, by default the installed one; None where ggml must do the work."""
    path = LIBRARY if path is None else path
    # Compilers fuse ggml's multiply-adds where the baseline CPU has the instruction, as AArch64 does.
    if platform.machine() not in ("x86_64", "AMD64") or not path.is_file():
        return None
    try:
        library = ctypes.CDLL(str(path))
        return BlockQuantizer(library) if library.pk_abi() == ABI else None
    except (OSError, AttributeError):  # for another machine, or older than the call
        return None
