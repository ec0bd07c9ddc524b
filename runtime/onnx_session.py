# SPDX-License-Identifier: Apache-2.0
"""ONNX graphs of a model directory, loaded by ONNX Runtime, with one-line errors."""

from __future__ import annotations

import logging
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy.typing as npt

from . import kernels, onnx_kernels
from .errors import BundleError, InputError, KernelError, one_line
from .files import is_unicode
from .onnx_check import check_graph
from .parts import Float32

PROVIDERS: Mapping[str, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "dml": "DmlExecutionProvider",
    "qnn": "QNNExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
}
"""What graphs can run on, with ONNX Runtime's names."""

_log = logging.getLogger(__name__)

_DATA_FOLDER = "session.model_external_initializers_file_folder_path"

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
        self._session = load_session(path, check_graph(path, inputs, output), n_threads)

    def run(self, **inputs: npt.NDArray[Any]) -> Float32:
        """The output for these inputs.

        Raises:
            KernelError: ONNX Runtime failed.
        """
        try:
            result: Float32 = self._session.run(None, inputs)[0]
        except Exception as exc:
            raise KernelError(f"{self._path}: ONNX Runtime failed: {reason(exc)}") from None
        return result


def load_session(
    path: Path, graph: bytes, n_threads: int, provider: str = "cpu", *, decoder: bool = False
) -> Any:
    """An InferenceSession over a graph that has been checked. On a CPU our kernels run in it if they can.

    Args:
        path: the graph; the data file is beside it.
        graph: the file's bytes.
        n_threads: of ONNX Runtime's pool, the calling thread included.
        provider: what it runs on; the CPU does what that cannot.
        decoder: its inputs are of another size each time.

    Raises:
        BundleError: ONNX Runtime refuses the graph.
        InputError: this build of ONNX Runtime has no such provider.
        KernelError: ONNX Runtime itself cannot be loaded, or has too little memory for the graph.
    """
    check_provider(provider)
    onnxruntime = library()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = n_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors come as exceptions; below 4 they go to stderr as well
    if decoder:
        # The last level has nothing for it, and ends the process in ONNX Runtime 1.23 to 1.29.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.enable_mem_pattern = False  # it remembers one for each length of a sequence, for ever
        options.enable_cpu_mem_arena = False  # it keeps what the longest pass has taken; no slower without
    # Its threads may spin from one node to the next, but not past the end of a run.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if _products_saturate():
        options.add_session_config_entry("session.x64quantprecision", "1")
    ours = graph
    if provider == "cpu" and onnx_kernels.register(options):
        ours = onnx_kernels.with_our_products(graph)

    def opened(model: str | bytes) -> Any:
        return onnxruntime.InferenceSession(
            model, options, providers=list(dict.fromkeys((PROVIDERS[provider], PROVIDERS["cpu"]))),
            enable_fallback=False,  # to the same provider, with four lines about it on stdout
        )  # fmt: skip

    try:
        with _in_utf8(path) as name:
            if ours is not graph:
                options.add_session_config_entry(_DATA_FOLDER, str(Path(name).parent))
                try:
                    return opened(ours)
                except Exception as exc:
                    if _is_short(exc):
                        raise
                    _log.info("%s: ONNX Runtime's own kernels run: %s", path, reason(exc))
            return opened(name)
    except Exception as exc:  # ONNX Runtime's own exceptions have no public base class
        if _is_short(exc):
            said = f"ONNX Runtime has too little memory for it: {reason(exc)}"
            raise KernelError(f"{path}: {said}") from None
        raise BundleError(f"{path}: cannot be loaded: {reason(exc)}") from None


def _is_short(exc: Exception) -> bool:
    """Whether memory or threads ran out."""
    return isinstance(exc, MemoryError) or _SHORT.search(str(exc)) is not None


def check_provider(name: str) -> None:
    """
    Raises:
        InputError: there is no provider of that name, or this build of ONNX Runtime has none.
        KernelError: ONNX Runtime cannot be loaded.
    """
    if name not in PROVIDERS:
        raise InputError(f"provider is {name[:40]!r}, expected one of {', '.join(PROVIDERS)}")
    if name == "cpu":
        return
    there = library().get_available_providers()
    if PROVIDERS[name] not in there:
        known = ", ".join(short for short, long in PROVIDERS.items() if long in there)
        raise InputError(f"provider is {name!r}, but this build of onnxruntime has only: {known}")


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


def library() -> Any:
    """ONNX Runtime, loaded when it is first needed: it takes 60 MB of addresses and can fail like a graph."""
    try:
        import onnxruntime
    except Exception as exc:  # ImportError with the linker's words or its own, MemoryError, OSError
        raise KernelError(f"ONNX Runtime cannot be loaded: {reason(exc)}") from None
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


def reason(exc: Exception) -> str:
    """Without the place in ONNX Runtime's own sources, which helps nobody."""
    return re.sub(r"/onnxruntime_src/\S+ ", "", one_line(exc, 500))[:300]
