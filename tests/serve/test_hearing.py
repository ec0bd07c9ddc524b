# SPDX-License-Identifier: Apache-2.0
"""Recordings beside other requests: who waits for whom, who leaves, and a server that is told to stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pocketphi.runtime.engine import Model

from .conftest import Serve
from .recordings import (
    BOUNDARY,
    CLIP,
    TRANSCRIPTIONS,
    Events,
    body_of,
    directly,
    encoded,
    post,
    server_with,
    spoken,
)
from .served import FRANCE, LONG_S, Server, request
from .test_stopping import endless

PARIS = "The capital of France is Paris."
N = 24  # sentences of a long recording


@pytest.fixture(scope="module")
def three() -> bytes:
    """Three sentences."""
    return encoded(spoken(3))


@pytest.fixture(scope="module")
def many() -> bytes:
    """Over a minute of them."""
    return encoded(spoken(N))


@pytest.fixture(scope="module")
def long() -> bytes:
    """Minutes of them: nobody here reads all of it."""
    return encoded(spoken(5 * N))


@pytest.fixture(scope="module")
def narrow(user: dict[str, str], nano: Path) -> Iterator[Server]:
    """Two recordings at a time, and one request in the queue."""
    found = server_with(user, nano, "listeners=2, queue=1, audio_s=600")
    try:
        assert post(found.ready(), CLIP.read_bytes()).status == 200  # so that there is something to count on
        yield found
    finally:
        found.stop()


def test_a_chat_between_utterances(narrow: Server, long: bytes) -> None:
    """Who asks while a long recording is read waits for an utterance, not for all."""
    with Events(narrow, long) as events:
        assert next(iter(events))["type"] == "transcript.text.delta"
        assert narrow.answer(FRANCE) == PARIS
        assert narrow.metric("pocketphi_listeners") == 1  # it is still being read
    narrow.until(lambda: narrow.metric("pocketphi_listeners") == 0)


def test_a_client_that_leaves(narrow: Server, long: bytes) -> None:
    """What it asked for ends, and its place is free."""
    before = narrow.metric('pocketphi_answers_total{mode="speech"}')
    with Events(narrow, long) as events:
        next(iter(events))
    narrow.until(lambda: narrow.metric("pocketphi_listeners") == 0)
    narrow.until(lambda: narrow.metric("pocketphi_requests_running") == 0)
    assert narrow.metric("pocketphi_held_bytes") == narrow.metric("pocketphi_queue_length") == 0
    assert narrow.metric('pocketphi_answers_total{mode="speech"}') < before + 5 * N
    assert narrow.answer(FRANCE) == PARIS


@pytest.mark.parametrize("stream", ["true", "false"])
def test_clients_that_leave_at_once(serve: Serve, stream: str) -> None:
    """Wherever that finds them, it is no failure of the server's."""
    server = serve().ready()
    form = body_of([("stream", stream)], CLIP.read_bytes())
    kind = f"multipart/form-data; boundary={BOUNDARY}".encode()
    raw = request(form, path=TRANSCRIPTIONS).replace(b"application/json", kind, 1)
    for _ in range(60):
        with server.connect() as connection:
            connection.sendall(raw)
        server.until(lambda: server.metric("pocketphi_listeners") == 0)
    server.until(lambda: server.metric("pocketphi_held_bytes") == 0)
    lines = [line for line in server.log if "audio" in line or "failed" in line]
    assert lines and not any("failed" in line or " 500," in line for line in lines), lines


def test_a_client_that_leaves_a_whole_answer(narrow: Server, long: bytes) -> None:
    before = narrow.metric('pocketphi_answers_total{mode="speech"}')
    raw = request(body_of([], long), path=TRANSCRIPTIONS)
    kind = f"multipart/form-data; boundary={BOUNDARY}".encode()
    with narrow.connect() as connection:
        connection.sendall(raw.replace(b"application/json", kind, 1))
        narrow.until(lambda: narrow.metric('pocketphi_answers_total{mode="speech"}') > before)
        assert narrow.metric("pocketphi_listeners") == 1
    narrow.until(lambda: narrow.metric("pocketphi_listeners") == 0)
    assert narrow.metric('pocketphi_answers_total{mode="speech"}') < before + 5 * N
    assert narrow.answer(FRANCE) == PARIS


def test_more_recordings_than_may_be(narrow: Server, alone: Model, three: bytes) -> None:
    """The third is told to come again. The two fill no queue of one, and come to their ends."""
    with ThreadPoolExecutor(3) as pool:
        with endless(narrow):  # so that they have to wait
            recordings = [pool.submit(post, narrow, three) for _ in range(2)]
            narrow.until(lambda: narrow.metric("pocketphi_queue_length") == 2)
            found = post(narrow, three)
            assert (found.status, found.code) == (429, "rate_limit_exceeded")
            assert found.headers["retry-after"] == "5"
            chat = pool.submit(narrow.answer)
            narrow.until(lambda: narrow.metric("pocketphi_queue_length") == 3)
            assert narrow.chat().status == 429
        expected = " ".join(segment.text for segment, _ in directly(alone, three))
        assert [one.result().json["text"] for one in recordings] == [expected] * 2
        assert chat.result() == PARIS
    assert post(narrow, three).status == 200


def test_real_time_factor(narrow: Server, three: bytes) -> None:
    """Sound is counted once, and what was spent on it."""
    names = ("pocketphi_audio_seconds_total", "pocketphi_audio_busy_seconds_total")
    before = [narrow.metric(name) for name in names]
    segments = post(narrow, three, ("response_format", "verbose_json")).json["segments"]
    spoken_s, busy_s = (narrow.metric(name) - was for name, was in zip(names, before, strict=True))
    assert spoken_s == pytest.approx(sum(one["end"] - one["start"] for one in segments), abs=0.01)
    assert busy_s > 0


def test_told_to_stop_in_the_middle(serve: Serve, long: bytes) -> None:
    """After the grace it ends with a word."""
    server = serve("--grace", 0).ready()
    with Events(server, long) as events:
        found = iter(events)
        next(found)
        server.process.send_signal(signal.SIGTERM)
        rest = list(found)
    assert rest[-1]["error"]["code"] == "server_stopping" and len(rest) < 5 * N
    assert server.stop() == 0
    assert not any("Traceback" in line or "Error" in line for line in server.log)


def test_what_is_there_is_finished(serve: Serve, many: bytes) -> None:
    """Within the grace: all utterances, though most are asked for after the signal."""
    server = serve("--grace", int(LONG_S)).ready()
    with Events(server, many) as events:
        found = iter(events)
        next(found)
        server.process.send_signal(signal.SIGTERM)
        rest = list(found)
    assert rest[-1]["type"] == "transcript.text.done" and len(rest) == N
    assert server.stop() == 0
    assert not any("Traceback" in line or "Error" in line for line in server.log)


def test_two_at_a_time(serve: Serve, alone: Model, three: bytes) -> None:
    """With several workers the utterances of a recording still come in order."""
    server = serve("--parallel", 2).ready()
    expected = " ".join(segment.text for segment, _ in directly(alone, three))
    with Events(server, three) as first, Events(server, three) as second:
        assert [list(events)[-1]["text"] for events in (first, second)] == [expected] * 2
