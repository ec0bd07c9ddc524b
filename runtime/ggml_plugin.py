# SPDX-License-Identifier: Apache-2.0
"""Our kernels under llama.cpp: load the backend plug-in into ggml's registry, or say why stock ggml runs.

ggml calls a plug-in through structs that change between its releases, so versions are compared before it is
loaded, and whatever is wrong with it leaves stock ggml: slower, never wrong. POCKETPHI_KERNELS=stock
leaves it out on purpose.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import llama_cpp.llama_cpp

from .errors import InputError, one_line
from .ggml_log import ENGINE_LOG

BACKEND = "PK"  # the plug-in's name in ggml's registry
API = 2  # GGML_BACKEND_API_VERSION of ggml-backend-impl.h: the layout of the structs
COUNTS = (
    "graphs",
    "nodes",
    "matmuls",
    "matmul_tokens",
    "attentions",
    "packed_bytes",
    "threads",
)  # what pk_ggml_counts fills, in order; an eighth number is reserved

_VARIABLE = "POCKETPHI_KERNELS"
_CHOICES = ("auto", "stock")
_LIB_DIR = Path(__file__).parent.parent / "lib"
_N_COUNTS = 8

_log = logging.getLogger(__name__)

Choice = Literal["auto", "stock"]


@dataclass(frozen=True, slots=True)
class PluginState:
    """Which code multiplies the decoder's matrices in this process."""

    active: bool  # our plug-in's; otherwise stock ggml's
    reason: str  # why it is stock ggml; empty when active
    variant: str  # the instruction set of our matmul; empty when stock
    ggml: str  # the version of the ggml that runs here; empty where it cannot be asked
    path: Path  # the plug-in, whether it is there or not


class _Refused(Exception):
    """The plug-in cannot be used; the message is why."""

    def __init__(self, reason: str, level: int = logging.WARNING) -> None:
        self.level = level  # how loudly to say it: an old CPU is nothing that its owner could mend
        super().__init__(reason)


def library_path() -> Path:
    """Where the installed package keeps the plug-in, whether it is there or not."""
    suffix = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
    return _LIB_DIR / f"libpk_ggml.{suffix}"


@functools.cache
def load(path: Path | None = None) -> PluginState:
    """Put the plug-in into the registry of llama.cpp's ggml; once a process, before its first model.

    Args:
        path: the plug-in; the installed package's own when None.

    Returns:
        What is active. A fallback is logged in one line: as information where nothing is wrong (it was asked
        for, the package was built without plug-in, the plug-in has nothing for this CPU), else as a warning.

    Raises:
        InputError: POCKETPHI_KERNELS holds neither `auto` nor `stock`, or `stock` while something else has
            registered the plug-in already.
    """
    path = path or library_path()
    choice, version = _choice(), ""
    try:
        ggml = _ggml()
        version = ggml.ggml_version().decode()
        registered = ggml.ggml_backend_reg_by_name(BACKEND.encode()) is not None
        if choice == "stock":
            if registered:
                raise InputError(f"{_VARIABLE} is 'stock', but this process has loaded the backend {BACKEND}")
            return _stock(f"{_VARIABLE} is 'stock'", version, path, logging.INFO)
        if registered:
            path = _loaded_file(path)
        elif not path.is_file():
            return _stock(f"the package was built without {path.name}", version, path, logging.INFO)
        plugin = _compared(path, version)
        if not registered:
            _register(ggml, plugin, path)
        variant = (plugin.pk_ggml_variant() or b"").decode()
    except _Refused as exc:
        return _stock(str(exc), version, path, exc.level)
    return PluginState(True, "", variant, version, path)


def counts(state: PluginState) -> Mapping[str, int]:
    """What the plug-in has done in this process, by the names in `COUNTS`; empty while stock ggml runs."""
    if not state.active:
        return {}
    numbers = (ctypes.c_uint64 * _N_COUNTS)()
    _open(state.path).pk_ggml_counts(numbers)
    return dict(zip(COUNTS, numbers, strict=False))


