# SPDX-License-Identifier: Apache-2.0
"""Pictures from other servers, where the operator allows it: never from private networks, never much or long.

A name is resolved once and the connection goes to that address, so that a resolver that answers otherwise the
second time changes nothing. Each redirect is checked as the first address was.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from urllib.parse import urljoin, urlsplit

from .errors import Refusal
from .limits import Limits

_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 3
_MOST_URL = 4096  # characters
_PIECE = 1 << 16
_TRANSLATED = tuple(
    ipaddress.ip_network(text)
    for text in (
        "64:ff9b::/96",
        "64:ff9b:1::/48",
        "2002::/16",
        "2001::/32",
    )  # NAT64, 6to4, Teredo: IPv4 inside
)

Resolve = Callable[[str, int], Sequence[str]]
"""Addresses of a name. Raises OSError."""


def resolve(host: str, port: int) -> list[str]:
    """By the system's resolver."""
    return [str(one[4][0]) for one in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def is_public(address: str) -> bool:
    """Whether an address is the public internet's: not private, loopback, link-local or multicast."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return is_public(str(found.ipv4_mapped))
        if any(found in network for network in _TRANSLATED):
            return False
    return found.is_global and not found.is_multicast


class Fetcher:
    """Gets pictures. For several threads."""

    def __init__(
        self,
        limits: Limits,
        *,
        resolve: Resolve = resolve,
        permitted: Callable[[str], bool] = is_public,
    ) -> None:
        """
        Args:
            limits: of size and time.
            resolve: names to addresses.
            permitted: addresses that may be asked.
        """
        self._limits, self._resolve, self._permitted = limits, resolve, permitted

    def __call__(self, url: str) -> bytes:
        """The bytes at an address.

        Raises:
            Refusal: 400, the address is not allowed or does not answer with a picture; 422, it is too large.
        """
        ends = time.monotonic() + self._limits.remote_s
        for _ in range(1 + _MOST_REDIRECTS):
            try:
                found, onward = self._get(url, ends)
            except (OSError, http.client.HTTPException, ValueError):  # its words may tell of an inner network
                raise _failed("does not answer as it should") from None
            if onward is None:
                return found
            url = urljoin(url, onward)
        raise _failed("redirects too often")

    def _get(self, url: str, ends: float) -> tuple[bytes, str | None]:
        """The bytes, or where they are."""
        parts = urlsplit(url)
        if len(url) > _MOST_URL or parts.scheme not in ("http", "https") or not parts.hostname:
            raise _failed("is not an address of http or https")
        if parts.username is not None or parts.password is not None:
            raise _failed("has a name or password in it")
        port = parts.port or (443 if parts.scheme == "https" else 80)
        found = list(self._resolve(parts.hostname, port))
        if not found or not all(map(self._permitted, found)):
            raise _failed("is not on the public network")
        connection = _Pinned(parts.hostname, port, found[0], _left(ends), secure=parts.scheme == "https")
        # A socket's own timeout is for one byte: who sends them one by one is cut off by this.
        watch = threading.Timer(_left(ends), connection.cut)
        watch.start()
        try:
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", path, headers={"Accept": "image/*", "Accept-Encoding": "identity"})
            with connection.getresponse() as answer:
                if answer.status in _REDIRECTS:
                    return b"", answer.getheader("Location") or ""
                if answer.status != 200:
                    raise _failed(f"answers with status {answer.status}")
                return self._body(answer, ends), None
        finally:
            watch.cancel()
            connection.close()

    def _body(self, answer: http.client.HTTPResponse, ends: float) -> bytes:
        most, found = self._limits.remote_bytes, bytearray()
        if (answer.length or 0) > most:
            raise _too_large(most)
        while piece := answer.read1(_PIECE):
            found += piece
            if len(found) > most:
                raise _too_large(most)
        _left(ends)  # else it may have ended because it was cut
        return bytes(found)


class _Pinned(http.client.HTTPConnection):
    """A connection to one address, whatever the name resolves to by now."""

    def __init__(self, host: str, port: int, address: str, timeout_s: float, *, secure: bool) -> None:
        super().__init__(host, port, timeout=timeout_s)
        self._address, self._timeout_s, self._secure = address, timeout_s, secure
        self._plain: socket.socket | None = None

    def cut(self) -> None:
        """End what is being waited for, from another thread."""
        plain = self._plain
        if plain is not None:
            with contextlib.suppress(OSError):  # it has ended
                plain.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """See http.client; here what an answer still holds is closed with it."""
        super().close()
        if self._plain is not None:
            self._plain.close()

    def connect(self) -> None:
        """See http.client."""
        plain = socket.create_connection((self._address, self.port), self._timeout_s)
        self._plain = plain
        if not self._secure:
            self.sock = plain
            return
        try:
            self.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=self.host)
        except BaseException:
            plain.close()
            raise


def _left(ends: float) -> float:
    left = ends - time.monotonic()
    if left <= 0:
        raise _failed("takes too long")
    return left


def _failed(what: str) -> Refusal:
    return Refusal(400, f"the picture's address {what}", code="invalid_image_url", param="messages")


def _too_large(most: int) -> Refusal:
    what = f"the picture at the address has over {most:,} bytes"
    return Refusal(422, what, code="invalid_media", param="messages")
