# SPDX-License-Identifier: Apache-2.0
"""Time as live transcription sees it: real, or without the waiting."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds since some fixed moment; they never go back."""

    def now(self) -> float:
        """The time."""

    def wait_until(self, moment: float) -> None:
        """Return when `now()` is `moment` or later."""


class RealClock:
    """What a watch shows."""

    def now(self) -> float:
        """See `Clock.now`."""
        return time.monotonic()

    def wait_until(self, moment: float) -> None:
        """See `Clock.wait_until`."""
        time.sleep(max(0.0, moment - self.now()))


class SkippingClock:
    """Work takes the time that it takes, waiting takes none: a session's delays are those of real time."""

    def __init__(self) -> None:
        self._skipped = 0.0

    def now(self) -> float:
        """See `Clock.now`."""
        return time.monotonic() + self._skipped

    def wait_until(self, moment: float) -> None:
        """See `Clock.wait_until`."""
        self._skipped += max(0.0, moment - self.now())
