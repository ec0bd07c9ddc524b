# SPDX-License-Identifier: Apache-2.0
"""What this machine can do at most, measured: int8 and float32 arithmetic, and reading memory.

And how fast a model may be expected to run on such a machine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import kernels

_ROUND_S = 0.1  # of a probe on registers: long enough for a core to reach its clock and threads to overlap
_TRIES = 5  # the best counts: a limit is what the machine reaches undisturbed
_FIRST_ROUNDS = 100_000  # to learn how long a round takes
_BUFFERS = 3
_BUFFER_BYTES = 256 << 20
_CHUNK_WORDS = 64  # PK_PROBE_CHUNK in 64-bit words


@dataclass(frozen=True, slots=True)
class Machine:
    """Limits of all `threads` together, in 10^9 a second; a multiplication and an addition are two."""

    int8_gops: float
    fp32_gflops: float
    read_gbps: float
    threads: int
    cpu_features: tuple[str, ...]  # instruction sets that kernels may use

    def to_object(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def or_better(self, other: Machine) -> Machine:
        """The limits that two measurements with as many threads have found."""
        return replace(
            self,
            int8_gops=max(self.int8_gops, other.int8_gops),
            fp32_gflops=max(self.fp32_gflops, other.fp32_gflops),
            read_gbps=max(self.read_gbps, other.read_gbps),
        )


@dataclass(frozen=True, slots=True)
class Work:
    """What a model asks of a machine."""

    matrix_gop: float  # int8 operations to read a token, in 10^9; the head is for the last one alone
    attention_mflop: float  # float32 operations for each token before it, in 10^6
    write_gb: float  # read from memory for each token that is written, but for the cache
    cache_kb: float  # of the cache, for each token before
    in_float: bool = False  # the weights are F16 or F32: multiplied in float32


# Shares of what a probe reaches that the kernels reach too. SPEED.md, "The decoder": reading 512 tokens 53 to
# 62 % of int8 with 8 layers, and with 32 ("The whole chain", 168 tokens/s of 6.4 GOP) 55 %; from 512 to 4,096
# tokens attention adds what 85 % of float32 would take; writing moves 79 to 91 % of what reading memory does.
# "Encoders at full size": a second for a crop's 0.84 TOP, 0.15 s for ten seconds of speech.
_READ, _ATTENTION, _WRITE, _VISION, _SPEECH = 0.55, 0.85, 0.78, 0.45, 0.37
_SLOWER = {  # than int8, from the same section and from products of SigLIP's shapes for 4 bits
    "vision": {"int8": 1.0, "int4": 4.2, "fp16": 2.7, "fp32": 2.7},
    "speech": {"int8": 1.0, "int4": 1.9, "fp16": 2.9, "fp32": 2.9},
}
_FLOAT_READ = 0.55  # as for int8


def read_s(machine: Machine, work: Work, n_tokens: int) -> float:
    """Seconds to read a prompt, an estimate."""
    rate = _FLOAT_READ * machine.fp32_gflops if work.in_float else _READ * machine.int8_gops
    attention = work.attention_mflop * 1e-3 * n_tokens / 2 / (_ATTENTION * machine.fp32_gflops)
    return n_tokens * (work.matrix_gop / rate + attention)


def write_rate(machine: Machine, work: Work, n_before: int) -> float:
    """Tokens written in a second after so many tokens, an estimate."""
    return _WRITE * machine.read_gbps / (work.write_gb + work.cache_kb * 1e-6 * n_before)


def encode_s(machine: Machine, encoder: str, quant: str, gop: float) -> float:
    """Seconds of the vision or speech encoder for so many operations in 10^9, an estimate."""
    share = {"vision": _VISION, "speech": _SPEECH}[encoder]
    return gop * _SLOWER[encoder].get(quant, 1.0) / (share * machine.int8_gops)


def measure(n_threads: int, *, quick: bool = False) -> Machine:
    """Measure; takes about two seconds, or one where it need not be exact.

    Raises:
        KernelError: libpk is missing or broken.
    """
    tries, buffers = (2, 1) if quick else (_TRIES, _BUFFERS)
    with ThreadPoolExecutor(n_threads, thread_name_prefix="pocketphi-probe") as pool:
        crew = _Crew(pool, n_threads)
        return Machine(
            int8_gops=_arithmetic(crew, kernels.probe_int8, tries),
            fp32_gflops=_arithmetic(crew, kernels.probe_fp32, tries),
            read_gbps=_reading(crew, buffers),
            threads=n_threads,
            cpu_features=kernels.cpu_features(),
        )


class _Crew:
    """Threads that start a piece of work at the same moment."""

    def __init__(self, pool: ThreadPoolExecutor, n_threads: int) -> None:
        self.n_threads = n_threads
        self._pool = pool
        self._start = threading.Barrier(n_threads)

    def rate(self, work: Callable[[int], float]) -> float:
        """What `work(i)` did on all threads, in 10^9 a second from the first start to the last end."""

        def one(i: int) -> tuple[float, float, float]:
            self._start.wait()
            began = time.perf_counter()
            done = work(i)
            return began, time.perf_counter(), done

        spans = list(self._pool.map(one, range(self.n_threads)))
        seconds = max(s[1] for s in spans) - min(s[0] for s in spans)
        return sum(s[2] for s in spans) / max(seconds, 1e-9) / 1e9


def _arithmetic(crew: _Crew, probe: Callable[[int], tuple[int, float]], tries: int) -> float:
    began = time.perf_counter()
    probe(_FIRST_ROUNDS)
    rounds = max(_FIRST_ROUNDS, int(_FIRST_ROUNDS * _ROUND_S / max(time.perf_counter() - began, 1e-6)))
    rounds = min(rounds, 1 << 30)
    return max(crew.rate(lambda _: probe(rounds)[0]) for _ in range(tries))


def _reading(crew: _Crew, n_buffers: int) -> float:
    """Each thread reads a part of its own of a buffer that no cache holds.

    Where a buffer lies decides too (a virtual machine's memory is not all equally near): the best of some
    counts, each in memory of its own.
    """
    n_bytes = max(_BUFFER_BYTES, 2 * _last_cache_bytes())
    words = -(-n_bytes // 8 // crew.n_threads // _CHUNK_WORDS) * _CHUNK_WORDS
    buffers = [[np.empty(words, np.uint64) for _ in range(crew.n_threads)] for _ in range(n_buffers)]

    def best(parts: list[npt.NDArray[np.uint64]]) -> float:
        def fill(i: int) -> float:  # on the thread that will read it: where the pages are is decided now
            parts[i].fill(i)
            return 0.0

        def read(i: int) -> float:
            kernels.probe_read(parts[i])
            return float(parts[i].nbytes)

        crew.rate(fill)
        return max(crew.rate(read) for _ in range(_TRIES))

    return max(best(parts) for parts in buffers)


def _last_cache_bytes() -> int:
    """The size of the largest cache; 0 where the system does not say."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text("ascii").strip()
        number, unit = text.rstrip("KMG"), text[-1:]
        if number.isdecimal():
            sizes.append(int(number) << {"K": 10, "M": 20, "G": 30}.get(unit, 0))
    return max(sizes)
