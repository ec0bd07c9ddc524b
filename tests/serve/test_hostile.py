# SPDX-License-Identifier: Apache-2.0
"""What a bad client can send: a documented status, a server that goes on, and bounded memory."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest

from ..scoring import EVAL
from .conftest import Serve
from .served import FRANCE, Server, image, read_answer, request, sound, text

PICTURE = EVAL / "images/img-012.png"
_MIB = 1 << 20
# Beside the model's own: bodies of 8 MiB as bytes, as text and decoded, and what a large picture takes.
_ROOM = 400 * _MIB


def user(*parts: Any) -> Any:
    return {"messages": [{"role": "user", "content": list(parts)}], "max_tokens": 4}


def url(value: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": value}}


def encoded(data: bytes, kind: str = "image/png") -> dict[str, Any]:
    return url(f"data:{kind};base64,{base64.b64encode(data).decode()}")


def png(width: int, height: int) -> bytes:
    """Zeros: a thousandth of what they become."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes((width + 1) * 64), 9)
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def wav(seconds: int, *, rate: int = 16000, cut: int | None = None) -> bytes:
    """Silence that a header announces; `cut`: so many bytes of it are there."""
    size = seconds * rate * 2
    head = b"RIFF" + struct.pack("<I", 36 + size) + b"WAVEfmt "
    head += struct.pack("<IHHIIHH", 16, 1, 1, rate, rate * 2, 2, 16)
    return head + b"data" + struct.pack("<I", size) + bytes(size if cut is None else cut)


def flac(seconds: int) -> bytes:
    """An hour of silence in a few kilobytes."""
    import io

    import numpy as np
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, np.zeros(seconds * 8000, np.float32), 8000, format="FLAC")
    return file.getvalue()


