# SPDX-License-Identifier: Apache-2.0
"""What the browser's microphone and camera of software hear and see: phi4-nano's clips and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import soundfile
import soxr

from pocketphi.runtime.parts import Float32

RATE = 16000  # Hz, of phi4-nano's clips
_DEVICE_RATE = 48000  # Hz, of the file that Chromium reads
LEAD_S, PAUSE_S, END_S = 0.6, 1.2, 0.8  # silence before, between and after clips


def spoken(clips: Sequence[Path], lead_s: float = LEAD_S) -> Float32:
    """Clips one after the other with silence around them: float32 [n], mono, 16 kHz."""
    parts = [_silence(lead_s)]
    for clip in clips:
        samples, rate = soundfile.read(clip, dtype="float32")
        assert rate == RATE and samples.ndim == 1
        parts += [samples, _silence(PAUSE_S)]
    return np.concatenate([*parts[:-1], _silence(END_S)])


def write_sound(path: Path, samples: Float32) -> Path:
    """16-bit WAV at the device's rate, of float32 [n] at 16 kHz."""
    soundfile.write(path, soxr.resample(samples, RATE, _DEVICE_RATE).clip(-1, 1), _DEVICE_RATE, "PCM_16")
    return path


def write_picture(path: Path, picture: Path) -> Path:
    """A film of one picture: YUV4MPEG2, 4:2:0, two frames that the device repeats."""
    shown = cv2.imread(str(picture))
    height, width = shown.shape[:2]
    frame = b"FRAME\n" + cv2.cvtColor(shown, cv2.COLOR_BGR2YUV_I420).tobytes()
    path.write_bytes(f"YUV4MPEG2 W{width} H{height} F15:1 Ip A1:1 C420jpeg\n".encode() + 2 * frame)
    return path


def _silence(seconds: float) -> Float32:
    return np.zeros(round(seconds * RATE), np.float32)
