# SPDX-License-Identifier: Apache-2.0
"""Pictures and clips in a conversation: routing, caching, and that each adapter and projector matters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketphi.runtime import audio, image
from pocketphi.runtime.engine import Model
from pocketphi.runtime.errors import InputError
from pocketphi.runtime.media import MediaEncoder
from pocketphi.runtime.parts import Media, Message, TokenSpan
from pocketphi.runtime.session import Session

from .. import scoring
from ..conftest import Converted, load_decoder

PICTURE = scoring.EVAL / "images" / "img-000.png"
CLIP = scoring.EVAL / "audio" / "asr-000.flac"
SAID = "How many legs does a rooster have?"


@pytest.fixture(scope="module")
def directory(converted: Converted) -> Path:
    return converted("phi4-nano", "F32", lora_quant="F32", encoders="fp32")


@pytest.fixture(scope="module")
def model(directory: Path) -> Iterator[Model]:
    with Model(directory, kv_type="f32") as loaded:
        yield loaded


def turn(text: str, **part: object) -> dict[str, Any]:
    parts = [{"type": kind, kind: value} for kind, value in part.items()]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def test_a_picture_from_a_path_bytes_or_pixels(model: Model) -> None:
    answers = {
        model.chat([turn("Describe the image.", image=source)]).text
        for source in (PICTURE, str(PICTURE), PICTURE.read_bytes(), image.load(PICTURE))
    }
    assert answers == {"There is a large green circle on the left."}


def test_a_clip_from_a_path_bytes_or_samples(model: Model) -> None:
    clip = audio.load(CLIP)
    sources: tuple[object, ...] = (CLIP, CLIP.read_bytes(), (clip.samples, clip.sample_rate))
    for source in sources:
        reply = model.chat([turn("Transcribe the audio clip into text.", audio=source)])
        assert (reply.text, reply.mode, reply.adapter) == (SAID, "speech", "speech")


def test_media_come_first_or_where_the_text_says(model: Model) -> None:
    media = (Media("image", PICTURE),)
    first = model.chat([Message("user", "Describe the image.", media=media)])
    placed = model.chat([Message("user", "<|image_1|>Describe the image.", media=media)])
    last = model.chat([Message("user", "Describe the image.<|image_1|>", media=media)], max_tokens=5)
    assert first.token_ids == placed.token_ids
    assert first.usage.prompt_tokens == placed.usage.prompt_tokens == last.usage.prompt_tokens


def test_places_and_media_must_match(model: Model) -> None:
    one = (Media("image", PICTURE),)
    for text, media, want in (
        ("<|image_1|><|image_2|>x", one, "more"),
        ("<|audio_1|>x", one, "more"),
        ("<|image_1|>x", (*one, *one), "no <|image_n|> place"),
    ):
        with pytest.raises(InputError, match=want.replace("|", r"\|")):
            model.chat([Message("user", text, media=media)])
    plain = model.chat([{"role": "user", "content": "<|image_1|>"}], max_tokens=1)
    assert plain.mode == "language", "without media it is text like any other"


def test_a_picture_stays_in_the_conversation(model: Model) -> None:
    """Later turns keep the vision adapter; the picture is neither encoded nor read again."""
    first = turn("Describe the image.", image=PICTURE)
    reply = model.chat([first])
    again = model.chat(
        [first, {"role": "assistant", "content": reply.text}, {"role": "user", "content": "And?"}]
    )
    assert (again.mode, again.adapter) == ("vision", "vision")
    assert again.usage.cached_tokens >= reply.usage.prompt_tokens
    assert again.timings.encode_ms < 1000
    assert again.notes == ()


def test_a_change_of_mode_reads_again_and_says_so(model: Model) -> None:
    text = {"role": "user", "content": "Hello!"}
    model.chat([text])
    reply = model.chat(
        [text, {"role": "assistant", "content": "Hi."}, turn("Describe the image.", image=PICTURE)]
    )
    assert reply.usage.cached_tokens == 0
    assert reply.notes == ("adapter vision: reading the conversation again",)
    assert set(reply.resident) >= {"vision adapter", "vision encoder"}


def test_only_what_is_needed_is_loaded(directory: Path) -> None:
    with Model(directory) as fresh:
        assert fresh.chat([{"role": "user", "content": "Hello!"}]).resident == ()
        heard = fresh.chat([turn("Transcribe the audio clip into text.", audio=CLIP)])
        assert heard.resident == ("speech adapter", "speech encoder")


def test_every_adapter_and_projector_changes_the_result(directory: Path, model: Model) -> None:
    """The right pair reads the clip; each wrong adapter, no adapter and the wrong projector do not."""
    media = MediaEncoder(model.bundle, n_threads=2)
    decoder = load_decoder(directory)
    session = Session(decoder, limit=1000, note=lambda _: None)
    ids = model.tokenizer.encode_text("Transcribe the audio clip into text.")
    before = TokenSpan(np.array([model.tokenizer.token_id("<|user|>")], np.int32))
    ends = [model.tokenizer.token_id(t) for t in ("<|end|>", "<|assistant|>")]
    after = TokenSpan(np.concatenate([ids, np.array(ends, np.int32)]))
    logits = {}
    for projector in ("speech", "vision"):
        rows = media.embed(Media("audio", CLIP), projector)
        for adapter in (None, "speech", "vision"):
            logits[projector, adapter] = session.read([before, rows, after], adapter=adapter)[0]
    right = logits["speech", "speech"]
    assert (
        int(right.argmax())
        == model.chat([turn("Transcribe the audio clip into text.", audio=CLIP)]).token_ids[0]
    )
    for pair, found in logits.items():
        if pair != ("speech", "speech"):
            assert abs(found - right).max() > 1, pair
    decoder.close()


def test_a_picture_that_joins_a_clip_keeps_what_was_heard(model: Model) -> None:
    """The clip's projector changes with the mode; the trunk, nearly all of the work, is not run again."""
    media = MediaEncoder(model.bundle, n_threads=2)
    alone = media.embed(Media("audio", CLIP), "speech")
    encoder = media._speech_encoder()
    heard = []
    encoder.hidden = lambda features: heard.append(features)  # type: ignore[assignment,method-assign]
    beside = media.embed(Media("audio", CLIP), "vision")
    assert heard == []
    assert beside.rows.shape == alone.rows.shape
    fresh = MediaEncoder(model.bundle, n_threads=2).embed(Media("audio", CLIP), "vision")
    assert beside.rows.tobytes() == fresh.rows.tobytes()


