# SPDX-License-Identifier: Apache-2.0
"""One ONNX graph of a model directory, loaded on ONNX Runtime's CPU provider, with one-line errors."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy.typing as npt

from . import kernels
from .errors import BundleError, KernelError, one_line
from .files import is_unicode
from .onnx_check import check_graph
from .parts import Float32

# How it says that memory or threads ran out: its own words, or those of the C++ library.
_SHORT = re.compile(r"bad_alloc|bad allocation|Failed to allocate|pthread_create failed")


class OnnxSession:
    """A graph whose outputs are float32. Its threads sleep between runs: the decoder needs the cores."""

    def __init__(self, path: Path, n_threads: int, inputs: Mapping[str, int], output: str) -> None:
        """Load a graph.

        Args:
            path: `NAME.onnx`. It may refer to one file beside it, `NAME.onnx.data`, and to no other.
            n_threads: of ONNX Runtime's pool, the calling thread included.
            inputs: the name of each input, and how many dimensions it has.
            output: the name of the one output.

        Raises:
            BundleError: missing, damaged, with other inputs or outputs, or naming another file.
            KernelError: ONNX Runtime itself cannot be loaded, or has too little memory for the graph.
        """
        self._path = path
        check_graph(path, inputs, output)
        onnxruntime = _library()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = n_threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # errors come as exceptions; below 4 they go to stderr as well
        # Its threads may spin from one node to the next, but not past the end of a run.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if _products_saturate():
            options.add_session_config_entry("session.x64quantprecision", "1")
        try:
            with _in_utf8(path) as name:
                self._session = onnxruntime.InferenceSession(
                    name, options, providers=["CPUExecutionProvider"],
                    enable_fallback=False,  # to the same provider, with four lines about it on stdout
                )  # fmt: skip
        except Exception as exc:  # ONNX Runtime's own exceptions have no public base class
            if isinstance(exc, MemoryError) or _SHORT.search(str(exc)):
                said = f"ONNX Runtime has too little memory for it: {_reason(exc)}"
                raise KernelError(f"{path}: {said}") from None
            raise BundleError(f"{path}: cannot be loaded: {_reason(exc)}") from None

    def run(self, **inputs: npt.NDArray[Any]) -> Float32:
        """The output for these inputs.

        Raises:
            KernelError: ONNX Runtime failed.
        """
        try:
            result: Float32 = self._session.run(None, inputs)[0]
        except Exception as exc:
            raise KernelError(f"{self._path}: ONNX Runtime failed: {_reason(exc)}") from None
        return result


@contextmanager
def _in_utf8(path: Path) -> Iterator[str]:
    """The file's name. ONNX Runtime takes it in UTF-8 only; a folder called otherwise goes by its handle."""
    if is_unicode(str(path)) or not sys.platform.startswith("linux"):
        yield str(path)
        return
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{handle}/{path.name}"
    finally:
        os.close(handle)


def _library() -> Any:
    """ONNX Runtime, loaded when it is first needed: it takes 60 MB of addresses and can fail like a graph."""
    try:
        import onnxruntime
    except Exception as exc:  # ImportError with the linker's words or its own, MemoryError, OSError
        raise KernelError(f"ONNX Runtime cannot be loaded: {_reason(exc)}") from None
    return onnxruntime


def _products_saturate() -> bool:
    """Whether ONNX Runtime must be told to be exact in products of unsigned and signed bytes.

    On x86 without VNNI its AVX2 kernels add pairs of them in 16 bits, which overflow. The exact way costs
    half of the speed and as much memory again, so it is left out where the CPU is known to have VNNI.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    features = kernels.cpu_features() if kernels.is_available() else ()
    return not {"avx512vnni", "avxvnni"} & set(features)


def _reason(exc: Exception) -> str:
    """Without the place in ONNX Runtime's own sources, which helps nobody."""
    return re.sub(r"/onnxruntime_src/\S+ ", "", one_line(exc, 500))[:300]
