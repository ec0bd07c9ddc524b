# SPDX-License-Identifier: Apache-2.0
"""The probes do the work they say: sums and counts, of every variant this CPU has. How fast is not tested."""

from __future__ import annotations

import numpy as np
import pytest

from pocketphi.runtime import kernels
from pocketphi.runtime.errors import KernelError

VARIANTS = pytest.mark.parametrize("variant", kernels.variants("probe"))
ROUNDS = pytest.mark.parametrize("rounds", [1, 2, 3, 16, 1000, 99_999])
WEIGHT, INPUT = 3, 5  # PK_PROBE_WEIGHT, PK_PROBE_INPUT


@VARIANTS
@ROUNDS
def test_int8_adds_up(variant: str, rounds: int) -> None:
    operations, total = kernels.probe_int8(rounds, variant=variant)
    assert operations > 0
    assert operations % (2 * rounds) == 0
    assert total == operations // 2 * WEIGHT * INPUT % 2**32


@VARIANTS
@ROUNDS
def test_fp32_adds_up(variant: str, rounds: int) -> None:
    operations, total = kernels.probe_fp32(rounds, variant=variant)
    lanes = operations // (2 * rounds)
    assert operations == 2 * rounds * lanes
    # Each lane is exact; each of fewer than `lanes` additions rounds by at most 2^-24 of the whole sum.
    assert abs(total - lanes * rounds) <= lanes * lanes * rounds * 2.0**-24


@VARIANTS
@pytest.mark.parametrize("n", [64, 128, 192, 64 * 33])
@pytest.mark.parametrize("offset", [0, 1])  # words: no variant may want more than ggml's or numpy's alignment
def test_every_word_is_read_once(variant: str, n: int, offset: int) -> None:
    rng = np.random.default_rng(n)
    memory = rng.integers(0, 2**64, n + 2, np.uint64)
    words = memory[offset : offset + n]
    assert kernels.probe_read(words, variant=variant) == sum(map(int, words)) % 2**64
    at = rng.integers(n)
    before = kernels.probe_read(words, variant=variant)
    words[at] += np.uint64(1)
    assert kernels.probe_read(words, variant=variant) == (before + 1) % 2**64


def test_the_fastest_variant_is_the_default() -> None:
    best = kernels.variants("probe")[-1]
    assert kernels.probe_int8(7) == kernels.probe_int8(7, variant=best)
    assert kernels.probe_fp32(7) == kernels.probe_fp32(7, variant=best)


@pytest.mark.parametrize("rounds", [0, 2**30 + 1, -1])
def test_rounds_out_of_range_are_refused(rounds: int) -> None:
    for probe in (kernels.probe_int8, kernels.probe_fp32):
        with pytest.raises(KernelError, match="probe"):
            probe(rounds)


def test_wrong_memory_is_refused() -> None:
    words = np.zeros(128, np.uint64)
    for bad in (words[:63], words[:0], words.reshape(2, 64), words[::2], words.view(np.int64)):
        with pytest.raises(KernelError, match="probe"):
            kernels.probe_read(bad)  # type: ignore[arg-type]
    with pytest.raises(KernelError, match="'sse9'"):
        kernels.probe_read(words, variant="sse9")
