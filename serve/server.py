# SPDX-License-Identifier: Apache-2.0
"""uvicorn with bounds of our own: how long headers may take, how long an answer lies unread, how it ends.

What a connection may do once it is a WebSocket is in `websocket`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import signal
import socket
from collections.abc import Iterator
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..runtime.errors import InputError
from .errors import Refusal
from .limits import Limits
from .unread import DropsUnread
from .websocket import WebSocket, bounded_websocket, is_handshake
from .worker import Workers

_BACKLOG = 1024  # connections that wait to be accepted
_AFTER_GRACE_S = 2  # for answers to say that they were ended
_NO_HANDSHAKE = "the WebSocket's handshake is not one of RFC 6455, or its headers are too long"


class Connection(DropsUnread, H11Protocol):
    """One connection: it is closed when a request, or reading its answer, takes too long."""

    limits = Limits()  # `bounded` makes a class with a server's own

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._waiting: asyncio.TimerHandle | None = None  # for a request
        self._upgraded = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            transport.abort()
        else:
            transport.set_write_buffer_limits(high=self.limits.unread_bytes)
            self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        """An answer has been written."""
        super().on_response_complete()
        self._look()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """The connection is a WebSocket's from here on: it has timers of its own."""
        if not is_handshake(event.method, self.headers):
            self._say(Refusal(400, _NO_HANDSHAKE, code="invalid_http"))
            return
        self._upgraded = True
        self._stop_waiting()
        self._take_back()
        super().handle_websocket_upgrade(event)
        protocol = self.transport.get_protocol()
        if isinstance(protocol, WebSocket) and not protocol.handshake_initiated:  # the library has bounds too
            self._say(Refusal(400, _NO_HANDSHAKE, code="invalid_http"))

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP gets an error of the shape of all others."""
        self._say(Refusal(400, "the request is not HTTP, or its headers are too long", code="invalid_http"))

    def _look(self) -> None:
        """A timer runs while no request is complete up to its body: who sends slowly gains nothing by it."""
        busy = self._upgraded or (self.cycle is not None and not self.cycle.response_complete)
        if busy:
            self._stop_waiting()
        elif self._waiting is None and not self.transport.is_closing():
            self._waiting = self.loop.call_later(self.limits.header_s, self._late)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _late(self) -> None:
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            self._say(Refusal(408, "the request's headers did not come in time", code="request_timeout"))
        else:
            self.transport.close()

    def _say(self, refusal: Refusal) -> None:
        """Answer without the application, and close."""
        body = json.dumps(refusal.body).encode()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        with contextlib.suppress(h11.LocalProtocolError):  # an answer has begun
            start = self.conn.send(h11.Response(status_code=refusal.status, headers=headers))
            rest = self.conn.send(h11.Data(data=body))
            self.transport.write((start or b"") + (rest or b""))
        self.transport.close()


def bounded(limits: Limits) -> type[Connection]:
    """Connection with a server's own limits."""
    return type("BoundedConnection", (Connection,), {"limits": limits})


class Server(uvicorn.Server):
    """One that ends within a stated time after SIGINT or SIGTERM, without raising them again."""

    def __init__(self, app: ASGIApp, workers: Workers, limits: Limits) -> None:
        """
        Args:
            app: the application.
            workers: started when the server listens, stopped with it.
            limits: of connections, and the grace.
        """
        config = uvicorn.Config(
            app,
            http=bounded(limits),
            ws=bounded_websocket(limits),
            ws_max_size=limits.event_bytes,
            ws_ping_interval=limits.ping_s,
            ws_ping_timeout=limits.ping_s,
            ws_per_message_deflate=False,  # a small frame could become a large one
            loop="asyncio",
            log_config=None,
            log_level=logging.CRITICAL,  # it would quote requests; what matters the application logs
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=limits.header_bytes,
            proxy_headers=False,
            lifespan="off",
            timeout_graceful_shutdown=int(limits.grace_s) + _AFTER_GRACE_S,
        )
        super().__init__(config)
        self._workers, self._grace_s = workers, limits.grace_s
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and begin to load."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._workers.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse what is new, and end after the grace what is not done by then."""
        self._workers.stop()
        asyncio.get_running_loop().call_later(0 if self.force_exit else self._grace_s, self._workers.abandon)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A first signal ends the server, a second at once."""
        if self.should_exit and self._loop is not None:
            self.force_exit = True
            self._loop.call_soon_threadsafe(self._workers.abandon)
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Around all of its work."""
        before = {one: signal.signal(one, self.handle_exit) for one in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)


def listen(host: str, port: int, unread_bytes: int) -> socket.socket:
    """A listening socket; the system keeps about `unread_bytes` of an answer that is not read.

    Raises:
        InputError: no such host, or the port is taken or not allowed.
    """
    try:
        family, kind, proto, _, address = _addresses(host, port)[0]
        found = socket.socket(family, kind, proto)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, unread_bytes)
            found.bind(address)
            found.listen(_BACKLOG)  # who comes from now on waits until the loop runs
        except BaseException:
            found.close()
            raise
    except OSError as exc:
        raise InputError(f"{host} port {port}: cannot be listened on: {exc.strerror}") from None
    found.set_inheritable(False)
    return found


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it.

    Raises:
        InputError: no such host.
    """
    try:
        found = _addresses(host, 0)
    except OSError as exc:
        raise InputError(f"host {host[:100]!r} cannot be found: {exc.strerror}") from None
    return all(ipaddress.ip_address(str(one[4][0]).partition("%")[0]).is_loopback for one in found)


def _addresses(host: str, port: int) -> list[tuple[Any, Any, int, str, Any]]:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
