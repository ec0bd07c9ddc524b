# SPDX-License-Identifier: Apache-2.0
"""ASGI: counts each request, logs its size and time, and answers with an error what nobody has caught.

The line has no text of the request: not its path, which is the client's, but the route that it took.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from ..runtime.errors import PocketPhiError
from .auth import refuse
from .errors import Refusal, refusal_of
from .metrics import Metrics

_log = logging.getLogger("pocketphi.serve")
_ACCEPTED, _FORBIDDEN = 101, 403  # a WebSocket, and one that is closed before that
_GONE = 499  # as nginx writes it down: the client left before it had an answer


class Observer:
    """The outermost layer."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, routes: Collection[str], most_header_bytes: int
    ) -> None:
        """`routes`: paths that may be named."""
        self._app, self._metrics, self._routes = app, metrics, frozenset(routes)
        self._most_header_bytes = most_header_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        status, n_in, n_out = 0, 0, 0

        async def heard() -> Message:
            nonlocal n_in
            message = await receive()
            n_in += _size(message)
            return message

        async def said(message: Message) -> None:
            nonlocal status, n_out
            kind = message["type"]
            if kind.endswith("http.response.start"):
                status = message["status"]
                message.setdefault("headers", []).append((b"x-content-type-options", b"nosniff"))
            elif kind.startswith("websocket.") and not status:
                status = _ACCEPTED if kind == "websocket.accept" else _FORBIDDEN
            n_out += _size(message)
            await send(message)

        try:
            if sum(len(name) + len(value) for name, value in scope["headers"]) > self._most_header_bytes:
                raise Refusal(431, "the headers are too long", code="headers_too_long")
            await self._app(scope, heard, said)
        except ClientDisconnect:
            status = _GONE
        except WebSocketDisconnect:
            pass
        except Exception as exc:
            if not isinstance(exc, (PocketPhiError, Refusal)):
                _log.error("a request failed: %s", type(exc).__name__)
            if not status:
                await refuse(refusal_of(exc), scope, heard, said)
        finally:
            route = scope["path"] if scope["path"] in self._routes else "other"
            self._metrics.requests[route, status or _GONE] += 1
            seconds = time.monotonic() - started
            _log.info("%s %d, %d bytes in, %d out, %.3f s", route, status or _GONE, n_in, n_out, seconds)


def _size(message: Message) -> int:
    """Bytes of a body, or of a WebSocket's message; of text, characters."""
    return len(message.get("body") or message.get("bytes") or message.get("text") or b"")
