# SPDX-License-Identifier: Apache-2.0
"""Who may ask: API keys, and the Host and Origin of a request (DNS rebinding, other sites' pages).

A page that rebinds its name to this machine still sends that name as Host. An address cannot be rebound, so
addresses and localhost are always good; other names have to be allowed. What a page of another site sends has
that site as Origin.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Collection, Iterable, Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from .answers import error_response
from .errors import Refusal

_DEFAULT_PORTS = {"http": "80", "https": "443"}
_PLAIN_KEY = "openai-insecure-api-key."
_ENCODED_KEY = "pocketphi-key."  # base64 for addresses, without padding, of the key's UTF-8


class Keys:
    """API keys, as digests."""

    def __init__(self, keys: Iterable[str]) -> None:
        """No keys: everybody may ask."""
        self._digests = [_digest(key.encode("utf-8")) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, given: bytes) -> bool:
        """Whether it is one of them; takes as long for any that is not."""
        digest = _digest(given)
        found = False
        for one in self._digests:
            found |= hmac.compare_digest(one, digest)
        return found


class KeyCheck:
    """ASGI: 401 without a key, but for the paths that are open to everybody."""

    def __init__(self, app: ASGIApp, keys: Keys, open_paths: Collection[str]) -> None:
        self._app, self._keys, self._open = app, keys, frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer."""
        guarded = scope["type"] in ("http", "websocket") and scope["path"] not in self._open
        if guarded and self._keys and not self._keys.accept(bearer(scope)):
            what = "the API key is missing or wrong: send Authorization: Bearer KEY"
            await refuse(Refusal(401, what, code="invalid_api_key"), scope, receive, send)
            return
        await self._app(scope, receive, send)


class Boundary:
    """ASGI: 403 for a Host that may be somebody else's name, and for an Origin of another site."""

    def __init__(self, app: ASGIApp, hosts: Collection[str], origins: Collection[str]) -> None:
        """
        Args:
            hosts: names beside localhost and addresses.
            origins: of sites that may ask, "https://example.org", beside the server's own.
        """
        self._app = app
        self._hosts = {name.lower() for name in hosts} | {"localhost", socket.gethostname().lower()}
        self._origins = {origin.lower().rstrip("/") for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer."""
        if scope["type"] in ("http", "websocket") and (refusal := self._refusal(scope)) is not None:
            await refuse(refusal, scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Refusal | None:
        hosts, origins = headers(scope, b"host"), headers(scope, b"origin")
        if len(hosts) != 1 or not self._known(hosts[0]):
            what = "the Host is not this server's: --allow-host NAME lets one in"
            return Refusal(403, what, code="host_not_allowed")
        if len(origins) > 1 or (origins and not self._welcome(origins[0], hosts[0])):
            what = "the Origin is another site: --allow-origin URL lets one in"
            return Refusal(403, what, code="origin_not_allowed")
        return None

    def _known(self, host: str) -> bool:
        name = host_name(host)
        if name is None:
            return False
        return name in self._hosts or name.endswith(".localhost") or is_address(name)

    def _welcome(self, origin: str, host: str) -> bool:
        if origin in self._origins:
            return True
        scheme, mark, rest = origin.partition("://")
        port = _DEFAULT_PORTS.get(scheme)
        return bool(mark) and port is not None and _with_port(rest, port) == _with_port(host, port)


async def refuse(refusal: Refusal, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with an error. A WebSocket's handshake gets it as HTTP, where the server can do that."""
    if scope["type"] == "websocket" and "websocket.http.response" not in (scope.get("extensions") or {}):
        await send({"type": "websocket.close", "code": 1008, "reason": refusal.code or ""})
    else:
        await error_response(refusal)(scope, receive, send)


def bearer(scope: Scope) -> bytes:
    """The key that a request brings; empty without one, or with several.

    A page cannot set a WebSocket's Authorization: there the key may stand among the subprotocols, as OpenAI's
    clients put it, or in base64 for the sake of characters that a subprotocol cannot have.
    """
    found = [value for name, value in scope["headers"] if name == b"authorization"]
    if not found and scope["type"] == "websocket":
        return _key_among(scope.get("subprotocols") or ())
    scheme, _, key = (found[0] if len(found) == 1 else b"").partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else b""


def _key_among(protocols: Iterable[str]) -> bytes:
    found = [key for protocol in protocols if (key := _key_in(protocol)) is not None]
    return found[0] if len(found) == 1 else b""


def _key_in(protocol: str) -> bytes | None:
    """The key in a subprotocol; None: it is another."""
    for prefix in (_PLAIN_KEY, _ENCODED_KEY):
        if protocol.startswith(prefix):
            rest = protocol[len(prefix) :].encode("latin-1", "replace")
            if prefix == _PLAIN_KEY:
                return rest
            try:
                return base64.b64decode(rest + b"=" * (-len(rest) % 4), b"-_", validate=True)
            except binascii.Error:
                return b""
    return None


def headers(scope: Scope, name: bytes) -> Sequence[str]:
    """The values of a header, in lower case."""
    return [value.decode("latin-1").lower() for key, value in scope["headers"] if key == name]


def host_name(host: str) -> str | None:
    """The name in "name:port" or "[address]:port"; None where it is neither."""
    if host.startswith("["):
        name, closed, port = host[1:].partition("]")
        return name if closed and (not port or (_is_port(port[1:]) and port[0] == ":")) else None
    name, colon, port = host.partition(":")
    return name if name and (not colon or _is_port(port)) else None


def is_address(name: str) -> bool:
    """Whether a name is an IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_port(text: str) -> bool:
    return text.isdecimal() and len(text) <= 5


def _with_port(netloc: str, port: str) -> str:
    return netloc if netloc.rpartition("]")[2].rpartition(":")[1] else f"{netloc}:{port}"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
