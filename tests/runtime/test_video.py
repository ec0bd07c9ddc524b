# SPDX-License-Identifier: Apache-2.0
"""Frames of videos written by OpenCV itself, and what is no video."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from pocketphi.runtime.errors import InputError
from pocketphi.runtime.video import TOKEN_BUDGET, as_media, camera, frames

N = 20


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frame i has red 10 i, green 0 and blue 255 - 10 i."""
    path = tmp_path_factory.mktemp("video") / "v.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    assert writer.isOpened()
    for i in range(N):
        writer.write(np.full((48, 64, 3), (255 - 10 * i, 0, 10 * i), np.uint8))
    writer.release()
    return path


@pytest.mark.parametrize("count", [1, 2, 5, N])
def test_frames_lie_in_the_middle_of_equal_parts(count: int, video: Path) -> None:
    found = frames(video, count)
    assert len(found) == count
    for i, frame in enumerate(found):
        assert frame.shape == (48, 64, 3)
        wanted = int((i + 0.5) * N / count)
        red, _, blue = frame[24, 32].astype(int)
        # JPEG at this quality moves a flat colour by a few steps; neighbours are 10 apart.
        assert abs(red - 10 * wanted) < 5
        assert abs(blue - (255 - 10 * wanted)) < 5


def test_a_short_video_gives_all_it_has(video: Path) -> None:
    assert len(frames(video, 64)) == N


@pytest.mark.parametrize("count", [0, -1, 65])
def test_counts_out_of_range(count: int, video: Path) -> None:
    with pytest.raises(InputError, match="1 to 64"):
        frames(video, count)


def test_what_is_no_video(tmp_path: Path, video: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.mp4").write_bytes(b"not a video" * 100)
    (tmp_path / "empty.avi").write_bytes(b"")
    (tmp_path / "cut.avi").write_bytes(video.read_bytes()[:200])
    for path in (tmp_path / "gone.mp4", tmp_path, *tmp_path.iterdir()):
        with pytest.raises(InputError) as caught:
            frames(path, 3)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("index", [-1, 99, 10**11])
def test_no_camera(index: int) -> None:
    with pytest.raises(InputError, match=f"camera {index}"):
        camera(index)


def test_a_video_stays_within_its_budget(tmp_path: Path) -> None:
    path = tmp_path / "hd.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (1280, 720))
    for _ in range(8):
        writer.write(np.zeros((720, 1280, 3), np.uint8))
    writer.release()
    media, tokens = as_media(path, 8)
    assert [m.max_crops for m in media] == [1] * 8
    assert tokens == 8 * 426 <= TOKEN_BUDGET
    one, tokens = as_media(path, 1)
    assert (one[0].max_crops or 36) >= 6
    assert tokens == 1596
