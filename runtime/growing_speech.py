# SPDX-License-Identifier: Apache-2.0
"""One utterance while it is spoken: what its earlier windows share with the next one is not encoded again.

Exact to keep, and kept: log-mel frames, each of which looks at its own 25 ms alone, and what the encoder's
front made of whole pieces, which looks back only. Never kept: what the Conformer trunk made, where every row
sees every other. So the rows are those of the same samples encoded at once, bit for bit.
"""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING

import numpy as np

from . import kernels
from .errors import InputError
from .logmel import log_mel
from .parts import AudioProjector, Float32

if TYPE_CHECKING:  # ONNX Runtime loads with the first clip
    from .speech_encoder import SpeechEncoder

_TOKEN_FRAMES = 8  # 80 ms, as the encoder has it
MAX_SECONDS = 40  # one block of the encoder; a longer clip is padded, and is no utterance


class GrowingSpeech:
    """An utterance and the rows of its latest window, as `Media("audio", …)` takes it. For one thread."""

    def __init__(self, sample_rate: int) -> None:
        """
        Args:
            sample_rate: of all windows: 16000 or 8000 Hz.

        Raises:
            InputError: another rate.
        """
        if sample_rate not in kernels.FRAME_SAMPLES:
            raise InputError(f"speech is at {sample_rate} Hz, expected 16000 or 8000")
        self.sample_rate = sample_rate
        self.log_mel_s = 0.0  # what the latest `rows` took for each; 0 where it had nothing to do
        self.encoder_s = 0.0
        self._name = uuid.uuid4().hex
        self._window: Float32 = np.zeros(0, np.float32)
        self._features: Float32 = np.zeros((0, kernels.MEL_BANDS), np.float32)  # of the first frames
        self._front: Float32 = np.zeros((0, 0), np.float32)  # [n, d]: the first tokens' rows
        self._hidden: Float32 | None = None  # of the window, as are these:
        self._rows: dict[AudioProjector, Float32] = {}

    @property
    def window(self) -> Float32:
        """The samples that `rows` are about: float32 [n], not to be written to."""
        return self._window

    @property
    def key(self) -> str:
        """Names this utterance's window of this length; no other window of any utterance has it."""
        return f"growing {self._name} {len(self._window)}"

    def set_window(self, samples: Float32) -> None:
        """What there is of the utterance now. The samples are copied.

        Args:
            samples: float32 [n], from the utterance's first sample on: more than before, or less where it was
                cut. Samples that are not those of before make it another utterance, encoded from its start.

        Raises:
            InputError: of another kind, or longer than 40 s. The window stays as it was.
        """
        if samples.ndim != 1 or samples.dtype != np.float32:
            raise InputError(f"speech is {samples.dtype} {list(samples.shape)}, expected float32 [samples]")
        if len(samples) > MAX_SECONDS * self.sample_rate:
            seconds = len(samples) / self.sample_rate
            raise InputError(
                f"an utterance of {seconds:.1f} s cannot be read, expected at most {MAX_SECONDS} s"
            )
        shared = min(len(samples), len(self._window))
        if not np.array_equal(samples[:shared], self._window[:shared]):
            shared = 0
        if shared == len(samples) == len(self._window):
            return
        if shared < len(self._window):  # what was taken away may come back as other samples: none of it stays
            self._name = uuid.uuid4().hex
        n_frames = kernels.log_mel_frames(shared, self.sample_rate)
        self._features = self._features[:n_frames]
        self._front = self._front[: n_frames // _TOKEN_FRAMES]
        self._hidden, self._rows = None, {}
        self._window = samples.copy()
        self._window.flags.writeable = False

    def rows(self, encoder: SpeechEncoder, projector: AudioProjector) -> Float32:
        """The window's rows for the decoder: float32 [ceil(frames / 8), d_model]. Asked twice, made once.

        Args:
            encoder: always the same one.
            projector: "speech", or "vision" when the request has pictures.

        Raises:
            InputError: the window is shorter than 25 ms, or has a sample that is not finite.
            BundleError, KernelError: as `SpeechEncoder.encode`.
        """
        self.log_mel_s = self.encoder_s = 0.0
        if projector in self._rows:
            return self._rows[projector]
        if self._hidden is None:
            started = time.perf_counter()
            self._extend_features()
            self.log_mel_s = time.perf_counter() - started
        started = time.perf_counter()
        if self._hidden is None:
            self._hidden, self._front = encoder.continue_hidden(self._features, self._front)
        self._rows[projector] = encoder.project(self._hidden, projector)
        self.encoder_s = time.perf_counter() - started
        return self._rows[projector]

    def _extend_features(self) -> None:
        """Log-mel features of the whole window; frames that are there already stay as they are."""
        _, hop = kernels.FRAME_SAMPLES[self.sample_rate]
        # numpy's matrix product may round a frame otherwise beside others; the kernel never does.
        kept = len(self._features) if kernels.is_available() else 0
        if kept == 0 or kept < kernels.log_mel_frames(len(self._window), self.sample_rate):
            new = log_mel(self._window[kept * hop :], self.sample_rate)
            self._features = np.concatenate([self._features[:kept], new])
