# SPDX-License-Identifier: Apache-2.0
"""Who may ask: keys, Host and Origin; alone in tables, and of a server that has them."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pocketphi.cli.serve import serve as serve_command
from pocketphi.runtime.errors import InputError, PocketPhiError
from pocketphi.serve.auth import Boundary, KeyCheck, Keys, host_name
from pocketphi.serve.run import Settings, run

from .conftest import Serve
from .served import CALL, LONG_S, Server


def status_of(app: Any, headers: dict[str, str], *, path: str = "/v1/models", kind: str = "http") -> int:
    """What an application says to a request; 0: it was passed on."""
    said: list[Any] = []

    async def send(message: Any) -> None:
        said.append(message)

    async def receive() -> Any:
        return {"type": "http.request"}

    scope = {
        "type": kind,
        "path": path,
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers.items()],
    }
    asyncio.run(app(scope, receive, send))
    if not said:
        return 0
    return int(said[0].get("status", said[0].get("code")))


async def passed(scope: Any, receive: Any, send: Any) -> None:
    """The application behind."""


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 0),
        ("localhost:8080", 0),
        ("LOCALHOST:1", 0),
        ("app.localhost", 0),
        ("127.0.0.1:8080", 0),
        ("192.168.1.7", 0),
        ("[::1]:8080", 0),
        ("[::1]", 0),
        ("phi.example.org", 0),
        ("phi.example.org:443", 0),
        ("evil.example.org", 403),
        ("localhost.evil.org", 403),
        ("127.0.0.1.evil.org", 403),
        ("127.0.0.1:8080@evil.org", 403),
        ("localhost:80:80", 403),
        ("[::1", 403),
        ("[::1]x", 403),
        ("[evil]:1", 403),
        ("localhost:abc", 403),
        ("", 403),
        (" ", 403),
        ("localhost\xe9", 403),
    ],
)
def test_hosts(host: str, status: int) -> None:
    boundary = Boundary(passed, ["phi.example.org"], [])
    assert status_of(boundary, {"host": host}) == status
    assert status_of(boundary, {"host": host}, kind="websocket") == (1008 if status else 0)


def test_a_request_with_two_hosts_or_none() -> None:
    boundary = Boundary(passed, [], [])
    assert status_of(boundary, {}) == 403
    assert status_of(boundary, {"host": "localhost", "origin": "http://localhost"}) == 0


@pytest.mark.parametrize(
    ("origin", "host", "status"),
    [
        ("http://localhost:8080", "localhost:8080", 0),
        ("http://127.0.0.1:8080", "127.0.0.1:8080", 0),
        ("http://localhost", "localhost:80", 0),
        ("https://phi.example.org", "phi.example.org", 0),  # behind a proxy that speaks TLS
        ("https://friend.example.org", "localhost:8080", 0),
        ("http://friend.example.org", "localhost:8080", 403),
        ("http://localhost:8081", "localhost:8080", 403),
        ("http://127.0.0.1:8080", "localhost:8080", 403),
        ("http://evil.org", "localhost:8080", 403),
        ("null", "localhost:8080", 403),
        ("", "localhost:8080", 403),
        ("file://", "localhost", 403),
        ("localhost:8080", "localhost:8080", 403),
        ("http://[::1]:8080", "[::1]:8080", 0),
        ("http://[::1]", "[::1]:8080", 403),
    ],
)
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_origins(origin: str, host: str, status: int, kind: str) -> None:
    boundary = Boundary(passed, ["phi.example.org"], ["https://friend.example.org"])
    expected = 1008 if status and kind == "websocket" else status
    assert status_of(boundary, {"host": host, "origin": origin}, kind=kind) == expected


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ("Bearer one", 0),
        ("bearer two", 0),
        ("Bearer  one ", 0),
        ("Bearer three", 401),
        ("Bearer on", 401),
        ("Bearer onee", 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        ("Basic one", 401),
        ("one", 401),
        ("Bearer \xff", 401),
    ],
)
def test_keys(given: str, status: int) -> None:
    check = KeyCheck(passed, Keys(["one", "two"]), ["/health"])
    assert status_of(check, {"authorization": given}) == status
    assert status_of(check, {"authorization": given}, path="/health") == 0
    assert status_of(check, {"authorization": given}, kind="websocket") == (1008 if status else 0)


def test_no_keys_are_no_check() -> None:
    assert status_of(KeyCheck(passed, Keys([]), []), {}) == 0
    assert status_of(KeyCheck(passed, Keys(["one"]), []), {}) == 401


@pytest.mark.parametrize(
    ("host", "name"),
    [("a:1", "a"), ("a", "a"), ("[::1]:9", "::1"), ("a:123456", None), (":1", None), ("[a]:", None)],
)
def test_host_names(host: str, name: str | None) -> None:
    assert host_name(host) == name


def test_a_server_with_keys(serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("first-key\n\nsecond-key\n", "ascii")
    site = "https://friend.example.org"
    server: Server = serve("--api-key-file", file, "--allow-origin", site).ready()
    assert server.get("/health").status == 200
    for path in ("/v1/models", "/metrics", "/nothing"):
        found = server.get(path)
        assert (found.status, found.code) == (401, "invalid_api_key")
        assert found.headers["www-authenticate"] == "Bearer"
    key = {"Authorization": "Bearer second-key"}
    assert server.get("/v1/models", key).status == 200
    assert server.get("/v1/models", key | {"Host": "evil.org"}).code == "host_not_allowed"
    assert server.get("/v1/models", key | {"Origin": "http://evil.org"}).code == "origin_not_allowed"
    found = server.get("/v1/models", key | {"Origin": site})
    assert (found.status, found.headers["access-control-allow-origin"]) == (200, site)
    found = server.get("/v1/models", {"Origin": site})  # a page can read why
    assert (found.status, found.headers["access-control-allow-origin"]) == (401, site)
    plain = server.get("/v1/models", key)
    assert not any(name.startswith("access-control") for name in plain.headers)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"host": "0.0.0.0"}, "can be reached from other machines: expected an API key, or --no-auth"),
        ({"host": "::"}, "can be reached from other machines: expected an API key, or --no-auth"),
        ({"host": "no.such.host.invalid"}, "cannot be found"),
        ({"parallel": 17}, "parallel is 17, expected 1 to 16"),
        ({"parallel": 2, "n_ctx": 99_999_999}, "context is 99999999 tokens"),
        ({"parallel": 2, "options": {"backbone": "onnx"}}, "need the GGUF backbone, not the ONNX one"),
        ({"model": Path("/nowhere")}, "/nowhere"),
        ({"n_ctx": 99_999_999}, "context is 99999999 tokens"),  # found out by the worker: the server ends
        ({"options": {"n_threads": 0}}, "threads is 0"),
    ],
)
def test_a_server_that_does_not_start(nano: Path, settings: dict[str, Any], line: str) -> None:
    made = Settings(**{"model": nano, "port": 0, **settings})
    with pytest.raises(PocketPhiError) as caught:
        run(made)
    assert line in str(caught.value)


@pytest.mark.parametrize(
    ("key", "file"),
    [("", None), ("two words", None), ("a" * 513, None), (None, "/nowhere"), (None, "/dev/null")],
)
def test_keys_that_are_none(key: str | None, file: str | None) -> None:
    with pytest.raises(InputError, match=r"key|/nowhere|/dev/null"):
        serve_command(api_key=key, api_key_file=None if file is None else Path(file))


def test_a_failure_is_one_line(user: dict[str, str], nano: Path) -> None:
    call = [*CALL, "serve", "--port", "0", "-m", str(nano), "-c", "99999999"]
    done = subprocess.run(call, env=user, capture_output=True, text=True, timeout=LONG_S, check=False)
    lines = done.stderr.splitlines()
    assert (done.returncode, len(lines)) == (2, 2), done.stderr
    assert lines[0].startswith("listening on ") and lines[1].startswith("error: context is 99999999 tokens")


def test_a_port_that_is_taken(user: dict[str, str], nano: Path, server: Server) -> None:
    call = [*CALL, "serve", "--port", str(server.port), "-m", str(nano)]
    done = subprocess.run(call, env=user, capture_output=True, text=True, timeout=LONG_S, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: 127.0.0.1 port {server.port}: cannot be listened on: ")
    assert done.stderr.count("\n") == 1


def test_without_the_extra(user: dict[str, str], tmp_path: Path) -> None:
    """A package that is not there is said with the command that brings it."""
    hide = "import sys; sys.modules['starlette'] = None; import importlib.util as u; f = u.find_spec; "
    hide += "u.find_spec = lambda n, *a: None if n == 'starlette' else f(n, *a); "
    call = [CALL[0], "-c", hide + CALL[2], "serve"]
    done = subprocess.run(call, env=user, capture_output=True, text=True, timeout=LONG_S, check=False)
    line = "error: pocketphi serve needs starlette: pip install 'pocketphi[serve]'\n"
    assert (done.returncode, done.stderr) == (2, line)
