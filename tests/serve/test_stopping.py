# SPDX-License-Identifier: Apache-2.0
"""Clients that leave, senders that are slow, readers that do not read, and a server that is told to stop."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pocketphi.serve.limits import Limits
from pocketphi.serve.server import bounded

from .conftest import Serve
from .served import ENDLESS, FRANCE, LONG_S, Server, read_answer, request

PARIS = "The capital of France is Paris."


def endless(server: Server, *, stream: bool = True, **fields: object) -> socket.socket:
    """A connection on which an answer that has no end is being written."""
    connection = server.connect()
    body = {"messages": FRANCE, "response_format": ENDLESS, "stream": stream, "temperature": 1, "seed": 1}
    connection.sendall(request(json.dumps(body | fields).encode()))
    if stream:
        seen = b""
        while seen.count(b"data: ") < 3:
            piece = connection.recv(65536)
            assert piece, seen
            seen += piece
    else:
        server.until(lambda: server.metric("pocketphi_requests_running") == 1)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves(server: Server, stream: bool) -> None:
    """Its answer ends, the next one is whole."""
    before = server.metric("pocketphi_cancelled_running_total")
    endless(server, stream=stream).close()
    server.until(lambda: server.metric("pocketphi_cancelled_running_total") == before + 1)
    server.until(lambda: server.metric("pocketphi_requests_running") == 0)
    assert server.answer() == PARIS
    assert server.metric("pocketphi_held_bytes") == 0


def test_a_client_that_leaves_the_queue(server: Server) -> None:
    before = server.metric("pocketphi_cancelled_waiting_total")
    with endless(server) as first:
        with server.connect() as second:
            second.sendall(request(json.dumps({"messages": FRANCE}).encode()))
            server.until(lambda: server.metric("pocketphi_queue_length") == 1)
        server.until(lambda: server.metric("pocketphi_cancelled_waiting_total") == before + 1)
        assert server.metric("pocketphi_queue_length") == 0
        assert first.recv(65536)  # which goes on
    assert server.answer() == PARIS


def test_health_does_not_wait(server: Server) -> None:
    with endless(server):
        assert server.get("/health").json == {"status": "ok"}
        assert server.get("/v1/models").status == 200
        assert server.metric("pocketphi_requests_running") == 1
    assert server.answer() == PARIS


def test_a_full_queue(server: Server) -> None:
    """Four wait behind the one at work; the next is told to come again."""
    waiting = []
    with endless(server):
        for _ in range(4):
            waiting.append(server.connect())
            waiting[-1].sendall(request(json.dumps({"messages": FRANCE}).encode()))
        server.until(lambda: server.metric("pocketphi_queue_length") == 4)
        found = server.chat()
        assert (found.status, found.code) == (429, "rate_limit_exceeded")
        assert 1 <= int(found.headers["retry-after"]) <= 60
        assert found.json["error"]["type"] == "rate_limit_error"
    for one in waiting:  # the first has left
        with one:
            assert PARIS.encode() in read_answer(one)


def test_an_answer_has_its_time(serve: Serve) -> None:
    server = serve("--answer-time", 1).ready()
    found = server.chat(response_format=ENDLESS, temperature=1, seed=1).json["choices"][0]
    assert found["finish_reason"] == "length" and found["message"]["content"].startswith("[")
    assert server.answer() == PARIS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_in_the_middle(serve: Serve, number: int) -> None:
    """What is being written is ended after the grace, with a word; nothing new is taken."""
    server = serve("--grace", 1).ready()
    with endless(server) as connection:
        waiting = server.connect()
        waiting.sendall(request(json.dumps({"messages": FRANCE}).encode()))
        server.until(lambda: server.metric("pocketphi_queue_length") == 1)
        server.process.send_signal(number)
        seen = b""
        while piece := connection.recv(65536):
            seen += piece
        assert b"server_stopping" in seen and b"[DONE]" not in seen
        with waiting:
            assert b"server_stopping" in read_answer(waiting)
        with pytest.raises(OSError):
            server.connect().close()
    assert server.stop(number) == 0
    assert not any("Traceback" in line or "Error" in line for line in server.log)


def test_what_is_there_is_finished(serve: Serve) -> None:
    """Within the grace: the stream comes to its own end."""
    server = serve("--grace", int(LONG_S)).ready()
    with endless(server, max_tokens=300) as connection:
        server.process.send_signal(signal.SIGTERM)
        seen = b""
        while piece := connection.recv(65536):
            seen += piece
    assert b'"finish_reason":"length"' in seen and b"data: [DONE]" in seen
    assert server.stop() == 0


def test_told_to_stop_while_it_loads(serve: Serve) -> None:
    server = serve()
    found = server.get("/health")
    assert found.status in (200, 503) and found.json["status"] in ("ok", "loading model")
    assert server.stop() == 0


def test_told_twice(serve: Serve) -> None:
    """The second time it does not wait for the grace."""
    server = serve("--grace", 600).ready()
    with endless(server):
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert server.process.poll() is None
        assert server.stop(signal.SIGINT) == 0


# Times are short here, so that nobody has to wait for them.
SLOW = """
import sys
from pathlib import Path
from pocketphi.serve.limits import Limits
from pocketphi.serve.run import Settings, run
import logging; logging.basicConfig(stream=sys.stderr, format="%(message)s")
limits = Limits(header_s=0.5, body_s=0.5, send_s=0.5, connections=8, unread_bytes=4096)
run(Settings(Path(sys.argv[-1]), port=0, limits=limits, options={"n_threads": 1}))
"""


@pytest.fixture(scope="module")
def hasty(user: dict[str, str], nano: Path) -> Iterator[Server]:
    """A server with little patience."""
    from . import served

    call = served.CALL
    try:
        served.CALL = [call[0], "-c", SLOW]
        found = Server(user, nano)
    finally:
        served.CALL = call
    try:
        yield found.ready()
    finally:
        found.stop()


def test_slow_headers(hasty: Server) -> None:
    with hasty.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: loc")
        assert b" 408 " in read_answer(connection)
    with hasty.connect() as connection:  # drop by drop
        found = b""
        ends = time.monotonic() + LONG_S
        while not found and time.monotonic() < ends:
            try:
                connection.sendall(b"G")
                connection.settimeout(0.1)
                found = connection.recv(1000)
            except TimeoutError:
                continue
            except OSError:
                break
    assert b" 408 " in found or b" 400 " in found or found == b""


def test_a_silent_client(hasty: Server) -> None:
    """Who connects and says nothing is let go."""
    with hasty.connect() as connection:
        assert read_answer(connection) == b""


def test_a_slow_body(hasty: Server) -> None:
    with hasty.connect() as connection:
        connection.sendall(request(b'{"messages"', length=500))
        found = read_answer(connection)
    assert b" 408 " in found and b"request_timeout" in found
    assert hasty.answer() == PARIS


def test_an_answer_that_nobody_reads(hasty: Server) -> None:
    """The model is free again, and the connection gone."""
    before = hasty.metric("pocketphi_cancelled_running_total")
    body = {
        "messages": FRANCE,
        "response_format": ENDLESS,
        "stream": True,
        "temperature": 1,
        "seed": 1,
        "logprobs": True,
    }
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", hasty.port))
        connection.sendall(request(json.dumps(body).encode()))
        hasty.until(lambda: hasty.metric("pocketphi_cancelled_running_total") > before)
    assert hasty.answer() == PARIS


def test_more_connections_than_may_be(hasty: Server) -> None:
    """Those beyond are closed, and soon there is room again."""
    with ExitStack() as all_of_them:
        for one in [all_of_them.enter_context(hasty.connect()) for _ in range(30)]:
            assert read_answer(one) == b""
    assert hasty.answer() == PARIS


def test_limits_are_the_servers_own() -> None:
    assert bounded(Limits(header_s=3.0)).limits.header_s == 3.0
