# SPDX-License-Identifier: Apache-2.0
"""How fast a model directory is here: text, pictures and speech of fixed sizes, with made-up content."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from .engine import Model
from .errors import InputError
from .parts import BenchRow, Media, Message, Reply
from .report import peak_rss
from .sampler import Sampling

_SPEECH_RATE = 16000
_ENDLESS = 'root ::= "x" root'  # an answer of exactly the length asked for


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure."""

    name: str
    media: tuple[Media, ...] = ()
    text: str = "Say x."


def cases(model: Model) -> list[Case]:
    """What this model can be measured with: text always, pictures and speech where it has the encoder."""
    found = [Case("text, short"), Case("text, long", text="one " * 500)]
    if "vision" in model.bundle.encoders:
        found += [
            Case(f"image {w}×{h}", (Media("image", _picture(w, h)),)) for w, h in ((448, 448), (1344, 896))
        ]
    if "speech" in model.bundle.encoders:
        found += [Case(f"speech {s} s", (Media("audio", (_noise(s), _SPEECH_RATE)),)) for s in (10, 30)]
    return found


def run(
    open_model: Callable[[], Model], *, repetitions: int, predict: int, only: str | None = None
) -> Iterator[BenchRow]:
    """Measure every case, each repetition on a fresh cache and fresh encodings.

    Args:
        open_model: called once; closed at the end.
        repetitions: of each case; the median counts.
        predict: tokens to write after each prompt, at least 2.
        only: names must contain this.
    """
    with open_model() as model:
        sampling = Sampling(grammar=_ENDLESS)
        chosen = [case for case in cases(model) if only is None or only in case.name]
        if not chosen:
            raise InputError(f"no case has {str(only)[:40]!r} in its name")
        for case in chosen:
            replies: list[Reply] = []
            warm_up = Message("user", "Say x.", media=case.media)
            model.chat([warm_up], max_tokens=2, sampling=sampling)  # loads what the case needs
            for _ in range(repetitions):
                model.forget()
                message = Message("user", case.text, media=case.media)
                replies.append(model.chat([message], max_tokens=predict, sampling=sampling))
            yield _row(case.name, replies)


def _row(name: str, replies: list[Reply]) -> BenchRow:
    timings = [r.timings for r in replies]

    def middle(value: Callable[[int], float]) -> float:
        return statistics.median(value(i) for i in range(len(timings)))

    return BenchRow(
        name=name,
        prompt_n=timings[0].prompt_n,
        encode_ms=middle(lambda i: timings[i].encode_ms),
        prompt_ms=middle(lambda i: timings[i].prompt_ms),
        prompt_per_second=middle(lambda i: timings[i].prompt_per_second),
        ttft_ms=middle(lambda i: timings[i].ttft_ms),
        predicted_per_second=middle(lambda i: timings[i].predicted_per_second),
        peak_rss_bytes=peak_rss(),
    )


def _picture(width: int, height: int) -> np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)


def _noise(seconds: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.random.default_rng(1).normal(0, 0.1, seconds * _SPEECH_RATE).astype(np.float32)
