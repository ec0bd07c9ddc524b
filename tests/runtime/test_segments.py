# SPDX-License-Identifier: Apache-2.0
"""The segmenter: its rules with a scripted voice, real speech and noise with the real one."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soxr

from pocketphi.runtime import audio
from pocketphi.runtime.errors import InputError
from pocketphi.runtime.parts import Float32
from pocketphi.runtime.segments import Growing, Segmenter, SegmentRules, Silence, Speech
from pocketphi.runtime.voice import VoiceDetector

ROOT = Path(__file__).parent.parent.parent
CLIPS = sorted((ROOT / "nano" / "eval" / "audio").glob("*.flac"))
REAL = {p.stem: p for p in (ROOT / "tests" / "audio").iterdir() if p.suffix in {".flac", ".mp3"}}
RATE = 16000
FRAME = 512
RULES = SegmentRules()
Pieces = list[Speech | Silence]


def run(segmenter: Segmenter, samples: Float32, sizes: Iterable[int] | None = None) -> Pieces:
    """All pieces of `samples`, pushed in blocks of `sizes` (None: 0.1 s) while they last, then in one."""
    found: Pieces = []
    at = 0
    for n in sizes if sizes is not None else iter(lambda: 1600, 0):
        if at >= len(samples):
            break
        found += segmenter.push(samples[at : at + n])
        at += n
    return found + segmenter.push(samples[at:]) + segmenter.finish()


def check_partition(pieces: Pieces, samples: Float32) -> None:
    """Every sample is in one piece, in order, and speech is what went in, bit for bit."""
    assert [p.start for p in pieces] == [0, *[p.stop for p in pieces[:-1]]][: len(pieces)]
    assert (pieces[-1].stop if pieces else 0) == len(samples)
    for piece in pieces:
        assert piece.stop > piece.start
        if isinstance(piece, Speech):
            assert piece.samples.dtype == np.float32
            assert piece.samples.tobytes() == samples[piece.start : piece.stop].tobytes()
            assert 0.025 * piece.sample_rate <= len(piece.samples) <= 30 * piece.sample_rate


def spoken(pieces: Pieces) -> list[Speech]:
    return [p for p in pieces if isinstance(p, Speech)]


def spans(pieces: Pieces, rate: int = RATE) -> list[tuple[float, float]]:
    """Speech, in seconds to two places."""
    return [(round(p.start / rate, 2), round(p.stop / rate, 2)) for p in spoken(pieces)]


def outline(pieces: Pieces) -> list[tuple[str, int, int]]:
    return [(type(p).__name__, p.start, p.stop) for p in pieces]


class Script:
    """A voice that says what it is told of each frame, and 0 afterwards."""

    def __init__(self, *parts: tuple[int, float]) -> None:
        self._said = iter([p for n, p in parts for _ in range(n)])

    def __call__(self, frame: Float32) -> float:
        assert frame.shape == (FRAME,) and frame.dtype == np.float32
        return next(self._said, 0.0)


def scripted(*parts: tuple[int, float], rules: SegmentRules = RULES, extra: int = 0) -> Pieces:
    """Pieces of noise in which each frame is as likely speech as the parts (frames, probability) say."""
    samples = noise(sum(n for n, _ in parts) * FRAME + extra)
    pieces = run(Segmenter(RATE, rules, Script(*parts)), samples)
    check_partition(pieces, samples)
    return pieces


def noise(n: int, seed: int = 1) -> Float32:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, n).astype(np.float32)


# --- the rules, with a scripted voice ---


def test_an_utterance_has_its_pre_roll_and_its_tail() -> None:
    found = scripted((50, 0), (20, 0.9), (60, 0))
    start, stop = 50 * FRAME - 4800, 70 * FRAME + 6400
    assert outline(found) == [
        ("Silence", 0, start),
        ("Speech", start, stop),
        ("Silence", stop, 130 * FRAME),
    ]


@pytest.mark.parametrize(("parts", "frames"), [
    (((5, 0.9), (40, 0)), None),  # five frames are not enough
    (((6, 0.9), (40, 0)), (50, 56)),
    (((3, 0.9), (2, 0), (3, 0.9), (40, 0)), (50, 58)),  # six of eight
    (((3, 0.9), (3, 0), (3, 0.9), (40, 0)), None),  # six of nine
    (((20, 0.49), (40, 0)), None),
    (((6, 0.5), (5, 0.35), (40, 0.34)), (50, 61)),  # what has begun goes on at less
    (((1, 0.9), (5, 0), (6, 0.9), (40, 0)), (50, 62)),  # it may have begun up to six frames before
    (((1, 0.9), (6, 0), (6, 0.9), (40, 0)), (57, 63)),
    (((5, 0.3), (5, 0.29), (6, 0.9), (40, 0)), (50, 66)),
    (((40, 0.3), (6, 0.9), (40, 0)), (72, 96)),  # but no more than 24
])  # fmt: skip
def test_when_speech_begins_and_ends(
    parts: tuple[tuple[int, float], ...], frames: tuple[int, int] | None
) -> None:
    found = spoken(scripted((50, 0), *parts))
    assert [(p.start + 4800, p.stop - 6400) for p in found] == (
        [(frames[0] * FRAME, frames[1] * FRAME)] if frames else []
    )


def test_speech_at_once_and_to_the_end() -> None:
    assert outline(scripted((30, 0.9), extra=100)) == [("Speech", 0, 30 * FRAME + 100)]
    # The tail reaches into the last part of a frame, or ends before it.
    assert outline(scripted((30, 0.9), (5, 0), extra=100)) == [("Speech", 0, 35 * FRAME + 100)]
    end = 30 * FRAME + 6400
    assert outline(scripted((30, 0.9), (14, 0), extra=100)) == [
        ("Speech", 0, end),
        ("Silence", end, 44 * FRAME + 100),
    ]


def test_an_empty_stream_and_one_shorter_than_a_frame() -> None:
    assert scripted() == []
    assert outline(scripted(extra=511)) == [("Silence", 0, 511)]
    segmenter = Segmenter(RATE, voice=Script())
    assert segmenter.push(noise(0)) == [] and segmenter.finish() == [] and segmenter.finish() == []


def test_the_pre_roll_never_takes_from_the_piece_before() -> None:
    rules = SegmentRules(pause_s=0.2, tail_s=0.2)  # the pause is 7 frames, 24 ms longer than the tail
    first, second = spoken(scripted((10, 0.9), (7, 0), (10, 0.9), (30, 0), rules=rules))
    assert first.stop == second.start == 10 * FRAME + 3200


@pytest.mark.parametrize(("pause_s", "n"), [(0.2, 3), (0.5, 2), (1.0, 1)])
def test_the_pause_is_settable(pause_s: float, n: int) -> None:
    parts = ((10, 0.9), (10, 0), (10, 0.9), (20, 0), (10, 0.9), (40, 0))  # pauses of 0.32 and 0.64 s
    assert len(spoken(scripted(*parts, rules=SegmentRules(pause_s=pause_s)))) == n


def test_a_long_silence_is_reported_as_it_goes() -> None:
    segmenter = Segmenter(RATE, SegmentRules(silence_s=2), Script())
    lengths, held = [], []
    for i in range(1, 301):  # 30 s in blocks of 0.1 s
        for piece in segmenter.push(np.zeros(1600, np.float32)):
            lengths.append(piece.stop - piece.start)
        held.append(i * 1600 - sum(lengths))
    assert lengths == [32000] * 14
    # At most a piece, 24 frames, the pre-roll and part of a frame, rounded up to the block that shows it.
    assert max(held) < 32000 + 24 * FRAME + 4800 + FRAME + 1600
    (last,) = segmenter.finish()
    assert (last.start, last.stop) == (14 * 32000, 480000)


@pytest.mark.parametrize(("name", "value"), [
    ("pause_s", 0.19), ("pause_s", 10.1), ("pause_s", float("nan")), ("pre_roll_s", -0.1), ("tail_s", 0.0),
    ("tail_s", float("inf")), ("max_s", 2.9), ("max_s", 41), ("silence_s", 0.0),
])  # fmt: skip
def test_rules_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"^{name} is .* s, expected .* to "):
        replace(RULES, **{name: value})


def test_other_rates_are_refused() -> None:
    with pytest.raises(InputError, match="44100 Hz, expected 16000 or 8000"):
        Segmenter(44100)


# --- what is being said ---


def windows(
    segmenter: Segmenter, samples: Float32, n: int = FRAME
) -> Iterator[tuple[Pieces, Growing | None]]:
    for i in range(0, len(samples), n):
        yield segmenter.push(samples[i : i + n]), segmenter.open


def test_the_last_window_is_the_utterance() -> None:
    samples = noise(150 * FRAME)
    parts = ((20, 0), (10, 0.9), (5, 0), (15, 0.9), (100, 0))
    segmenter = Segmenter(RATE, RULES, Script(*parts))
    last: Growing | None = None
    copies: list[tuple[Growing, bytes]] = []
    for k, (pieces, growing) in enumerate(windows(segmenter, samples), 1):
        if growing is not None:
            assert growing.start == 20 * FRAME - 4800
            seen, end = k * FRAME, (50 if k >= 36 else 30) * FRAME + 6400
            assert len(growing.window) == min(seen if k > 36 or k <= 50 else end, end) - growing.start
            assert growing.pausing == (k * FRAME >= end)
            copies.append((growing, growing.window.tobytes()))
            last = growing
        for piece in spoken(pieces):
            assert last is not None and last.pausing and growing is None
            assert last.start == piece.start and last.window.tobytes() == piece.samples.tobytes()
            break
    assert last is not None and not last.window.flags.writeable
    assert all(g.window.tobytes() == held for g, held in copies), "a window changed after it was given out"


def test_a_pause_is_over_when_speech_goes_on() -> None:
    segmenter = Segmenter(RATE, RULES, Script((10, 0.9), (15, 0), (5, 0.9)))
    states = [g is not None and g.pausing for _, g in windows(segmenter, noise(30 * FRAME))]
    # The tail is 12.5 frames, the pause 21.9.
    assert states == [False] * 22 + [True] * 3 + [False] * 5


# --- the forced cut ---


def test_a_cut_falls_into_the_quietest_place() -> None:
    samples = noise(75 * RATE)
    quiet = [slice(int(a * RATE), int((a + 0.4) * RATE)) for a in (11.0, 24.0, 26.0, 47.5)]
    for place, level in zip(quiet, (0.0, 0.01, 0.3, 0.01), strict=True):  # the first one comes too early
        samples[place] *= level
    segmenter = Segmenter(RATE, RULES, lambda frame: 0.9)
    first, second, third = (pieces := run(segmenter, samples))
    check_partition(pieces, samples)
    assert quiet[1].start < first.stop < quiet[1].stop
    assert quiet[3].start < second.stop < quiet[3].stop
    assert second.stop == third.start and third.stop == len(samples)
    assert spoken(pieces) == pieces


def test_what_follows_a_cut_is_still_the_utterance() -> None:
    n = 31 * RATE // FRAME  # 968 frames
    segmenter = Segmenter(RATE, RULES, Script((n, 0.9), (40, 0)))
    opened = [g for _, g in windows(segmenter, noise((n + 40) * FRAME))]
    assert all(g is not None for g in opened[5 : n + 10])
    assert all(len(g.window) <= 30 * RATE for g in opened if g is not None)


@pytest.mark.parametrize("silent_frames", range(1, 22, 4))
def test_a_pause_at_the_limit_leaves_no_crumb(silent_frames: int) -> None:
    """Speech ends just before 30 s: the quietest place is in the pause, and nothing is said after it."""
    samples = noise(40 * RATE)
    until = 938 - silent_frames  # 938 frames are the first that reach 30 s
    samples[until * FRAME :] *= 0.001
    pieces = run(Segmenter(RATE, RULES, Script((until, 0.9))), samples)
    check_partition(pieces, samples)
    if len(speech := spoken(pieces)) == 1:  # the cut would have come after the last word
        assert speech[0].stop == min(until * FRAME + 6400, 30 * RATE)
    else:
        assert speech[1].start < until * FRAME and speech[1].stop == until * FRAME + 6400


def test_any_script_partitions() -> None:
    rng = np.random.default_rng(5)
    for seed in range(12):
        parts = [(int(rng.integers(1, 300)), float(rng.choice([0, 0.4, 0.6, 1]))) for _ in range(12)]
        rules = SegmentRules(
            pause_s=rng.uniform(0.2, 2), tail_s=rng.uniform(0.05, 3), pre_roll_s=rng.uniform(0, 2),
            max_s=rng.uniform(3, 30), silence_s=rng.uniform(1, 20),
        )  # fmt: skip
        samples = noise(sum(n for n, _ in parts) * FRAME + int(rng.integers(0, FRAME)), seed)
        pieces = run(Segmenter(RATE, rules, Script(*parts)), samples)
        check_partition(pieces, samples)
        other = run(Segmenter(RATE, rules, Script(*parts)), samples, rng.integers(1, 100_000, 10_000))
        assert outline(other) == outline(pieces)
        assert all(len(p.samples) <= rules.max_s * RATE + 1 for p in spoken(pieces))


# --- real speech ---


@pytest.fixture(scope="module")
def stream() -> Float32:
    """Evaluation clips with silences of 0.1 to 3 s between them."""
    rng = np.random.default_rng(2)
    parts: list[Float32] = []
    for path in CLIPS[::6]:
        parts += [np.zeros(int(rng.uniform(0.1, 3) * RATE), np.float32), audio.load(path).samples]
    return np.concatenate([*parts, np.zeros(300, np.float32)])


def test_the_blocks_do_not_matter(stream: Float32) -> None:
    whole = run(Segmenter(RATE), stream, [])
    check_partition(whole, stream)
    assert len(spoken(whole)) > 5
    rng = np.random.default_rng(4)
    for _ in range(2):
        assert outline(run(Segmenter(RATE), stream, rng.integers(1, 5001, len(stream)))) == outline(whole)


def test_first_and_last_syllables_are_kept() -> None:
    """A clip in silence is one utterance or more: all that the detector hears, and what is around it."""
    silence = np.zeros(RATE, np.float32)
    for path in CLIPS[::3]:
        samples = np.concatenate([silence, audio.load(path).samples, silence])
        detector = VoiceDetector(RATE)
        heard = np.flatnonzero(
            [detector(samples[i : i + FRAME]) >= 0.5 for i in range(0, len(samples) - FRAME + 1, FRAME)]
        )
        speech = spoken(run(Segmenter(RATE), samples))
        assert speech, path.name
        assert speech[0].start <= heard[0] * FRAME - 4800, path.name
        assert speech[-1].stop >= min((heard[-1] + 1) * FRAME + 6400, len(samples)), path.name
        assert all(b.start - a.stop < 0.7 * RATE for a, b in pairwise(speech)), path.name


def limited(clip: Float32) -> Float32:
    """What a headset's gain control and limiter make of it: every 20 ms equally loud, the peaks cut off."""
    loudness = np.sqrt(np.convolve(clip**2, np.ones(320) / 320, "same")) + 1e-3
    return np.clip(0.3 * clip / loudness, -0.5, 0.5).astype(np.float32)


