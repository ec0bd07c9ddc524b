# SPDX-License-Identifier: Apache-2.0
"""Pictures that are none, that lie, or that are more than what fits."""

# ruff: noqa: E501  (one case a line reads as a table)
from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ..tiny import NANO
from .conftest import Bitten
from .table import Case, Place

PICTURE = NANO.parent / "eval" / "images" / "img-012.png"
SAID = "chair"
Pixels = npt.NDArray[np.uint8]


def asked(
    content: bytes | Callable[[Path], object], name: str = "picture.png", *args: str
) -> Callable[[Place], list[str]]:
    """`run` about a picture of that content, or of what is made there."""

    def make(place: Place) -> list[str]:
        if isinstance(content, bytes):
            place.write(name, content)
        else:
            content(place.path / name)
        return ["run", "--image", str(place.path / name), "-p", "What does the text say?", "-n", "8", *args]

    return make


def raw(text: str, n_images: int, n_clips: int = 0) -> Callable[[Place], list[str]]:
    """A prompt in markup, and so many pictures and clips."""
    clip = str(NANO.parent / "eval" / "audio" / "asr-000.flac")
    media = ["--image", str(PICTURE)] * n_images + ["--audio", clip] * n_clips
    return lambda place: ["run", "--raw", "-p", text, "-n", "2", *media]


def encoded(pixels: Pixels, ending: str, *options: int) -> bytes:
    import cv2

    done, found = cv2.imencode(ending, pixels, list(options))
    assert done
    return found.tobytes()


def grey(height: int, width: int) -> Pixels:
    return np.full((height, width, 3), 128, np.uint8)


def shown() -> Pixels:
    """The evaluation picture, blue first."""
    import cv2

    found: Any = cv2.imread(str(PICTURE))
    return np.asarray(found, np.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, depth: int = 8, colour: int = 2, data: bytes = b"", *, more: bytes = b""
) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + more + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def palette(entries: int) -> bytes:
    """A PNG whose pixels are all number 200 of a palette of `entries`."""
    return png(64, 64, 8, 3, (b"\0" + bytes([200]) * 64) * 64, more=chunk(b"PLTE", bytes(3 * entries)))


def gif(frames: int, size: int = 8) -> bytes:
    """An animation; each pixel's code comes after one that clears the table, so all have 3 bits."""
    codes = [4, 1] * (size * size) + [5]
    packed = sum(code << 3 * i for i, code in enumerate(codes))
    data = packed.to_bytes((3 * len(codes) + 7) // 8, "little")
    frame = b"," + struct.pack("<HHHHB", 0, 0, size, size, 0) + bytes([2, len(data)]) + data + b"\0"
    head = b"GIF89a" + struct.pack("<HHBBB", size, size, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return head + frame * frames + b";"


def cmyk() -> bytes:
    """The picture as a TIFF of four inks, uncompressed: black is what white lacks."""
    black = 255 - shown().mean(axis=2).astype(np.uint8)
    height, width = black.shape
    inks = np.zeros((height, width, 4), np.uint8)
    inks[:, :, 3] = black
    tags = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 4, 134), (259, 3, 1, 1), (262, 3, 1, 5), (273, 4, 1, 142),
            (277, 3, 1, 4), (278, 3, 1, height), (279, 4, 1, inks.size), (284, 3, 1, 1)]  # fmt: skip
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\0\x08\0\0\0" + directory + struct.pack("<4H", 8, 8, 8, 8) + inks.tobytes()


def turned(orientation: int) -> bytes:
    """The picture as JPEG, stored as EXIF's orientation says it was taken."""
    pixels = shown()
    stored = np.ascontiguousarray(np.rot90(pixels, 1 if orientation == 6 else 2))
    jpeg = encoded(stored, ".jpg")
    exif = (
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01"
        + struct.pack(">HH", orientation, 0)
        + bytes(4)
    )
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]


