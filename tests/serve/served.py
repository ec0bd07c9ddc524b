# SPDX-License-Identifier: Apache-2.0
"""`pocketphi serve` as a process of its own, and raw requests to it."""

from __future__ import annotations

import base64
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CALL = [sys.executable, "-c", "import sys; sys.argv[0] = 'pocketphi'; from pocketphi.cli import main; main()"]
LONG_S = 60.0  # nothing here takes so long: who waits so long has lost

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
# About the longest answer there is: strings that the schema does not let end.
ENDLESS = {
    "type": "json_schema",
    "json_schema": {
        "name": "long",
        "schema": {"type": "array", "minItems": 100, "items": {"type": "string", "minLength": 200}},
    },
}


@dataclass(frozen=True)
class Reply:
    """What the server answered."""

    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str | None:
        found: str | None = self.json["error"]["code"]
        return found


class Server:
    """A running server."""

    def __init__(self, env: Mapping[str, str], *arguments: object) -> None:
        self.process = subprocess.Popen(
            [*CALL, "serve", "--port", "0", "-t", "1", *map(str, arguments)],
            env=dict(env), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.until(lambda: self.address() is not None)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line.rstrip("\n"))

    def address(self) -> str | None:
        assert self.process.poll() is None, self.log
        found = [re.fullmatch(r"listening on (http://\S+)", line) for line in self.log]
        return next((match[1] for match in found if match), None)

    def until(self, true: Callable[[], bool]) -> None:
        """Wait for something that is bound to happen."""
        ends = time.monotonic() + LONG_S
        while not true():
            assert time.monotonic() < ends, self.log[-20:]
            time.sleep(0.02)

    def ready(self) -> Server:
        self.until(lambda: self.get("/health").status == 200)
        return self

    @property
    def url(self) -> str:
        found = self.address()
        assert found is not None
        return found

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Reply:
        return self._send(urllib.request.Request(self.url + path, headers=dict(headers or {})))

    def post(self, path: str, value: Any, headers: Mapping[str, str] | None = None) -> Reply:
        """`value`: bytes as they are, anything else as JSON."""
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        kind = {"Content-Type": "application/json"}
        return self._send(urllib.request.Request(self.url + path, data, {**kind, **(headers or {})}))

    def chat(self, messages: Any = FRANCE, **fields: Any) -> Reply:
        return self.post("/v1/chat/completions", {"messages": messages, **fields})

    def answer(self, messages: Any = FRANCE, **fields: Any) -> str:
        found: str = self.chat(messages, **fields).json["choices"][0]["message"]["content"]
        return found

    def _send(self, request: urllib.request.Request) -> Reply:
        try:
            with urllib.request.urlopen(request, timeout=LONG_S) as found:
                return Reply(found.status, lower(found.headers), found.read())
        except urllib.error.HTTPError as exc:
            return Reply(exc.code, lower(exc.headers), exc.read())

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), LONG_S)

    def raw(self, data: bytes) -> bytes:
        """What comes back until the server closes or has said all of one answer."""
        with self.connect() as connection:
            connection.sendall(data)
            return read_answer(connection)

    def metric(self, name: str) -> float:
        text = self.get("/metrics").body.decode()
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        assert found is not None, name
        return float(found[1])

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(LONG_S)
        self._reader.join(LONG_S)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        return code


def read_answer(connection: socket.socket) -> bytes:
    """One HTTP answer with a Content-Length, or all until the end."""
    found = b""
    while True:
        try:
            piece = connection.recv(65536)
        except ConnectionResetError:
            return found
        found += piece
        head, gap, body = found.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        if not piece or (gap and length and len(body) >= int(length[1])):
            return found


def lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def request(body: bytes, *, path: str = "/v1/chat/completions", length: int | None = None) -> bytes:
    """The bytes of a POST; `length` may lie."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


def image(path: Path) -> dict[str, Any]:
    data = base64.b64encode(path.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def sound(data: Path | bytes, form: str = "wav") -> dict[str, Any]:
    raw = data if isinstance(data, bytes) else data.read_bytes()
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(raw).decode(), "format": form}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}