REQUESTS: dict[str, tuple[Any, int, str]] = {  # what is sent, the status, the code
    "not-json": (b"hello", 400, "invalid_json"),
    "not-utf-8": (b'{"messages": "\xff\xfe"}', 400, "invalid_json"),
    "half-a-surrogate-pair": (b'{"messages": "\\udc00"}', 400, "invalid_json"),
    "deep": (b'{"messages":' + b"[" * _MIB + b"]" * _MIB + b"}", 400, "invalid_json"),
    "deep-objects": (b'{"tools":' + b'{"a":' * 300_000, 400, "invalid_json"),
    "no-messages": ({}, 400, "missing_required_parameter"),
    "nobody-says-anything": ({"messages": []}, 400, "invalid_value"),
    "many-messages": ({"messages": FRANCE * 5000}, 422, "invalid_value"),
    "many-parts": (user(*[text("a")] * 9000), 422, "too_many_parts"),
    "many-pictures": (user(*[encoded(PICTURE.read_bytes())] * 65), 422, "too_many_media"),
    "many-tools": (
        {
            "messages": FRANCE,
            "tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(200)],
        },
        422,
        "too_many_tools",
    ),
    "two-tools-of-a-name": (
        {"messages": FRANCE, "tools": [{"type": "function", "function": {"name": "f"}}] * 2},
        400,
        "invalid_value",
    ),
    "too-many-tokens": (
        {"messages": [{"role": "user", "content": "word " * 20_000}]},
        400,
        "context_length_exceeded",
    ),
    "too-many-picture-tokens": (
        user(*[encoded(png(4000, 4000))] * 30, text("What?")),
        400,
        "context_length_exceeded",
    ),
    "not-base64": (user(url("data:image/png;base64,@@@@")), 400, "invalid_base64"),
    "not-ascii-base64": (user(url("data:image/png;base64,é")), 400, "invalid_base64"),
    "cut-base64": (user(url("data:image/png;base64,AAAAA")), 400, "invalid_base64"),
    "sound-not-base64": (
        user({"type": "input_audio", "input_audio": {"data": "****", "format": "wav"}}),
        400,
        "invalid_base64",
    ),
    "no-data": (user(url("data:image/png;base64,")), 422, "invalid_media"),
    "no-picture": (user(encoded(b"no picture")), 422, "invalid_media"),
    "cut-picture": (user(encoded(PICTURE.read_bytes()[:500])), 422, "invalid_media"),
    "cut-jpeg": (user(encoded(b"\xff\xd8\xff\xc0\x00\x11\x08\x00\x10\x00\x10")), 422, "invalid_media"),
    "picture-bomb": (user(encoded(png(60_000, 60_000))), 422, "invalid_media"),
    "thin-picture": (user(encoded(png(20_000, 2))), 422, "invalid_media"),
    "a-lie-about-pixels": (user(encoded(png(300, 300))), 422, "invalid_media"),
    "no-sound": (user(sound(b"no sound at all")), 422, "invalid_media"),
    "cut-sound": (user(sound(wav(5, cut=1000))), 422, "invalid_media"),
    "short-sound": (user(sound(wav(0))), 422, "invalid_media"),
    "long-sound": (user(sound(wav(61))), 422, "invalid_media"),
    "long-sounds": (user(*[sound(wav(31))] * 2), 422, "invalid_media"),
    "sound-bomb": (user(sound(flac(3600))), 422, "invalid_media"),
    "file": (user(url("file:///etc/passwd")), 400, "invalid_url"),
    "path": (user(url("/etc/passwd")), 400, "invalid_url"),
    "path-of-a-picture": (user(url(str(PICTURE))), 400, "invalid_url"),
    "address": (user(url("http://127.0.0.1:9/a.png")), 400, "remote_media_not_allowed"),
    "secure-address": (user(url("HTTPS://example.org/a.png")), 400, "remote_media_not_allowed"),
    "picture-of-the-system": (
        {"messages": [{"role": "system", "content": [encoded(PICTURE.read_bytes())]}]},
        400,
        "invalid_value",
    ),
    "no-tokens": ({"messages": FRANCE, "max_tokens": 0}, 400, "invalid_value"),
    "hot": ({"messages": FRANCE, "temperature": 1000}, 400, "invalid_value"),
    "no-stop": ({"messages": FRANCE, "stop": [""]}, 400, "invalid_value"),
    "many-stops": ({"messages": FRANCE, "stop": ["a"] * 100}, 400, "invalid_value"),
    "no-schema": (
        {
            "messages": FRANCE,
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "name": "a",
                    "schema": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
                },
            },
        },
        400,
        "invalid_value",
    ),
    "a-call-without-tools": ({"messages": FRANCE, "tool_choice": "required"}, 400, "invalid_value"),
    "calls-that-are-no-json": (
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [
                        {"type": "function", "function": {"name": "f", "arguments": "[" * 100_000}}
                    ],
                }
            ]
        },
        400,
        "invalid_value",
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_bad_request(server: Server, name: str) -> None:
    sent, status, code = REQUESTS[name]
    found = server.post("/v1/chat/completions", sent)
    assert (found.status, found.code) == (status, code), found.body[:300]
    assert found.headers["content-type"] == "application/json"
    message = found.json["error"]["message"]
    assert len(message) < 1200 and "\n" not in message and "Traceback" not in message
    assert found.json["error"].keys() == {"message", "type", "param", "code"}


def test_after_all_of_them(server: Server) -> None:
    """It is there, answers as ever, holds nothing, and has not grown."""
    before = server.metric("pocketphi_resident_memory_bytes")
    for sent, *_ in REQUESTS.values():
        server.post("/v1/chat/completions", sent)
    assert server.answer() == "The capital of France is Paris."
    assert server.metric("pocketphi_held_bytes") == 0
    assert server.metric("pocketphi_queue_length") == server.metric("pocketphi_requests_running") == 0
    assert server.metric("pocketphi_resident_memory_bytes") < before + _ROOM


def test_nothing_of_a_request_is_logged(server: Server) -> None:
    secret = "the-cat-is-called-Rosa"
    server.chat([{"role": "user", "content": secret}], max_tokens=2)
    server.post("/v1/chat/completions", user(url(f"file:///{secret}")))
    server.post(f"/{secret}", b"{}", {"X-Secret": secret})
    server.get(f"/v1/models/{secret}?{secret}=1")
    server.raw(f"{secret}\r\n\r\n".encode())
    server.until(lambda: any("other 404" in line for line in server.log))
    assert not any(secret in line for line in server.log)


def test_a_request_is_logged_where_asked(serve: Serve) -> None:
    """In one line that steers no terminal."""
    one = serve("--log-requests").ready()
    one.chat([{"role": "user", "content": "\x1b[2J\nRosa"}], max_tokens=1)
    one.until(lambda: any("Rosa" in line for line in one.log))
    assert all(line.isprintable() for line in one.log)


