# SPDX-License-Identifier: Apache-2.0
"""A GGUF file's header, and what llama.cpp would be given: everything inside the file, nothing twice."""

from __future__ import annotations

import math

from pocketphi.runtime.errors import BundleError
from pocketphi.runtime.gguf_check import AdapterFile, check_adapter, check_model
from pocketphi.runtime.gguf_header import BLOCKS, Array, GgufHeader, read_header

from ..target import Target, attempt, file_with, promise


def one_input(data: bytes) -> None:
    """Read, hold against the file, then check it as a model and as an adapter of itself."""
    path = file_with(data, "model.gguf")
    header = attempt(lambda: read_header(path), BundleError)
    if header is None:
        return
    _check_tensors(header)
    for key, value in header.keys.items():
        if isinstance(value, Array):
            inside = 0 <= value.start <= value.start + value.n_bytes <= header.size
            promise(inside, f"array {key!r} lies outside the file")
            strings = attempt(lambda key=key: header.strings(key), BundleError)  # type: ignore[misc]
            promise(strings is None or len(strings) == value.count, f"{key!r} has another number of strings")
        else:
            attempt(lambda key=key: header.number(key), BundleError)  # type: ignore[misc]
    attempt(lambda: check_model(header, None), BundleError)
    attempt(lambda: check_adapter(header, header, AdapterFile(path), None), BundleError)


def _check_tensors(header: GgufHeader) -> None:
    end = 0
    for name, tensor in header.tensors.items():
        _, block, block_bytes = BLOCKS[tensor.type_id]
        promise(name == tensor.name and min(tensor.shape) > 0, f"tensor {name!r} has no values")
        promise(
            tensor.n_bytes * block == math.prod(tensor.shape) * block_bytes, f"tensor {name!r}: its bytes"
        )
        promise(
            end <= tensor.offset <= header.size - tensor.n_bytes,
            f"tensor {name!r} lies on another, or outside",
        )
        end = tensor.offset + tensor.n_bytes
        if tensor.type_id == 0:
            promise(header.float32(name).size == tensor.n_values, f"tensor {name!r} has other values")


TARGETS = (Target("gguf", one_input, runs=4000),)
