# SPDX-License-Identifier: Apache-2.0
"""Recordings: what clients get is what the Python API gives; who leaves, and who waits."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketphi.runtime.engine import Model
from pocketphi.runtime.segments import SegmentRules
from pocketphi.runtime.speech_task import Task
from pocketphi.runtime.transcript import write

from ..scoring import EVAL
from .conftest import Serve
from .recordings import (
    CLIP,
    RATE,
    TRANSLATIONS,
    Events,
    Field,
    directly,
    encoded,
    post,
    spoken,
)
from .served import Server

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def three() -> bytes:
    """Three sentences."""
    return encoded(spoken(3))


def ask(client: Any, data: bytes, **fields: Any) -> Any:
    return client.audio.transcriptions.create(model="any", file=("clip.wav", data), **fields)


def test_json(client: Any, alone: Model, three: bytes) -> None:
    found, expected = ask(client, three), directly(alone, three)
    assert len(expected) == 3
    assert found.text == " ".join(segment.text for segment, _ in expected)
    assert (found.usage.type, found.usage.seconds) == (
        "duration",
        pytest.approx(len(spoken(3)) / RATE, abs=1e-3),
    )
    assert found.logprobs is None


@pytest.mark.parametrize("clip", [EVAL / f"audio/asr-{i:03}.flac" for i in (3, 17, 31)], ids=lambda p: p.stem)
def test_a_clip_of_the_set(client: Any, alone: Model, clip: Path) -> None:
    data = clip.read_bytes()
    assert ask(client, data).text == " ".join(segment.text for segment, _ in directly(alone, data))


@pytest.mark.parametrize(("asked", "kind"), [("text", "txt"), ("srt", "srt"), ("vtt", "vtt")])
def test_text_and_subtitles(client: Any, alone: Model, three: bytes, asked: Any, kind: Any) -> None:
    """As the command line writes them."""
    found = ask(client, three, response_format=asked)
    assert found == write([segment for segment, _ in directly(alone, three)], kind)


def test_verbose_json(client: Any, alone: Model, three: bytes) -> None:
    found, expected = (
        ask(client, three, response_format="verbose_json", language="en"),
        directly(alone, three),
    )
    assert (found.task, found.language) == ("transcribe", "en")
    assert found.duration == found.usage.seconds == pytest.approx(len(spoken(3)) / RATE, abs=1e-3)
    assert found.text == " ".join(one.text for one in found.segments)
    for i, (one, (segment, reading)) in enumerate(zip(found.segments, expected, strict=True)):
        assert (one.id, one.text, one.seek) == (i, segment.text, round(segment.t0 * 100))
        assert (one.start, one.end) == (round(segment.t0, 3), round(segment.t1, 3))
        assert (tuple(one.tokens), one.temperature) == (reading.token_ids, 0.0)
        assert one.avg_logprob == pytest.approx(sum(reading.logprobs) / len(reading.logprobs), abs=1e-4)
        assert one.compression_ratio > 0 and one.no_speech_prob == 0.0
    assert ask(client, three, response_format="verbose_json").language == "und"


def test_stream(client: Any, alone: Model, three: bytes) -> None:
    """One delta for each utterance; together they are the text."""
    events = list(ask(client, three, stream=True))
    assert [one.type for one in events] == ["transcript.text.delta"] * 3 + ["transcript.text.done"]
    expected = directly(alone, three)
    assert "".join(one.delta for one in events[:-1]) == events[-1].text
    assert events[-1].text == " ".join(segment.text for segment, _ in expected)
    usage = events[-1].usage
    assert usage.output_tokens == sum(len(reading.token_ids) for _, reading in expected)
    assert usage.input_tokens == sum(reading.prompt_tokens for _, reading in expected)
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


def test_logprobs(client: Any, alone: Model, three: bytes) -> None:
    found = ask(client, three, include=["logprobs"])
    _, first = directly(alone, three)[0]
    values = [one.logprob for one in found.logprobs]
    assert values[: len(first.logprobs)] == pytest.approx(first.logprobs, abs=1e-4)
    raw = b"".join(bytes(map(int, one.bytes)) for one in found.logprobs)
    assert raw.decode().replace(" ", "") == found.text.replace(" ", "")
    events = list(ask(client, three, include=["logprobs"], stream=True))
    assert [one.logprob for event in events[:-1] for one in event.logprobs] == values
    assert [one.logprob for one in events[-1].logprobs] == values


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # by the reference, not here
def test_translation(client: Any, server: Server, alone: Model) -> None:
    data = (EVAL / "audio/ast-003.flac").read_bytes()
    ((segment, _),) = directly(alone, data, Task(translate="English"))

    def ask(**fields: Any) -> Any:
        return client.audio.translations.create(model="any", file=("clip.flac", data), **fields)

    assert ask().text == segment.text
    assert ask(response_format="text") == f"{segment.text}\n"
    verbose = ask(response_format="verbose_json")
    assert (verbose.language, verbose.task, verbose.text) == ("english", "translate", segment.text)
    with Events(server, data, path=TRANSLATIONS) as events:
        assert [one.get("delta", one.get("text")) for one in events] == [segment.text] * 2


def test_prompt_and_keywords(server: Server, alone: Model) -> None:
    """Words to expect stand in the instruction."""
    data = CLIP.read_bytes()
    ((segment, reading),) = directly(alone, data, Task(words="Grace, a message"))
    found = post(server, data, ("prompt", "Grace"), ("keywords[]", "a message"), ("include[]", "logprobs"))
    assert found.json["text"] == segment.text
    values = [one["logprob"] for one in found.json["logprobs"]]
    assert values == pytest.approx(reading.logprobs, abs=1e-4)
    plain = post(server, data, ("prompt", ""), ("include[]", "logprobs")).json["logprobs"]
    assert [one["logprob"] for one in plain] != values


def test_chunking(client: Any, alone: Model) -> None:
    """A pause that is short for us can end an utterance."""
    data = encoded(spoken(6, 0.0))
    rules = SegmentRules(pause_s=0.3, pre_roll_s=0.1)
    expected = directly(alone, data, rules=rules)
    assert len(expected) > len(directly(alone, data))
    vad = {"type": "server_vad", "silence_duration_ms": 300, "prefix_padding_ms": 100, "threshold": 0.5}
    found = ask(client, data, chunking_strategy=vad, response_format="verbose_json")
    assert [one.text for one in found.segments] == [segment.text for segment, _ in expected]
    text = json.dumps(vad)
    assert ask(client, data, chunking_strategy=text).text == found.text
    assert ask(client, data, chunking_strategy="auto").text == ask(client, data).text


def sounds() -> dict[str, bytes]:
    samples = spoken(1)
    both = np.stack([samples, samples], axis=1)
    return {
        "stereo": encoded(both),
        "flac": encoded(samples, kind="FLAC"),
        "mp3": encoded(samples, kind="MP3", subtype="MPEG_LAYER_III"),
        "ogg": encoded(samples, kind="OGG", subtype="VORBIS"),
        "float": encoded(samples, subtype="FLOAT"),
        "8 kHz": encoded(samples[::2], RATE // 2),  # aliased, and still the same for both
        "44.1 kHz": encoded(samples, 44_100),  # far too fast, and still the same for both
    }


@pytest.mark.parametrize(("name", "data"), sounds().items(), ids=lambda x: x if isinstance(x, str) else "")
def test_kinds_of_files(server: Server, alone: Model, name: str, data: bytes) -> None:
    """What a file is is seen from its bytes, whatever it is called."""
    found = post(server, data, file_name="../../etc/passwd")
    assert found.status == 200
    assert found.json["text"] == " ".join(
        segment.text for segment, _ in directly(alone, data) if segment.text
    )


def test_silence(server: Server) -> None:
    data = encoded(np.zeros(3 * RATE, np.float32))
    assert post(server, data).json == {"text": "", "usage": {"type": "duration", "seconds": 3.0}}
    for asked, expected in (("text", b""), ("srt", b""), ("vtt", b"WEBVTT\n")):
        assert post(server, data, ("response_format", asked)).body == expected
    assert post(server, data, ("response_format", "verbose_json")).json["segments"] == []
    with Events(server, data) as events:
        (done,) = events
    assert (done["type"], done["text"], done["usage"]["total_tokens"]) == ("transcript.text.done", "", 0)
    empty = post(server, encoded(np.zeros(0, np.float32)))
    assert (empty.status, empty.json["text"]) == (200, "")


def test_temperature(server: Server) -> None:
    """It is handed on: at 1 a segment says so."""
    found = post(server, CLIP.read_bytes(), ("temperature", "1"), ("response_format", "verbose_json"))
    assert [one["temperature"] for one in found.json["segments"]] in ([1.0], [])


def vad(name: str, value: str) -> tuple[Field, ...]:
    return (("chunking_strategy", f'{{"type": "server_vad", "{name}": {value}}}'),)


BAD: list[tuple[str, tuple[Field, ...], str]] = [
    ("response_format", (("response_format", "diarized_json"),), "unsupported_value"),
    ("response_format", (("response_format", "xml"),), "invalid_value"),
    ("timestamp_granularities", (("timestamp_granularities[]", "word"),), "unsupported_value"),
    ("include", (("include[]", "everything"),), "unsupported_value"),
    ("include", (("include[]", "logprobs"), ("response_format", "srt")), "unsupported_value"),
    ("known_speaker_names", (("known_speaker_names[]", "Ada"),), "unsupported_value"),
    ("stream", (("stream", "true"), ("response_format", "srt")), "unsupported_value"),
    ("stream", (("stream", "perhaps"),), "invalid_value"),
    ("temperature", (("temperature", "warm"),), "invalid_value"),
    ("temperature", (("temperature", "1.5"),), "invalid_value"),
    ("temperature", (("temperature", "nan"),), "invalid_value"),
    ("temperature", (("temperature", "-1"),), "invalid_value"),
    ("language", (("language", "Deutsch"),), "invalid_value"),
    ("language", (("language", "en"), ("language", "de")), "invalid_value"),
    ("prompt", (("prompt", b"\xff\xfe"),), "invalid_value"),
    ("prompt", (("prompt", "a" * 70_000),), "invalid_value"),
    ("chunking_strategy", (("chunking_strategy", "never"),), "invalid_value"),
    ("chunking_strategy", (("chunking_strategy", "[" * 60_000),), "invalid_value"),
    ("chunking_strategy", (("chunking_strategy[type]", "semantic_vad"),), "invalid_value"),
    ("chunking_strategy", vad("silence_duration_ms", "1"), "invalid_value"),
    ("chunking_strategy", vad("prefix_padding_ms", "1e300"), "invalid_value"),
    ("chunking_strategy", vad("prefix_padding_ms", "-1"), "invalid_value"),
    ("file", (("file", "again"),), "invalid_value"),
]  # fmt: skip


@pytest.mark.parametrize(("param", "fields", "code"), BAD, ids=lambda x: str(x)[:40])
def test_bad_fields(server: Server, param: str, fields: tuple[Field, ...], code: str) -> None:
    found = post(server, CLIP.read_bytes(), *fields)
    error = found.json["error"]
    assert (found.status, error["code"], error["param"]) == (400, code, param), error
    assert error["message"].startswith(f"{param}: ") and "\n" not in error["message"]


def test_a_missing_file(server: Server) -> None:
    found = post(server, None, ("model", "any"))
    assert (found.status, found.code) == (400, "missing_required_parameter")


def test_a_long_prompt(server: Server) -> None:
    """More than the context holds, before anything is read."""
    found = post(server, CLIP.read_bytes(), ("prompt", "word " * 10_000), ("stream", "true"))
    assert (found.status, found.code) == (400, "invalid_value") and "context" in found.json["error"][
        "message"
    ]


def test_unknown_fields_are_ignored(server: Server) -> None:
    fields: tuple[Field, ...] = (
        ("user", "somebody"),
        ("timestamp_granularities[]", "segment"),
        ("model", "x"),
    )
    assert post(server, CLIP.read_bytes(), *fields).json["text"] == "Send a message to Grace."


@pytest.mark.parametrize("stream", ["true", "false"])
def test_sound_that_cannot_be_used(server: Server, stream: str) -> None:
    """Refused with a status, before a stream begins; sound that ends early is found out too."""
    clip = CLIP.read_bytes()
    bomb = encoded(np.zeros(3600 * 8000, np.int16), 8000, kind="FLAC")
    assert len(bomb) < 100_000
    nan = np.zeros(4 * RATE, np.float32)
    nan[-1] = np.nan
    files = [b"", b"RIFF", b"not sound", clip[: len(clip) // 2], bomb, encoded(nan, subtype="FLOAT")]
    for data in [
        *files,
        encoded(np.zeros(61 * RATE, np.float32)),
        encoded(np.zeros(RATE, np.float32))[:-100],
    ]:
        found = post(server, data, ("stream", stream), file_name="Secret.wav")
        assert (found.status, found.code) == (422, "invalid_media"), found.body
        message = found.json["error"]["message"]
        assert message.startswith("file: ") and message.isprintable() and len(message) < 300
    assert server.metric("pocketphi_listeners") == server.metric("pocketphi_held_bytes") == 0


def test_a_model_that_is_loading(serve: Serve) -> None:
    server = serve()
    found = post(server, CLIP.read_bytes())
    assert (
        (found.status, found.code) in ((503, "loading_model"), (200, None)) if found.status != 200 else True
    )
    assert server.ready().metric("pocketphi_listeners") == 0


def test_nothing_is_logged(serve: Serve) -> None:
    """But sizes and times; no prompt, no file name, no text."""
    server = serve("--verbose").ready()
    post(server, CLIP.read_bytes(), ("prompt", "Xylophone"), file_name="Secret.flac")
    post(server, b"junk", file_name="Secret.flac")
    server.until(lambda: sum("/v1/audio/transcriptions" in line for line in server.log) == 2)
    assert not any(re.search("Xylophone|Secret|Grace", line) for line in server.log)
