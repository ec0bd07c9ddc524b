# SPDX-License-Identifier: Apache-2.0
"""glibc's malloc, told to give back what it has: a server lives long, and threads come and go in it.

By itself glibc keeps a heap for each thread that ran beside others, and the larger the blocks it has seen
freed, the larger those that it keeps there. Neither is ever undone, so a server would stay as large as its
worst minute.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # malloc.h
_LARGE_BYTES = 1 << 20  # blocks from here on are mapped, and so gone when they are freed: pictures, sound
_HEAPS = 2  # for threads that want memory at the same moment; what takes time holds none of their locks


def bound_heaps(environment: Mapping[str, str] = os.environ) -> bool:
    """Do so, before threads start.

    Returns:
        Whether it was done: not without glibc, nor where glibc's own variables say what is wanted.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in environment):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another system, or another C library
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return bool(mallopt(_M_ARENA_MAX, _HEAPS)) and bool(mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES))
