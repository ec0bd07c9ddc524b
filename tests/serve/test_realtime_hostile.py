# SPDX-License-Identifier: Apache-2.0
"""What a bad client of a live session can send: a documented error or close, and bounded memory."""

from __future__ import annotations

import base64
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketphi.serve.limits import Limits
from pocketphi.serve.websocket import bounded_websocket

from .served import LONG_S, Server
from .talk import Frames, Talk, clip, encoded, frame, silence

pytest.importorskip("websockets")

_MIB = 1 << 20
# Beside the model's own: what 8 sessions of 20 s, events of 1 MiB and what is unread take, some times over.
_ROOM = 100 * _MIB

# Times and sizes are small here, so that nobody has to wait for them.
SMALL = """
import sys
from pathlib import Path
from pocketphi.serve.limits import Limits
from pocketphi.serve.run import Settings, run
import logging; logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.INFO)
limits = Limits(
    header_s=1.0, send_s=1.0, unread_bytes=4096, connections=40, listeners=8,
    event_bytes=1 << 20, fragments=16, unheard_s=20.0, idle_s=2.5, ping_s=float(sys.argv[-2]),
)
run(Settings(Path(sys.argv[-1]), port=0, limits=limits, options={"n_threads": 1}))
"""


def hasty(user: dict[str, str], nano: Path, ping_s: float) -> Server:
    """A server with little patience."""
    from . import served

    call = served.CALL
    try:
        served.CALL = [call[0], "-c", SMALL]
        return Server(user, ping_s, nano)
    finally:
        served.CALL = call


@pytest.fixture(scope="module")
def small(user: dict[str, str], nano: Path) -> Iterator[Server]:
    """One whose pings come late: who is dropped here is dropped for something else."""
    found = hasty(user, nano, LONG_S)
    try:
        yield found.ready()
    finally:
        found.stop()


def event(kind: str, **fields: Any) -> bytes:
    return frame(json.dumps({"type": kind, **fields}).encode())


def append(audio: Any) -> bytes:
    return event("input_audio_buffer.append", audio=audio)


def update(**session: Any) -> bytes:
    return event("session.update", session={"type": "transcription", **session})


def heard(**fields: Any) -> bytes:
    return update(audio={"input": fields})


