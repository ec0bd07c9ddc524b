# SPDX-License-Identifier: Apache-2.0
"""A connection whose client leaves unread what it is sent is dropped."""

from __future__ import annotations

import asyncio

from .limits import Limits


class DropsUnread(asyncio.Protocol):
    """Before another protocol in a class's bases: it counts the time in which nothing can be written."""

    limits: Limits
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    _unread: asyncio.TimerHandle | None = None  # runs while there is no room

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._take_back()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        super().pause_writing()
        self._unread = self.loop.call_later(self.limits.send_s, self.transport.abort)

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        super().resume_writing()
        self._take_back()

    def _take_back(self) -> None:
        """It is not dropped for what has been so far."""
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
