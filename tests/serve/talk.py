# SPDX-License-Identifier: Apache-2.0
"""Live sessions from a client's side: events through a library's WebSocket, and frames that none sends."""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pocketphi.runtime import audio

from ..scoring import EVAL
from .served import LONG_S, Server

Int16 = npt.NDArray[np.int16]
Event = dict[str, Any]

TRANSCRIPTION = "conversation.item.input_audio_transcription"
TAIL = "item.input_audio_transcription.tail"


def clip(number: int) -> Int16:
    """One of phi4-nano's, at 16 kHz."""
    return samples(EVAL / f"audio/asr-{number:03d}.flac")


def samples(path: Path) -> Int16:
    found = audio.load(path)
    assert found.sample_rate == 16000
    return np.clip(np.round(found.samples * 32768), -32768, 32767).astype("<i2")


def silence(seconds: float, rate: int = 16000) -> Int16:
    return np.zeros(round(seconds * rate), "<i2")


def encoded(sound: Int16) -> str:
    return base64.b64encode(sound.astype("<i2").tobytes()).decode()


class Talk:
    """A session. Closed by `with`."""

    def __init__(
        self, server: Server, *, query: str = "?intent=transcription", protocols: Sequence[str] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        from websockets.sync.client import connect
        from websockets.typing import Subprotocol

        self._open = ExitStack()
        connection = connect(
            f"{server.url.replace('http', 'ws')}/v1/realtime{query}", proxy=None, max_size=None,
            subprotocols=[Subprotocol(one) for one in protocols] or None, additional_headers=headers,
        )  # fmt: skip
        self.socket = self._open.enter_context(connection)
        self.heard: list[Event] = []

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def say(self, kind: str, **fields: Any) -> None:
        self.socket.send(json.dumps({"type": kind, **fields}))

    def append(self, sound: Int16) -> None:
        self.say("input_audio_buffer.append", audio=encoded(sound))

    def update(self, **session: Any) -> Event:
        self.say("session.update", session={"type": "transcription", **session})
        return self.until("session.updated", "error")

    def input(self, rate: int = 16000, **fields: Any) -> Event:
        """Settings of the audio."""
        return self.update(audio={"input": {"format": {"type": "audio/pcm", "rate": rate}, **fields}})

    def commit(self, **fields: Any) -> None:
        self.say("input_audio_buffer.commit", **fields)

    def hear(self) -> Event:
        found: Event = json.loads(self.socket.recv(timeout=LONG_S))
        self.heard.append(found)
        return found

    def until(self, *kinds: str) -> Event:
        """The next event of one of these kinds; a short name is that of a transcription's."""
        wanted = {one if "." in one or one == "error" else f"{TRANSCRIPTION}.{one}" for one in kinds}
        while (found := self.hear())["type"] not in wanted:
            pass
        return found

    def error(self) -> Event:
        found: Event = self.until("error")["error"]
        return found

    def transcripts(self) -> list[str]:
        """Of what has been heard, in order."""
        return [one["transcript"] for one in self.heard if one["type"] == f"{TRANSCRIPTION}.completed"]


def refused_handshake(server: Server, **how: Any) -> tuple[int, Any, Any]:
    """Status, headers and error of a handshake."""
    from websockets.exceptions import InvalidStatus

    with pytest.raises(InvalidStatus) as found:
        Talk(server, **how)
    answer = found.value.response
    return answer.status_code, answer.headers, json.loads(answer.body)["error"]


def as_protocol(key: str) -> str:
    """A key as a subprotocol can have it."""
    return "pocketphi-key." + base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")


def check_order(events: Sequence[Event]) -> None:
    """Whether each item's events came in their order, each item after the one before, and no id twice."""
    ids = [event["event_id"] for event in events]
    assert len(set(ids)) == len(ids)
    previous: str | None = None
    state: dict[str, str] = {}
    said: dict[str, str] = {}
    latest_ms = 0
    for event in events:
        kind, item = event["type"], event.get("item_id") or event.get("item", {}).get("id")
        if kind == "input_audio_buffer.speech_started":
            assert item not in state and event["audio_start_ms"] >= latest_ms
            state[item], latest_ms = "started", event["audio_start_ms"]
        elif kind == "input_audio_buffer.speech_stopped":
            assert state[item] == "started" and event["audio_end_ms"] > latest_ms
            state[item], latest_ms = "stopped", event["audio_end_ms"]
        elif kind == "input_audio_buffer.committed":
            assert state.get(item, "stopped") == "stopped" and event["previous_item_id"] == previous
            state[item], previous = "committed", item
        elif kind == "conversation.item.added":
            assert state[item] == "committed"
            state[item] = "added"
        elif kind == "conversation.item.done":
            assert state[item] == "added"
            state[item] = "done"
        elif kind == f"{TRANSCRIPTION}.delta":
            assert state[item] in ("started", "done") and event["delta"]
            said[item] = said.get(item, "") + event["delta"]
        elif kind == f"{TRANSCRIPTION}.tail":
            assert state[item] == "started"
        elif kind == f"{TRANSCRIPTION}.completed":
            assert state[item] == "done" and said.get(item, "") == event["transcript"]
            state[item] = "completed"
    assert all(one in ("started", "completed") for one in state.values()), state


class Frames:
    """A WebSocket by hand. Closed by `with`."""

    def __init__(
        self, server: Server, *, read: bool = True, pongs: bool = True, little: bool = False
    ) -> None:
        """
        Args:
            server: to connect to.
            read: up to the session's first event.
            pongs: pings are answered when they are read.
            little: the system is to keep little of what is not read.
        """
        self._pongs = pongs
        self.connection = socket.socket()
        self.connection.settimeout(LONG_S)
        if little:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.connection.connect(("127.0.0.1", server.port))
        key = base64.b64encode(os.urandom(16)).decode()
        self.connection.sendall(
            f"GET /v1/realtime HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self._rest = b""
        self._frames: deque[tuple[int, bytes]] = deque()
        if read:
            head = self._until(lambda: b"\r\n\r\n" in self._rest)
            assert head and self._rest.startswith(b"HTTP/1.1 101"), self._rest
            self._rest = self._rest.partition(b"\r\n\r\n")[2]
            assert self.event()["type"] == "session.created"

    def __enter__(self) -> Frames:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def send(self, data: bytes) -> None:
        """As it is. Who has been dropped does not mind."""
        try:
            self.connection.sendall(data)
        except OSError:
            return

    def _until(self, true: Callable[[], bool]) -> bool:
        while not true():
            try:
                piece = self.connection.recv(65536)
            except (TimeoutError, ConnectionError):
                return False
            if not piece:
                return False
            self._rest += piece
        return True

    def frame(self) -> tuple[int, bytes] | None:
        """The next frame: opcode and content; None: the connection has ended."""
        if not self._until(lambda: len(self._rest) >= 2):
            return None
        size, at = self._rest[1], 2
        if size > 125:
            width = 2 if size == 126 else 8
            if not self._until(lambda: len(self._rest) >= 2 + width):
                return None
            size, at = int.from_bytes(self._rest[2 : 2 + width], "big"), 2 + width
        if not self._until(lambda: len(self._rest) >= at + size):
            return None
        found = self._rest[0] & 15, self._rest[at : at + size]
        self._rest = self._rest[at + size :]
        if found[0] == 9 and self._pongs:
            self.send(frame(found[1], 10))
        return found

    def event(self) -> Event:
        """The next event."""
        while (found := self.frame()) is not None and found[0] == 9:
            pass
        assert found is not None and found[0] == 1, found
        event: Event = json.loads(found[1])
        return event

    def close_code(self) -> int | None:
        """Of the close that comes, whatever comes before; None: the connection ends without one."""
        while (found := self.frame()) is not None:
            if found[0] == 8:
                code: int = struct.unpack(">H", found[1][:2])[0]
                return code
        return None


def frame(
    content: bytes, opcode: int = 1, *, fin: bool = True, masked: bool = True, reserved: int = 0,
    size: int | None = None,
) -> bytes:  # fmt: skip
    """One frame as a client sends it; `size` may lie."""
    size = len(content) if size is None else size
    first = (0x80 if fin else 0) | reserved << 4 | opcode
    bit = 0x80 if masked else 0
    if size < 126:
        head = struct.pack(">BB", first, bit | size)
    elif size < 1 << 16:
        head = struct.pack(">BBH", first, bit | 126, size)
    else:
        head = struct.pack(">BBQ", first, bit | 127, size)
    return head + (bytes(4) if masked else b"") + content  # a mask of zeros changes nothing
