# SPDX-License-Identifier: Apache-2.0
"""Time for tests."""

from __future__ import annotations


class MadeTime:
    """A clock on which nothing takes time but what says so, and waits."""

    def __init__(self, at: float = 1000.0) -> None:
        self.time = at

    def now(self) -> float:
        return self.time

    def wait_until(self, moment: float) -> None:
        self.time = max(self.time, moment)
