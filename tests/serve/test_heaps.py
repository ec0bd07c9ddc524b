# SPDX-License-Identifier: Apache-2.0
"""What glibc keeps of memory that threads have freed, with and without its bounds."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Sixteen threads at the same time take 48 blocks of 4 MiB in all, after one of 16 MiB was freed, which makes
# glibc keep smaller ones in its heaps. Small blocks above them hold the heaps up; then all that is large is
# freed.
CODE = """
import ctypes, os, sys, threading
from pathlib import Path
from pocketphi.serve.heaps import bound_heaps

done = bound_heaps({}) if sys.argv[1] == "bounded" else None
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.free(libc.malloc(16 << 20))
together, kept = threading.Barrier(16), []

def work():
    together.wait()
    large = [libc.malloc(4 << 20) for _ in range(3)]
    for block in large:
        ctypes.memset(block, 1, 4 << 20)
    kept.append(libc.malloc(64 << 10))
    together.wait()
    for block in large:
        libc.free(block)

threads = [threading.Thread(target=work) for _ in range(16)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
pages = int(Path("/proc/self/statm").read_text().split()[1])
print(done, pages * os.sysconf("SC_PAGE_SIZE") >> 20)
"""


def resident_mib(how: str) -> tuple[str, int]:
    found = subprocess.run(
        [sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True, timeout=60
    )
    done, size = found.stdout.split()
    return done, int(size)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_large_blocks_of_threads_go_back() -> None:
    """192 MiB are freed: all of them go back with the bounds, and without them nearly none."""
    (done, bounded), (_, unbounded) = resident_mib("bounded"), resident_mib("free")
    assert done == "True"
    assert unbounded - bounded > 96


def test_the_users_own_settings_stay() -> None:
    from pocketphi.serve.heaps import bound_heaps

    assert not bound_heaps({"MALLOC_ARENA_MAX": "8"})
    assert not bound_heaps({"GLIBC_TUNABLES": "glibc.malloc.arena_max=8"})
