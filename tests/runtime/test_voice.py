# SPDX-License-Identifier: Apache-2.0
"""The detector on real speech, on what is none, and on what a microphone should never give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soxr

from pocketphi.runtime import audio
from pocketphi.runtime.errors import InputError
from pocketphi.runtime.parts import Float32
from pocketphi.runtime.voice import VoiceDetector

JFK = Path(__file__).parent.parent / "audio" / "jfk.flac"


def probabilities(samples: Float32, rate: int = 16000) -> list[float]:
    detector = VoiceDetector(rate)
    n = detector.frame_samples
    return [detector(samples[i : i + n]) for i in range(0, len(samples) - n + 1, n)]


@pytest.fixture(scope="module")
def speech() -> Float32:
    """Eleven seconds of a real voice at 16 kHz, with pauses."""
    return audio.load(JFK).samples


def test_a_voice_and_its_pauses(speech: Float32) -> None:
    found = np.array(probabilities(speech))
    assert len(found) == len(speech) // 512
    assert found.min() >= 0 and found.max() <= 1
    heard = found >= 0.5  # frame k begins at 0.032 k s; what is where can be heard in the recording
    assert heard[12:60].mean() > 0.5  # words from 0.4 to 1.9 s, with gaps between them
    assert not heard[84:103].any()  # 2.7 to 3.3 s
    assert heard[175:230].mean() > 0.5


def test_telephone_speech_is_heard_in_the_same_places(speech: Float32) -> None:
    narrow = soxr.resample(speech, 16000, 8000, quality="VHQ").astype(np.float32)
    wide, found = np.array(probabilities(speech)), np.array(probabilities(narrow, 8000))
    assert VoiceDetector(8000).frame_samples == 256
    assert len(found) == len(wide)
    # Speech without its upper half is other speech: words are found again, and nothing in the pauses.
    for words in (slice(12, 60), slice(175, 230)):
        assert (found[words] >= 0.5).mean() > 0.5
    assert not (found[84:103] >= 0.5).any()


def test_a_new_detector_knows_nothing_of_another(speech: Float32) -> None:
    first = probabilities(speech[:32000])
    assert probabilities(speech[:32000]) == first
    used = VoiceDetector(16000)
    for i in range(0, 32000, 512):
        used(speech[i : i + 512])
    again = [used(speech[i : i + 512]) for i in range(0, 16000 - 512, 512)]
    assert again != first[: len(again)], "the state is not carried from frame to frame"


@pytest.mark.parametrize("rate", [16000, 8000])
@pytest.mark.parametrize(
    "make",
    [
        lambda n, rng: np.zeros(n),
        lambda n, rng: np.ones(n),
        lambda n, rng: np.full(n, 3.4e38),
        lambda n, rng: np.where(rng.random(n) < 0.5, -3.4e38, 3.4e38),
        lambda n, rng: np.full(n, 1e-45),
        lambda n, rng: np.eye(1, n)[0],
        lambda n, rng: rng.normal(size=n) * 100,
    ],
    ids=["silence", "offset", "huge", "huge-noise", "denormal", "click", "loud"],
)
def test_any_finite_frame_has_a_probability(make: object, rate: int) -> None:
    assert callable(make)
    detector = VoiceDetector(rate)
    rng = np.random.default_rng(3)
    for _ in range(8):
        found = detector(make(detector.frame_samples, rng).astype(np.float32))
        assert isinstance(found, float) and 0 <= found <= 1


@pytest.mark.parametrize("hz", [50, 60, 100, 120])
def test_a_steady_hum_is_nobody(hz: int) -> None:
    """The network alone says 0.7 to 0.9 of some of these for many frames."""
    t = np.arange(16000 * 4) / 16000
    for harmonics, fall in ((4, 1.0), (19, 1.0), (29, 0.5)):
        hum = sum(np.sin(2 * np.pi * hz * k * t + k) / k**fall for k in range(1, harmonics + 1))
        found = probabilities((0.9 * hum / np.abs(hum).max()).astype(np.float32))
        assert not any(p >= 0.5 for p in found[4:]), (harmonics, fall)  # 4 frames until it is known as steady


@pytest.mark.parametrize("rate", [0, 11025, 44100, 48000])
def test_other_rates_are_refused(rate: int) -> None:
    with pytest.raises(InputError, match=f"{rate} Hz, expected 16000 or 8000"):
        VoiceDetector(rate)
