# SPDX-License-Identifier: Apache-2.0
"""Who is next: a bounded queue, oldest first, but what the loaded adapter can read goes before the rest.

A change of adapter reads a conversation anew, and requests with different adapters share no pass: those of
one group follow one another, and run at the same time where several can. Nobody starves: an entry is passed
over a few times or for a few seconds, whichever ends first, and then it is the next.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from .errors import Refusal

T = TypeVar("T")

_MEMORY = 0.8  # of the running mean of what a request takes
_MOST_RETRY_S = 60


@dataclass(slots=True)
class _Entry(Generic[T]):
    item: T
    group: str
    added: float  # by the clock
    admitted: bool = False
    passed_over: int = 0


class Scheduler(Generic[T]):
    """The queue. It knows no thread: who shares it holds a lock around every call."""

    def __init__(
        self,
        most: int,
        *,
        workers: int = 1,
        most_passed_over: int = 8,
        patience_s: float = 15.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            most: entries that may wait.
            workers: that take from it, for `retry_after`.
            most_passed_over: times that a younger entry may go before an older one.
            patience_s: after which none may.
            now: a clock in seconds.
        """
        self._most, self._workers, self._now = most, workers, now
        self._most_passed_over, self._patience_s = most_passed_over, patience_s
        self._entries: list[_Entry[T]] = []
        self._mean_s = 1.0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def retry_after(self) -> int:
        """Seconds after which a place is likely to be free: what waits, at the pace of late."""
        wait = math.ceil(max(len(self._entries), 1) * self._mean_s / self._workers)
        return min(max(wait, 1), _MOST_RETRY_S)

    def add(self, item: T, group: str, *, admitted: bool = False) -> None:
        """Wait at the end.

        Args:
            item, group: see the class.
            admitted: it is part of something longer that has a place of its own: it takes none here.

        Raises:
            Refusal: 429, as many wait as may.
        """
        bounded = sum(not entry.admitted for entry in self._entries)
        if not admitted and bounded >= self._most:
            raise Refusal(
                429,
                f"{bounded} requests are waiting, which is the most: try again",
                code="rate_limit_exceeded",
                retry_after=self.retry_after,
            )
        self._entries.append(_Entry(item, group, self._now(), admitted))

    def take(self, group: str | None) -> tuple[T, str] | None:
        """The next item and its group; None when nobody waits.

        Args:
            group: of what runs now, or has run last.
        """
        if not self._entries:
            return None
        place = self._place(group)
        for entry in self._entries[:place]:
            entry.passed_over += 1
        found = self._entries.pop(place)
        return found.item, found.group

    def discard(self, item: T) -> bool:
        """Take an item out; False when it is not in."""
        for place, entry in enumerate(self._entries):
            if entry.item is item:
                del self._entries[place]
                return True
        return False

    def empty(self) -> list[T]:
        """Take all out, oldest first."""
        found = [entry.item for entry in self._entries]
        self._entries.clear()
        return found

    def took(self, seconds: float) -> None:
        """How long a request took, for `retry_after`."""
        self._mean_s = _MEMORY * self._mean_s + (1 - _MEMORY) * seconds

    def _place(self, group: str | None) -> int:
        oldest = self._entries[0]
        waited = self._now() - oldest.added
        if oldest.passed_over >= self._most_passed_over or waited >= self._patience_s:
            return 0
        return next((i for i, entry in enumerate(self._entries) if entry.group == group), 0)
