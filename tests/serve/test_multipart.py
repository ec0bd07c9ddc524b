# SPDX-License-Identifier: Apache-2.0
"""Forms, well-formed and not: a documented status for each, a server that goes on, and parts to the byte."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from pocketphi.serve.errors import Refusal
from pocketphi.serve.multipart import boundary_of, parts_of

from .recordings import BOUNDARY, CLIP, KIND, TRANSCRIPTIONS, body_of, server_with
from .served import FRANCE, Server, read_answer, request

MIB = 1 << 20
SOUND = CLIP.read_bytes()
B = BOUNDARY.encode()
FORM = KIND["Content-Type"]


def part(headers: bytes, data: bytes = b"x") -> bytes:
    return b"--" + B + b"\r\n" + headers + b"\r\n\r\n" + data + b"\r\n"


def form(*headers: bytes) -> bytes:
    """A good file, then parts with such headers."""
    return body_of([], SOUND).removesuffix(b"--" + B + b"--\r\n") + b"".join(map(part, headers)) + END


END = b"--" + B + b"--\r\n"
NAMED = b'Content-Disposition: form-data; name="a"'
GOOD = body_of([], SOUND)

HOSTILE: list[tuple[str, str | None, bytes, int, str | None]] = [
    ("no-type", None, GOOD, 415, "unsupported_media_type"),
    ("json", "application/json", b"{}", 415, "unsupported_media_type"),
    ("urlencoded", "application/x-www-form-urlencoded", b"file=x", 415, "unsupported_media_type"),
    ("mixed", f"multipart/mixed; boundary={BOUNDARY}", GOOD, 415, "unsupported_media_type"),
    ("no-boundary", "multipart/form-data", GOOD, 400, "invalid_multipart"),
    ("empty-boundary", "multipart/form-data; boundary=", GOOD, 400, "invalid_multipart"),
    ("long-boundary", "multipart/form-data; boundary=" + "a" * 71, GOOD, 400, "invalid_multipart"),
    ("huge-boundary", "multipart/form-data; boundary=" + "a" * 9000, GOOD, 400, "invalid_multipart"),
    ("another-boundary", "multipart/form-data; boundary=other", GOOD, 400, "invalid_multipart"),
    ("empty", FORM, b"", 400, "invalid_multipart"),
    ("no-end", FORM, GOOD[: -len(END)], 400, "invalid_multipart"),
    ("half-an-end", FORM, GOOD[:-4], 400, "invalid_multipart"),
    ("half-a-file", FORM, GOOD[: len(GOOD) // 2], 400, "invalid_multipart"),
    ("half-a-header", FORM, GOOD[:60], 400, "invalid_multipart"),
    ("no-form", FORM, b"hello", 400, "invalid_multipart"),
    ("line-ends", FORM, b"\r\n" * (2 * MIB), 400, "invalid_multipart"),
    ("nearly-boundaries", FORM, (b"\r\n--" + B[:-1]) * 100_000, 400, "invalid_multipart"),
    ("many-boundaries", FORM, (b"--" + B + b"\r\n") * 100_000, 400, "invalid_multipart"),
    ("many-parts", FORM, form(*[NAMED] * 64), 422, "too_many_parts"),
    ("thousands", FORM, part(NAMED) * 50_000 + END, 422, "too_many_parts"),
    ("long-header", FORM, form(NAMED + b"\r\nX: " + b"a" * 9000), 400, "invalid_multipart"),
    ("huge-header", FORM, form(NAMED + b"\r\nX: " + b"a" * 5 * MIB), 400, "invalid_multipart"),
    ("huge-header-name", FORM, form(NAMED + b"\r\n" + b"X" * 5 * MIB + b": a"), 400, "invalid_multipart"),
    ("many-headers", FORM, form(NAMED + b"\r\nX: a" * 20_000), 400, "invalid_multipart"),
    ("header-twice", FORM, form(NAMED + b"\r\n" + NAMED), 400, "invalid_multipart"),
    ("no-colon", FORM, form(NAMED + b"\r\nX a"), 400, "invalid_multipart"),
    ("nul", FORM, form(NAMED + b"\r\nX\0: a"), 400, "invalid_multipart"),
    ("escape", FORM, body_of([], SOUND, "a\x1b[2J.wav"), 400, "invalid_multipart"),
    ("bare-line-feed", FORM, form(NAMED + b"\nX: a"), 400, "invalid_multipart"),
    ("no-disposition", FORM, form(b"Content-Type: text/plain"), 400, "invalid_multipart"),
    ("no-name", FORM, form(b"Content-Disposition: form-data"), 400, "invalid_multipart"),
    ("empty-name", FORM, form(b'Content-Disposition: form-data; name=""'), 400, "invalid_multipart"),
    ("long-name", FORM, form(NAMED.replace(b"a", b"a" * 200)), 400, "invalid_multipart"),
    ("attachment", FORM, form(NAMED.replace(b"form-data", b"attachment")), 400, "invalid_multipart"),
    ("nested", FORM, form(NAMED + b"\r\nContent-Type: multipart/mixed"), 400, "invalid_multipart"),
    ("base64", FORM, form(NAMED + b"\r\nContent-Transfer-Encoding: base64"), 400, "invalid_multipart"),
    ("two-files", FORM, form(b'Content-Disposition: form-data; name="file"'), 400, "invalid_value"),
    ("bad-utf-8", FORM, body_of([("language", b"\xc3\x28")], SOUND), 400, "invalid_value"),
    ("long-field", FORM, body_of([("whatever", b"a" * (1 << 17))], SOUND), 400, "invalid_value"),
    ("file-is-a-boundary", FORM, body_of([], b"\r\n--" + B[:-1]), 422, "invalid_media"),
    ("epilogue", FORM, GOOD + b"and so on", 200, None),
    ("no-last-line-end", FORM, GOOD[:-2], 200, None),
    ("quoted-boundary", FORM.replace(BOUNDARY, f'"{BOUNDARY}"'), GOOD, 200, None),
    ("other-case", FORM.replace("multipart/form-data", "Multipart/Form-Data"), GOOD, 200, None),
    ("more-fields", FORM, form(NAMED, NAMED, NAMED.replace(b'"a"', '"ä"'.encode())), 200, None),
    ("a-path", FORM, body_of([], SOUND, file_name="/etc/passwd"), 200, None),
    ("no-file-name", FORM, GOOD.replace(b'; filename="clip.wav"', b""), 200, None),
    ("most-parts", FORM, form(*[NAMED] * 63), 200, None),
]  # fmt: skip


def sent(kind: str | None, body: bytes, length: int | None = None) -> bytes:
    """The bytes of a request."""
    head = b"" if kind is None else f"Content-Type: {kind}\r\n".encode()
    raw = request(body, path=TRANSCRIPTIONS, length=length)
    return raw.replace(b"Content-Type: application/json\r\n", head, 1)


def status_and_code(answer: bytes) -> tuple[int, str | None]:
    found = json.loads(answer.partition(b"\r\n\r\n")[2])
    return int(answer[9:12]), found.get("error", {}).get("code")


@pytest.mark.parametrize(
    ("kind", "body", "status", "code"), [one[1:] for one in HOSTILE], ids=[one[0] for one in HOSTILE]
)
def test_forms(server: Server, kind: str | None, body: bytes, status: int, code: str | None) -> None:
    found = server.raw(sent(kind, body))
    assert status_and_code(found) == (status, code)
    assert server.get("/health").status == 200
    assert server.metric("pocketphi_listeners") == server.metric("pocketphi_held_bytes") == 0


def test_nothing_of_a_bad_form_is_logged(server: Server) -> None:
    n = len(server.log)
    server.raw(sent(FORM, form(NAMED + b"\r\nSecret\x01: a")))
    assert server.answer(FRANCE) == "The capital of France is Paris."
    assert not any("Secret" in line or "boundary" in line or "character" in line for line in server.log[n:])


@pytest.fixture(scope="module")
def hasty(user: dict[str, str], nano: Path) -> Iterator[Server]:
    found = server_with(user, nano, "body_s=0.5, body_bytes=1 << 20")
    try:
        yield found.ready()
    finally:
        found.stop()


def test_a_form_that_does_not_come(hasty: Server) -> None:
    """Announced and not sent, announced as too much, and sent as too much."""
    assert status_and_code(hasty.raw(sent(FORM, GOOD[:100], length=len(GOOD)))) == (408, "request_timeout")
    assert status_and_code(hasty.raw(sent(FORM, b"", length=2 * MIB))) == (413, "request_too_large")
    assert status_and_code(hasty.raw(sent(FORM, body_of([], bytes(2 * MIB))))) == (413, "request_too_large")
    head = sent(FORM, b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    with hasty.connect() as connection:
        connection.sendall(head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(GOOD), GOOD))
        assert b"Send a message to Grace." in read_answer(connection)
    for _ in range(20):
        with hasty.connect() as connection:
            connection.sendall(sent(FORM, GOOD[:1000], length=len(GOOD)))
    hasty.until(lambda: hasty.metric("pocketphi_held_bytes") == 0)


def test_parts_to_the_byte() -> None:
    """Data that is full of what looks like an end."""
    rng = random.Random(1)
    pieces = [
        b"\r",
        b"\n",
        b"-",
        b"--",
        B,
        b"\r\n--",
        B[:-1],
        b"\0",
        b"\xff",
        b"\r\n--" + B[:5],
        b"a: b\r\n\r\n",
    ]
    for _ in range(300):
        data = b"".join(rng.choices(pieces, k=rng.randrange(12)))
        if b"\r\n--" + B in b"\r\n" + data + b"\r\n":
            continue
        found = parts_of(body_of([("one", data), ("two", b"2")], data, "ä – b.wav"), B)
        assert [(p.name, p.data) for p in found] == [("one", data), ("two", b"2"), ("file", data)]


def test_a_form_cut_anywhere() -> None:
    """Refused, wherever that is; nothing else is raised."""
    whole = body_of([("model", "x")], b"RIFF" * 3)
    for n in range(len(whole) - 2):
        with pytest.raises(Refusal) as caught:
            parts_of(whole[:n], B)
        assert (caught.value.status, caught.value.code) == (400, "invalid_multipart")
    assert len(parts_of(whole[:-2], B)) == len(parts_of(whole, B)) == 2


def test_a_form_changed_anywhere() -> None:
    """Parts or a refusal, never anything else."""
    whole = bytearray(body_of([("model", "x")], b"RIFF" * 3))
    rng = random.Random(2)
    for at in range(len(whole)):
        for value in (0, 10, 13, 45, 58, 255, rng.randrange(256)):
            changed = whole.copy()
            changed[at] = value
            try:
                parts_of(bytes(changed), B)
            except Refusal as exc:
                assert exc.status == 400


def test_boundaries() -> None:
    assert boundary_of('multipart/form-data; charset=utf-8; boundary="a b"') == b"a b"
    for text in ("", ";", "multipart/form-data;boundary", "multipart/form-data; boundary=" + "\0" * 80):
        with pytest.raises(Refusal):
            boundary_of(text)