def _choice() -> Choice:
    value = os.environ.get(_VARIABLE, "") or "auto"
    if value not in _CHOICES:
        raise InputError(f"{_VARIABLE} is {value[:40]!r}, expected one of {', '.join(_CHOICES)}")
    return "stock" if value == "stock" else "auto"


def _stock(reason: str, version: str, path: Path, level: int) -> PluginState:
    _log.log(level, "stock ggml: %s", reason)
    return PluginState(False, reason, "", version, path)


def _ggml() -> SimpleNamespace:
    """ggml through the handle of the libllama that llama_cpp itself has loaded.

    The wheel holds three copies of each library. A symbol looked up in libllama's handle comes from the
    copy that libllama was linked with; any other has a registry of its own that no model asks.
    """
    lib = llama_cpp.llama_cpp._lib
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ggml_version": (ctypes.c_char_p, []),
        "ggml_backend_load": (ctypes.c_void_p, [ctypes.c_char_p]),
        "ggml_backend_unload": (None, [ctypes.c_void_p]),
        "ggml_backend_reg_count": (ctypes.c_size_t, []),
        "ggml_backend_reg_by_name": (ctypes.c_void_p, [ctypes.c_char_p]),
    }
    return _declared(lib, signatures, "this build of llama-cpp-python")


def _compared(path: Path, version: str) -> SimpleNamespace:
    """The plug-in, opened; nothing of it has run but what tells its version."""
    plugin = _open(path)
    built_for = (plugin.pk_ggml_version() or b"").decode("ascii", "replace")
    if built_for != version:
        raise _Refused(f"{path.name} was built for ggml {built_for}, this one is {version}")
    api = plugin.pk_ggml_api()
    if api != API:
        raise _Refused(f"{path.name} has the plug-in API {api}, expected {API}")
    return plugin


def _register(ggml: SimpleNamespace, plugin: SimpleNamespace, path: Path) -> None:
    ENGINE_LOG.forget()
    before = ggml.ggml_backend_reg_count()
    registered = ggml.ggml_backend_load(os.fsencode(path))
    if not registered:
        why = (plugin.pk_ggml_refusal() or b"").decode("utf-8", "replace")
        level = logging.INFO if why else logging.WARNING
        raise _Refused(
            f"{path.name} is not usable here: {why or ENGINE_LOG.reason or 'no reason given'}", level
        )
    found = ggml.ggml_backend_reg_by_name(BACKEND.encode())
    if found != registered or ggml.ggml_backend_reg_count() != before + 1:
        ggml.ggml_backend_unload(registered)
        raise _Refused(f"{path.name} was loaded, but ggml does not list a backend {BACKEND}")


def _loaded_file(path: Path) -> Path:
    """The file of a plug-in that someone else has registered: counts are kept in that copy alone."""
    named = os.environ.get("GGML_BACKEND_PATH")
    candidates = [path, Path(named)] if named else [path]
    for candidate in candidates:
        try:
            ctypes.CDLL(str(candidate), mode=getattr(os, "RTLD_NOLOAD", 0) | ctypes.DEFAULT_MODE)
        except OSError:
            continue
        return candidate
    raise _Refused(f"a backend {BACKEND} is registered already, from a file that is not {path.name}")


def _open(path: Path) -> SimpleNamespace:
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "pk_ggml_version": (ctypes.c_char_p, []),
        "pk_ggml_api": (ctypes.c_int, []),
        "pk_ggml_variant": (ctypes.c_char_p, []),
        "pk_ggml_refusal": (ctypes.c_char_p, []),
        "pk_ggml_counts": (None, [ctypes.POINTER(ctypes.c_uint64)]),
    }
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as exc:
        raise _Refused(f"{path.name} cannot be loaded: {one_line(exc)}") from None
    return _declared(lib, signatures, path.name)


def _declared(lib: Any, signatures: Mapping[str, tuple[Any, list[Any]]], where: str) -> SimpleNamespace:
    """Functions with their types. Not the library's attributes: those are llama_cpp's to declare."""
    functions = SimpleNamespace()
    for name, (result, arguments) in signatures.items():
        try:
            function = lib[name]
        except AttributeError:
            raise _Refused(f"{where} does not export {name}") from None
        function.restype, function.argtypes = result, arguments
        setattr(functions, name, function)
    return functions