@pytest.mark.parametrize("treat", [lambda clip: clip, limited], ids=["as it is", "limited"])
def test_every_clip_of_a_long_stream_is_heard(treat: Callable[[Float32], Float32]) -> None:
    """Silero's memory of what came before must not make it deaf: without forgetting, 6 of 70 are lost."""
    parts: list[Float32] = []
    said: list[tuple[int, int]] = []
    at = 0
    for path in CLIPS:
        clip = treat(audio.load(path).samples)
        parts += [np.zeros(5 * RATE, np.float32), clip]
        said.append((at + 5 * RATE, at + 5 * RATE + len(clip)))
        at = said[-1][1]
    pieces = spoken(run(Segmenter(RATE), np.concatenate([*parts, np.zeros(RATE, np.float32)])))
    for start, stop in said:
        assert any(p.start < stop and p.stop > start for p in pieces), start / RATE


def test_a_speech_is_cut_at_its_pauses() -> None:
    """Kennedy, 1961."""
    samples = audio.load(REAL["jfk"]).samples
    pieces = run(Segmenter(RATE), samples)
    check_partition(pieces, samples)
    first, second, third = spans(pieces)
    assert first[0] < 0.4 and 2.2 < first[1] < 2.8  # "And so, my fellow Americans"
    assert 3.2 < second[0] < 3.8 and 4.2 < second[1] < 5  # "ask not"
    assert 4.8 < third[0] < 5.4 and third[1] == 11  # the rest, to the end of the file
    shorter = run(Segmenter(RATE, SegmentRules(pause_s=0.3)), samples)
    check_partition(shorter, samples)
    assert len(spans(shorter)) == 4  # "…what your country can do for you | ask what you can do…"


