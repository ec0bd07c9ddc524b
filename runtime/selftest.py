# SPDX-License-Identifier: Apache-2.0
"""A live session made of clips, silences and noise, whose words are known: does this machine keep up?

Time goes by as it would with a microphone, but for the waiting: delays are real, the session takes only as
long as the work in it.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import audio
from .clock import SkippingClock
from .errors import InputError
from .files import read_text
from .live import Listener, LiveOptions
from .live_events import LiveEvent
from .parts import Float32
from .reader import Reader
from .sources import Paced
from .transcribe import transcribe

_RATE = audio.SAMPLE_RATE
_BLOCK = _RATE // 10
_PAUSES_S = (1.0, 4.0)  # between clips: longer than the pause that ends an utterance
_NOISE_EVERY, _NOISE_S = 12, 8.0  # a burst of noise alone after so many clips
_ROOM = 1e-4  # RMS of the noise under everything: -80 dBFS, a quiet room
_LIST_MAX_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Script:
    """What is played, and what is said in it."""

    clips: Sequence[tuple[Path, str]]
    seconds: float
    seed: int = 0

    def blocks(self) -> Iterator[Float32]:
        """float32 blocks of 0.1 s at 16 kHz, the same each time: clips in a shuffled order, pauses, noise."""
        rng = np.random.default_rng(self.seed)
        rest = np.zeros(0, np.float32)
        for part, _ in self._parts():
            rest = np.concatenate([rest, part + rng.normal(0.0, _ROOM, len(part)).astype(np.float32)])
            n = len(rest) // _BLOCK * _BLOCK
            yield from rest[:n].reshape(-1, _BLOCK)
            rest = rest[n:]
        yield rest

    def references(self) -> list[str]:
        """What is said, in order."""
        return [said for _, said in self._parts() if said]

    def _parts(self) -> Iterator[tuple[Float32, str]]:
        """Samples and what is said in them; `seconds` of it, the last clip whole."""
        order = np.random.default_rng(self.seed + 1)
        n = played = 0
        while n < self.seconds * _RATE:
            path, said = self.clips[int(order.integers(len(self.clips)))]
            pause = np.zeros(int(order.uniform(*_PAUSES_S) * _RATE), np.float32)
            clip = audio.load(path)
            if clip.sample_rate != _RATE:
                raise InputError(f"{path}: is at {clip.sample_rate} Hz, expected {_RATE}")
            played += 1
            n += len(pause) + len(clip.samples)
            yield pause, ""
            yield clip.samples, said
            if played % _NOISE_EVERY == 0:
                noise = order.normal(0.0, 0.05, int(_NOISE_S * _RATE)).astype(np.float32)
                n += len(noise)
                yield noise, ""
        yield np.zeros(_RATE, np.float32), ""


def script(folder: Path, seconds: float, seed: int = 0) -> Script:
    """The session of an evaluation set in phi4-nano's form.

    Args:
        folder: with `speech.jsonl`; its items of the task "asr" are played.
        seconds: how long, at least; one clip is always played.
        seed: another one is another session.

    Raises:
        InputError: no such set, or nothing to play in it.
    """
    path = folder / "speech.jsonl"
    try:
        rows = [json.loads(line) for line in read_text(path, max_bytes=_LIST_MAX_BYTES).splitlines()]
        clips = [(folder / row["audio"], str(row["reference"])) for row in rows if row["task"] == "asr"]
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{path}: is not an evaluation set: expected lines of task, audio, reference"
        ) from None
    if not clips:
        raise InputError(f"{path}: has no item of the task asr")
    return Script(clips, seconds, seed)


class SelfTest:
    """Iterate for the session's events; `figures` is true afterwards."""

    def __init__(self, reader: Reader, session: Script, options: LiveOptions) -> None:
        """
        Args:
            reader: of the model that listens.
            session: what is played.
            options: as for a microphone.
        """
        self._reader, self._session, self._options = reader, session, options
        clock = SkippingClock()
        self._source = Paced(audio.Sound("selftest", _RATE, session.blocks()), clock)
        self.listener = Listener(reader, self._source, options, clock)
        self._finals: list[str] = []

    def __iter__(self) -> Iterator[LiveEvent]:
        with self._source:
            for event in self.listener:
                if event.type == "final":
                    self._finals.append(event.text)
                yield event

    def figures(self) -> dict[str, Any]:
        """The summary, the word error rate, and the same samples transcribed as a file for comparison."""
        played = 0

        def counted() -> Iterator[Float32]:
            nonlocal played
            for block in self._session.blocks():
                played += len(block)
                yield block

        sound = audio.Sound("selftest", _RATE, counted())
        offline = [s.text for s in transcribe(self._reader, sound, self._options.rules)]
        wanted = words(" ".join(self._session.references()))

        def wer(texts: Sequence[str]) -> float:
            return round(100 * edits(words(" ".join(texts)), wanted) / len(wanted), 2)

        different = sum(a != b for a, b in zip(self._finals, offline, strict=False))
        return self.listener.summary.to_object() | {
            "dropped_samples": played - self.listener.summary.n_covered,  # of all that was played
            "clips": len(self._session.references()),
            "wer": wer(self._finals),
            "offline_wer": wer(offline),
            "finals_unlike_offline": different + abs(len(self._finals) - len(offline)),
        }


def words(text: str) -> list[str]:
    """Lower case, without punctuation."""
    return text.lower().translate(str.maketrans("", "", string.punctuation)).split()


def edits(found: Sequence[str], wanted: Sequence[str]) -> int:
    """Word edit distance (Levenshtein)."""
    row = list(range(len(wanted) + 1))
    for i, a in enumerate(found, 1):
        last, row[0] = row[0], i
        for j, b in enumerate(wanted, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    return row[-1]
