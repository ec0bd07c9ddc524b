# SPDX-License-Identifier: Apache-2.0
"""Image files and frames to the normalised crops that the vision encoder reads: the reference's pixels.

Source: Phi4MultimodalImageProcessor in transformers, and PIL's `convert("RGB")` for what a file means:
alpha is dropped, not blended; 16-bit samples keep their upper byte; an animation is its first frame.
Where OpenCV differs it is followed: CMYK in JPEG by 1 of 255, and a TIFF's colours are multiplied by alpha.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .errors import InputError, native
from .hd import CROP_PIXELS, MAX_CROPS, MAX_PIXELS, Layout, layout
from .image_header import FORMATS, Header, HeaderError, read_header
from .parts import Float32
from .resample import bilinear, shrink_bicubic
from .stderr_capture import captured_stderr

with native("OpenCV"):
    import cv2

UInt8 = npt.NDArray[np.uint8]

MAX_FILE_BYTES = 512 << 20
_WHITE = 255  # of the padding

_NORMALISED: Float32 = (np.arange(256, dtype=np.float32) - np.float32(127.5)) / np.float32(127.5)
"""(v / 255 - 0.5) / 0.5 of each 8-bit value, in the form and rounding of the reference."""


@dataclass(frozen=True, slots=True, eq=False)
class ImageInput:
    """One image, ready for the encoder."""

    crops: Float32  # [layout.n_crops, 3, 448, 448]: the global view, then the canvas row by row
    layout: Layout
    key: str  # names the content: equal keys, equal features

    @property
    def n_tokens(self) -> int:
        """Positions it takes in the prompt."""
        return self.layout.n_tokens


def load(
    source: Path | bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    max_crops: int = MAX_CROPS,
    where: str | None = None,
) -> UInt8:
    """Decode an image file, upright as its EXIF data says.

    Args:
        source: a file, or a file's bytes.
        max_pixels: more are refused before anything is decoded.
        max_crops: as for `prepare`, which would refuse the same shapes, later.
        where: opens the message of an error; default the path, or "image".

    Returns:
        uint8 [h, w, 3], red first.

    Raises:
        InputError: missing, not a regular file, of no known format, damaged, too large, or too thin.
    """
    where = where or (str(source) if isinstance(source, Path) else "image")
    data = _read(source, where) if isinstance(source, Path) else source
    try:
        header = read_header(data)
    except HeaderError as exc:
        raise InputError(f"{where}: {exc}") from None
    if header is None:
        found = "is empty" if not data else "is not an image of a known format"
        raise InputError(f"{where}: {found}, expected {FORMATS}")
    if header.width * header.height > max_pixels:
        raise InputError(
            f"{where}: {header.width} × {header.height} pixels are too many, expected at most {max_pixels:,}"
        )
    layout(header.width, header.height, max_crops, where=where)
    return _decode(data, header, where)


def prepare(rgb: UInt8, max_crops: int = MAX_CROPS, *, where: str = "image") -> ImageInput:
    """Scale, pad, normalise and cut an image.

    Args:
        rgb: uint8 [h, w, 3], red first, upright.
        max_crops: of the canvas; fewer mean fewer tokens and less time. The reference has 36.
        where: opens the message of an error.

    Raises:
        InputError: scaled to fit, a side would have fewer than 10 pixels.
    """
    assert rgb.dtype == np.uint8 and rgb.ndim == 3 and rgb.shape[2] == 3
    height, width = rgb.shape[:2]
    plan = layout(width, height, max_crops, where=where)
    scaled = bilinear(np.ascontiguousarray(rgb.transpose(2, 0, 1)), plan.width, plan.height)
    canvas = np.full((3, CROP_PIXELS * plan.rows, CROP_PIXELS * plan.columns), _WHITE, np.uint8)
    canvas[:, : plan.height, : plan.width] = scaled
    crops = np.empty((plan.n_crops, 3, CROP_PIXELS, CROP_PIXELS), np.float32)
    tiles = canvas.reshape(3, plan.rows, CROP_PIXELS, plan.columns, CROP_PIXELS).transpose(1, 3, 0, 2, 4)
    for row in range(plan.rows):
        for column in range(plan.columns):
            crops[1 + row * plan.columns + column] = _NORMALISED[tiles[row, column]]
    crops[0] = shrink_bicubic(_NORMALISED[canvas], plan.rows, plan.columns)
    return ImageInput(crops, plan, _key(rgb, max_crops))


def _key(rgb: UInt8, max_crops: int) -> str:
    digest = hashlib.sha256(f"image {rgb.shape} {max_crops}\n".encode())
    digest.update(np.ascontiguousarray(rgb).data)
    return digest.hexdigest()


def _read(path: Path, where: str) -> bytes:
    """A regular file's bytes: a pipe would block and a device never end."""
    try:
        if not path.is_file():
            found = "is not a regular file" if path.exists() else "no such file"
            raise InputError(f"{where}: {found}")
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise InputError(f"{where}: has {size:,} bytes, expected at most {MAX_FILE_BYTES:,}")
        return path.read_bytes()
    except OSError as exc:
        raise InputError(f"{where}: cannot be read: {exc.strerror}") from None
    except ValueError:  # a NUL in the path
        raise InputError(f"{where!r}: is not a file name") from None


def _decode(data: bytes, header: Header, where: str) -> UInt8:
    damage = ""
    try:
        with captured_stderr() as said:  # OpenCV's and the codecs' complaints
            made = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        damage = next((line for line in said.text.splitlines() if "Corrupt JPEG data: premature" in line), "")
    except (cv2.error, MemoryError):
        made = None
    if damage:  # libjpeg fills up with grey; the reference refuses such a file
        raise InputError(f"{where}: is damaged: {' '.join(damage.split())}")
    if made is None:
        raise InputError(
            f"{where}: cannot be decoded: the {header.format} file is damaged or of an unknown kind"
        )
    assert made.dtype == np.uint8 and made.ndim == 3, "IMREAD_COLOR_RGB gives 8 bits and three channels"
    if sorted(made.shape[:2]) != sorted((header.height, header.width)):
        raise InputError(
            f"{where}: is damaged: its header says {header.width} × {header.height} pixels, "
            f"it holds {made.shape[1]} × {made.shape[0]}"
        )
    return np.ascontiguousarray(made)
