# SPDX-License-Identifier: Apache-2.0
"""An utterance that grows against the same samples encoded at once: equal in every bit, for less work."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pocketphi.runtime import audio, kernels
from pocketphi.runtime import bundle as bundles
from pocketphi.runtime.engine import Model
from pocketphi.runtime.errors import InputError
from pocketphi.runtime.growing_speech import GrowingSpeech
from pocketphi.runtime.logmel import log_mel
from pocketphi.runtime.media import MediaEncoder
from pocketphi.runtime.parts import AudioProjector, EmbedSpan, Media, Message, TokenSpan
from pocketphi.runtime.session import Session

from .. import scoring
from ..conftest import Converted, load_decoder

Float32 = npt.NDArray[np.float32]
CLIP = scoring.EVAL / "audio" / "asr-000.flac"
SAID = "How many legs does a rooster have?"
RATES = (16000, 8000)
PIECE = 256  # frames: what the front takes at a time
QUANTS = ("fp32", "int8")


@functools.cache
def voice(rate: int) -> Float32:
    """41 s of recorded voices."""
    found = np.concatenate(
        [audio.load(p).samples for p in sorted((scoring.EVAL / "audio").glob("asr-*.flac"))]
    )
    return np.resize(found, 41 * 16000)[:: 16000 // rate].copy()


@functools.cache
def n_samples(rate: int, n_frames: int, more: int = 0) -> int:
    """So many frames' samples, and up to one less than a frame needs."""
    window, hop = kernels.FRAME_SAMPLES[rate]
    return window + (n_frames - 1) * hop + more % hop


@pytest.fixture(scope="module", params=QUANTS)
def media(request: pytest.FixtureRequest, converted: Converted) -> MediaEncoder:
    directory = converted("phi4-nano", "F32", lora_quant="F32", encoders=request.param)
    return MediaEncoder(bundles.load(directory), n_threads=2)


def grown(media: MediaEncoder, speech: GrowingSpeech, projector: AudioProjector = "speech") -> EmbedSpan:
    return media.embed(Media("audio", speech), projector)


def at_once(media: MediaEncoder, speech: GrowingSpeech, projector: AudioProjector = "speech") -> Float32:
    """The rows of a clip of the window's samples: the path that a file takes."""
    media.forget()
    return media.embed(Media("audio", (speech.window.copy(), speech.sample_rate)), projector).rows


def check(media: MediaEncoder, speech: GrowingSpeech) -> None:
    rows = grown(media, speech).rows
    want = at_once(media, speech)
    assert rows.dtype == want.dtype and rows.shape == want.shape
    assert rows.tobytes() == want.tobytes(), len(speech.window)


def test_every_remainder_while_it_grows(media: MediaEncoder) -> None:
    """Steps of 3 frames, which is prime to 256: up to 768 frames each place in a piece comes once."""
    speech = GrowingSpeech(16000)
    for i in range(256):
        speech.set_window(voice(16000)[: n_samples(16000, 1 + 3 * i, 13 * i)])
        check(media, speech)


@pytest.mark.parametrize("rate", RATES)
def test_around_the_ends_of_pieces(media: MediaEncoder, rate: int) -> None:
    """Up over each edge, and down again."""
    speech = GrowingSpeech(rate)
    edges = [PIECE * k + d for k in (1, 2, 15) for d in (-9, -8, -7, -1, 0, 1, 7, 8, 9)]
    for n_frames in (*edges, 3992, 3993, 3998, *reversed(edges)):
        speech.set_window(voice(rate)[: n_samples(rate, n_frames)])
        check(media, speech)


