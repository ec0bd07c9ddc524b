# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's log: kept quiet, kept for -v, and asked why when a call has failed."""

from __future__ import annotations

import ctypes
import logging

import llama_cpp

_log = logging.getLogger(__name__)

_LOG_ERROR = 4  # enum ggml_log_level


class EngineLog:
    """llama.cpp's log, for whoever listens at level DEBUG; its first error line explains a failed call."""

    def __init__(self) -> None:
        self.reason = ""
        self.callback = llama_cpp.llama_log_callback(self._receive)  # C keeps the pointer: so do we

    def forget(self) -> None:
        """Before a call whose failure `reason` is to explain; later errors only say that it failed."""
        self.reason = ""

    def _receive(self, level: int, text: bytes, _user_data: object) -> None:
        line = " ".join(text.decode("utf-8", "replace").split())
        if level == _LOG_ERROR and line and not self.reason:
            self.reason = line
        if line:
            _log.debug("%s", line)


ENGINE_LOG = EngineLog()  # llama.cpp has one log callback for the whole process
llama_cpp.llama_log_set(ENGINE_LOG.callback, ctypes.c_void_p(0))
