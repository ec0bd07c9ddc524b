# SPDX-License-Identifier: Apache-2.0
"""Write transformers.npz: log-mel features as transformers' own front end computes them.

Run with the `reference` extra: python make_golden.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import transformers
from transformers import Phi4MultimodalFeatureExtractor

RATE = 16000


def main() -> None:
    """Half a second: a sweep from 50 Hz to 7.9 kHz that fades by 80 dB, noise, a gap of digital silence."""
    t = np.arange(RATE // 2) / RATE
    sweep = np.sin(2 * np.pi * (50 * t + (7900 - 50) * t**2)) * 10 ** (-4 * 2 * t)
    noise = np.random.default_rng(3).standard_normal(t.size) * 1e-3
    wave = np.clip(np.rint((0.6 * sweep + noise) * 32768), -32768, 32767).astype(np.int16)
    wave[4000:5000] = 0
    extractor = Phi4MultimodalFeatureExtractor()
    out = extractor(wave.astype(np.float32) / 32768, sampling_rate=RATE, return_tensors="np")
    features = np.asarray(out["audio_input_features"][0], np.float32)
    path = Path(__file__).with_name("transformers.npz")
    np.savez_compressed(path, wave=wave, features=features)
    print(f"transformers {transformers.__version__}: {path.name} wave {wave.shape} features {features.shape}")


if __name__ == "__main__":
    main()
