# SPDX-License-Identifier: Apache-2.0
"""A KV cache as the buffers that ONNX Runtime writes into, in plain memory or on a device."""

from __future__ import annotations

from typing import Any

import numpy as np

from .parts import Float32
from .spec import TextSpec

_DEVICES = {"cuda": "cuda", "dml": "dml"}  # where a provider's cache lies, if it is not in plain memory


class KvCache:
    """K and V of each layer: float32 [1, n_kv_heads, capacity, head_dim], rotated already."""

    def __init__(self, ort_value: Any, spec: TextSpec, capacity: int, provider: str) -> None:
        """`ort_value`: ONNX Runtime's OrtValue; `provider`: what it computes on, as in onnx_session."""
        self._ort_value, self._spec, self.capacity = ort_value, spec, capacity
        self._device = _DEVICES.get(provider, "cpu")
        self.names = [f"{n}.{part}" for n in range(spec.n_layers) for part in ("key", "value")]
        self._arrays: list[Float32] = []  # the buffers' memory, where this process sees it
        self.buffers: list[Any] = []  # OrtValues
        for _ in self.names:
            self._add(capacity)

    @property
    def n(self) -> int:
        """How many buffers there are."""
        return len(self.names)

    def read(self, i: int) -> Float32:
        """A buffer's content."""
        values: Float32 = self._arrays[i] if self._arrays else self.buffers[i].numpy()
        return values

    def write(self, i: int, block: Float32) -> None:
        """Set a buffer's first tokens: float32 [1, n_kv_heads, n, head_dim]."""
        if self._arrays:
            self._arrays[i][:, :, : block.shape[2]] = block
            return
        values = np.zeros(self._shape(self.capacity), np.float32)
        values[:, :, : block.shape[2]] = block
        self.buffers[i].update_inplace(values)

    def grown(self, capacity: int, length: int) -> KvCache:
        """A larger cache with the first `length` tokens of this one, which gives up buffer after buffer."""
        new = KvCache.__new__(KvCache)
        new._ort_value, new._spec, new._device = self._ort_value, self._spec, self._device
        new.names, new.capacity, new._arrays, new.buffers = self.names, capacity, [], []
        for i in range(self.n):
            old = self.read(i)[:, :, :length]
            new._add(capacity)
            new.write(i, old)
            self.buffers[i] = None
            if self._arrays:
                self._arrays[i] = old[:, :, :0].copy()
        return new

    def _add(self, capacity: int) -> None:
        """One more buffer. Its pages take memory when they are first written."""
        shape = self._shape(capacity)
        if self._device != "cpu":
            self.buffers.append(self._ort_value.ortvalue_from_shape_and_type(shape, np.float32, self._device))
            return
        self._arrays.append(np.zeros(shape, np.float32))
        self.buffers.append(self._ort_value.ortvalue_from_numpy(self._arrays[-1]))

    def _shape(self, capacity: int) -> tuple[int, int, int, int]:
        return 1, self._spec.n_kv_heads, capacity, self._spec.head_dim
