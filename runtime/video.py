# SPDX-License-Identifier: Apache-2.0
"""Frames of a video file, evenly spaced, and one frame of a camera: pictures for the vision encoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError, native
from .files import check_file
from .hd import MAX_CROPS, layout
from .parts import RGB, Media
from .stderr_capture import captured_stderr

with native("OpenCV"):
    import cv2

MAX_FRAMES = 64
TOKEN_BUDGET = 3584  # of one video: with 512 tokens of text below 4,096, where the long RoPE table begins
_MAX_PIXELS = 100_000_000
_MAX_CAMERAS = 100
_WARM_UP_FRAMES = 5  # a camera's first frames are taken before its exposure has settled


def frames(path: Path, count: int) -> list[RGB]:
    """Frames in the middle of `count` equal parts of a video; all of them, if it has no more.

    Args:
        path: any container that this OpenCV reads.
        count: 1 to 64.

    Returns:
        uint8 [h, w, 3] each, red first.

    Raises:
        InputError: a count out of range; no such file, no video, or a damaged one.
    """
    if not 1 <= count <= MAX_FRAMES:
        raise InputError(f"frames is {count}, expected 1 to {MAX_FRAMES}")
    check_file(path)
    with _opened(str(path), f"{path}") as video:
        total = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        if total < 1:
            raise InputError(f"{path}: is a video without frames, or of unknown length")
        wanted = {int((i + 0.5) * total / count) for i in range(count)}
        found = []
        for at in range(max(wanted) + 1):
            with captured_stderr():
                good = video.grab()
            if not good:
                break
            if at in wanted:
                found.append(_retrieve(video, str(path)))
    if not found:
        raise InputError(f"{path}: no frame of this video can be decoded")
    return found


def as_media(path: Path, count: int, max_crops: int = MAX_CROPS) -> tuple[list[Media], int]:
    """Frames as pictures for one message, cut so that together they stay within the budget.

    The budget is `TOKEN_BUDGET`, which leaves a video within the short RoPE table; every frame gets as many
    crops as it allows, and one at least.

    Returns:
        the pictures, and how many tokens they take together.

    Raises:
        InputError: as `frames`.
    """
    pictures = frames(path, count)
    height, width = pictures[0].shape[:2]
    fits = [
        n for n in range(1, max_crops + 1) if count_tokens(width, height, n) * len(pictures) <= TOKEN_BUDGET
    ]
    crops = max(fits, default=1)
    media = [Media("image", rgb, f"{path}, frame {i}", crops) for i, rgb in enumerate(pictures, 1)]
    return media, count_tokens(width, height, crops) * len(pictures)


def count_tokens(width: int, height: int, max_crops: int) -> int:
    """Positions of a picture in the prompt."""
    return layout(width, height, max_crops).n_tokens


def camera(index: int = 0) -> RGB:
    """One frame of a camera.

    Raises:
        InputError: there is no such camera, or it gives no picture.
    """
    if not 0 <= index < _MAX_CAMERAS:
        raise InputError(f"camera {index}: expected 0 to {_MAX_CAMERAS - 1}")
    with _opened(index, f"camera {index}") as device:
        for _ in range(_WARM_UP_FRAMES):
            with captured_stderr():
                good = device.grab()
            if not good:
                raise InputError(f"camera {index}: gives no picture")
        return _retrieve(device, f"camera {index}")


@contextmanager
def _opened(source: str | int, where: str) -> Iterator[Any]:
    video = None
    try:
        with captured_stderr():  # FFmpeg's and OpenCV's complaints
            video = cv2.VideoCapture(source)
        if not video.isOpened():
            raise InputError(f"{where}: cannot be opened as a video")
        width, height = video.get(cv2.CAP_PROP_FRAME_WIDTH), video.get(cv2.CAP_PROP_FRAME_HEIGHT)
        if width * height > _MAX_PIXELS:
            raise InputError(f"{where}: frames of {width:.0f} × {height:.0f} pixels are too large")
        yield video
    finally:
        if video is not None:
            video.release()


def _retrieve(video: Any, where: str) -> RGB:
    with captured_stderr():
        good, frame = video.retrieve()
    if not good or frame is None or frame.ndim != 3:
        raise InputError(f"{where}: a frame cannot be decoded")
    rgb: RGB = np.ascontiguousarray(frame[:, :, ::-1], np.uint8)
    return rgb