def test_fewer_crops_are_fewer_tokens(directory: Path) -> None:
    wide = np.full((600, 1300, 3), 200, np.uint8)
    counts = []
    for max_crops in (36, 2, 1):
        with Model(directory, max_crops=max_crops) as small:
            counts.append(small.chat([turn("What?", image=wide)], max_tokens=1).usage.prompt_tokens)
    assert counts[0] > counts[1] > counts[2]
    with pytest.raises(InputError, match="max crops is 37"):
        Model(directory, max_crops=37)


def test_a_model_without_encoders_says_so(converted: Converted) -> None:
    with Model(converted("phi4-mini", "Q8_0")) as text_only:
        with pytest.raises(InputError, match="no vision encoder: it cannot look at pictures"):
            text_only.chat([turn("What?", image=PICTURE)])
        with pytest.raises(InputError, match="no speech encoder: it cannot listen"):
            text_only.chat([turn("What?", audio=CLIP)])


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image"},
        {"type": "image", "image": 3},
        {"type": "image", "image": np.zeros((4, 4), np.uint8)},
        {"type": "image", "image": np.zeros((4, 4, 3), np.float32)},
        {"type": "audio", "audio": np.zeros(100, np.float32)},
        {"type": "smell"},
        "text",
    ],
)
def test_parts_that_cannot_be_used(part: object, model: Model) -> None:
    with pytest.raises(InputError, match="expected"):
        model.chat([{"role": "user", "content": [part]}])
    with pytest.raises(InputError, match="belong into a user message"):
        model.chat([{"role": "system", "content": [{"type": "image", "image": PICTURE}]}])


def test_files_that_are_not_there_or_not_media(model: Model, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"not a picture")
    (tmp_path / "x.wav").write_bytes(b"not a clip")
    for kind, name in (("image", "gone.png"), ("image", "x.png"), ("audio", "gone.wav"), ("audio", "x.wav")):
        with pytest.raises(InputError, match=name) as caught:
            model.chat([turn("?", **{kind: tmp_path / name})])
        assert "\n" not in str(caught.value)
