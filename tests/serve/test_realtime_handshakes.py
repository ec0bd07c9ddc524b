# SPDX-License-Identifier: Apache-2.0
"""Who gets a live session: handshakes that are refused, and keys where a page can put them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import pytest

from pocketphi.serve.app import make_app
from pocketphi.serve.auth import KeyCheck, Keys
from pocketphi.serve.facts import Facts
from pocketphi.serve.jobs import Job
from pocketphi.serve.limits import Budget, Limits, Places
from pocketphi.serve.metrics import Metrics
from pocketphi.serve.scheduler import Scheduler
from pocketphi.serve.services import Services
from pocketphi.serve.worker import Workers

from ..conftest import Converted
from .served import Server
from .talk import Talk, as_protocol, refused_handshake

pytest.importorskip("websockets")


def test_no_more_sessions_than_may_be(server: Server) -> None:
    with ExitStack() as all_of_them:
        for _ in range(16):
            all_of_them.enter_context(Talk(server))
        status, headers, error = refused_handshake(server)
        assert (status, error["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(headers["Retry-After"]) <= 60
        assert server.metric("pocketphi_listeners") == 16
    server.until(lambda: server.metric("pocketphi_listeners") == 0)


def test_handshakes_that_are_refused_handshake(server: Server) -> None:
    """As any request is: a status, and an error in JSON."""
    status, _, error = refused_handshake(server, query="?intent=conversation")
    assert (status, error["param"]) == (400, "intent")
    status, _, error = refused_handshake(server, headers={"Origin": "http://evil.example.org"})
    assert (status, error["code"]) == (403, "origin_not_allowed")
    status, _, error = refused_handshake(server, query="/other")
    assert (status, error["code"]) == (404, "unknown_url")
    status, _, error = refused_handshake(
        server, headers={"X": "a" * 7000} | {f"X{i}": "b" * 7000 for i in range(4)}
    )
    assert (status, error["code"]) == (431, "headers_too_long")
    text = server.get("/metrics").body.decode()
    for status in (101, 400, 403, 431):
        assert f'requests_total{{route="/v1/realtime",status="{status}"}}' in text


def test_a_model_that_cannot_listen(user: dict[str, str], converted: Converted) -> None:
    server = Server(user, "-m", converted("phi4-mini", "Q8_0"))
    try:
        status, _, error = refused_handshake(server.ready())
        assert status == 400 and "cannot listen" in error["message"]
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("protocols", "accepted"),
    [
        (["realtime", "openai-insecure-api-key.one"], True),
        (["realtime", "openai-insecure-api-key.one", "openai-beta.realtime-v1"], True),
        (["realtime", as_protocol("one")], True),
        ([as_protocol("tw/o ü")], True),
        (["realtime", "openai-insecure-api-key.two"], False),
        (["realtime", "openai-insecure-api-key."], False),
        (["realtime", as_protocol("two")], False),
        (["realtime", "pocketphi-key."], False),
        (["realtime", "pocketphi-key.@@@"], False),
        (["realtime", "pocketphi-key.a"], False),
        (["realtime", as_protocol("one"), "openai-insecure-api-key.two"], False),
        (["realtime", as_protocol("one"), as_protocol("one")], False),
        (["realtime"], False),
        ([], False),
    ],
)
def test_keys_of_pages(protocols: Sequence[str], accepted: bool) -> None:
    passed: list[int] = []

    async def behind(scope: Any, receive: Any, send: Any) -> None:
        passed.append(1)

    async def nothing(*_: Any) -> Any:
        return {}

    check = KeyCheck(behind, Keys(["one", "tw/o ü"]), [])
    scope = {"type": "websocket", "path": "/v1/realtime", "headers": [], "subprotocols": protocols}
    asyncio.run(check(scope, nothing, nothing))
    assert bool(passed) is accepted
    passed.clear()
    asyncio.run(check(scope | {"type": "http", "path": "/v1/models"}, nothing, nothing))
    assert not passed


def test_a_model_that_is_loading() -> None:
    """503 with Retry-After; and no place is taken."""
    limits = Limits()
    scheduler: Scheduler[Job] = Scheduler(limits.queue, workers=1)
    services = Services(
        facts=Facts("a", 4096, 16, 0, {}),
        limits=limits,
        budget=Budget(limits.held_bytes),
        scheduler=scheduler,
        workers=Workers(lambda number: pytest.fail("it is not started"), scheduler),
        metrics=Metrics(),
        listeners=Places(1),
    )
    said: list[Any] = []

    async def send(message: Any) -> None:
        said.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    scope = {
        "type": "websocket",
        "path": "/v1/realtime",
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
        "subprotocols": [],
        "extensions": {"websocket.http.response": {}},
    }
    asyncio.run(make_app(services, Keys([]))(scope, receive, send))
    start, body = said
    assert start["status"] == 503 and (b"retry-after", b"1") in start["headers"]
    assert b"loading_model" in body["body"]
    assert services.listeners.taken == 0
    assert services.metrics.requests["/v1/realtime", 503] == 1