def test_routes_that_are_not_there(server: Server) -> None:
    found = server.get("/v1/nothing")
    assert (found.status, found.code) == (404, "unknown_url")
    found = server.get("/v1/chat/completions")
    assert (found.status, found.code, found.headers["allow"]) == (405, "method_not_allowed", "POST")
    assert server.post("/health", {}).status == 405
    assert server.get("/v1/chat/completions/../../../etc/passwd").status == 404


def test_another_kind_of_body(server: Server) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        found = server.post("/v1/chat/completions", {"messages": FRANCE}, {"Content-Type": kind})
        assert (found.status, found.code) == (415, "unsupported_media_type")
    body = json.dumps({"messages": FRANCE}).encode()
    plain = request(body).replace(b"Content-Type: application/json\r\n", b"")
    assert b" 200 OK" in server.raw(plain)


def test_a_long_body(server: Server) -> None:
    """Refused by what it announces, or when it has come so far."""
    found = server.raw(request(b"", length=9 * _MIB))
    assert b" 413 " in found and b"request_too_large" in found
    try:
        found = server.post("/v1/chat/completions", b" " * (9 * _MIB))
        assert (found.status, found.code) == (413, "request_too_large")
    except URLError as error:  # the answer and the end came while it was still sending
        assert isinstance(error.reason, (ConnectionResetError, BrokenPipeError))
    piece = b"%x\r\n%s\r\n" % (_MIB, b" " * _MIB)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(head)
        for _ in range(9):
            connection.sendall(piece)
        connection.sendall(b"0\r\n\r\n")
        assert b" 413 " in read_answer(connection)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET / HTTQ/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",  # without a Host
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
    ],
    ids=["tls", "version", "no-host", "negative", "two-lengths"],
)
def test_what_is_no_http(server: Server, sent: bytes) -> None:
    found = server.raw(sent)
    assert found.startswith(b"HTTP/1.1 400 ")
    assert json.loads(found.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


@pytest.mark.parametrize(
    "lines", [b"X: " + b"a" * 100_000 + b"\r\n", b"X: a\r\n" * 20_000], ids=["long", "many"]
)
def test_long_headers(server: Server, lines: bytes) -> None:
    """In one piece they are a request; in several, they are given up on before they are one."""
    found = server.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + lines + b"\r\n")
    status, code = found[9:12], json.loads(found.partition(b"\r\n\r\n")[2])["error"]["code"]
    assert (status, code) in ((b"431", "headers_too_long"), (b"400", "invalid_http"))


def test_a_body_longer_than_announced(server: Server) -> None:
    """The rest is another request, and is no HTTP."""
    body = json.dumps({"messages": FRANCE}).encode()
    with server.connect() as connection:
        connection.sendall(request(body + b"x" * 1000, length=len(body)))
        assert b"Paris" in read_answer(connection)


def test_a_body_that_never_ends(server: Server) -> None:
    """The client goes away in its middle: nobody waits for the rest."""
    for _ in range(20):
        with server.connect() as connection:
            connection.sendall(request(b'{"messages": [', length=5 * _MIB))
    assert server.answer() == "The capital of France is Paris."
    server.until(lambda: server.metric("pocketphi_held_bytes") == 0)


def test_many_at_once(server: Server) -> None:
    """As many as may wait are answered, others get a 429 and are told when to come again."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(lambda _: server.chat(max_tokens=20), range(48)))
    statuses = {one.status for one in found}
    assert statuses <= {200, 429} and 200 in statuses
    for one in found:
        if one.status == 429:
            assert one.code == "rate_limit_exceeded" and 1 <= int(one.headers["retry-after"]) <= 60
        else:
            assert one.json["choices"][0]["message"]["content"] == "The capital of France is Paris."


def test_a_path_in_sound_is_no_path(server: Server, tmp_path: Path) -> None:
    """Data is base64 and nothing else, even where it spells a file that is there."""
    name = tmp_path / "abcd"
    name.write_bytes((EVAL / "audio/asr-003.flac").read_bytes())
    found = server.post(
        "/v1/chat/completions",
        user({"type": "input_audio", "input_audio": {"data": str(name), "format": "flac"}}),
    )
    assert found.status in (400, 422)


def test_pictures_still_work(server: Server) -> None:
    found = server.answer([{"role": "user", "content": [image(PICTURE), text("What does the text say?")]}])
    assert found == "It says chair."
