# SPDX-License-Identifier: Apache-2.0
"""The native library libpk through ctypes: load, compare ABI numbers, typed and checked calls.

Kernels choose the fastest variant for this CPU. For tests, POCKETPHI_CPU_MASK narrows the choice: the CPU
features that may be used, comma-separated, or `none` for the scalar code; read once, at the first call.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import KernelError
from .parts import Float32

ABI = 1  # PK_ABI of kernels/include/pk.h
MEL_BANDS = 80
FRAME_SAMPLES = {16000: (400, 160), 8000: (200, 80)}  # sample rate in Hz -> window, hop

_Q8_0 = 8  # ggml_type
_LIB_DIR = Path(__file__).parent.parent / "lib"


def library_path() -> Path:
    """Where the installed package keeps libpk, whether it is there or not."""
    suffix = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
    return _LIB_DIR / f"libpk.{suffix}"


def is_available() -> bool:
    """Whether the package was built with its native library. One that is there but broken is an error."""
    return library_path().is_file()


def version() -> str:
    """The version of the native library; it is the package's own.

    Raises:
        KernelError: as `cpu_features`.
    """
    return str(_library().pk_version().decode())


def cpu_features() -> tuple[str, ...]:
    """The CPU features that kernels may use here, e.g. `("avx2", "fma")`, after POCKETPHI_CPU_MASK.

    Raises:
        KernelError: no library, one of another ABI, or a mask with an unknown name.
    """
    return _names(_library().pk_feature)


def variants(kernel: str) -> tuple[str, ...]:
    """The variants of `kernel` that this CPU can run, slow to fast; the first is the scalar reference.

    Raises:
        KernelError: as `cpu_features`, or there is no such kernel.
    """
    lib = _library()
    found = _names(lambda i: lib.pk_variant(kernel.encode(), i))
    if not found:
        known = "'logmel', 'quantize', 'matmul', 'activations', 'attention', 'vector' or 'probe'"
        raise KernelError(f"kernel {kernel!r} is not in {library_path().name}, expected {known}")
    return found


def log_mel_frames(n_samples: int, sample_rate: int) -> int:
    """How many whole frames a clip of `n_samples` has; 0 when it is shorter than one.

    Raises:
        KernelError: the rate is neither 8000 nor 16000 Hz.
    """
    if sample_rate not in FRAME_SAMPLES:
        raise KernelError(f"log_mel: sample rate is {sample_rate} Hz, expected 8000 or 16000")
    window, hop = FRAME_SAMPLES[sample_rate]
    return (n_samples - window) // hop + 1 if n_samples >= window else 0


def log_mel(
    wave: Float32, sample_rate: int = 16000, *, out: Float32 | None = None, variant: str | None = None
) -> Float32:
    """Log-mel features by the native kernel. `logmel.log_mel` is the call for everyone but tests.

    Args:
        wave: float32 [n], contiguous, finite, n at least one window (400 samples, or 200 at 8 kHz).
        sample_rate: 16000 or 8000 Hz.
        out: float32 [t, 80], contiguous, where to put the result; it may not overlap `wave`.
        variant: one of `variants("logmel")`; the fastest when None.

    Returns:
        `out`, or a new float32 [t, 80].

    Raises:
        KernelError: an argument is not as stated above, or `cpu_features` would raise.
    """
    lib = _library()
    _check("wave", wave, (wave.size,))
    n_frames = log_mel_frames(wave.size, sample_rate)
    if out is None:
        out = np.empty((n_frames, MEL_BANDS), np.float32)
    _check("out", out, (n_frames, MEL_BANDS))
    if not out.flags.writeable:
        raise KernelError("log_mel: out is read-only, expected an array that can be written")
    name = None if variant is None else variant.encode()
    status = lib.pk_logmel(out.ctypes.data, out.size, wave.ctypes.data, wave.size, sample_rate, name)
    if status:
        chosen = f" (variant {variant!r})" if variant else ""
        raise KernelError(f"log_mel of {wave.size} samples{chosen}: {lib.pk_status(status).decode()}")
    return out


def matmul_q8_0(weights: npt.NDArray[np.uint8], x: Float32) -> Float32:
    """x times the transpose of Q8_0 weights, by the fastest variant, for who wants to see that it is right.

    Args:
        weights: uint8 [rows, columns / 32 * 34], contiguous: blocks of a float16 scale and 32 int8.
        x: float32 [tokens, columns], contiguous; rounded to 8 bits, 32 columns to a scale.

    Returns:
        float32 [tokens, rows].

    Raises:
        KernelError: an argument is not as stated above, or `cpu_features` would raise.
    """
    lib = _library()
    if x.ndim != 2 or x.dtype != np.float32 or weights.ndim != 2 or weights.dtype != np.uint8:
        raise KernelError(
            f"matmul: {weights.dtype} weights by {x.dtype}, expected matrices, uint8 and float32"
        )
    if not (weights.flags.c_contiguous and x.flags.c_contiguous):
        raise KernelError("matmul: a strided matrix, expected contiguous ones")
    (rows, _), (tokens, columns) = weights.shape, x.shape
    out = np.empty((tokens, rows), np.float32)
    status = lib.pk_matmul(
        out.ctypes.data, out.size, weights.ctypes.data, weights.nbytes, x.ctypes.data, x.size,
        rows, columns, tokens, _Q8_0, 0.0, 0, None,
    )  # fmt: skip
    if status:
        raise KernelError(
            f"matmul of {list(weights.shape)} bytes by {list(x.shape)}: {lib.pk_status(status).decode()}"
        )
    return out


def probe_int8(rounds: int, *, variant: str | None = None) -> tuple[int, int]:
    """Multiply and add int8 on registers, on this thread, without the GIL. See kernels/probe/probe.h.

    Returns:
        The operations done, and the sum they made.

    Raises:
        KernelError: rounds is not 1 to 2^30, no such variant, or `cpu_features` would raise.
    """
    done, total = ctypes.c_uint64(), ctypes.c_uint32()
    _probe("int8", ctypes.byref(done), ctypes.byref(total), rounds, variant)
    return done.value, total.value


def probe_fp32(rounds: int, *, variant: str | None = None) -> tuple[int, float]:
    """Multiply and add float32 on registers, on this thread: as `probe_int8`."""
    done, total = ctypes.c_uint64(), ctypes.c_float()
    _probe("fp32", ctypes.byref(done), ctypes.byref(total), rounds, variant)
    return done.value, total.value


def probe_read(words: npt.NDArray[np.uint64], *, variant: str | None = None) -> int:
    """Read memory once, on this thread; the GIL is free meanwhile.

    Args:
        words: uint64 [n], contiguous, n a multiple of 64.
        variant: one of `variants("probe")`; the fastest when None.

    Returns:
        Their sum modulo 2^64.

    Raises:
        KernelError: an argument is not as stated above, or `cpu_features` would raise.
    """
    if words.dtype != np.uint64 or words.ndim != 1 or not words.flags.c_contiguous:
        raise KernelError(
            f"probe: words are {words.dtype} {list(words.shape)}, expected contiguous uint64 [n]"
        )
    total = ctypes.c_uint64()
    _probe("read", ctypes.byref(total), words.ctypes.data, words.nbytes, variant)
    return total.value


def _probe(name: str, first: Any, second: Any, size: int, variant: str | None) -> None:
    lib = _library()
    status = getattr(lib, f"pk_probe_{name}")(
        first, second, size, None if variant is None else variant.encode()
    )
    if status:
        chosen = f" (variant {variant!r})" if variant else ""
        raise KernelError(f"probe {name} of {size}{chosen}: {lib.pk_status(status).decode()}")


def _check(name: str, array: Float32, shape: tuple[int, ...]) -> None:
    """An array goes to C as a bare pointer: what it points to must be what C will read."""
    if array.dtype != np.float32 or array.shape != shape or not array.flags.c_contiguous:
        layout = "contiguous" if array.flags.c_contiguous else "strided"
        raise KernelError(
            f"log_mel: {name} is {layout} {array.dtype} {list(array.shape)}, "
            f"expected contiguous float32 {list(shape)}"
        )


def _names(at: Callable[[int], bytes | None]) -> tuple[str, ...]:
    found: list[str] = []
    while (name := at(len(found))) is not None:
        found.append(name.decode())
    return tuple(found)


@functools.cache
def _library() -> ctypes.CDLL:
    path = library_path()
    if not path.is_file():
        raise KernelError(f"{path} is missing: the package was built without its native library")
    try:
        lib = ctypes.CDLL(str(path))
        found = lib.pk_abi()  # before the rest, some of which another ABI may lack
        if found == ABI:
            _declare(lib)
    except (OSError, AttributeError) as exc:  # not a library at all; not ours: a symbol is missing
        raise KernelError(f"{path} cannot be loaded: {str(exc).splitlines()[0]}") from None
    if found != ABI:
        raise KernelError(f"{path} has ABI {found}, expected {ABI}: reinstall pocketphi")
    if lib.pk_check_mask():
        known = ", ".join(_names(lib.pk_known_feature))
        mask = os.environ.get("POCKETPHI_CPU_MASK", "")
        raise KernelError(f"POCKETPHI_CPU_MASK is {mask!r}, expected 'none' or names from: {known}")
    return lib


def _declare(lib: ctypes.CDLL) -> None:
    """Argument and result types of kernels/include/pk.h."""
    pointer, size, text, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_int
    number = ctypes.c_float
    signatures: dict[str, tuple[type, list[type]]] = {
        "pk_abi": (integer, []),
        "pk_version": (text, []),
        "pk_status": (text, [integer]),
        "pk_check_mask": (integer, []),
        "pk_feature": (text, [size]),
        "pk_known_feature": (text, [size]),
        "pk_variant": (text, [text, size]),
        "pk_logmel": (integer, [pointer, size, pointer, size, ctypes.c_uint, text]),
        "pk_quantize": (integer, [pointer, size, pointer, size, integer, text]),  # called by the converter
        "pk_probe_int8": (integer, [pointer, pointer, size, text]),
        "pk_probe_fp32": (integer, [pointer, pointer, size, text]),
        "pk_probe_read": (integer, [pointer, pointer, size, text]),
        "pk_vector_rms_norm": (
            integer,
            [pointer, pointer, pointer, size, number, text],
        ),  # from here on: tests
        "pk_vector_swiglu": (integer, [pointer, pointer, pointer, size, text]),
        "pk_vector_add": (integer, [pointer, pointer, pointer, size, text]),
        "pk_vector_scale": (integer, [pointer, pointer, size, number, number, text]),
        "pk_vector_to_f16": (integer, [pointer, pointer, size, text]),
        "pk_vector_to_q8_0": (integer, [pointer, size, pointer, size, text]),
        "pk_vector_rope": (integer, [pointer, pointer, pointer, pointer, size, size, text]),
        "pk_matmul": (
            integer,
            [pointer, size, pointer, size, pointer, *[size] * 4, integer, number, integer, text],
        ),
        "pk_attention": (
            integer,
            [
                *(pointer, size, pointer, pointer, size, pointer, size, pointer, pointer),
                *(integer, integer, number, size, text),
            ],
        ),
        "pk_activations": (integer, [pointer, size, pointer, *[size] * 5, integer, text]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
