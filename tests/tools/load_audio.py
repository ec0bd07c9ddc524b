# SPDX-License-Identifier: Apache-2.0
"""What `load_serve` asks of recordings and in live sessions, how clients leave them, and what is neither."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import random
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from pocketphi.runtime import audio

from ..scoring import EVAL
from ..serve.recordings import KIND, RATE, TRANSCRIPTIONS, body_of, encoded
from .load_requests import JSON, TIMEOUT_S, Heard, Malformed, Question, post, posted

Int16 = npt.NDArray[np.int16]

REALTIME = "/v1/realtime"
PAUSE_S = 1.2  # between sentences: long enough to end an utterance
_CHUNK = RATE // 5  # samples of an event
_TRANSCRIPTION = "conversation.item.input_audio_transcription"


@cache
def sentences(*numbers: int) -> Int16:
    """Clips of the evaluation set, with pauses between them: 16 kHz, mono."""
    parts = [np.zeros(0, np.float32)]
    for number in numbers:
        found = audio.load(EVAL / f"audio/asr-{number:03}.flac")
        assert found.sample_rate == RATE
        parts += [np.zeros(int(PAUSE_S * RATE), np.float32)] if len(parts) > 1 else []
        parts.append(found.samples)
    return np.clip(np.round(np.concatenate(parts) * 32768), -32768, 32767).astype("<i2")


@dataclass(frozen=True)
class RecordingItem:
    """A sound file to write down."""

    numbers: tuple[int, ...]
    kind = "recording"

    @property
    def seconds(self) -> float:
        """That it lasts."""
        return len(sentences(*self.numbers)) / RATE

    @property
    def file(self) -> bytes:
        """A WAV."""
        return encoded(sentences(*self.numbers))

    def ask(self, url: str, *, stream: bool) -> Heard:
        """See Question."""
        body = body_of([("stream", "true")] if stream else [], self.file)
        return post(url, TRANSCRIPTIONS, body, KIND, _streamed if stream else _whole)


@dataclass(frozen=True)
class SessionItem:
    """A live session: all of it as fast as it is taken, committed, and heard to the end.

    Streamed, the server finds the utterances, each an item; whole, the commit says where the one item ends.
    """

    numbers: tuple[int, ...]
    kind = "session"

    @property
    def seconds(self) -> float:
        """That it lasts."""
        return len(sentences(*self.numbers)) / RATE

    def ask(self, url: str, *, stream: bool) -> Heard:
        """See Question."""
        try:
            with _session(url, turns=stream) as connection:
                _say(connection, sentences(*self.numbers))
                connection.send(json.dumps({"type": "input_audio_buffer.commit"}))
                return _transcripts(connection, len(self.numbers) if stream else 1)
        except InvalidStatus as exc:
            return _refused(exc)


def questions() -> list[Question]:
    """Of one sentence and of several."""
    some = [(1,), (2, 3), (4,), (5, 6, 7)]
    return [*map(RecordingItem, some), *map(SessionItem, some)]


def leave_a_recording(url: str, chance: random.Random) -> Heard:
    """In the middle of sending it, before its answer, or after the first words."""
    when = chance.choice(("sending", "waiting", "hearing"))
    body = body_of([("stream", "true")] if when == "hearing" else [], RecordingItem((8, 9, 10)).file)
    wait_s = chance.random()
    if when == "hearing":
        return post(url, TRANSCRIPTIONS, body, KIND, _first)
    at = urlsplit(url)
    head = f"POST {TRANSCRIPTIONS} HTTP/1.1\r\nHost: {at.netloc}\r\nContent-Type: {KIND['Content-Type']}\r\n"
    raw = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    with socket.create_connection((str(at.hostname), at.port or 0), TIMEOUT_S) as connection:
        connection.sendall(raw[: len(raw) // 2] if when == "sending" else raw)
        time.sleep(wait_s)
    return Heard(0)


def leave_a_session(url: str, chance: random.Random) -> Heard:
    """Before a commit or after it, with a word or without."""
    sound = sentences(8, 9, 10)
    share, wait_s = chance.random(), chance.random()
    turns, commits, polite = (chance.random() < 0.5 for _ in range(3))
    try:
        with _session(url, turns=turns) as connection:
            _say(connection, sound[: max(int(share * len(sound)), _CHUNK)])
            if commits:
                connection.send(json.dumps({"type": "input_audio_buffer.commit"}))
            time.sleep(wait_s)
            if not polite:
                connection.socket.shutdown(socket.SHUT_RDWR)
    except InvalidStatus as exc:
        return _refused(exc)
    return Heard(200)


def malformed() -> list[Malformed]:
    """With the status that docs/server.md announces; of an event that is none, the status of its kind."""
    form = body_of([], RecordingItem((1,)).file)
    return [
        posted("no form", b"{}", 415, path=TRANSCRIPTIONS, headers=JSON),
        posted("no file", body_of([], None), 400, path=TRANSCRIPTIONS, headers=KIND),
        posted("half a form", form[: len(form) // 2], 400, path=TRANSCRIPTIONS, headers=KIND),
        posted("no sound", body_of([], b"RIFF" + bytes(400)), 422, path=TRANSCRIPTIONS, headers=KIND),
        Malformed("no transcription", (400,), lambda url: _no_session(url, "?intent=conversation", "")),
        Malformed("no event", (400, 429), lambda url: _no_session(url, "", "{")),
        Malformed("no audio", (400, 429), lambda url: _no_session(url, "", _append("????"))),
    ]


def _no_session(url: str, query: str, event: str) -> Heard:
    """A session that is not one, or an event of it; the session goes on after it."""
    try:
        with _connected(url, query) as connection:
            connection.send(event)
            error = _until(connection, "error")["error"]
            connection.send(json.dumps({"type": "input_audio_buffer.clear"}))
            _until(connection, "input_audio_buffer.cleared")
    except InvalidStatus as exc:
        return _refused(exc)
    return Heard(400 if error["type"] == "invalid_request_error" else 500)


def _connected(url: str, query: str = "?intent=transcription") -> ClientConnection:
    return connect(
        f"ws{url.removeprefix('http')}{REALTIME}{query}",
        proxy=None, open_timeout=TIMEOUT_S, close_timeout=TIMEOUT_S, ping_interval=None,
    )  # fmt: skip


@contextlib.contextmanager
def _session(url: str, *, turns: bool) -> Iterator[ClientConnection]:
    """One at 16 kHz, in which the server finds the utterances or does not."""
    detection = {"type": "server_vad"} if turns else None
    heard = {"format": {"type": "audio/pcm", "rate": RATE}, "turn_detection": detection}
    with _connected(url) as connection:
        update = {"type": "transcription", "audio": {"input": heard}}
        connection.send(json.dumps({"type": "session.update", "session": update}))
        _until(connection, "session.updated")
        yield connection


def _until(connection: ClientConnection, kind: str) -> dict[str, Any]:
    while (found := _event(connection))["type"] != kind:
        assert found["type"] != "error", found
    return found


def _event(connection: ClientConnection) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(connection.recv(timeout=TIMEOUT_S))
    return found


def _append(data: str) -> str:
    return json.dumps({"type": "input_audio_buffer.append", "audio": data})


def _say(connection: ClientConnection, sound: Int16) -> None:
    for i in range(0, len(sound), _CHUNK):
        connection.send(_append(base64.b64encode(sound[i : i + _CHUNK].tobytes()).decode()))


def _transcripts(connection: ClientConnection, n: int) -> Heard:
    """Of so many items, each the words that came before."""
    started, first_s = time.perf_counter(), 0.0
    said: dict[str, str] = {}
    found: list[str] = []
    while len(found) < n:
        event = _event(connection)
        kind, item = event["type"].removeprefix(f"{_TRANSCRIPTION}."), event.get("item_id", "")
        if kind == "delta":
            first_s = first_s or time.perf_counter() - started
            said[item] = said.get(item, "") + event["delta"]
        elif kind == "completed":
            assert said.get(item, "") == event["transcript"], (said, event)
            found.append(event["transcript"])
        elif kind in ("failed", "error"):
            return Heard(200, f"failed: {event['error']}")
    return Heard(200, " ".join(found), first_s=first_s)


def _refused(error: InvalidStatus) -> Heard:
    answer = error.response
    return Heard(answer.status_code, retry_after=float(answer.headers.get("Retry-After", 0)))


def _whole(answer: http.client.HTTPResponse, started: float) -> Heard:
    return Heard(200, json.loads(answer.read())["text"])


def _streamed(answer: http.client.HTTPResponse, started: float) -> Heard:
    words, first_s = "", 0.0
    for event in _events(answer):
        if event.get("type") == "transcript.text.delta":
            first_s = first_s or time.perf_counter() - started
            words += event["delta"]
        elif event.get("type") == "transcript.text.done":
            same = event["text"] == words
            return Heard(200, words if same else f"{words!r}, done {event['text']!r}", first_s=first_s)
        else:
            return Heard(200, f"failed: {event}")
    return Heard(200, f"no end: {words}")


def _first(answer: http.client.HTTPResponse, started: float) -> Heard:
    assert next(_events(answer))["type"] == "transcript.text.delta"
    return Heard(200, first_s=time.perf_counter() - started)


def _events(answer: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in answer:
        if line.startswith(b"data: "):
            yield json.loads(line[6:])
