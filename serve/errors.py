# SPDX-License-Identifier: Apache-2.0
"""Errors as OpenAI's clients know them: a status, and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..runtime.errors import InputError, MemoryShortError, PocketPhiError

_TYPES: Mapping[int, str] = MappingProxyType(
    {
        401: "invalid_request_error",
        408: "timeout_error",
        429: "rate_limit_error",
        500: "server_error",
        503: "unavailable_error",
    }
)


class MediaError(InputError):
    """A picture or clip of a request cannot be used."""


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        """
        Args:
            status: of HTTP, from 400.
            message: one line for the person at the client.
            code: a word for the program.
            param: the field of the request that is at fault.
            retry_after: seconds.
        """
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = retry_after

    @property
    def fresh(self) -> Refusal:
        """Another that says the same: one that is raised time and again would keep all of its tracebacks."""
        return Refusal(
            self.status, self.message, code=self.code, param=self.param, retry_after=self.retry_after
        )

    @property
    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """That go with the status."""
        found = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def refusal_of(error: BaseException) -> Refusal:
    """What a client is told of an error. Of one that is a bug it learns nothing."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, MediaError):
        return Refusal(422, str(error), code="invalid_media")
    if isinstance(error, InputError):
        return Refusal(400, str(error), code="invalid_value")
    if isinstance(error, MemoryShortError):
        return Refusal(503, str(error), code="insufficient_memory")
    if isinstance(error, MemoryError):
        return Refusal(503, "there is not enough memory for this request", code="insufficient_memory")
    if isinstance(error, PocketPhiError):
        return Refusal(500, str(error), code="model_error")
    return Refusal(500, "the server failed at this request", code="internal_error")
