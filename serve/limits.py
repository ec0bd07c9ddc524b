# SPDX-License-Identifier: Apache-2.0
"""What a client may ask of the server: sizes, times and counts, with the defaults of `pocketphi serve`."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import Refusal

_LISTENED_S = 5  # after which to ask for a place again: recordings and sessions are long


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one server. docs/server.md lists them with the statuses they lead to."""

    queue: int = 64  # requests that wait; one more is a 429
    connections: int = 512  # open at a time; one more is closed
    header_bytes: int = 32 << 10
    body_bytes: int = 32 << 20  # of one request
    held_bytes: int = 256 << 20  # of the bodies of all requests that are not answered yet
    header_s: float = 10.0  # from the first byte of a request, or the last answer, to the end of its headers
    body_s: float = 60.0  # to the end of its body
    unread_bytes: int = 256 << 10  # of an answer: what we keep, and what the system does
    send_s: float = 30.0  # that a client may leave an answer unread
    answer_s: float = 600.0  # that the model may take over one request; then the answer ends with "length"
    grace_s: float = 10.0  # that requests have to finish when the server is told to stop
    messages: int = 4096
    parts: int = 8192  # of all messages together
    media: int = 64  # pictures and clips of one request
    pixels: int = 50_000_000  # of one picture
    audio_s: float = 1800.0  # of all clips of one request
    listeners: int = 16  # recordings and live sessions at a time; one more is a 429
    event_bytes: int = 4 << 20  # of one event of a live session
    fragments: int = 1024  # in which one event may come
    unheard_s: float = 600.0  # of a live session's audio: what nobody has looked at yet
    idle_s: float = 300.0  # that a live session may go on without an event of the client
    ping_s: float = 20.0  # between two pings, and for the answer to one
    stop: int = 16  # stop strings
    stop_chars: int = 256  # of one of them
    tools: int = 128
    biases: int = 300  # tokens in logit_bias
    remote_bytes: int = 20 << 20  # of one picture from another server
    remote_s: float = 10.0  # to get it


class Budget:
    """Bytes that the requests of a server hold together. For one thread, the event loop's."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = 0

    @property
    def held(self) -> int:
        """Bytes held now."""
        return self._held

    def take(self, n: int) -> None:
        """Hold `n` bytes more.

        Raises:
            Refusal: 429, all requests together would hold too much.
        """
        if self._held + n > self._most:
            raise Refusal(
                429,
                f"the server holds {self._held:,} bytes of requests, at most {self._most:,}: try again",
                code="rate_limit_exceeded",
                retry_after=1,
            )
        self._held += n

    def give_back(self, n: int) -> None:
        """They are held no more."""
        self._held -= n


class Places:
    """Recordings and live sessions that are being listened to. For one thread, the event loop's."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = 0

    @property
    def taken(self) -> int:
        """How many there are now. From any thread."""
        return self._taken

    def take(self) -> None:
        """One more.

        Raises:
            Refusal: 429, there are as many as may be.
        """
        if self._taken >= self._most:
            raise Refusal(
                429,
                f"{self._taken} recordings and live sessions are listened to, which is the most: try again",
                code="rate_limit_exceeded",
                retry_after=_LISTENED_S,
            )
        self._taken += 1

    def give_back(self) -> None:
        """One has ended."""
        self._taken -= 1
