# SPDX-License-Identifier: Apache-2.0
"""Reads the golden speech cases: which clip goes in, and which rows transformers gives for it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile

from ... import tiny

HERE = Path(__file__).resolve().parent
CLIPS = tiny.NANO.parent / "eval" / "audio"
RATE = 16000

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

SHORT = ("asr-000", "asr-019", "ast-000", "sqa-005", "vs-000")
LONG = {  # name -> (what it is made of, frames): blocks of 500 tokens, one token is 8 frames
    "chirp-500": ("chirp", 4000),  # one block, full
    "chirp-501": ("chirp", 4001),  # one token of one frame in the second block
    "speech-750": ("speech", 5998),  # a minute
    "speech-1001": ("speech", 8003),  # two full blocks and one token of three frames
}


@dataclass(frozen=True, eq=False)
class Case:
    """One clip and the reference. n is its number of tokens; `rows` of them are recorded."""

    name: str
    samples: Float32  # [samples], 16 kHz
    n_tokens: int
    rows: Int64  # [m], increasing
    hidden: Float32  # [m, d], the Conformer's output
    speech: Float32  # [m, d_model], through the projector used without a picture
    vision: Float32  # [m, d_model], through the one used with a picture


def samples_of(name: str) -> Float32:
    """The waveform of a case: a file of phi4-nano's evaluation set, or made by its recipe."""
    if name not in LONG:
        return _flac(CLIPS / f"{name}.flac")
    kind, n_frames = LONG[name]
    n = (n_frames - 1) * 160 + 400
    if kind == "chirp":
        return _chirps(n)
    parts: list[Float32] = []
    for path in sorted(CLIPS.glob("asr-*.flac")):
        parts.append(_flac(path))
        if sum(map(len, parts)) >= n:
            break
    return np.concatenate(parts)[:n]


def load() -> list[Case]:
    """Every case."""
    index: dict[str, Any] = json.loads((HERE / "speech.json").read_text("utf-8"))
    found = []
    with np.load(HERE / "speech.npz") as file:
        for name, n_tokens in index["n_tokens"].items():
            arrays = {key: file[f"{name}/{key}"] for key in ("rows", "hidden", "speech", "vision")}
            found.append(Case(name, samples_of(name), n_tokens, **arrays))
    return found


def reference_features() -> Float32:
    """transformers' own log-mel features of the first short clip: float32 [t, 80]."""
    with np.load(HERE / "speech.npz") as file:
        features: Float32 = file["features"]
    return features


def _flac(path: Path) -> Float32:
    samples, rate = soundfile.read(path, dtype="float32")
    assert rate == RATE and samples.ndim == 1
    return np.asarray(samples, np.float32)


def _chirps(n: int) -> Float32:
    """Sweeps of two seconds that rise to 7.5 kHz and fade, over noise: int16 steps, the same everywhere."""
    t = np.arange(n) / RATE
    phase = t % 2.0
    sweep = np.sin(2 * np.pi * (80 * phase + 1855 * phase**2)) * (0.6 - 0.29 * phase)
    noise = np.random.PCG64(4).random_raw(n).astype(np.float64) / 2**64 - 0.5
    return (np.rint((sweep + 0.02 * noise) * 32768) / 32768).astype(np.float32)
