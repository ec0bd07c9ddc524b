# SPDX-License-Identifier: Apache-2.0
"""What the journals of jobs have in common: a line is a JSON object, and the first one says of which job."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import InputError


def json_object(line: bytes, where: str) -> dict[str, Any]:
    """A JSON object in UTF-8.

    Raises:
        InputError: it is none; names `where`.
    """
    try:
        found = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):  # ValueError: not UTF-8, not JSON, a number of thousands of digits
        raise InputError(f"{where}: is not JSON, expected an object") from None
    if not isinstance(found, dict):
        raise InputError(f"{where}: is a JSON {type(found).__name__}, expected an object")
    return found


def check_same_job(found: Mapping[str, Any], wanted: Mapping[str, Any], where: Path) -> None:
    """Whether a file is of this job.

    Raises:
        InputError: it is of another; names the first thing that differs.
    """
    plain = json.loads(json.dumps(wanted))  # tuples become lists, as they are in the file
    for key in [*plain, *(k for k in found if k not in plain)]:
        if key not in found or key not in plain or found[key] != plain[key]:
            was, now = (_brief(of[key]) if key in of else "not given" for of in (found, plain))
            raise InputError(f"{where}: is of another job: {key[:40]!r} is {was}, expected {now}")


def _brief(value: object) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 200 else text[:200] + "…"
