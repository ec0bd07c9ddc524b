# SPDX-License-Identifier: Apache-2.0
"""`/v1/realtime`: a WebSocket for a transcription session; see `realtime_session`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from ..runtime.errors import PocketPhiError
from .answers import encode
from .auth import refuse
from .errors import Refusal, refusal_of
from .in_thread import InThread
from .realtime_listening import Heard
from .realtime_session import ServerEvent, Session, SessionEnd, error_event
from .services import Services
from .websocket import GOING_AWAY
from .worker import STOPPING

PROTOCOL = "realtime"

_FAILED = 1011  # close codes of RFC 6455
_POLICY = 1008

_log = logging.getLogger("pocketphi.serve")
_requests_log = logging.getLogger("pocketphi.serve.requests")


async def realtime(websocket: WebSocket) -> None:
    """A connection from handshake to end. It has one of `Services.listeners` all the time."""
    services: Services = websocket.app.state.services
    try:
        _check(websocket)
        session = Session(services)
        services.listeners.take()
    except (Refusal, PocketPhiError) as exc:
        await refuse(refusal_of(exc), websocket.scope, websocket.receive, websocket.send)
        return
    try:
        await websocket.accept(PROTOCOL if PROTOCOL in websocket.scope["subprotocols"] else None)
        await _Connection(websocket, services, session).run()
    except WebSocketDisconnect:
        pass  # also from a send
    finally:
        services.listeners.give_back()


async def unknown(websocket: WebSocket) -> None:
    """Any other path."""
    refusal = Refusal(404, "not found", code="unknown_url")
    await refuse(refusal, websocket.scope, websocket.receive, websocket.send)


def _check(websocket: WebSocket) -> None:
    services: Services = websocket.app.state.services
    if websocket.query_params.get("intent", "transcription") != "transcription":
        what = "intent: only transcription is supported"
        raise Refusal(400, what, code="unsupported_value", param="intent")
    if services.workers.state == "stopping":
        raise STOPPING.refusal.fresh


class _Connection:
    """A session and its socket."""

    def __init__(self, websocket: WebSocket, services: Services, session: Session) -> None:
        self._websocket, self._services, self._session = websocket, services, session
        self._turn = asyncio.Lock()  # what is said about an item comes after its id, whoever says it

    async def run(self) -> None:
        """To the session's end."""
        await self._say([self._session.opening()])
        listening = self._session.listening
        heard = InThread(lambda: iter(listening), stop=listening.close, name="pocketphi-listener")
        telling = asyncio.create_task(self._tell(heard))
        hearing = asyncio.create_task(self._hear())
        try:
            await asyncio.wait([hearing, telling], return_when=asyncio.FIRST_COMPLETED)
            end = await (hearing if hearing.done() else telling)
            if end is not None:
                await self._end(end, telling)
        finally:
            for task in (hearing, telling):
                task.cancel()
            await asyncio.gather(hearing, telling, return_exceptions=True)
            heard.close()
            await _drain(heard)

    async def _hear(self) -> SessionEnd | None:
        """Take events; None: the client has left."""
        idle_s = self._services.limits.idle_s
        while True:
            try:
                message = await asyncio.wait_for(self._websocket.receive(), idle_s)
            except asyncio.TimeoutError:
                what = f"there was no event for {idle_s:g} s"
                return SessionEnd(_POLICY, Refusal(408, what, code="session_idle"))
            if message["type"] == "websocket.disconnect":
                return SessionEnd(GOING_AWAY, STOPPING.refusal.fresh) if _stops(message) else None
            text = message.get("text")
            try:
                async with self._turn:
                    await self._say(self._taken(text))
            except SessionEnd as exc:
                return exc
            await asyncio.sleep(0)  # others have their turn, however many events wait

    def _taken(self, text: str | None) -> list[ServerEvent]:
        if text is None:
            what = "the message is binary, expected JSON in text"
            return [error_event(Refusal(400, what, code="invalid_json"), None)]
        if self._services.log_requests and len(text) <= 4096:  # longer ones are audio
            _requests_log.info("%r", text)
        return self._session.take(text)

    async def _tell(self, heard: InThread[Heard]) -> SessionEnd | None:
        """Tell what is heard; None: all of it has been told."""
        try:
            async for one in heard:
                async with self._turn:
                    await self._say(self._session.told(one))
        except WebSocketDisconnect:
            raise
        except Exception as exc:  # whatever it is, the session cannot go on
            refusal = refusal_of(exc)
            if refusal.status >= 500:
                _log.error("a live session failed: %s", type(exc).__name__)
            return SessionEnd(_FAILED, refusal)
        return None

    async def _end(self, end: SessionEnd, telling: asyncio.Task[SessionEnd | None]) -> None:
        """Tell what is still being said, then why there is no more."""
        self._session.end()
        if end.refusal.code != "input_audio_buffer_full":  # there, it would take long
            await telling
        async with self._turn:
            await self._say([error_event(end.refusal, end.event_id)])
        await self._websocket.close(end.close_code, end.refusal.code)

    async def _say(self, events: Iterable[ServerEvent]) -> None:
        for event in events:
            if self._websocket.application_state is WebSocketState.CONNECTED:
                await self._websocket.send_text(encode(event).decode("utf-8"))


def _stops(message: object) -> bool:
    return isinstance(message, dict) and message.get("code") == GOING_AWAY


async def _drain(heard: InThread[Heard]) -> None:
    """Until its thread is done: only then may another session have its place."""
    with contextlib.suppress(Exception):
        async for _ in heard:
            pass
