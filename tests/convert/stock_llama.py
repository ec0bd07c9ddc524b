# SPDX-License-Identifier: Apache-2.0
"""llama.cpp as it comes, through llama-cpp-python's low-level calls: the judge of what convert writes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]

_F32 = 0  # GGML_TYPE_F32, for an exact cache


def _quiet(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """llama.cpp's log is not the tests'."""


_QUIET = llama_cpp.llama_log_callback(_quiet)  # kept: llama.cpp holds a pointer to it


class Stock:
    """A loaded model with one context and an exact cache."""

    def __init__(self, path: Path, n_ctx: int = 256) -> None:
        llama_cpp.llama_log_set(_QUIET, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model: Any = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        assert self.model, f"llama.cpp does not load {path}"
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = n_ctx
        params.n_threads = params.n_threads_batch = 2
        params.type_k = params.type_v = _F32
        self.context: Any = llama_cpp.llama_init_from_model(self.model, params)
        assert self.context
        self.vocab: Any = llama_cpp.llama_model_get_vocab(self.model)
        self.adapters: list[Any] = []

    def metadata(self, key: str) -> str | None:
        """One GGUF key as text."""
        text = ctypes.create_string_buffer(4096)
        n = llama_cpp.llama_model_meta_val_str(self.model, key.encode(), text, len(text))
        return None if n < 0 else text.value.decode()

    def tokens(self, text: str) -> list[int]:
        data = text.encode()
        room = (llama_cpp.llama_token * (len(data) + 8))()
        n = llama_cpp.llama_tokenize(self.vocab, data, len(data), room, len(room), False, True)
        assert n >= 0
        return list(room[:n])

    def logits(self, ids: Sequence[int]) -> Float32:
        """After the last of `ids`, from an empty cache: float32 [vocab]."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        tokens = (llama_cpp.llama_token * len(ids))(*ids)  # the batch only points to it
        batch = llama_cpp.llama_batch_get_one(tokens, len(ids))
        assert llama_cpp.llama_decode(self.context, batch) == 0
        found = llama_cpp.llama_get_logits_ith(self.context, -1)
        logits: Float32 = np.ctypeslib.as_array(found, (llama_cpp.llama_vocab_n_tokens(self.vocab),)).copy()
        return logits

    def greedy(self, prompt: str, stop: Sequence[int], limit: int = 64) -> list[int]:
        """The most likely continuation, with its stop token."""
        ids, found = self.tokens(prompt), list[int]()
        while len(found) < limit and (not found or found[-1] not in stop):
            found.append(int(self.logits(ids + found).argmax()))
        return found

    def set_adapter(self, path: Path) -> None:
        """Load an adapter and switch it on at full strength."""
        adapter = llama_cpp.llama_adapter_lora_init(self.model, str(path).encode())
        assert adapter, f"llama.cpp does not load {path}"
        self.adapters.append(adapter)
        one = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
        assert llama_cpp.llama_set_adapters_lora(self.context, one, 1, (ctypes.c_float * 1)(1.0)) == 0

    def __enter__(self) -> Stock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)  # and its adapters
