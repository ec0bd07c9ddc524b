# SPDX-License-Identifier: Apache-2.0
"""How many threads to use when nobody says."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def default_threads() -> int:
    """Physical cores among the processors that this process may use; at least 1.

    Two hyper-threads of one core share its vector units, so a second thread there only adds waiting.
    """
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:  # not on this system
        return max(1, (os.cpu_count() or 2) // (1 if platform.machine() == "arm64" else 2))
    cores = set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.is_file() else str(cpu))
    return max(1, len(cores))
