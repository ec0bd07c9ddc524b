# SPDX-License-Identifier: Apache-2.0
"""The speech encoder against transformers: every kind, every block boundary, both projectors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt
import pytest

from pocketphi.convert.checkpoint import Checkpoint
from pocketphi.convert.config import read_config
from pocketphi.convert.encoder_quant import EncoderQuant
from pocketphi.convert.write_onnx_speech import GRAPHS, write_speech
from pocketphi.runtime import kernels
from pocketphi.runtime.errors import BundleError, KernelError
from pocketphi.runtime.logmel import log_mel
from pocketphi.runtime.parts import AudioProjector
from pocketphi.runtime.speech_encoder import SpeechEncoder, SpeechFiles, count_tokens

from .. import tiny
from ..golden.speech import cases

Float32 = npt.NDArray[np.float32]
Get = Callable[[EncoderQuant], SpeechEncoder]
CASES = cases.load()
PROJECTORS: tuple[AudioProjector, ...] = get_args(AudioProjector)


def write(quant: EncoderQuant, out: Path, checkpoint: Path = tiny.NANO) -> SpeechFiles:
    with Checkpoint.open(checkpoint) as source:
        write_speech(out, source, read_config(source.config, "config.json"), quant)
    return files(out)


def files(out: Path) -> SpeechFiles:
    at = {part: out / name for part, name in GRAPHS.items()}
    return SpeechFiles(
        at["front"], at["trunk"], {"speech": at["speech-projector"], "vision": at["vision-projector"]}
    )


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Get:
    @functools.cache
    def get(quant: EncoderQuant) -> SpeechEncoder:
        return SpeechEncoder(write(quant, tmp_path_factory.mktemp(quant)), n_threads=2)

    return get


@functools.cache
def features(name: str) -> Float32:
    return log_mel(cases.samples_of(name))


def cosine(a: Float32, b: Float32) -> float:
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def encoded(encoder: SpeechEncoder, case: cases.Case, projector: AudioProjector) -> tuple[Float32, Float32]:
    """What we make of a case, and the reference, at the recorded rows."""
    rows = encoder.encode(features(case.name), projector)
    want: Float32 = getattr(case, projector)
    assert rows.shape == (case.n_tokens, want.shape[1]) and rows.dtype == np.float32
    return rows[case.rows], want


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_fp32_is_the_reference(encoder: Get, case: cases.Case, projector: AudioProjector) -> None:
    got, want = encoded(encoder("fp32"), case, projector)
    # 60 products in a row of up to 1280 terms, in another order: 60 · sqrt(1280) · 2^-24 if all errors added
    # up would be 1.3e-4; they do not. A wrong block, halo or pad is off by more than 1e-2.
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


# What is asked of each kind. int4 is the small one: here its blocks of 32 are a quarter of a row.
COSINES: list[tuple[EncoderQuant, float]] = [("fp16", 0.999), ("int8", 0.998), ("int4", 0.98)]


@pytest.mark.parametrize(("quant", "least"), COSINES)
@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_other_kinds_are_close(
    encoder: Get, case: cases.Case, projector: AudioProjector, quant: EncoderQuant, least: float
) -> None:
    assert cosine(*encoded(encoder(quant), case, projector)) >= least


def test_a_wrong_projector_is_wrong_as_in_the_reference(encoder: Get) -> None:
    for case in CASES:
        apart = cosine(case.speech, case.vision)
        assert apart < 0.9
        ours = encoder("fp32").encode(features(case.name), "speech")[case.rows]
        assert abs(cosine(ours, case.vision) - apart) < 1e-4


def test_log_mel_is_the_reference() -> None:
    want = cases.reference_features()
    got = features(cases.SHORT[0])
    assert got.shape == want.shape
    # transformers gives the last band a bin that the published front end does not.
    assert np.abs(got - want)[:, :79].max() <= 1e-4


# Seconds -> frames, tokens, and blocks of 500 tokens: the reference's own counts.
COUNTS = [
    (0.025, 1, 1, 1),
    (0.5, 48, 6, 1),
    (1, 98, 13, 1),
    (5, 498, 63, 1),
    (10, 998, 125, 1),
    (20, 1998, 250, 1),
    (30, 2998, 375, 1),
    (40, 3998, 500, 1),
    (60, 5998, 750, 2),
    (120, 11998, 1500, 3),
    (300, 29998, 3750, 8),
    (600, 59998, 7500, 15),
    (1800, 179998, 22500, 45),
]


@pytest.mark.parametrize(("seconds", "n_frames", "n_tokens", "n_blocks"), COUNTS)
@pytest.mark.parametrize("rate", [16000, 8000])
def test_token_counts(rate: int, seconds: float, n_frames: int, n_tokens: int, n_blocks: int) -> None:
    assert kernels.log_mel_frames(int(seconds * rate), rate) == n_frames
    assert count_tokens(n_frames) == n_tokens
    assert -(-n_tokens // 500) == n_blocks


@pytest.mark.parametrize("n_frames", [1, 2, 7, 8, 9, 255, 256, 257, 263, 264, 265])
def test_pieces_of_the_front_do_not_show(encoder: Get, n_frames: int) -> None:
    """The front in pieces of 32 tokens equals the front at once, wherever the clip ends."""
    e = encoder("fp32")
    x = features("speech-750")[:n_frames]
    whole = e._front.run(features=x[None])
    got = e._subsample(x, 0, count_tokens(n_frames))
    assert got.shape == whole.shape == (count_tokens(n_frames), 128)
    assert np.abs(got - whole).max() <= 1e-5 * np.abs(whole).max()  # sums of 1280 terms in another order


def test_blocks_are_independent(encoder: Get) -> None:
    """What comes later does not reach back: the first block is that of the clip cut after it, which is one
    token longer than a block because a clip of 500 tokens would not be padded."""
    e = encoder("fp32")
    x = features("speech-1001")
    whole, cut = e.hidden(x), e.hidden(x[:4001])
    assert (len(whole), len(cut)) == (1001, 501)
    assert np.abs(cut[:500] - whole[:500]).max() <= 1e-5 * np.abs(cut).max()
    assert np.array_equal(e.project(whole, "speech"), e.encode(x, "speech"))


@pytest.mark.parametrize("quant", ["fp32", "fp16", "int8", "int4"])
def test_a_clip_that_grows(encoder: Get, quant: EncoderQuant) -> None:
    """Every bit as at once, whether the front goes on from a shorter clip, a longer one, or from less than it
    could; what it gives for the next time is whole pieces."""
    e = encoder(quant)
    x = features("speech-1001")
    front = np.zeros((0, 0), np.float32)
    for n_frames, known in [
        (100, 0),
        (300, 0),
        (512, 32),
        (520, 64),
        (519, 40),
        (4000, 64),
        (777, 500),
        (3, 96),
    ]:
        hidden, front = e.continue_hidden(x[:n_frames], front[:known])
        assert hidden.tobytes() == e.hidden(x[:n_frames]).tobytes()
        assert len(front) == n_frames // 256 * 32


def test_a_clip_that_grows_beyond_a_block(encoder: Get) -> None:
    with pytest.raises(KernelError, match="features have 4001 frames, expected at most 4000"):
        encoder("fp32").continue_hidden(features("speech-1001")[:4001], np.zeros((0, 0), np.float32))


def test_8_khz(encoder: Get) -> None:
    wave = cases.samples_of("asr-000")[::2].copy()
    rows = encoder("fp32").encode(log_mel(wave, 8000), "speech")
    assert len(rows) == count_tokens(kernels.log_mel_frames(len(wave), 8000))
    assert np.isfinite(rows).all()


def test_projectors_load_on_first_use(tmp_path: Path) -> None:
    e = SpeechEncoder(write("int8", tmp_path), n_threads=1)
    assert e.loaded == ()
    e.encode(features("asr-019"), "vision")
    assert e.loaded == ("vision",)


def test_the_tiny_member_runs(tmp_path: Path) -> None:
    checkpoint = tiny.write("phi4-multimodal", tmp_path / "checkpoint")
    for quant in ("fp32", "int8"):
        out = tmp_path / quant
        out.mkdir()
        e = SpeechEncoder(write(quant, out, checkpoint), n_threads=1)  # type: ignore[arg-type]
        assert e.encode(features("asr-019"), "speech").shape == (19, 256)


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((0, 80), np.float32),
        np.zeros((10, 128), np.float32),
        np.zeros(80, np.float32),
        np.zeros((10, 80), np.float64),
    ],
)
def test_features_of_another_kind(encoder: Get, bad: npt.NDArray[np.generic]) -> None:
    with pytest.raises(KernelError, match=r"features are .*, expected float32 \[frames, 80\]"):
        encoder("fp32").encode(bad, "speech")  # type: ignore[arg-type]


def test_weights_that_give_no_numbers(tmp_path: Path) -> None:
    found = write("fp32", tmp_path)
    data = found.trunk.with_name(found.trunk.name + ".data")
    raw = bytearray(data.read_bytes())
    raw[:4096] = b"\xff" * 4096  # float32 NaN
    data.write_bytes(raw)
    with pytest.raises(BundleError, match="not finite"):
        SpeechEncoder(found, n_threads=1).encode(features("asr-019"), "speech")


@pytest.mark.parametrize("part", ["front", "trunk"])
@pytest.mark.parametrize("harm", ["missing", "no data", "cut", "text", "another"])
def test_damaged_files(tmp_path: Path, part: str, harm: str) -> None:
    found = write("int8", tmp_path)
    path = tmp_path / GRAPHS[part]
    if harm == "missing":
        path.unlink()
    elif harm == "no data":
        path.with_name(path.name + ".data").unlink()
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif harm == "text":
        path.write_text("not a graph")
    else:
        path.write_bytes((tmp_path / GRAPHS["speech-projector"]).read_bytes())
    with pytest.raises(BundleError, match=GRAPHS[part]) as caught:
        SpeechEncoder(found, n_threads=1)
    assert "\n" not in str(caught.value)
