# SPDX-License-Identifier: Apache-2.0
"""What `load_serve` asks in JSON: questions of the four modes, clients that leave, requests that are none."""

from __future__ import annotations

import http.client
import json
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

from ..scoring import EVAL, rows
from ..serve.served import ENDLESS, FRANCE, image, sound, text

TIMEOUT_S = 300.0  # of a client: who waits so long has been forgotten
TOKENS = 48
PER_SET = {"text": 8, "vision": 4, "speech": 4, "vision_speech": 4}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
JSON = {"Content-Type": "application/json"}
_MARKUP = re.compile(r"<\|[^|]*\|>")


@dataclass(frozen=True)
class Heard:
    """What came back. Of an answer that is whole, its text, and its tokens if it says them."""

    status: int  # 0: the client left before it knew
    text: str | None = None
    tokens: int = 0
    first_s: float = 0.0
    retry_after: float = 0.0


class Question(Protocol):
    """Something to ask; what comes back is the same every time."""

    @property
    def kind(self) -> str:
        """What it is counted as."""

    @property
    def seconds(self) -> float:
        """Of a recording or a live session."""

    def ask(self, url: str, *, stream: bool) -> Heard:
        """Ask, whole or streamed."""


Leave = Callable[[str, random.Random], Heard]
"""Ask the server of a URL for something, and leave in the middle, by chance sooner or later."""


@dataclass(frozen=True)
class Malformed:
    """A request that is none."""

    name: str
    statuses: tuple[int, ...]  # that may come of it
    send: Callable[[str], Heard]


Read = Callable[[http.client.HTTPResponse, float], Heard]
"""What an answer of status 200 says; the second argument is when it was asked for."""


@dataclass(frozen=True)
class Item:
    """A question in JSON."""

    kind: str
    path: str
    fields: Mapping[str, Any]
    seconds = 0.0

    def ask(self, url: str, *, stream: bool) -> Heard:
        """See Question."""
        body = json.dumps({**self.fields, "stream": stream}).encode()
        return post(url, self.path, body, JSON, streamed if stream else _whole)


def words_of(row: Mapping[str, str]) -> str:
    """A prompt without its markup."""
    return _MARKUP.sub("", row["prompt"])


def questions() -> list[Question]:
    """Of every mode some, from the evaluation set."""
    found: list[Question] = []
    for name, n in PER_SET.items():
        for row in rows(name)[:n]:
            parts: list[Any] = [image(EVAL / path) for path in row.get("images") or ()]
            parts += [sound(EVAL / row["audio"], "flac")] if row.get("audio") else []
            parts.append(text(words_of(row)))
            fields = {"messages": [{"role": "user", "content": parts}], "max_tokens": TOKENS}
            found.append(Item(name, CHAT, fields))
    return found


def prompts() -> list[Question]:
    """The text items alone, in a form that llama-cpp-python's server takes too."""
    some = rows("text")[: PER_SET["text"]]
    return [
        Item("text", COMPLETIONS, {"prompt": row["prompt"], "max_tokens": TOKENS, "temperature": 0})
        for row in some
    ]


def leave_an_answer(url: str, chance: random.Random) -> Heard:
    """One that would not end."""
    fields = {"messages": FRANCE, "response_format": ENDLESS, "temperature": 1, "stream": True}
    n = chance.randint(1, 4)

    def read(answer: http.client.HTTPResponse, started: float) -> Heard:
        return streamed(answer, started, leave_after=n)

    return post(url, CHAT, json.dumps(fields).encode(), JSON, read)


def malformed() -> list[Malformed]:
    """With the status that docs/server.md announces."""

    def user(*parts: Any, **fields: Any) -> bytes:
        return json.dumps({"messages": [{"role": "user", "content": parts}], **fields}).encode()

    def picture(url: str) -> bytes:
        return user({"type": "image_url", "image_url": {"url": url}}, text("What is it?"))

    no_length = JSON | {"Content-Length": "999999999"}
    return [
        posted("no JSON", b"{", 400),
        posted("no UTF-8", b'{"messages": "\xff"}', 400),
        posted("deep JSON", b"[" * 5000, 400),
        posted("two answers", user(text("a"), n=2), 400),
        posted("no base64", picture("data:image/png;base64,????"), 400),
        posted("no picture", picture("data:image/png;base64,AAAA"), 422),
        posted("no JSON's type", b"a=b", 415, headers={"Content-Type": "application/x-www-form-urlencoded"}),
        posted("no such path", b"{}", 404, path="/v1/nothing"),
        posted("too long", b"{", 413, headers=no_length),
    ]


def posted(
    name: str, body: bytes, status: int, *, path: str = CHAT, headers: Mapping[str, str] = JSON
) -> Malformed:
    """A body that is at fault. Media are only looked at when it is their turn, and may not get one."""
    statuses = (status, 429) if status == 422 else (status,)
    return Malformed(name, statuses, lambda url: post(url, path, body, headers, lambda *_: Heard(200)))


def post(url: str, path: str, body: bytes, headers: Mapping[str, str], read: Read) -> Heard:
    """One request on a connection of its own."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT_S)
    try:
        started = time.perf_counter()
        connection.request("POST", path, body, dict(headers))
        answer = connection.getresponse()
        if answer.status != 200:
            retry = float(answer.headers.get("Retry-After", 0))
            answer.read()
            return Heard(answer.status, retry_after=retry)
        return read(answer, started)
    finally:
        connection.close()


def _whole(answer: http.client.HTTPResponse, started: float) -> Heard:
    value = json.loads(answer.read())
    choice = value["choices"][0]
    words = choice["message"]["content"] if "message" in choice else choice["text"]
    return Heard(200, f"{words}|{choice['finish_reason']}", value["usage"]["completion_tokens"])


def streamed(answer: http.client.HTTPResponse, started: float, leave_after: int = 0) -> Heard:
    """Events; the client leaves after so many with words in them."""
    words, reason, first_s, n, ended = "", "", 0.0, 0, False
    for line in answer:
        if not line.startswith(b"data: "):
            continue
        ended = line.startswith(b"data: [DONE]")
        if ended:
            continue
        event = json.loads(line[6:])
        for choice in event.get("choices", ()):
            piece = choice["delta"].get("content") if "delta" in choice else choice["text"]
            first_s = first_s or (time.perf_counter() - started if piece else 0.0)
            words, reason, n = words + (piece or ""), choice.get("finish_reason") or reason, n + bool(piece)
        if leave_after and n >= leave_after:
            return Heard(200, first_s=first_s)
    return Heard(200, f"{words}|{reason}" if ended else f"no end: {words}", first_s=first_s)
