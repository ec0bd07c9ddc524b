# SPDX-License-Identifier: Apache-2.0
"""Server-sent events: one JSON object each, `[DONE]` at the end."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .answers import encode

DONE = b"data: [DONE]\n\n"


def event(value: Any) -> bytes:
    """One event."""
    return b"data: " + encode(value) + b"\n\n"


class EventStream(Response):
    """An answer that is written while it is made."""

    media_type = "text/event-stream"

    def __init__(self, parts: AsyncGenerator[bytes, None], close: Callable[[], None]) -> None:
        """
        Args:
            parts: each is whole events, and one write.
            close: called at the end, also where it comes before the first part.
        """
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._parts, self._close = parts, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write it."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with aclosing(self._parts) as parts:
                async for part in parts:
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._close()
