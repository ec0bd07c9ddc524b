# SPDX-License-Identifier: Apache-2.0
"""Pictures and sound: headers, whole files through the decoders, and a pipe that is still being written."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np

from pocketphi.runtime import audio, image, image_header, mpeg
from pocketphi.runtime.clock import RealClock
from pocketphi.runtime.errors import InputError
from pocketphi.runtime.pipe import Piped

from ..target import Target, attempt, promise

_MOST_PIXELS = 1 << 20


def _sound_checksums(data: bytes) -> bytes:
    """A PNG whose chunks have the right checksums, so that its reader goes on to what they hold."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    made, at = bytearray(data), 8
    while at + 12 <= len(made):
        (length,) = struct.unpack_from(">I", made, at)
        if at + 12 + length > len(made):
            break
        struct.pack_into(">I", made, at + 8 + length, zlib.crc32(made[at + 4 : at + 8 + length]))
        at += 12 + length
    return bytes(made)


def header(data: bytes) -> None:
    """Nothing that is not a size comes out."""
    data = _sound_checksums(data[1:]) if data[:1] and data[0] % 2 else data[1:]
    found = attempt(lambda: image_header.read_header(data), image_header.HeaderError)
    if found is not None:
        promise(found.width > 0 and found.height > 0, f"{found.width} x {found.height} pixels")


def whole_image(data: bytes) -> None:
    """Decoded, it is of the size that the header says, turned or not."""
    data = _sound_checksums(data[1:]) if data[:1] and data[0] % 2 else data[1:]
    rgb = attempt(lambda: image.load(data, max_pixels=_MOST_PIXELS), InputError)
    if rgb is not None:
        said = image_header.read_header(data)
        promise(said is not None and rgb.shape[0] * rgb.shape[1] <= _MOST_PIXELS, "more pixels than allowed")
        promise(
            said is not None and {said.width, said.height} == set(rgb.shape[:2]), "another size than it says"
        )
        promise(rgb.dtype == np.uint8 and rgb.shape[2] == 3, "no picture")


def frames(data: bytes) -> None:
    """A sniffer never fails."""
    promise(mpeg.format_of(lambda n: data[:n]) in (None, "MP3", "AAC"), "a format of its own")


def sound(data: bytes) -> None:
    """A clip from bytes is finite and of a rate that the front end has."""
    clip = attempt(lambda: audio.load(data), InputError)
    if clip is not None:
        promise(clip.sample_rate in (8000, 16000) and clip.samples.ndim == 1, "no clip")
        promise(bool(np.isfinite(clip.samples).all()), "a sample that is none")


def pipe(data: bytes) -> None:
    """The same of what comes through a pipe; its thread ends with the bytes."""

    def take() -> None:
        with Piped(io.BytesIO(data), RealClock(), name="pipe") as piped:
            for block in piped.blocks:
                promise(block.dtype == np.float32 and block.ndim == 1, "no samples")
                promise(bool(np.isfinite(block).all()), "a sample that is none")

    attempt(take, InputError)


TARGETS = (
    Target("image-header", header, runs=6000, seeds="image"),
    Target("image", whole_image, runs=600),
    Target("mpeg", frames, runs=6000, seeds="sound"),
    Target("sound", sound, runs=600),
    Target("pipe", pipe, runs=500, seeds="sound"),
)
