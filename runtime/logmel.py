# SPDX-License-Identifier: Apache-2.0
"""Waveform to log-mel features, by the native kernel, or by numpy where the package was built without it."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from . import kernels
from .errors import InputError
from .parts import Float32

Float64 = npt.NDArray[np.float64]

_PREEMPHASIS = np.float32(0.97)
_INT16_SCALE = 32768.0  # the front end was built for 16-bit samples
_MAX_HZ = 7690.0  # upper edge of the last mel band
_BIN_HZ = 31.25  # 16000 / 512 and 8000 / 256
_BINS = {16000: 246, 8000: 128}  # bins 1 up to this one carry weight; 8 kHz also drops its Nyquist bin
_MAX_SAMPLE = float(np.finfo(np.float32).max) / 2  # above it the float32 pre-emphasis may overflow
_BLOCK_FRAMES = 4096  # numpy works on about 60 MB at a time, however long the clip


def log_mel(wave: Float32, sample_rate: int = 16000) -> Float32:
    """Log-mel features of mono speech, as the Phi-4-multimodal speech encoder wants them.

    Args:
        wave: float32 [n], PCM in [-1, 1] at `sample_rate`.
        sample_rate: 16000, or 8000 Hz for telephone speech. Resample anything else first.

    Returns:
        float32 [t, 80]: natural log of mel power, one row per 10 ms, each over 25 ms.
        t = (n - 400) // 160 + 1, at 8 kHz (n - 200) // 80 + 1; a tail shorter than one hop is dropped.
        The log floor is ln 1 = 0, so silence is exactly 0.0. At 8 kHz bands above 4 kHz are 0.0.

    Raises:
        InputError: another rate, another dtype, more than one axis, shorter than one 25 ms frame, or a
            sample that is not finite (or beyond 1.7e38).
        KernelError: the native library is there but broken or of another version.

    Source: the feature extractor of microsoft/Phi-4-multimodal-instruct (processing_phi4mm.py):
    pre-emphasis 0.97 inside each frame, times 32768, symmetric Hamming 400, FFT 512, 80 mel bands to
    7690 Hz that are linear in mel, power clipped at 1. transformers' port differs in band 79 alone, which
    also takes bin 246 there. Whisper's front end differs in every one of these.
    """
    _check(wave, sample_rate)
    if kernels.is_available():
        return kernels.log_mel(np.ascontiguousarray(wave), sample_rate)
    return log_mel_numpy(wave, sample_rate)


def _check(wave: Float32, sample_rate: int) -> None:
    if sample_rate not in _BINS:
        raise InputError(f"audio is at {sample_rate} Hz, expected 16000 or 8000")
    if wave.ndim != 1 or wave.dtype != np.float32:
        raise InputError(f"audio is {wave.dtype} {list(wave.shape)}, expected mono float32 [samples]")
    window, _ = kernels.FRAME_SAMPLES[sample_rate]
    if wave.size < window:
        raise InputError(f"audio has {wave.size} samples, expected at least {window} (25 ms)")
    if not (wave.max() <= _MAX_SAMPLE and wave.min() >= -_MAX_SAMPLE):  # false for NaN too
        raise InputError("audio has a sample that is not finite, expected values in [-1, 1]")


def log_mel_numpy(wave: Float32, sample_rate: int) -> Float32:
    """The kernel's formula: pre-emphasis rounded to float32, everything after it in float64."""
    window, hop = kernels.FRAME_SAMPLES[sample_rate]
    # A view: frame f starts at sample f * hop.
    frames = np.lib.stride_tricks.sliding_window_view(wave, window)[::hop]
    out = np.empty((len(frames), kernels.MEL_BANDS), np.float32)
    n = np.arange(window)
    hamming = _INT16_SCALE * (0.54 - 0.46 * np.cos(2 * np.pi * n / (window - 1)))
    n_fft = 512 if sample_rate == 16000 else 256
    mel = _mel_matrix()[: _BINS[sample_rate]]
    for start in range(0, len(frames), _BLOCK_FRAMES):
        x = frames[start : start + _BLOCK_FRAMES]
        before = np.concatenate([x[:, :1], x[:, :-1]], axis=1)
        spectrum = np.fft.rfft((x - _PREEMPHASIS * before) * hamming, n_fft)[:, : len(mel)]
        power = spectrum.real**2 + spectrum.imag**2
        out[start : start + len(x)] = np.log(np.maximum(power @ mel, 1.0))
    return out


@functools.cache
def _mel_matrix() -> Float64:
    """Weights float64 [246, 80] of the power at 31.25 Hz * bin; bin 0 has none."""

    def mel(hz: npt.ArrayLike) -> Float64:
        return np.asarray(1127.0 * np.log(1.0 + np.asarray(hz, np.float64) / 700.0))

    spacing = mel(_MAX_HZ) / (kernels.MEL_BANDS + 1)
    centres = spacing * np.arange(1, kernels.MEL_BANDS + 1)
    bins = mel(_BIN_HZ * np.arange(_BINS[16000]))
    weights = np.maximum(0.0, 1.0 - np.abs(bins[:, None] - centres) / spacing)
    weights[0] = 0.0
    return weights
