# SPDX-License-Identifier: Apache-2.0
"""Forms with a file in them (multipart/form-data, RFC 7578) to their parts, bounded in number and headers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from .errors import Refusal

if TYPE_CHECKING:  # it is there for type checkers alone
    from python_multipart.multipart import MultipartCallbacks

_KIND = "multipart/form-data"
_MOST_BOUNDARY = 70  # characters: RFC 2046, 5.1.1
_MOST_PARTS = 64
_MOST_HEADER_BYTES = 8 << 10  # of one part, names and values
_MOST_NAME = 100  # characters
_PLAIN = (b"", b"7bit", b"8bit", b"binary")  # what a part may be encoded in: RFC 7578, 4.7
_SILENT = logging.Logger("silent", logging.CRITICAL + 1)  # the parser's warnings would quote requests


@dataclass(frozen=True, slots=True)
class Part:
    """One field of a form."""

    name: str
    data: bytes

    @property
    def text(self) -> str:
        """What it says.

        Raises:
            Refusal: 400, it is not UTF-8.
        """
        try:
            return self.data.decode("utf-8")
        except UnicodeDecodeError:
            what = f"{self.name}: is not UTF-8"
            raise Refusal(400, what, code="invalid_value", param=self.name) from None


def boundary_of(content_type: str) -> bytes:
    """What stands between parts.

    Args:
        content_type: the request's header.

    Raises:
        Refusal: 415, it is no form with files; 400, it does not say, or says what cannot be.
    """
    kind, options = parse_options_header(content_type)
    if kind.strip().lower() != _KIND.encode():
        raise Refusal(415, f"the Content-Type is not {_KIND}", code="unsupported_media_type")
    found = options.get(b"boundary", b"")
    if not 0 < len(found) <= _MOST_BOUNDARY:
        what = f"the Content-Type has no boundary of 1 to {_MOST_BOUNDARY} characters"
        raise Refusal(400, what, code="invalid_multipart")
    return found


def parts_of(body: bytes, boundary: bytes) -> list[Part]:
    """The parts of a form, in order.

    Raises:
        Refusal: 400, it is damaged, ends early, or has a part that is none of a form; 422, too many parts.
    """
    collector = _Collector()
    try:
        parser = MultipartParser(boundary, collector.callbacks)
        parser.logger = _SILENT
        parser.write(body)
    except FormParserError as exc:
        at = getattr(exc, "offset", -1)
        raise _damaged("is damaged" if at < 0 else f"is damaged at byte {at:,}") from None
    if not collector.ended:
        raise _damaged("ends before its last boundary")
    return collector.parts


class _Collector:
    """Parts as the parser finds them. What it is called with is (data, start, stop)."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.ended = False
        self._headers: dict[bytes, bytes] = {}
        self._name = self._value = b""  # of the header that is being read
        self._n_header_bytes = 0
        self._data: list[bytes] = []
        self.callbacks: MultipartCallbacks = {
            "on_part_begin": self._begin,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_part_data": self._piece,
            "on_part_end": self._end,
            "on_end": self._last,
        }

    def _begin(self) -> None:
        if len(self.parts) >= _MOST_PARTS:
            what = f"the form has over {_MOST_PARTS} parts"
            raise Refusal(422, what, code="too_many_parts")
        self._headers, self._data, self._n_header_bytes = {}, [], 0
        self._name = self._value = b""

    def _header_name(self, data: bytes, start: int, stop: int) -> None:
        self._count(stop - start)
        self._name += data[start:stop]

    def _header_value(self, data: bytes, start: int, stop: int) -> None:
        self._count(stop - start)
        self._value += data[start:stop]

    def _count(self, n: int) -> None:
        self._n_header_bytes += n
        if self._n_header_bytes > _MOST_HEADER_BYTES:
            raise _damaged(f"has a part with over {_MOST_HEADER_BYTES:,} bytes of headers")

    def _header_end(self) -> None:
        name = self._name.lower()
        if name in self._headers:
            raise _damaged("has a part with a header twice")
        if any(c < 32 and c != 9 for c in name + self._value):  # a line feed alone, or a zero
            raise _damaged("has a part with a header that is no text")
        self._headers[name] = self._value
        self._name = self._value = b""

    def _piece(self, data: bytes, start: int, stop: int) -> None:
        self._data.append(data[start:stop])

    def _end(self) -> None:
        disposition, options = parse_options_header(self._headers.get(b"content-disposition"))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if disposition.lower() != b"form-data" or not 0 < len(name) <= _MOST_NAME:
            raise _damaged("has a part without a name")
        if self._headers.get(b"content-type", b"").strip().lower().startswith(b"multipart/"):
            raise _damaged("has a part that is multipart itself")
        if self._headers.get(b"content-transfer-encoding", b"").strip().lower() not in _PLAIN:
            raise _damaged("has a part that is encoded, expected its bytes as they are")
        self.parts.append(Part(name, b"".join(self._data)))
        self._data = []

    def _last(self) -> None:
        self.ended = True


def _damaged(what: str) -> Refusal:
    return Refusal(400, f"the form {what}", code="invalid_multipart")


def only(parts: Sequence[Part], name: str) -> Part | None:
    """The part of a name; None without one.

    Raises:
        Refusal: 400, there are several.
    """
    found = [part for part in parts if part.name == name]
    if len(found) > 1:
        raise Refusal(400, f"{name}: is there {len(found)} times", code="invalid_value", param=name)
    return found[0] if found else None
