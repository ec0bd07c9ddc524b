# SPDX-License-Identifier: Apache-2.0
"""uvicorn's WebSocket with bounds of our own: fragments, pongs, what lies unread, and how it ends."""

from __future__ import annotations

import asyncio
import base64
import binascii
from asyncio.transports import BaseTransport
from collections.abc import Sequence
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import CloseCode, Frame

from .limits import Limits
from .unread import DropsUnread

GOING_AWAY = (
    1012  # "service restart": what the application is told when the server stops, and the client then
)
_KEY_BYTES = 16
_FAREWELL_S = 1.0  # that a client has to answer a close when the server stops


class WebSocket(DropsUnread, WebSocketsSansIOProtocol):
    """One connection after its upgrade. It is dropped when reading what was sent takes too long."""

    limits = Limits()  # `bounded` makes a class with a server's own

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._watch: asyncio.TimerHandle | None = None
        self._was_closing = False

    def connection_made(self, transport: BaseTransport) -> None:
        """See asyncio.Protocol."""
        super().connection_made(transport)
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        if self._watch is not None:
            self._watch.cancel()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """The server stops: the application is told, and may say what it has to before it closes."""
        if self.close_sent or not self.handshake_complete:
            super().shutdown()
            return
        self.stop_keepalive()
        self.close_timeout = _FAREWELL_S
        self.queue.put_nowait({"type": "websocket.disconnect", "code": GOING_AWAY})

    def handle_cont(self, event: Frame) -> None:
        """Part of a message. Their sizes are bounded together, and so is their number: they may be empty."""
        if self.close_sent:
            return
        if len(self.frames) >= self.limits.fragments:
            self.conn.fail(CloseCode.MESSAGE_TOO_BIG, "too many fragments")
            self.frames = []
            self.handle_parser_exception()
            return
        super().handle_cont(event)

    def handle_ping(self) -> None:
        """Answered, but to a client that does not read what it is sent."""
        pongs = b"".join(self.conn.data_to_send())
        if self.writable.is_set():
            self.transport.write(pongs)

    def handle_parser_exception(self) -> None:
        """Wrong frames. Before the handshake is answered there is no close to send."""
        if self.conn.close_sent is None:
            self.transport.abort()
        else:
            super().handle_parser_exception()

    def _look(self) -> None:
        """Whether it has been closing since the last look: the client does not take the rest."""
        if self._was_closing:
            self.transport.abort()
            return
        self._was_closing = self.transport.is_closing()
        self._watch = self.loop.call_later(self.limits.send_s, self._look)


def is_handshake(method: bytes, headers: Sequence[tuple[bytes, bytes]]) -> bool:
    """Whether a request to upgrade is one of RFC 6455."""
    keys = [value for name, value in headers if name == b"sec-websocket-key"]
    versions = [value for name, value in headers if name == b"sec-websocket-version"]
    try:
        sizes = [len(base64.b64decode(key, validate=True)) for key in keys]
    except binascii.Error:
        return False
    return method == b"GET" and versions == [b"13"] and sizes == [_KEY_BYTES]


def bounded_websocket(limits: Limits) -> type[WebSocket]:
    """WebSocket with a server's own limits."""
    return type("BoundedWebSocket", (WebSocket,), {"limits": limits})