def test_a_reader_is_cut_at_her_pauses() -> None:
    samples = audio.load(REAL["1272-141231-0002"]).samples
    pieces = run(Segmenter(RATE), samples)
    check_partition(pieces, samples)
    first, second = spans(pieces)
    assert first[0] < 0.6 and 3 < first[1] <= second[0] < 3.7


def test_telephone_speech_is_cut_in_the_same_places() -> None:
    wide = audio.load(REAL["jfk"]).samples
    samples = soxr.resample(wide, RATE, 8000, quality="VHQ").astype(np.float32)
    pieces = run(Segmenter(8000), samples)
    check_partition(pieces, samples)
    found, expected = spans(pieces, 8000), spans(run(Segmenter(RATE), wide))
    assert len(found) == len(expected)
    # Soft beginnings and ends differ without the upper half of the band, by less than a pause.
    assert np.abs(np.array(found) - np.array(expected)).max() < RULES.pause_s


# --- what is no speech ---


def harmonics(hz: float, seconds: float, n: int, fall: float = 1.0) -> Float32:
    t = np.arange(int(seconds * RATE)) / RATE
    return np.asarray(sum(np.sin(2 * np.pi * hz * k * t + k) / k**fall for k in range(1, n + 1)), np.float32)


def pink(rng: np.random.Generator) -> Float32:
    spectrum = np.fft.rfft(rng.normal(size=60 * RATE))
    return np.fft.irfft(spectrum / np.sqrt(np.maximum(np.arange(len(spectrum)), 1))).astype(np.float32)