MISTAKES: dict[str, tuple[bytes, str]] = {  # what is sent, the code of the error; the session goes on
    "not-json": (frame(b"hello"), "invalid_json"),
    "nothing": (frame(b""), "invalid_json"),
    "no-object": (frame(b"[1]"), "invalid_json"),
    "half-a-surrogate-pair": (frame(b'{"type": "\\udc00"}'), "invalid_json"),
    "deep": (frame(b'{"type":' + b"[" * 10_000 + b"]" * 10_000 + b"}"), "invalid_json"),
    "deep-objects": (frame(b'{"a":' * 10_000 + b"1" + b"}" * 10_000), "invalid_json"),
    "not-a-number": (frame(b'{"type": NaN}'), "invalid_json"),
    "binary": (frame(bytes(3200), 2), "invalid_json"),
    "no-type": (frame(b"{}"), "invalid_value"),
    "a-type-that-is-none": (frame(b'{"type": {"a": 1}}'), "invalid_value"),
    "another-type": (event("response.create"), "invalid_value"),
    "an-event-of-the-server": (event("session.created"), "invalid_value"),
    "no-session": (event("session.update"), "missing_required_parameter"),
    "a-conversation": (event("session.update", session={"type": "realtime"}), "invalid_type"),
    "another-format": (heard(format={"type": "audio/pcmu"}), "invalid_type"),
    "another-rate": (heard(format={"type": "audio/pcm", "rate": 8000}), "invalid_type"),
    "a-rate-in-text": (heard(format={"type": "audio/pcm", "rate": "16000"}), "invalid_type"),
    "another-turn-detection": (heard(turn_detection={"type": "semantic_vad"}), "invalid_type"),
    "a-short-pause": (heard(turn_detection={"type": "server_vad", "silence_duration_ms": 1}), "invalid_type"),
    "a-threshold": (heard(turn_detection={"type": "server_vad", "threshold": 2}), "invalid_type"),
    "a-language": (heard(transcription={"language": "../../etc"}), "invalid_type"),
    "many-keywords": (heard(transcription={"keywords": ["a"] * 300}), "invalid_type"),
    "a-long-prompt": (heard(transcription={"prompt": "word " * 10_000}), "invalid_type"),
    "too-long-a-prompt": (heard(transcription={"prompt": "ü€§ " * 1000}), "invalid_value"),
    "another-include": (update(include=["item.input_audio_transcription.logprobs"]), "invalid_type"),
    "no-audio": (event("input_audio_buffer.append"), "missing_required_parameter"),
    "audio-that-is-no-text": (append([1, 2]), "invalid_type"),
    "not-base64": (append("@@@@"), "invalid_base64"),
    "not-ascii-base64": (append("é"), "invalid_base64"),
    "cut-base64": (append("AAAAA"), "invalid_base64"),
    "an-odd-byte": (append(base64.b64encode(bytes(3)).decode()), "invalid_value"),
    "no-bytes": (append(""), "invalid_value"),
    "a-path": (append("/etc/passwd"), "invalid_base64"),
    "a-commit-of-nothing": (event("input_audio_buffer.commit"), "input_audio_buffer_commit_empty"),
    "a-commit-of-little": (
        append(encoded(silence(0.05))) + event("input_audio_buffer.commit"),
        "input_audio_buffer_commit_empty",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake(small: Server, name: str) -> None:
    sent, code = MISTAKES[name]
    with Frames(small) as client:
        client.send(sent)
        found = client.event()
        assert (found["type"], found["error"]["code"]) == ("error", code), found
        assert found["error"].keys() == {"message", "type", "param", "code", "event_id"}
        assert len(found["error"]["message"]) < 1200 and "\n" not in found["error"]["message"]
        client.send(event("input_audio_buffer.clear"))
        assert client.event()["type"] == "input_audio_buffer.cleared"


WRONG: dict[str, tuple[bytes, int]] = {  # frames, and the code that the connection is closed with
    "unmasked": (frame(b"{}", masked=False), 1002),
    "a-reserved-bit": (frame(b"{}", reserved=4), 1002),  # compression, which is not agreed on
    "a-reserved-opcode": (frame(b"{}", 3), 1002),
    "a-reserved-control": (frame(b"", 11), 1002),
    "a-long-ping": (frame(bytes(126), 9), 1002),
    "a-ping-in-parts": (frame(b"", 9, fin=False), 1002),
    "a-continuation-of-nothing": (frame(b"{}", 0), 1002),
    "two-beginnings": (frame(b"{", fin=False) + frame(b"{}"), 1002),
    "a-close-of-one-byte": (frame(b"\x03", 8), 1002),
    "a-close-that-is-not-sent": (frame(b"\x03\xed", 8), 1002),  # 1005
    "not-utf-8": (frame(b'{"type": "\xff\xfe"}'), 1007),
    "a-close-that-is-not-utf-8": (frame(b"\x03\xe8\xff", 8), 1007),
    "long": (frame(b" " * (2 * _MIB)), 1009),
    "a-length-that-lies": (frame(b"", size=1 << 62), 1009),
    "long-in-parts": (frame(b" " * _MIB, fin=False) + frame(b" ", 0), 1009),
    "many-parts": (frame(b"{", fin=False) + frame(b"", 0, fin=False) * 100, 1009),
    "goodbye": (frame(b"\x03\xe8", 8), 1000),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_frames(small: Server, name: str) -> None:
    sent, code = WRONG[name]
    with Frames(small) as client:
        client.send(sent)
        assert client.close_code() == code


@pytest.mark.parametrize("key", ["", "short", "Zm9v", "\xff"])
def test_handshakes_that_are_none(small: Server, key: str) -> None:
    head = "GET /v1/realtime HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    lines = head + (f"Sec-WebSocket-Key: {key}\r\n" if key else "") + "Sec-WebSocket-Version: 13\r\n\r\n"
    found = small.raw(lines.encode("latin-1"))
    assert found.startswith(b"HTTP/1.1 400 ") and b'"invalid_http"' in found


def test_other_handshakes(small: Server) -> None:
    rest = b" /v1/realtime HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    key = b"Sec-WebSocket-Key: " + base64.b64encode(bytes(16)) + b"\r\n"
    many = b"".join(b"X%d: a\r\n" % i for i in range(1000))
    for method, lines in (
        (b"GET", b"Sec-WebSocket-Version: 7\r\n"),
        (b"GET", b"Sec-WebSocket-Version: 13\r\n" + key),
        (b"POST", b"Sec-WebSocket-Version: 13\r\n"),
        (b"GET", many + b"Sec-WebSocket-Version: 13\r\n"),
    ):
        found = small.raw(method + rest + key + lines + b"\r\n")
        assert found.startswith(b"HTTP/1.1 400 ") and b'"invalid_http"' in found
    assert small.get("/v1/realtime").status == 404


def test_frames_before_the_handshake_is_answered(small: Server) -> None:
    """They are wrong, or early: the connection ends, or goes on, and its place is given back."""
    for early in (frame(b"{}"), frame(b"", 8), frame(b"", 9), frame(b"", 3), os.urandom(300)):
        for delay_s in (0.0, 0.001, 0.003):
            with Frames(small, read=False) as client:
                time.sleep(delay_s)
                client.send(early)
                client.connection.settimeout(0.05)
                client.frame()
    nobody(small)


def test_too_much_audio(small: Server) -> None:
    """That nobody has looked at: an error, and the end."""
    quarter = encoded(silence(5.0, 24000))
    with Frames(small) as client:
        client.send(heard(turn_detection=None))
        assert client.event()["type"] == "session.updated"
        for _ in range(5):
            client.send(append(quarter))
        found = client.event()
        assert found["error"]["code"] == "input_audio_buffer_full"
        assert client.close_code() == 1008
    nobody(small)


def test_who_says_nothing(small: Server) -> None:
    """What was being said is told, then why there is no more."""
    with Talk(small) as talk:  # its pings are answered
        talk.input()
        talk.append(clip(1))
        talk.until("completed")
        assert talk.error()["code"] == "session_idle"
    nobody(small)


def test_who_answers_no_ping(user: dict[str, str], nano: Path) -> None:
    """A connection of which one half is gone; who answers may stay."""
    server = hasty(user, nano, 0.5)
    try:
        with Frames(server.ready(), pongs=False) as client, Talk(server) as talk:
            while server.metric("pocketphi_listeners") == 2:
                client.send(event("input_audio_buffer.clear"))  # both send all the same
                talk.say("input_audio_buffer.clear")
                time.sleep(0.05)
            assert client.close_code() == 1011
            for _ in range(3):
                talk.until("input_audio_buffer.cleared")
            talk.commit()
            assert talk.error()["code"] == "input_audio_buffer_commit_empty"
    finally:
        server.stop()


def test_parts_for_ever(small: Server) -> None:
    """A message that never ends is no event: the session is idle."""
    with Frames(small) as client:
        client.send(frame(b'{"type": "', fin=False))
        assert client.event()["error"]["code"] == "session_idle"
        assert client.close_code() == 1008


@pytest.mark.parametrize(
    "sent",
    [frame(b"x") * 100, event("input_audio_buffer.clear") * 100, frame(bytes(125), 9) * 1000],
    ids=["errors", "events", "pings"],
)
def test_who_does_not_read(small: Server, sent: bytes) -> None:
    """Dropped, whatever else comes; what it does not read is not piled up."""
    before = small.metric("pocketphi_resident_memory_bytes")
    with Frames(small, little=True) as client:
        client.connection.settimeout(0.2)
        dropped, ends = False, time.monotonic() + LONG_S
        while not dropped and time.monotonic() < ends:
            try:
                client.connection.sendall(sent)
            except TimeoutError:
                continue
            except OSError:
                dropped = True
        assert dropped
    assert small.metric("pocketphi_resident_memory_bytes") < before + _ROOM
    nobody(small)


def test_floods(small: Server) -> None:
    """Pings, pongs, errors and tiny pieces of audio: answered in bounded memory, and others are served."""
    before = small.metric("pocketphi_resident_memory_bytes")
    piece = append(encoded(np.zeros(8, "<i2"))) * 500
    with Frames(small) as pinging, Frames(small) as appending, Frames(small) as failing:
        for one in (pinging, appending):
            one.connection.settimeout(0.01)
        for _ in range(20):
            pinging.send(frame(b"x" * 100, 9) * 500 + frame(b"", 10) * 500)
            appending.send(piece)
            failing.send(frame(b"{}") * 20)
            for _ in range(20):
                assert failing.event()["error"]["code"] == "invalid_value"
            for one in (pinging, appending):
                while one.frame() is not None:
                    pass
        assert small.metric("pocketphi_listeners") == 3
        assert small.answer() == "The capital of France is Paris."
        assert small.metric("pocketphi_resident_memory_bytes") < before + _ROOM
    nobody(small)


def test_more_sessions_than_may_be(small: Server) -> None:
    """Those that end badly give their place back too."""
    for _ in range(5):
        clients = [Frames(small) for _ in range(8)]
        for client in clients:
            client.send(append(encoded(clip(1))))
        for client in clients:
            client.connection.close()
        nobody(small)
    with Talk(small) as talk:
        talk.input()
        talk.append(clip(3))
        talk.commit()
        assert talk.until("completed")["transcript"] == "Send a message to Grace."


def test_after_all_of_them(small: Server) -> None:
    """It is there, answers as ever, has not grown, and has written nothing of what was sent."""
    before = small.metric("pocketphi_resident_memory_bytes")
    for sent, _ in [*MISTAKES.values(), *WRONG.values()]:
        with Frames(small) as client:
            client.send(sent)
            client.frame()
        nobody(small)
    assert small.answer() == "The capital of France is Paris."
    assert small.metric("pocketphi_queue_length") == small.metric("pocketphi_requests_running") == 0
    assert small.metric("pocketphi_resident_memory_bytes") < before + _ROOM
    known = (
        r"listening on \S+|phi4-nano is ready|adapter \w+: reading the conversation again"
        r"|\S+ \d+, \d+ bytes in, \d+ out, \S+ s"
    )
    assert all(re.fullmatch(known, line) for line in small.log), small.log


def nobody(server: Server) -> None:
    """All places are free, soon."""
    server.until(lambda: server.metric("pocketphi_listeners") == 0)


def test_limits_are_the_servers_own() -> None:
    assert bounded_websocket(Limits(send_s=3.0)).limits.send_s == 3.0
