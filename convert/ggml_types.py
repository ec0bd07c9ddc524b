# SPDX-License-Identifier: Apache-2.0
"""The ggml tensor types this project writes: number, block size and bytes, as in ggml.h and ggml-common.h."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GgmlType:
    """One storage type. A row is whole blocks: `block` values in `block_bytes` bytes."""

    name: str
    id: int  # enum ggml_type
    block: int
    block_bytes: int

    def row_bytes(self, n_values: int) -> int:
        """Bytes of one row of `n_values`, which must be a multiple of `block`."""
        return n_values // self.block * self.block_bytes

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return 8 * self.block_bytes / self.block


F32 = GgmlType("F32", 0, 1, 4)
F16 = GgmlType("F16", 1, 1, 2)
Q4_0 = GgmlType("Q4_0", 2, 32, 18)
Q8_0 = GgmlType("Q8_0", 8, 32, 34)
Q4_K = GgmlType("Q4_K", 12, 256, 144)
Q5_K = GgmlType("Q5_K", 13, 256, 176)
Q6_K = GgmlType("Q6_K", 14, 256, 210)

TYPES: tuple[GgmlType, ...] = (F32, F16, Q4_0, Q8_0, Q4_K, Q5_K, Q6_K)
QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION: the layout of the blocks above
