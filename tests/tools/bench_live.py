# SPDX-License-Identifier: Apache-2.0
"""The budget of live transcription: what re-reading a growing utterance takes, ours and stock ggml in turns.

    python -m tests.tools.bench_live [MODEL] [--windows 2,5] [--repetitions 3] [--step 1] [--no-peer] [--json]

MODEL is a model directory with a speech encoder; without it the built-in phi4-nano. Random weights will do:
the tokens are chosen here and not by the model, at 3.3 a second, and a draft is always taken. Each kind of
kernels is a process of its own, asked for one reading at a time; medians of interleaved repetitions.

A reading is that of a window which was one step shorter before: log-mel of the new frames, the encoder with
its front continued, the audio rows, the earlier words as a draft together with the prompt's end, and one
pass for each new word. "At once" is the encoder that begins from nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketphi.convert.builtin import builtin_bundle
from pocketphi.runtime import ggml_plugin
from pocketphi.runtime.continuation import Continuation
from pocketphi.runtime.embeddings import spans
from pocketphi.runtime.engine import Model
from pocketphi.runtime.growing_speech import GrowingSpeech
from pocketphi.runtime.logmel import log_mel
from pocketphi.runtime.parts import EmbedSpan, Media, Message, Span
from pocketphi.runtime.prompt import render
from pocketphi.runtime.speech_encoder import count_tokens
from pocketphi.runtime.speech_task import Task

from ..golden.speech.cases import CLIPS

RATE = 16000
TOKENS_PER_S = 3.3  # of fluent English
WINDOWS = "1,2,3,5,7,10,15,20,30"
UTTERANCES = (5.0, 15.0)
PATIENCE = 1.25  # the adaptive rule: so many times the last reading's seconds of new audio before the next
WARM_UP = 1  # rounds that do not count

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Reading:
    """Seconds of one reading's parts; `word` is one new word's pass."""

    log_mel: float
    encoder: float
    log_mel_at_once: float
    encoder_at_once: float
    front_at_once: float  # of the encoder's
    prefill: float
    draft: float
    word: float
    rest: float  # of the reading, in none of these: prompt, bookkeeping, choosing the highest logit

    def seconds(self, new_audio_s: float, *, at_once: bool = False) -> float:
        """All of it, with the words of so much new audio."""
        heard = self.log_mel_at_once + self.encoder_at_once if at_once else self.log_mel + self.encoder
        return heard + self.prefill + self.draft + self.rest + TOKENS_PER_S * new_audio_s * self.word


Cost = Callable[[float, float], float]  # seconds of a reading: of which window, how much of it is new


def voices(seconds: float) -> Float32:
    """Recorded voices, repeated as often as needed."""
    import soundfile

    parts = [soundfile.read(p, dtype="float32")[0] for p in sorted(CLIPS.glob("asr-*.flac"))]
    return np.resize(np.concatenate(parts), round(seconds * RATE))


class Rig:
    """A loaded model, and the passes of its decoder with their times."""

    def __init__(self, model: Model, longest_s: float) -> None:
        self._model, self._wave = model, voices(longest_s)
        self._passes: list[tuple[bool, float]] = []  # whether of embedded rows, and seconds
        feed_each = model._decoder.feed_each

        def timed(span: Span, n: int) -> Float32:
            begin = time.perf_counter()
            logits = feed_each(span, n)
            self._passes.append((isinstance(span, EmbedSpan), time.perf_counter() - begin))
            return logits

        model._decoder.feed_each = timed  # type: ignore[method-assign]

    def read(self, window_s: float, step_s: float) -> Reading:
        """A window that was a step shorter before."""
        before = max(0.0, window_s - step_s)
        speech, fresh = GrowingSpeech(RATE), GrowingSpeech(RATE)
        if before > 0:
            self._listen(speech, before)
        self._listen(fresh, window_s)
        n_draft, n_all = round(TOKENS_PER_S * before), round(TOKENS_PER_S * window_s)
        words = np.arange(100, 100 + max(n_all, n_draft + 1), dtype=np.int32)
        begin = time.perf_counter()
        speech.set_window(self._wave[: round(window_s * RATE)])
        turn = Message("user", Task().text, media=(Media("audio", speech),))
        prompt = spans(
            render([turn], self._model.bundle.chat_format),
            self._model.tokenizer,
            lambda media: self._model._embed(media, "speech"),
        )
        self._passes.clear()
        growing = Continuation(self._model._session, prompt, adapter="speech", draft=words[:n_draft])
        for word in words[:n_draft]:
            growing.logits.argmax()
            growing.advance(int(word))
        n_known = len(self._passes)
        for word in words[n_draft:]:
            growing.logits.argmax()
            growing.advance(int(word))
        growing.logits.argmax()
        total = time.perf_counter() - begin
        growing.close()
        heard = sum(s for is_audio, s in self._passes if is_audio)
        known = sum(s for _, s in self._passes[:n_known]) - heard
        new = [s for _, s in self._passes[n_known:]]
        return Reading(
            log_mel=speech.log_mel_s,
            encoder=speech.encoder_s,
            log_mel_at_once=fresh.log_mel_s,
            encoder_at_once=fresh.encoder_s,
            front_at_once=self._front(fresh.window),
            prefill=heard,
            draft=known,
            word=float(np.median(new)),
            rest=total - speech.log_mel_s - speech.encoder_s - heard - known - sum(new),
        )

    def _listen(self, speech: GrowingSpeech, seconds: float) -> None:
        speech.set_window(self._wave[: round(seconds * RATE)])
        self._model._embed(Media("audio", speech), "speech")

    def _front(self, window: Float32) -> float:
        assert self._model._parts.media is not None
        features = log_mel(window, RATE)
        begin = time.perf_counter()
        self._model._parts.media._speech_encoder()._subsample(features, 0, count_tokens(len(features)))
        return time.perf_counter() - begin


def serve(directory: Path, longest_s: float) -> None:
    """One kind of kernels: a line with window and step comes in, a line with the reading goes out."""
    with Model(directory) as model:
        rig = Rig(model, longest_s)
        kind = "ours" if ggml_plugin.load().active else "stock"
        print(json.dumps({"kernels": kind}), flush=True)
        for line in sys.stdin:
            print(json.dumps(asdict(rig.read(**json.loads(line)))), flush=True)


@contextmanager
def child(kernels: str, directory: Path, longest_s: float) -> Iterator[Callable[[float, float], Reading]]:
    """A process with these kernels; what is given asks it for a reading."""
    command = [sys.executable, "-m", "tests.tools.bench_live", str(directory), "--serve", str(longest_s)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"POCKETPHI_KERNELS": kernels},
    )
    assert process.stdin is not None and process.stdout is not None
    to, back = process.stdin, process.stdout

    def hear() -> dict[str, Any]:
        if not (line := back.readline()):
            raise SystemExit(f"the process with kernels {kernels} ended with status {process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(window_s: float, step_s: float) -> Reading:
        print(json.dumps({"window_s": window_s, "step_s": step_s}), file=to, flush=True)
        return Reading(**hear())

    try:
        found, wanted = hear()["kernels"], "stock" if kernels == "stock" else "ours"
        if found != wanted:
            raise SystemExit(f"the process runs {found}, expected {wanted}: is the plug-in built?")
        yield ask
    finally:
        process.kill()
        process.wait()
        to.close()
        back.close()


def measure(
    directory: Path, windows: Sequence[float], step: float, repetitions: int, kinds: Sequence[str]
) -> dict[str, list[Reading]]:
    """Medians for each kind of kernels and window; the kinds take turns at every reading."""
    taken: dict[tuple[str, float], list[Reading]] = {(k, w): [] for k in kinds for w in windows}
    with ExitStack() as stack:
        ask = {k: stack.enter_context(child(k, directory, max(windows))) for k in kinds}
        for turn in range(-WARM_UP, repetitions):
            for window in windows if turn >= 0 else (max(windows),):
                for kind in kinds:
                    reading = ask[kind](window, step)
                    if turn >= 0:
                        taken[kind, window].append(reading)
            print(f"round {turn + 1} of {repetitions}", file=sys.stderr, flush=True)
    return {k: [_median(taken[k, w]) for w in windows] for k in kinds}


def _median(readings: list[Reading]) -> Reading:
    parts = [asdict(r) for r in readings]
    return Reading(**{name: float(np.median([p[name] for p in parts])) for name in parts[0]})


def cost_of(windows: Sequence[float], readings: list[Reading], *, at_once: bool = False) -> Cost:
    """Readings of any window, straight lines between the measured ones."""

    def cost(window_s: float, new_audio_s: float) -> float:
        return float(
            np.interp(window_s, windows, [r.seconds(new_audio_s, at_once=at_once) for r in readings])
        )

    return cost


def re_read(length_s: float, step: float, cost: Cost, *, adaptive: bool) -> tuple[int, float]:
    """How often an utterance is read and what all of it takes: each step and, whole again, at the end."""
    n, at, last, total = 0, 0.0, 0.0, 0.0
    while at + (wait := max(step, PATIENCE * last) if adaptive else step) <= length_s + 1e-9:
        at += wait
        last = cost(at, wait)
        n, total = n + 1, total + last
    return n + 1, total + cost(length_s, length_s - at)


def budget(kind: str, windows: Sequence[float], readings: list[Reading], step: float) -> list[str]:
    """The table of one kind of kernels."""
    n_words = TOKENS_PER_S * step
    found = [
        f"{kind}, seconds of a reading; log-mel and encoder: continued / at once (of which its front)",
        "",
        f"| window, s | log-mel | encoder | prefill | draft | {n_words:.1f} new words | rest | all |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for window, r in zip(windows, readings, strict=True):
        found.append(
            f"| {window:g} | {r.log_mel:.4f} / {r.log_mel_at_once:.4f} "
            f"| {r.encoder:.3f} / {r.encoder_at_once:.3f} ({r.front_at_once:.3f}) | {r.prefill:.3f} "
            f"| {r.draft:.3f} | {n_words * r.word:.3f} | {r.rest:.3f} | **{r.seconds(step):.3f}** |"
        )
    return [*found, ""]


def factors(windows: Sequence[float], found: dict[str, list[Reading]], step: float) -> list[dict[str, Any]]:
    """Real-time factors: all readings of an utterance over its length."""
    rows = []
    for length in UTTERANCES:
        for adaptive in (False, True):
            for kind, readings in found.items():
                for at_once in (False, True):
                    cost = cost_of(windows, readings, at_once=at_once)
                    n, total = re_read(length, step, cost, adaptive=adaptive)
                    rule = "adaptive" if adaptive else "fixed"
                    front = "at once" if at_once else "continued"
                    row = {"utterance_s": length, "step": rule, "kernels": kind, "encoder": front}
                    rows.append({**row, "readings": n, "factor": total / length})
    return rows


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--windows", default=WINDOWS)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--step", type=float, default=1.0)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    directory = args.model or builtin_bundle()
    if args.serve:
        serve(directory, args.serve)
        return
    windows = sorted(float(w) for w in args.windows.split(","))
    kinds = ("auto",) if args.no_peer else ("auto", "stock")
    found = measure(directory, windows, args.step, args.repetitions, kinds)
    rows = factors(windows, found, args.step)
    if args.json:
        readings = {
            k: [{"window_s": w, **asdict(r)} for w, r in zip(windows, f, strict=True)]
            for k, f in found.items()
        }
        print(json.dumps({"readings": readings, "factors": rows}))
        return
    for kind, each in found.items():
        print("\n".join(budget("Our kernels" if kind == "auto" else "Stock ggml", windows, each, args.step)))
    print("| utterance, s | step | kernels | encoder | readings | real-time factor |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        *cells, factor = row.values()
        print("| " + " | ".join(str(c) for c in cells) + f" | **{factor:.2f}** |")


if __name__ == "__main__":
    main()
