# SPDX-License-Identifier: Apache-2.0
"""The library: open a model directory and talk to it. Names are loaded when they are first used."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .answer import Answer as Answer
    from .engine import Model as Model
    from .errors import BundleError as BundleError
    from .errors import CheckpointError as CheckpointError
    from .errors import InputError as InputError
    from .errors import KernelError as KernelError
    from .errors import OutputError as OutputError
    from .errors import PocketPhiError as PocketPhiError
    from .parts import Message as Message
    from .parts import Reply as Reply
    from .parts import TextEvent as TextEvent
    from .parts import ToolCall as ToolCall
    from .sampler import Sampling as Sampling

# ONNX Runtime's builds for Linux and macOS tell Microsoft about every session, and keep an identifier of
# the device on disk, unless this is set before the library is first loaded: that comes later than here.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# Where gdb or lldb is installed, ggml starts it on itself before it aborts: a debugger that nobody asked for
# writes pages to stderr, and may ask the network for symbols. The abort's own line stays.
os.environ.setdefault("GGML_NO_BACKTRACE", "1")

_HOME = {
    "Answer": "answer",
    "BundleError": "errors",
    "CheckpointError": "errors",
    "InputError": "errors",
    "KernelError": "errors",
    "Message": "parts",
    "Model": "engine",
    "OutputError": "errors",
    "PocketPhiError": "errors",
    "Reply": "parts",
    "Sampling": "sampler",
    "TextEvent": "parts",
    "ToolCall": "parts",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
