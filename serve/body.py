# SPDX-License-Identifier: Apache-2.0
"""The body of a request, read in bounded time and memory."""

from __future__ import annotations

import asyncio
import time

from starlette.requests import ClientDisconnect, Request

from .errors import Refusal
from .limits import Budget, Limits

_DRAIN_S = 5.0  # that a body which is refused may go on
_DRAIN_PAUSE_S = 0.5  # without a byte: it does not go on


class Lease:
    """Bytes of a Budget, given back once."""

    def __init__(self, budget: Budget) -> None:
        self._budget, self._n = budget, 0

    def take(self, n: int) -> None:
        """Hold more. Raises what `Budget.take` does."""
        self._budget.take(n)
        self._n += n

    def release(self) -> None:
        """Hold nothing any more."""
        self._budget.give_back(self._n)
        self._n = 0


async def read_json(request: Request, limits: Limits, lease: Lease) -> bytes:
    """A JSON body, unparsed.

    Raises:
        Refusal: 415, it says it is something else; 413, too long; 408, too slow; 429, too much is held.
        ClientDisconnect: the client left.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("", "application/json"):
        raise Refusal(415, "the Content-Type is not application/json", code="unsupported_media_type")
    return await read(request, limits, lease, limits.body_bytes)


async def read(request: Request, limits: Limits, lease: Lease, most: int) -> bytes:
    """A body of at most `most` bytes. Raises as `read_json`."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > most:
        await _drain(request, most)
        raise _too_long(most)
    found, ends = bytearray(), time.monotonic() + limits.body_s
    while True:
        try:
            message = await asyncio.wait_for(request.receive(), max(ends - time.monotonic(), 0.001))
        except asyncio.TimeoutError:
            what = f"the body did not come within {limits.body_s:g} s"
            raise Refusal(408, what, code="request_timeout") from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        piece: bytes = message.get("body", b"")
        if len(found) + len(piece) > most:
            found.clear()
            lease.release()
            await _drain(request, most)
            raise _too_long(most)
        lease.take(len(piece))
        found += piece
        if not message.get("more_body", False):
            return bytes(found)


async def _drain(request: Request, most: int) -> None:
    """Let go by what is on its way: a client that still sends when the connection ends never reads why."""
    left, ends = most, time.monotonic() + _DRAIN_S
    while left > 0 and time.monotonic() < ends:
        try:
            message = await asyncio.wait_for(request.receive(), _DRAIN_PAUSE_S)
        except asyncio.TimeoutError:
            return
        left -= len(message.get("body", b""))
        if not message.get("more_body", False):
            return


def _too_long(most: int) -> Refusal:
    return Refusal(413, f"the body is longer than {most:,} bytes", code="request_too_large")