def arpeggio(rng: np.random.Generator, octave: float = 1.0) -> Float32:
    """Plucked chords, six notes a second."""
    found = np.zeros(61 * RATE, np.float32)
    chords = ((220, 277.2, 329.6), (196, 246.9, 293.7), (174.6, 220, 261.6), (261.6, 329.6, 392))
    decay = np.exp(-4 * np.arange(RATE) / RATE).astype(np.float32)
    for i, at in enumerate(range(0, 60 * RATE, RATE // 6)):
        hz = octave * chords[i // 12 % 4][i % 3] * (1 + i // 3 % 2)
        found[at : at + RATE] += decay * harmonics(hz, 1, 7, 1.3)
    return found[: 60 * RATE]


def tremolo(rng: np.random.Generator) -> Float32:
    chord = sum(harmonics(hz, 60, 6) for hz in (220.0, 277.2, 329.6))
    return np.asarray(chord * (1 + 0.5 * np.sin(2 * np.pi * 5 * np.arange(60 * RATE) / RATE)), np.float32)


def drums(rng: np.random.Generator) -> Float32:
    t = np.arange(RATE // 4) / RATE
    kick = np.sin(2 * np.pi * (60 + 60 * np.exp(-30 * t)) * t) * np.exp(-12 * t)
    hits = [0.5 * rng.normal(size=len(t)) * np.exp(-40 * t) if i % 2 else kick for i in range(240)]
    return np.concatenate(hits).astype(np.float32)


SOUNDS: dict[str, Callable[[np.random.Generator], Float32]] = {
    "silence": lambda rng: np.zeros(60 * RATE, np.float32),
    "white": lambda rng: rng.normal(size=60 * RATE).astype(np.float32),
    "pink": pink,
    "hum-50": lambda rng: harmonics(50, 60, 19),
    "hum-60": lambda rng: harmonics(60, 60, 29, 0.5),
    "hum-120": lambda rng: harmonics(120, 60, 4),
    "arpeggio": arpeggio,
    "low-arpeggio": lambda rng: arpeggio(rng, 0.5),
    "tremolo": tremolo,
    "drums": drums,
    "band": lambda rng: arpeggio(rng) + drums(rng),
}


@pytest.mark.parametrize("name", SOUNDS)
def test_a_minute_without_a_voice_is_silence(name: str) -> None:
    made = SOUNDS[name](np.random.default_rng(6))
    samples = made * np.float32(0.8 / max(float(np.abs(made).max()), 1e-9))
    samples[30 * RATE :] *= np.float32(0.2)  # loud, then soft
    pieces = run(Segmenter(RATE), samples)
    assert spans(pieces) == []
    check_partition(pieces, samples)


# --- an hour ---


def test_memory_is_flat_over_an_hour() -> None:
    """Speech without a pause for half an hour, then utterances and silences."""
    block = noise(RATE)
    calls = 0

    def voice(frame: Float32) -> float:
        nonlocal calls
        calls += 1
        return 0.9 if calls * FRAME < 1800 * RATE or calls // 100 % 3 else 0.0

    segmenter = Segmenter(RATE, RULES, voice)
    stop = 0
    tracemalloc.start()
    try:
        for _ in range(3600):
            for piece in segmenter.push(block):
                assert piece.start == stop
                stop = piece.stop
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    for piece in segmenter.finish():
        assert piece.start == stop
        stop = piece.stop
    assert stop == 3600 * RATE
    # 30 s are 1.9 MB: a buffer of at most twice that and a block, while it moves the one before; a piece; and
    # for the cut the energies of 10 s, squared and summed in float64 (four arrays of 1.3 MB).
    assert peak < (2 + 1 + 1) * 4 * 31 * RATE + 4 * 8 * 10 * RATE
