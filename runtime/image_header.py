# SPDX-License-Identifier: Apache-2.0
"""Width and height of an image file from its first bytes, so that a bomb is refused before it is decoded.

Every format that OpenCV reads is known here; what is not known is not given to OpenCV. A header is only
believed to be what it says: the decoder checks the rest.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

FORMATS = "PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000, PNM, PAM, PFM, HDR or Sun raster"

_SEARCHED_BYTES = 1 << 20  # how far into a file a marker without a fixed place is looked for


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says it holds, before any rotation that its EXIF data asks for."""

    format: str
    width: int  # pixels
    height: int


class HeaderError(ValueError):
    """A known format whose header is cut short or impossible; the text says how."""


def read_header(data: bytes) -> Header | None:
    """The header of a whole image file in memory; None when the format is not known.

    Raises:
        HeaderError: the format is known and the header is not as it should be.
    """
    for pattern, parse in _PARSERS:
        if pattern.match(data):
            try:
                header = parse(data)
            except (struct.error, IndexError, OverflowError):  # the last: an offset beyond any memory
                raise HeaderError("is cut short in its header") from None
            if header.width <= 0 or header.height <= 0:
                raise HeaderError(f"says it is {header.width} × {header.height} pixels")
            return header
    return None


def _png(data: bytes) -> Header:
    """Walks every chunk: libpng would report a broken one on stderr by itself."""
    at, kind = 8, b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, at)
        if at + 12 + length > len(data):
            raise HeaderError("is cut short: a PNG without its end")
        (crc,) = struct.unpack_from(">I", data, at + 8 + length)
        if zlib.crc32(memoryview(data)[at + 4 : at + 8 + length]) != crc:
            raise HeaderError(f"is damaged: PNG chunk at byte {at} has another checksum")
        if at == 8 and (kind != b"IHDR" or length != 13):
            raise HeaderError("is damaged: a PNG that does not begin with IHDR")
        at += 12 + length
    return Header("PNG", *struct.unpack_from(">II", data, 16))


def _jpeg(data: bytes) -> Header:
    """Walks the segments to the frame header: markers C0 to CF except DHT, JPG and DAC."""
    at = 2
    while True:
        if data[at] != 0xFF:
            raise HeaderError(f"is damaged: no JPEG marker at byte {at}")
        marker = data[at + 1]
        if marker == 0xFF:  # fill
            at += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 5)
            return Header("JPEG", width, height)
        if marker in (0xD9, 0xDA):
            raise HeaderError("is damaged: a JPEG without a frame header")
        at += 2 if marker == 0x01 or 0xD0 <= marker <= 0xD7 else 2 + struct.unpack_from(">H", data, at + 2)[0]


def _webp(data: bytes) -> Header:
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (1 + int.from_bytes(data[i : i + 3], "little") for i in (24, 27))
        return Header("WebP", width, height)
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return Header("WebP", 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return Header("WebP", width & 0x3FFF, height & 0x3FFF)
    raise HeaderError("is damaged: a WebP without an image chunk")


def _gif(data: bytes) -> Header:
    return Header("GIF", *struct.unpack_from("<HH", data, 6))


def _bmp(data: bytes) -> Header:
    (size,) = struct.unpack_from("<I", data, 14)
    if size == 12:
        return Header("BMP", *struct.unpack_from("<HH", data, 18))
    width, height = struct.unpack_from("<ii", data, 18)
    return Header("BMP", width, abs(height))  # negative: rows from the top


_TIFF_TYPES = {1: "B", 3: "H", 4: "I", 16: "Q"}  # BYTE, SHORT, LONG, LONG8
_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257


def _tiff(data: bytes) -> Header:
    """The first image file directory; BigTIFF has the same with wider fields."""
    order = "<" if data[0] == 0x49 else ">"
    big = struct.unpack_from(f"{order}H", data, 2)[0] == 43
    (at,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, 8 if big else 4)
    (count,) = struct.unpack_from(f"{order}{'Q' if big else 'H'}", data, at)
    at += 8 if big else 2
    if count > 65535:
        raise HeaderError(f"is damaged: a TIFF directory of {count} entries")
    tags: dict[int, int] = {}
    for _ in range(count):
        tag, kind = struct.unpack_from(f"{order}HH", data, at)
        if kind in _TIFF_TYPES:
            tags[tag] = struct.unpack_from(f"{order}{_TIFF_TYPES[kind]}", data, at + (12 if big else 8))[0]
        at += 20 if big else 12
    return Header("TIFF", tags.get(_TIFF_WIDTH, 0), tags.get(_TIFF_HEIGHT, 0))


def _jpeg_2000(data: bytes) -> Header:
    """The size marker of the codestream, wherever the boxes around put it; all decoding follows from it."""
    at = data.find(b"\xff\x4f\xff\x51", 0, _SEARCHED_BYTES)
    if at < 0:
        raise HeaderError("is damaged: JPEG 2000 without a codestream")
    right, bottom, left, top = struct.unpack_from(">IIII", data, at + 8)
    return Header("JPEG 2000", right - left, bottom - top)


def _avif(data: bytes) -> Header:
    """The largest of the spatial extents; a file has one for each image item, thumbnails included."""
    sizes = [
        struct.unpack_from(">II", data, match.end() + 4)
        for match in re.finditer(b"ispe", data[:_SEARCHED_BYTES])
    ]
    if not sizes:
        raise HeaderError("is damaged: AVIF without a size")
    return Header("AVIF", *max(sizes, key=lambda size: size[0] * size[1]))


def _pnm(data: bytes) -> Header:
    """P1 to P6 and PFM: magic, width and height in decimal, with comments between."""
    head = re.sub(rb"#[^\r\n]*", b" ", data[:4096])
    match = re.match(rb"P[1-6Ff]\s+(\d{1,9})\s+(\d{1,9})\s", head)
    if match is None:
        raise HeaderError("is damaged: a PNM without a size")
    return Header("PNM", int(match[1]), int(match[2]))


def _pam(data: bytes) -> Header:
    found = dict(re.findall(rb"^(WIDTH|HEIGHT)\s+(\d{1,9})\s*$", data[:4096], re.MULTILINE))
    return Header("PAM", int(found.get(b"WIDTH", 0)), int(found.get(b"HEIGHT", 0)))


def _sun_raster(data: bytes) -> Header:
    return Header("Sun raster", *struct.unpack_from(">II", data, 4))


def _radiance(data: bytes) -> Header:
    match = re.search(rb"\n[-+]Y (\d{1,9}) [-+]X (\d{1,9})\n", data[:_SEARCHED_BYTES])
    if match is None:
        raise HeaderError("is damaged: HDR without a size")
    return Header("HDR", int(match[2]), int(match[1]))


_PARSERS: tuple[tuple[re.Pattern[bytes], Callable[[bytes], Header]], ...] = tuple(
    (re.compile(pattern, re.DOTALL), parse)
    for pattern, parse in (
        (rb"\x89PNG\r\n\x1a\n", _png),
        (rb"\xff\xd8\xff", _jpeg),
        (rb"RIFF....WEBP", _webp),
        (rb"GIF8[79]a", _gif),
        (rb"BM", _bmp),
        (rb"II[\x2a\x2b]\0|MM\0[\x2a\x2b]", _tiff),
        (rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", _jpeg_2000),
        (rb"....ftyp(?:avif|avis|mif1|msf1|miaf)", _avif),
        (rb"P[1-6Ff]\s", _pnm),
        (rb"P7\n", _pam),
        (rb"\x59\xa6\x6a\x95", _sun_raster),
        (rb"#\?(?:RADIANCE|RGBE)\n", _radiance),
    )
)
