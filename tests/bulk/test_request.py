# SPDX-License-Identifier: Apache-2.0
"""Items as requests: OpenAI's form and ours, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pocketphi.bulk.lines import Task
from pocketphi.bulk.request import Chat, Transcription, request_of
from pocketphi.runtime.errors import InputError
from pocketphi.runtime.parts import ToolCall

from .batch_items import IMAGE, mixed, user


def request(item: dict[str, Any], folder: Path = Path("/")) -> Chat | Transcription:
    return request_of(Task("x", 3, json.dumps(item)), folder, 40)


def test_one_of_each_kind(tmp_path: Path) -> None:
    for item in mixed():
        found = request(item)
        assert isinstance(found, Transcription if "audio" in item else Chat)
        assert found.options["max_tokens"] == item.get("max_tokens", 40)


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "c.wav").write_bytes(b"x")
    for name in ("c.wav", "a/../c.wav", str(tmp_path / "c.wav")):
        found = request({"audio": name}, tmp_path)
        assert found.files == [tmp_path / name]


def test_openai_form_is_the_same_request() -> None:
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
        ]},
        {"role": "tool", "tool_call_id": "1", "content": "2"},
    ]  # fmt: skip
    body = {
        "model": "any", "n": 1, "stream": False, "user": "me", "messages": turns, "max_completion_tokens": 5,
        "temperature": 0.5, "top_p": 1, "stop": "x", "response_format": {"type": "json_object"},
    }  # fmt: skip
    found = request({"custom_id": "x", "method": "POST", "url": "/v1/chat/completions", "body": body})
    assert isinstance(found, Chat)
    assert [(m.role, m.content) for m in found.messages] == [
        ("system", "Be brief."), ("user", "ab"), ("assistant", ""), ("tool", "2"),
    ]  # fmt: skip
    assert found.messages[2].tool_calls == (ToolCall("f", {"x": 1}),)
    sampling = found.options["sampling"]
    assert sampling is not None
    assert (sampling.temperature, sampling.json_schema) == (0.5, '{"type": "object"}')
    assert (found.options["max_tokens"], found.options["stop"]) == (5, ("x",))


def test_low_detail_is_one_crop() -> None:
    import base64

    url = "data:image/png;base64," + base64.b64encode(IMAGE.read_bytes()).decode()
    part = {"type": "image_url", "image_url": {"url": url, "detail": "low"}}
    found = request({"messages": user([part])})
    assert isinstance(found, Chat)
    assert found.messages[0].media[0].max_crops == 1


def test_a_seed_of_the_items_own() -> None:
    """The same item draws the same numbers wherever it runs; another draws others."""

    def seed(item: dict[str, Any]) -> int | None:
        sampling = request(item).options["sampling"]
        assert sampling is not None
        return sampling.seed

    item = {"messages": user("Hi"), "temperature": 1}
    assert seed(item) == seed(item)
    assert seed(item) != seed({**item, "messages": user("Ho")})
    assert seed({**item, "seed": 5}) == 5


def test_penalties_and_bias() -> None:
    """As OpenAI has them; 0 and none are off. What a transcript cannot have may be off too."""
    given = {"frequency_penalty": 1.5, "presence_penalty": -2, "logit_bias": {"7": -1.5, "40": 100}}
    found = request({**HI, **given})
    off = request({**HI, "seed": 1, "frequency_penalty": 0, "presence_penalty": None, "logit_bias": {}})
    plain = request({**HI, "seed": 1})
    sampling = found.options["sampling"]
    assert sampling is not None
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (1.5, -2.0)
    assert sampling.logit_bias == {7: -1.5, 40: 100.0}
    assert off.options == plain.options != found.options
    said = {"audio": str(IMAGE), "frequency_penalty": 0, "logit_bias": None}
    assert isinstance(request(said), Transcription)


HI = {"messages": user("Hi")}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "audio: has 'None' as its file, expected a path"),
    ({"type": "embed"}, "type is 'embed', expected chat or transcribe"),
    ({"messages": []}, "messages is not a list of at least one object"),
    ({"messages": ["x"]}, r"messages\[0\] is a JSON str"),
    ({"messages": [{"role": "me", "content": ""}]}, "role is 'me', expected one of system"),
    ({"messages": [{"role": "user"}]}, "content is NoneType, expected text or a list of parts"),
    ({"messages": user([{"type": "video"}])}, "type is 'video', expected text, image_url"),
    ({"messages": user("\ud800")}, "half a surrogate pair"),
    ({"messages": user([{"type": "image", "path": "nope.png"}])}, "nope.png: no such file"),
    ({"messages": user([{"type": "image", "path": "."}])}, "is not a regular file"),
    ({"messages": user([{"type": "image", "path": "a\0b"}])}, "cannot be opened"),
    ({"messages": user([{"type": "image_url", "image_url": "https://x/y.png"}])}, "which is not fetched"),
    ({"messages": user([{"type": "image_url", "image_url": {"url": "data:image/png,x"}}])}, "a data URI"),
    ({"messages": user([{"type": "input_audio", "input_audio": {"data": "€"}}])}, "is not base64"),
    ({"messages": user([{"type": "input_audio", "input_audio": {"data": ""}}])}, "is empty"),
    ({"messages": user([{"type": "image", "path": str(IMAGE)}] * 65)}, "65 pictures and clips"),
    ({**HI, "temprature": 1}, "has a field 'temprature', expected some of frequency_penalty, grammar"),
    ({**HI, "audio": "x.wav"}, "has a field 'audio'"),
    ({**HI, "n": 2}, "n is '2', expected 1"),
    ({**HI, "stream": True}, "stream is 'True', expected False"),
    ({**HI, "tool_choice": "required"}, "tool_choice is 'required', expected 'auto'"),
    ({**HI, "temperature": "hot"}, "temperature is 'hot', expected a number"),
    ({**HI, "temperature": -1}, "temperature is -1.0, expected a number from 0 to 100"),
    ({**HI, "frequency_penalty": 2.5}, "frequency penalty is 2.5, expected from -2 to 2"),
    ({**HI, "presence_penalty": "1"}, "presence_penalty is '1', expected a number"),
    ({**HI, "logit_bias": [1]}, "logit_bias is a JSON list, expected an object"),
    ({**HI, "logit_bias": {"1_0": 1}}, "logit_bias has '1_0', expected token ids"),
    ({**HI, "logit_bias": {"\u0661": 1}}, "logit_bias has '\u0661', expected token ids"),
    ({**HI, "logit_bias": {"9" * 5000: 1}}, "logit_bias has '9{40}', expected token ids"),
    ({**HI, "logit_bias": {"1": True}}, "logit_bias has 'True' for 1, expected a number"),
    ({**HI, "logit_bias": {"1": 10**400}}, "logit_bias has '10{39}' for 1, expected a number"),
    ({**HI, "logit_bias": {"1": 101}}, "logit bias of token 1 is 101.0, expected from -100 to 100"),
    ({**HI, "logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias has 301 tokens"),
    ({**HI, "logprobs": True}, "logprobs is 'True', expected False or none"),
    ({**HI, "top_logprobs": 3}, "top_logprobs is '3', expected 0 or none"),
    ({**HI, "max_tokens": 1.5}, "max_tokens is '1.5', expected a whole number"),
    ({**HI, "stop": [1]}, "stop is not text"),
    ({**HI, "stop": ["a"] * 17}, "stop has 17 texts"),
    ({**HI, "tools": {}}, None),
    ({**HI, "tools": "x"}, "tools is not a list of objects"),
    ({**HI, "response_format": {"type": "xml"}}, "response_format has the type 'xml'"),
    ({**HI, "response_format": {"type": "json_schema"}}, "response_format has no schema"),
    ({**HI, "json_schema": {}, "response_format": {"type": "json_object"}}, "has both json_schema"),
    ({**HI, "json_schema": {}, "grammar": "x"}, "both a grammar and a JSON schema"),
    ({"audio": "http://x/y.wav"}, "which is not fetched"),
    ({"audio": str(IMAGE), "both": 1}, "both is '1', expected true or false"),
    ({"audio": str(IMAGE), "both": True}, "need a language to translate to"),
    ({"audio": str(IMAGE), "presence_penalty": 1}, "presence_penalty is '1', expected 0 or none"),
    ({"audio": str(IMAGE), "pause": 99}, "pause_s is 99 s"),
    ({"custom_id": "x", "body": []}, "body is a JSON list"),
    ({"custom_id": "x", "url": "/v1/embeddings", "body": {}}, "expected POST to /v1/chat/completions"),
]  # fmt: skip


@pytest.mark.parametrize(("item", "said"), REFUSED)
def test_what_is_refused(item: dict[str, Any], said: str | None, tmp_path: Path) -> None:
    if said is None:
        assert isinstance(request(item, tmp_path), Chat)
        return
    with pytest.raises(InputError, match=said) as caught:
        request(item, tmp_path)
    assert str(caught.value).startswith("line 3: ")
    assert "\n" not in str(caught.value)


def test_deep_json_is_an_items_error() -> None:
    """Deep enough for Python's writer of JSON and not for its reader, or the other way round, or for both."""
    for depth in (500, 900, 990, 2000, 50_000):
        deep = '{"x":' * depth + "1" + "}" * depth
        text = '{"messages": [{"role": "user", "content": "Hi"}], "json_schema": ' + deep + "}"
        try:
            found = request_of(Task("x", 3, text), Path("/"), None)
        except InputError as exc:
            assert str(exc).startswith("line 3: ")
        else:
            assert isinstance(found, Chat)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is not a regular file"):
        request({"audio": "pipe"}, tmp_path)
