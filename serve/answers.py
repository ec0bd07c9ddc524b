# SPDX-License-Identifier: Apache-2.0
"""Whole answers as HTTP: JSON in one shape, errors in another."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

from .errors import Refusal


def encode(value: Any) -> bytes:
    """One line of JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """An answer in JSON."""
    return Response(encode(value), status, headers, "application/json")


def error_response(refusal: Refusal) -> Response:
    """An error."""
    return json_response(refusal.body, refusal.status, refusal.headers)