@pytest.mark.parametrize("rate", RATES)
def test_up_and_down_at_random(media: MediaEncoder, rate: int) -> None:
    """Some windows are never read, and what a cut took away comes back as other samples."""
    rng = np.random.default_rng(rate)
    speech = GrowingSpeech(rate)
    wave = voice(rate)
    for _ in range(40):
        length = int(rng.integers(rate // 40, 20 * rate))
        if rng.random() < 0.4:  # the utterance is cut, and goes on differently
            kept = min(len(speech.window), length)
            wave = np.concatenate(
                [speech.window[:kept], np.roll(voice(rate), int(rng.integers(10**6)))[kept:]]
            )
            speech.set_window(wave[:kept])
        speech.set_window(wave[:length])
        if rng.random() < 0.7:
            check(media, speech)


def test_the_longest_window(media: MediaEncoder) -> None:
    for rate in RATES:
        speech = GrowingSpeech(rate)
        for seconds in (30, 40):
            speech.set_window(voice(rate)[: seconds * rate])
            check(media, speech)
        with pytest.raises(
            InputError, match=r"an utterance of 40\.0 s cannot be read, expected at most 40 s"
        ):
            speech.set_window(voice(rate)[: 40 * rate + 1])
        assert len(speech.window) == 40 * rate
        check(media, speech)


def test_frames_are_the_same_in_any_company() -> None:
    """What keeping frames stands on: the native kernel rounds a frame alike whatever is beside it."""
    for rate in RATES:
        _, hop = kernels.FRAME_SAMPLES[rate]
        wave = voice(rate)[: n_samples(rate, 40)]
        whole = log_mel(wave, rate)
        for first in range(9):
            for n_frames in range(1, 32):
                part = log_mel(wave[first * hop :][: n_samples(rate, n_frames)], rate)
                assert part.tobytes() == whole[first : first + n_frames].tobytes()


def test_numpys_frames_are_made_anew(media: MediaEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the native library all frames come from one matrix product again, as at once."""
    monkeypatch.setattr(kernels, "is_available", lambda: False)
    speech = GrowingSpeech(16000)
    for seconds in (1.0, 3.3, 3.31, 2.0, 6.0):
        speech.set_window(voice(16000)[: int(16000 * seconds)])
        check(media, speech)


@pytest.fixture
def work(media: MediaEncoder, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """What the log-mel kernel, the front and the trunk are given from here on: frames or tokens."""
    encoder = media._speech_encoder()
    found: dict[str, list[int]] = {"log-mel": [], "front": [], "trunk": []}

    def watch(name: str, run: Callable[..., Float32], length: Callable[..., int]) -> Callable[..., Float32]:
        def watched(*args: Any, **named: Any) -> Float32:
            found[name].append(length(*args, **named))
            return run(*args, **named)

        return watched

    monkeypatch.setattr(
        encoder._front, "run", watch("front", encoder._front.run, lambda features: features.shape[1])
    )
    monkeypatch.setattr(encoder._trunk, "run", watch("trunk", encoder._trunk.run, lambda tokens: len(tokens)))
    frames = watch("log-mel", kernels.log_mel, lambda wave, rate: kernels.log_mel_frames(len(wave), rate))
    monkeypatch.setattr(kernels, "log_mel", frames)
    return found


def test_only_what_is_new_is_made(media: MediaEncoder, work: dict[str, list[int]]) -> None:
    """998 frames are three pieces and 230 frames; 100 more need the last piece again, and one after it. A cut
    to 300 leaves one piece, whether it is read or not."""
    speech = GrowingSpeech(16000)
    for n_frames in (998, 1098, 1098, 600, 300, 998):
        speech.set_window(voice(16000)[: n_samples(16000, n_frames)])
        if n_frames != 300:
            grown(media, speech)
    assert work == {
        "log-mel": [998, 100, 698],
        "front": [256, 264, 264, 238, 264, 82, 96, 264, 264, 238],
        "trunk": [125, 138, 75, 125],
    }


def test_a_window_read_twice_is_encoded_once(media: MediaEncoder, work: dict[str, list[int]]) -> None:
    """Setting the same samples changes nothing, and another projector takes the trunk's rows as they are."""
    speech = GrowingSpeech(16000)
    speech.set_window(voice(16000)[:16000])
    first = grown(media, speech)
    assert speech.log_mel_s > 0 and speech.encoder_s > 0
    speech.set_window(voice(16000)[:16000].copy())
    again = grown(media, speech)
    assert again.rows is first.rows and again.key == first.key
    assert (speech.log_mel_s, speech.encoder_s) == (0, 0)
    beside = grown(media, speech, "vision")
    assert beside.key != first.key
    assert len(work["trunk"]) == 1
    assert beside.rows.tobytes() == at_once(media, speech, "vision").tobytes()


def test_a_key_is_never_used_for_other_rows(media: MediaEncoder) -> None:
    """A longer window, a cut one, one that grew differently after a cut, another utterance."""
    wave = voice(16000)
    speech, other = GrowingSpeech(16000), GrowingSpeech(16000)
    keys = []
    for samples in (
        wave[:16000],
        wave[:32000],
        wave[:16000],
        np.concatenate([wave[:16000], wave[:16000]]),
        wave[9:32009],
    ):
        speech.set_window(samples)
        keys.append(grown(media, speech).key)
    other.set_window(speech.window)
    keys.append(grown(media, other).key)
    assert len({*keys}) == len(keys)


def test_other_samples_are_another_utterance(media: MediaEncoder) -> None:
    speech = GrowingSpeech(16000)
    speech.set_window(voice(16000)[:90000])
    grown(media, speech)
    speech.set_window(voice(16000)[7:100000])
    check(media, speech)


def test_the_callers_buffer_may_be_used_again(media: MediaEncoder) -> None:
    speech = GrowingSpeech(16000)
    buffer = voice(16000)[:40000].copy()
    speech.set_window(buffer[:20000])
    grown(media, speech)
    buffer[:] = 0
    assert speech.window.tobytes() == voice(16000)[:20000].tobytes()
    with pytest.raises(ValueError, match="read-only"):
        speech.window[0] = 1


def test_nothing_goes_into_the_cache_of_media(media: MediaEncoder) -> None:
    """Windows of a minute would push out the pictures of a conversation."""
    media.forget()
    speech = GrowingSpeech(16000)
    speech.set_window(voice(16000)[:16000])
    grown(media, speech)
    assert not media._cache


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (np.zeros(0, np.float32), r"has 0 samples, expected at least 400 \(25 ms\)"),
        (np.zeros(399, np.float32), r"has 399 samples, expected at least 400 \(25 ms\)"),
        (np.full(800, np.nan, np.float32), "not finite"),
        (np.full(800, np.inf, np.float32), "not finite"),
    ],
)
def test_windows_that_cannot_be_read(media: MediaEncoder, window: Float32, message: str) -> None:
    """And the utterance is none the worse for them."""
    speech = GrowingSpeech(16000)
    speech.set_window(window)
    with pytest.raises(InputError, match=message) as caught:
        grown(media, speech)
    assert "\n" not in str(caught.value)
    speech.set_window(voice(16000)[:9000])
    check(media, speech)


@pytest.mark.parametrize("bad", [np.zeros((10, 2), np.float32), np.zeros(1000), np.zeros(1000, np.int16)])
def test_windows_of_another_kind(bad: Float32) -> None:
    with pytest.raises(InputError, match=r"speech is .*, expected float32 \[samples\]"):
        GrowingSpeech(16000).set_window(bad)


def test_other_rates() -> None:
    with pytest.raises(InputError, match="speech is at 44100 Hz, expected 16000 or 8000"):
        GrowingSpeech(44100)


@pytest.fixture(scope="module")
def directory(converted: Converted) -> Path:
    return converted("phi4-nano", "F32", lora_quant="F32", encoders="fp32")


@pytest.fixture(scope="module")
def model(directory: Path) -> Iterator[Model]:
    with Model(directory, kv_type="f32") as loaded:
        yield loaded


def test_the_model_reads_it_as_it_reads_a_file(model: Model) -> None:
    """At its full length the answer is the clip's; asked again, nothing but the last token is read."""
    clip = audio.load(CLIP)
    speech = GrowingSpeech(clip.sample_rate)
    turn = Message("user", "Transcribe the audio clip into text.", media=(Media("audio", speech),))
    for share in (0.5, 0.8):
        speech.set_window(clip.samples[: int(share * len(clip.samples))])
        model.chat([turn], max_tokens=3)
    speech.set_window(clip.samples)
    reply = model.chat([turn])
    assert (reply.text, reply.adapter) == (SAID, "speech")
    again = model.chat([turn])
    assert again.token_ids == reply.token_ids
    assert again.usage.cached_tokens == reply.usage.prompt_tokens - 1


def test_a_longer_window_is_read_from_its_first_row(directory: Path, media: MediaEncoder) -> None:
    """The trunk changes every row: a session reuses what stands before them and none of them."""
    decoder = load_decoder(directory)
    session = Session(decoder, limit=400, note=lambda _: None)
    opening, ending = TokenSpan(np.array([5], np.int32)), TokenSpan(np.array([6, 7], np.int32))
    speech = GrowingSpeech(16000)

    def reused(samples: int) -> int:
        speech.set_window(voice(16000)[:samples])
        return session.read([opening, grown(media, speech), ending], adapter="speech")[1]

    assert reused(16000) == 0
    assert reused(16000) == 1 + 13 + 1  # all but the last token, whose logits are asked for
    assert reused(17280) == 1
    decoder.close()
