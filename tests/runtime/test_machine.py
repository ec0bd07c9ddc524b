# SPDX-License-Identifier: Apache-2.0
"""The machine's limits: that they are measured at all, and over all threads."""

from __future__ import annotations

import pytest

from pocketphi.runtime import kernels, machine


@pytest.mark.parametrize("n_threads", [1, 3])
def test_limits_are_positive_and_say_for_what(n_threads: int) -> None:
    found = machine.measure(n_threads)
    assert found.threads == n_threads
    assert found.cpu_features == kernels.cpu_features()
    assert min(found.int8_gops, found.fp32_gflops, found.read_gbps) > 0
    assert set(found.to_object()) == {"int8_gops", "fp32_gflops", "read_gbps", "threads", "cpu_features"}


def test_the_better_of_two_measurements_is_taken_limit_by_limit() -> None:
    first = machine.Machine(10.0, 5.0, 3.0, 2, ("avx2",))
    second = machine.Machine(8.0, 6.0, 4.0, 2, ("avx2",))
    both = machine.Machine(10.0, 6.0, 4.0, 2, ("avx2",))
    assert first.or_better(second) == second.or_better(first) == both
