# SPDX-License-Identifier: Apache-2.0
"""Pictures from other servers: which addresses may be asked, and what a server that means no good can do."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pocketphi.serve.errors import Refusal
from pocketphi.serve.limits import Limits
from pocketphi.serve.remote import Fetcher, is_public

PICTURE = b"\x89PNG" + bytes(1000)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("127.0.0.1", False),
        ("127.9.9.9", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("192.0.2.1", False),
        ("198.18.0.1", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("2001:0:7f00:1::", False),
        ("example.org", False),
        ("", False),
    ],
)
def test_addresses(address: str, public: bool) -> None:
    assert is_public(address) == public


class Handler(BaseHTTPRequestHandler):
    """A server that does what its path says."""

    def do_GET(self) -> None:
        what, _, rest = self.path[1:].partition("/")
        if what.startswith("picture"):
            self.reply(200, PICTURE)
        elif what == "to":
            self.send_response(302)
            self.send_header("Location", rest)
            self.end_headers()
        elif what == "around":
            self.send_response(302)
            self.send_header("Location", "/around")
            self.end_headers()
        elif what == "huge":
            self.reply(200, b"a", length=1 << 40)
        elif what == "endless":
            self.send_response(200)
            self.end_headers()
            for _ in range(1000):
                self.wfile.write(bytes(1 << 16))
        elif what == "slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(200):
                self.wfile.write(b"a")
                time.sleep(0.05)
        else:
            self.reply(404, b"")

    def reply(self, status: int, body: bytes, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the fetcher has left
            super().handle()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()
    thread.join()


def fetcher(resolved: str = "127.0.0.1") -> Fetcher:
    """For once this machine is the internet, and 10.0.0.0/8 the private network beside it."""
    names = {"good.example": resolved, "inner.example": "10.0.0.1"}
    return Fetcher(
        Limits(remote_bytes=100_000, remote_s=1.0),
        resolve=lambda host, port: [names.get(host, host)],
        permitted=lambda address: address == "127.0.0.1",
    )


def test_a_picture(port: int) -> None:
    assert fetcher()(f"http://good.example:{port}/picture") == PICTURE
    assert fetcher()(f"http://good.example:{port}/to//picture") == PICTURE
    assert fetcher()(f"http://good.example:{port}/to/http://good.example:{port}/picture?a=b") == PICTURE


@pytest.mark.parametrize(
    ("path", "status", "word"),
    [
        ("to/http://inner.example/", 400, "public network"),
        ("to/http://10.0.0.1/", 400, "public network"),
        ("to/http://169.254.169.254/latest/meta-data/", 400, "public network"),
        ("to/file:///etc/passwd", 400, "not an address"),
        ("to/ftp://good.example/", 400, "not an address"),
        ("to/http://user:word@good.example/", 400, "password"),
        ("to/", 400, "too often"),
        ("around", 400, "too often"),
        ("missing", 400, "status 404"),
        ("huge", 422, "100,000 bytes"),
        ("endless", 422, "100,000 bytes"),
        ("slow", 400, ""),
    ],
)
def test_a_server_that_means_no_good(port: int, path: str, status: int, word: str) -> None:
    with pytest.raises(Refusal) as caught:
        fetcher()(f"http://good.example:{port}/{path}")
    assert caught.value.status == status and word in caught.value.message


@pytest.mark.parametrize(
    "url",
    [
        "http://inner.example/a.png",
        "http://10.0.0.1:8080/",
        "http://[::1]/",
        "http:///etc/passwd",
        "http://good.example:99999/",
        "http://good.example:1/",
        "http://\x00/",
        "http://good.example/\r\nHost: evil",
        "http://" + "a" * 10_000,
        "https://good.example:1/",
    ],
)
def test_addresses_that_are_not_asked(url: str) -> None:
    with pytest.raises(Refusal) as caught:
        fetcher()(url)
    assert caught.value.status == 400


def test_a_name_with_one_private_address_is_private() -> None:
    both = Fetcher(Limits(), resolve=lambda host, port: ["93.184.216.34", "10.0.0.1"])
    with pytest.raises(Refusal, match="public network"):
        both("http://good.example/")


def test_no_address_of_this_machine_by_default(port: int) -> None:
    with pytest.raises(Refusal, match="public network"):
        Fetcher(Limits())(f"http://127.0.0.1:{port}/picture")
    with pytest.raises(Refusal, match="public network"):
        Fetcher(Limits())(f"http://localhost:{port}/picture")
