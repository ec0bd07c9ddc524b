# SPDX-License-Identifier: Apache-2.0
"""Takes what C libraries write to the process's stderr, so that an error stays one line of ours."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

_MAX_BYTES = 1 << 16


class Captured:
    """What was written; complete when the block has ended."""

    text = ""


@contextmanager
def captured_stderr() -> Iterator[Captured]:
    """Redirect file descriptor 2 into a temporary file for the time of a block. Not for several threads."""
    found = Captured()
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield found
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            found.text = file.read(_MAX_BYTES).decode("utf-8", "replace")