JPEG, CMYK = encoded(shown(), ".jpg"), cmyk()
GOOD = PICTURE.read_bytes()
CASES = [
    Case("empty", asked(b""), 2, r"picture\.png: is empty, expected PNG, JPEG"),
    Case("1 byte", asked(b"\x89"), 2, r"picture\.png: is not an image of a known format, expected PNG"),
    Case("text", asked(b"hello " * 99), 2, r"picture\.png: is not an image of a known format"),
    Case("a clip", asked(b"RIFF\x24\0\0\0WAVEfmt "), 2, r"picture\.png: is not an image of a known format"),
    Case("SVG", asked(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), 2, r"picture\.png: is not an image of a known"),
    Case("missing", lambda place: ["run", "--image", "gone.png", "-p", "x"], 2, r"gone\.png: no such file"),
    Case("a directory", asked(lambda p: p.mkdir()), 2, r"picture\.png: is not a regular file"),
    Case("a FIFO", asked(os.mkfifo), 2, r"picture\.png: is not a regular file"),
    Case("/dev/zero", lambda place: ["run", "--image", "/dev/zero", "-p", "x"], 2, r"/dev/zero: is not a regular file"),
    Case("512 MB and 1", asked(lambda p: sparse(p, (512 << 20) + 1)), 2, r"picture\.png: has [\d,]+ bytes, expected at"),
    Case("as it should be", asked(GOOD), 0, "", out=SAID),
    Case("1×1", asked(encoded(grey(1, 1), ".png")), 0, ""),
    Case("2×1", asked(encoded(grey(1, 2), ".png")), 0, ""),
    Case("1×20000", asked(encoded(grey(20000, 1), ".png")), 2, r"picture\.png: 1 × 20000 pixels? .*too long and thin"),
    Case("20000×1", asked(encoded(grey(1, 20000), ".png")), 2, r"picture\.png: 20000 × 1 pixels? .*too long and thin"),
    Case("400×800", asked(encoded(grey(800, 400), ".png"), "picture.png", "--max-crops", "2"), 0, ""),
    Case("0×0", asked(png(0, 0)), 2, r"picture\.png: says it is 0 × 0 pixels"),
    Case("a bomb of 2^31 squared", asked(png(0x7FFFFFFF, 0x7FFFFFFF)), 2, r"picture\.png: 2147483647 × 2147483647 pixels a"),
    Case("a bomb of 2^32 by 1", asked(png(0xFFFFFFFF, 1)), 2, r"picture\.png: 4294967295 × 1 pixels"),
    Case("a bomb of 30000 squared", asked(png(30000, 30000, data=bytes(1 << 20))), 2, r"picture\.png: 30000 × 30000 pixels"),
    Case("a header that lies", asked(png(640, 480, data=bytes(99))), 2, r"picture\.png: (cannot be decoded|is damaged)"),
    Case("16 bits", asked(encoded(shown().astype(np.uint16) * 257, ".png")), 0, "", out=SAID),  # type: ignore[arg-type]
    Case("alpha", asked(encoded(np.dstack([shown(), np.full(shown().shape[:2], 255, np.uint8)]), ".png")), 0, "", out=SAID),
    Case("grey", asked(encoded(shown().mean(axis=2).astype(np.uint8), ".png")), 0, "", out=SAID),
    Case("a palette", asked(palette(256)), 0, ""),
    Case("a palette too short", asked(palette(2)), 0, ""),
    Case("CMYK", asked(CMYK, "picture.tif"), 0, "", out=SAID),
    Case("JPEG cut", asked(JPEG[: len(JPEG) // 2], "picture.jpg"), 2, r"picture\.jpg: (is damaged: Corrupt JPEG data|cannot be decoded: the JPEG)"),
    Case("JPEG cut in its header", asked(JPEG[:100], "picture.jpg"), 2, r"picture\.jpg: is cut short in its header"),
    Case("JPEG of 65535 squared", asked(JPEG.replace(JPEG[(i := JPEG.index(b"\xff\xc0")) + 5 : i + 9], b"\xff" * 4, 1),
                                        "picture.jpg"), 2, r"picture\.jpg: 65535 × 65535 pixels are too many"),
    Case("PNG cut", asked(GOOD[:-40]), 2, r"picture\.png: is cut short: a PNG without its end"),
    Case("PNG bit-flipped", asked(GOOD[:300] + bytes([GOOD[300] ^ 1]) + GOOD[301:]), 2, r"picture\.png: is damaged: PNG chu"),
    Case("a chunk of 2^32-1", asked(GOOD[:33] + b"\xff" * 4 + GOOD[37:]), 2, r"picture\.png: is cut short"),
    Case("EXIF turned by 90°", asked(turned(6), "picture.jpg"), 0, "", out=SAID),
    Case("EXIF turned by 180°", asked(turned(3), "picture.jpg"), 0, "", out=SAID),
    Case("WebP", asked(encoded(shown(), ".webp"), "picture.webp"), 0, "", out=SAID),
    Case("WebP cut", asked(encoded(shown(), ".webp")[:200], "picture.webp"), 2, r"picture\.webp: cannot be decoded"),
    Case("animated", asked(gif(3), "picture.gif"), 0, ""),
    Case("65,535 frames", asked(gif(65535), "picture.gif"), 0, ""),
    Case("TIFF of 2^16 entries", asked(b"II*\0\x08\0\0\0\xff\xff" + bytes(99), "picture.tif"), 2, r"picture\.tif: is cut short"),
    Case("TIFF whose directory is itself", asked(b"II*\0\x08\0\0\0\0\0\x08\0\0\0", "picture.tif"), 2, r"picture\.tif: "),
    Case("BMP of -2^31", asked(b"BM" + bytes(12) + struct.pack("<Iii", 40, 1, -(1 << 31)) + bytes(99), "p.bmp"), 2, r"p\.bmp: "),
    Case("PNM of 10^9", asked(b"P6 999999999 999999999 255\n", "p.ppm"), 2, r"p\.ppm: 999999999 × 999999999 pixels are too"),
    Case("65 frames", lambda place: ["run", "--video", str(place.write("v.mp4", b"x")), "--frames", "65", "-p", "x"], 2,
         r"frames.*65.*64"),
    Case("0 frames", lambda place: ["run", "--video", str(place.write("v.mp4", b"x")), "--frames", "0", "-p", "x"], 2,
         r"frames.*0.*64"),
    Case("a video that is none", lambda place: ["run", "--video", str(place.write("v.mp4", b"x" * 999)), "-p", "x"], 2,
         r"v\.mp4: "),
    Case("65 pictures", raw("".join(f"<|image_{n}|>" for n in range(1, 66)), 65), 2, r"(65|tokens, the context)", max_seconds=60),
    Case("no picture for a placeholder", raw("<|user|><|image_1|>x<|end|><|assistant|>", 0), 2, r"the text has a <\|image_1\|> place, but no pictures were given"),
    Case("more placeholders than pictures", raw("<|user|><|image_1|><|image_2|>x<|end|><|assistant|>", 1), 2, r"the text has more <\|image_n\|> places than"),
    Case("more pictures than placeholders", raw("<|user|><|image_1|>x<|end|><|assistant|>", 2), 2, r"1 pictures have no <\|image_n\|> place in the text"),
    Case("a placeholder twice", raw("<|user|><|image_1|><|image_1|>x<|end|><|assistant|>", 1), 2, r"the text has more <\|image_n\|> places than there are pictures"),
    Case("placeholder 0", raw("<|image_0|>x", 1), 0, ""),
    Case("placeholder 10^30", raw(f"<|image_1{'0' * 30}|>x", 1), 0, ""),
    Case("no clip for a placeholder", raw("<|user|><|audio_1|><|end|><|assistant|>", 1), 2, r"the text has more <\|audio_n\|> places than there are clips"),
    Case("the features' own token", raw("<|user|><|endoftext10|>x<|end|><|assistant|>", 0), 0, ""),
    Case("no vision encoder", lambda place: ["run", "-m", str(place.shared_model("phi4-mini", "F16")), "--image",
                                             str(PICTURE), "-p", "x"], 2, r"has no vision encoder"),
]  # fmt: skip


def sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_picture(case: Case, bitten: Bitten) -> None:
    bitten(case)
