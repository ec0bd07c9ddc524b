# SPDX-License-Identifier: Apache-2.0
"""The `openai` package against a server: what it gets is what the Python API gives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from pocketphi.runtime.engine import Model
from pocketphi.runtime.sampler import Sampling

from ..scoring import EVAL
from .served import FRANCE, Server, image, sound, text

openai = pytest.importorskip("openai")

PICTURE, CLIP = EVAL / "images/img-012.png", EVAL / "audio/asr-003.flac"
ASKED, SPOKEN = EVAL / "images/vs-003.png", EVAL / "audio/vs-003.flac"
WAKE = [
    {"role": "system", "content": "You have some tools."},
    {"role": "user", "content": "Wake me up at 9 on Saturday."},
]
ALARM = {
    "name": "alarm",
    "description": "Set an alarm",
    "parameters": {"hour": {"type": "int"}, "day": {"type": "str"}},
}
LIGHT = {
    "name": "light",
    "description": "Switch a light",
    "parameters": {
        "type": "object",
        "properties": {"room": {"type": "string", "maxLength": 8}, "value": {"enum": ["on", "off"]}},
        "required": ["room", "value"],
        "additionalProperties": False,
    },
}
TOOLS = [{"type": "function", "function": one} for one in (ALARM, LIGHT)]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as found:
        yield found


def chat(client: Any, messages: Any, **fields: Any) -> Any:
    return client.chat.completions.create(model="any", messages=messages, **fields)


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def test_text(client: Any, alone: Model) -> None:
    found = chat(client, FRANCE)
    reply = alone.chat(FRANCE)
    assert found.choices[0].message.content == reply.text == "The capital of France is Paris."
    assert (found.choices[0].finish_reason, found.model) == ("stop", "phi4-nano")
    assert found.usage.prompt_tokens == reply.usage.prompt_tokens
    assert found.usage.completion_tokens == reply.usage.completion_tokens
    assert found.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert found.timings["predicted_n"] == reply.timings.predicted_n


def test_stream(client: Any, alone: Model) -> None:
    chunks = list(chat(client, FRANCE, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    written = "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)
    assert written == alone.chat(FRANCE).text
    assert [one.choices[0].finish_reason for one in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0
    assert {one.id for one in chunks} == {chunks[0].id}


@pytest.mark.parametrize(
    ("parts", "media", "mode"),
    [
        ((image(PICTURE), text("What does the text say?")), {"image": [PICTURE]}, "vision"),
        ((text("Transcribe the audio clip into text."), sound(CLIP)), {"audio": [CLIP]}, "speech"),
        ((image(ASKED), sound(SPOKEN)), {"image": [ASKED], "audio": [SPOKEN]}, "vision_speech"),
        (
            (image(PICTURE), image(ASKED), text("Describe the image.")),
            {"image": [PICTURE, ASKED]},
            "vision",
        ),
        ((sound(CLIP), sound(SPOKEN), text("Transcribe.")), {"audio": [CLIP, SPOKEN]}, "speech"),
    ],
    ids=["picture", "clip", "spoken-question", "two-pictures", "two-clips"],
)
def test_media(client: Any, alone: Model, parts: Any, media: Any, mode: str) -> None:
    content = [{"type": kind, kind: path} for kind, paths in media.items() for path in paths]
    words = [part for part in parts if part["type"] == "text"]
    reply = alone.chat([{"role": "user", "content": [*content, *words]}], max_tokens=80)
    found = chat(client, user(*parts), max_tokens=80)
    assert found.choices[0].message.content == reply.text
    assert (found.timings["mode"], reply.mode) == (mode, mode)
    assert found.usage.prompt_tokens == reply.usage.prompt_tokens


def test_mp3(client: Any) -> None:
    import io

    import soundfile

    samples, rate = soundfile.read(CLIP)
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="MP3")
    found = chat(client, user(sound(file.getvalue(), "mp3"), text("Transcribe the audio clip into text.")))
    assert found.choices[0].message.content == "Send a message to Grace."


@pytest.mark.parametrize(
    "choice", [None, "auto", "required", {"type": "function", "function": {"name": "alarm"}}]
)
def test_tools(client: Any, alone: Model, choice: Any) -> None:
    fields = {} if choice is None else {"tool_choice": choice}
    found = chat(client, WAKE, tools=TOOLS, **fields)
    (call,) = alone.chat(WAKE, tools=[ALARM, LIGHT]).tool_calls
    (made,) = found.choices[0].message.tool_calls
    assert (made.function.name, json.loads(made.function.arguments)) == (call.name, call.arguments)
    assert (found.choices[0].finish_reason, found.choices[0].message.content) == ("tool_calls", None)


def test_tools_streamed(client: Any) -> None:
    with client.chat.completions.stream(model="any", messages=WAKE, tools=TOOLS) as stream:
        for _ in stream:
            pass
        found = stream.get_final_completion().choices[0]
    (made,) = found.message.tool_calls
    assert (made.function.name, json.loads(made.function.arguments)) == (
        "alarm",
        {"hour": 9, "day": "Saturday"},
    )
    assert found.finish_reason == "tool_calls"


def test_a_named_tool_is_called_whatever_is_asked(client: Any) -> None:
    """And its arguments are of its schema."""
    choice = {"type": "function", "function": {"name": "light"}}
    (made,) = chat(client, FRANCE, tools=TOOLS, tool_choice=choice).choices[0].message.tool_calls
    found = json.loads(made.function.arguments)
    assert made.function.name == "light"
    assert found.keys() == {"room", "value"} and found["value"] in ("on", "off")


def test_no_tool(client: Any, alone: Model) -> None:
    found = chat(client, FRANCE, tools=TOOLS, tool_choice="none").choices[0]
    assert (found.message.tool_calls, found.message.content) == (None, alone.chat(FRANCE).text)


def test_a_conversation_with_a_tools_result(client: Any, alone: Model) -> None:
    from pocketphi.runtime.parts import Message, ToolCall

    arguments = {"hour": 9, "day": "Saturday"}
    call = {"id": "a", "type": "function", "function": {"name": "alarm", "arguments": json.dumps(arguments)}}
    turns = [
        *WAKE,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "Alarm set."},
    ]
    same = [
        Message("system", WAKE[0]["content"]),
        Message("user", WAKE[1]["content"]),
        Message("assistant", "", (ToolCall("alarm", arguments),)),
        Message("tool", "Alarm set."),
    ]
    reply = alone.chat(same, tools=[ALARM, LIGHT], max_tokens=40)
    found = chat(client, turns, tools=TOOLS, max_tokens=40)
    assert (found.choices[0].message.content, found.usage.prompt_tokens) == (
        reply.text,
        reply.usage.prompt_tokens,
    )


def test_json_schema(client: Any, alone: Model) -> None:
    asked = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    found = chat(client, FRANCE, response_format=asked, max_tokens=60).choices[0].message.content
    assert json.loads(found).keys() == {"city"}
    reply = alone.chat(FRANCE, sampling=Sampling(json_schema=json.dumps(CITY)), max_tokens=60)
    assert found == reply.text


def test_json_object(client: Any) -> None:
    found = chat(client, FRANCE, response_format={"type": "json_object"}, max_tokens=5).choices[0]
    assert found.message.content.startswith("{") and found.finish_reason == "length"


def test_sampling_with_a_seed(client: Any, alone: Model) -> None:
    fields = {"temperature": 1.5, "top_p": 0.9, "seed": 7}
    found = [chat(client, FRANCE, max_tokens=30, **fields).choices[0].message.content for _ in range(2)]
    sampling = Sampling(temperature=1.5, top_p=0.9, seed=7)
    reply = alone.chat(FRANCE, sampling=sampling, max_tokens=30)
    assert found == [reply.text, reply.text]


def test_stop_and_length(client: Any) -> None:
    found = chat(client, FRANCE, stop=[" is"]).choices[0]
    assert (found.message.content, found.finish_reason) == ("The capital of France", "stop")
    found = chat(client, FRANCE, max_completion_tokens=3).choices[0]
    assert (found.message.content, found.finish_reason) == ("The capital of", "length")


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client: Any, alone: Model, stream: bool) -> None:
    reply = alone.chat(FRANCE, logprobs=True)
    if stream:
        chunks = list(chat(client, FRANCE, logprobs=True, stream=True))
        found = [one for c in chunks if c.choices[0].logprobs for one in c.choices[0].logprobs.content]
    else:
        found = chat(client, FRANCE, logprobs=True).choices[0].logprobs.content
    assert [one.logprob for one in found] == list(reply.logprobs)[:-1]  # the token that ends it is no text
    assert b"".join(bytes(one.bytes) for one in found).decode() == reply.text


def as_told(alone: Model, token: int) -> str:
    names = {i: name for name, i in alone.tokenizer.control_tokens.items()}
    return names.get(token) or alone.tokenizer.token_bytes(token).decode("utf-8", "replace")


@pytest.mark.parametrize("stream", [False, True])
def test_top_logprobs(client: Any, alone: Model, stream: bool) -> None:
    reply = alone.chat(FRANCE, top_logprobs=20)
    fields = {"logprobs": True, "top_logprobs": 20, "logit_bias": {str(reply.token_ids[0]): 5}}
    if stream:
        chunks = list(chat(client, FRANCE, stream=True, **fields))
        found = [one for c in chunks if c.choices[0].logprobs for one in c.choices[0].logprobs.content]
    else:
        found = chat(client, FRANCE, **fields).choices[0].logprobs.content
    places = reply.top_logprobs[:-1]
    assert [[(other.token, other.logprob) for other in one.top_logprobs] for one in found] == [
        [(as_told(alone, token), value) for token, value in place] for place in places
    ]
    for one in found:
        assert one.top_logprobs[0].model_dump() == one.model_dump(exclude={"top_logprobs"})  # it is greedy
    ends = [other for one in found for other in one.top_logprobs if other.token == "<|end|>"]
    assert ends and all(other.bytes == [] for other in ends)


def test_top_logprobs_are_the_models_whatever_is_chosen(client: Any, alone: Model) -> None:
    own = alone.chat(FRANCE, top_logprobs=3)
    ban = {str(own.token_ids[0]): -100}
    found = chat(client, FRANCE, logprobs=True, top_logprobs=3, logit_bias=ban, max_tokens=1)
    (one,) = found.choices[0].logprobs.content
    assert one.token == as_told(alone, own.top_logprobs[0][1][0]), "the second is chosen"
    assert [other.logprob for other in one.top_logprobs] == [value for _, value in own.top_logprobs[0]]
    assert one.logprob == one.top_logprobs[1].logprob


@pytest.mark.parametrize("fields", [{"frequency_penalty": 1.5}, {"presence_penalty": -1.5}])
def test_penalties(client: Any, alone: Model, fields: dict[str, float]) -> None:
    story = [{"role": "user", "content": "Tell me a story."}]
    reply = alone.chat(story, sampling=Sampling(**fields), max_tokens=30)
    assert chat(client, story, max_tokens=30, **fields).choices[0].message.content == reply.text
    assert reply.text != alone.chat(story, max_tokens=30).text


def test_logit_bias(client: Any, alone: Model) -> None:
    word = alone.chat([{"role": "user", "content": "What is 3 plus 4?"}]).token_ids[0]
    found = chat(client, FRANCE, logit_bias={str(word): 100}, max_tokens=3).choices[0].message.content
    assert found == alone.tokenizer.decode([word] * 3)
    unassigned = int(alone.tokenizer.unassigned_ids[0])
    with pytest.raises(openai.BadRequestError, match="names no token"):
        chat(client, FRANCE, logit_bias={str(unassigned): 1})
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, FRANCE, logit_bias={"4096": 1})
    assert (caught.value.code, caught.value.param) == ("invalid_value", "logit_bias")


@pytest.mark.parametrize("stream", [False, True])
def test_top_logprobs_of_a_completion(client: Any, alone: Model, stream: bool) -> None:
    prompt = "<|user|>What is the capital of France?<|end|><|assistant|>"
    ban = {token: -100 for token, _ in alone.complete(prompt, top_logprobs=2).top_logprobs[0]}
    reply = alone.complete(prompt, top_logprobs=2, sampling=Sampling(logit_bias=ban), max_tokens=4)
    assert reply.token_ids[0] not in dict(reply.top_logprobs[0]), "three are told"
    bias = {str(token): value for token, value in ban.items()}
    fields = {"model": "any", "prompt": prompt, "max_tokens": 4, "logit_bias": bias, "logprobs": 2}
    if stream:
        chunks = list(client.completions.create(stream=True, **fields))
        found = [one for c in chunks for one in c.choices[0].logprobs.top_logprobs]
    else:
        found = client.completions.create(**fields).choices[0].logprobs.top_logprobs
    rows = zip(reply.token_ids, reply.logprobs, reply.top_logprobs, strict=True)
    assert found == [
        {as_told(alone, i): v for i, v in place} | {as_told(alone, token): value}
        for token, value, place in rows
    ]


def test_cached_tokens(client: Any) -> None:
    """A conversation that goes on is not read again."""
    chat(client, [{"role": "user", "content": "What is 3 plus 4?"}])
    first = chat(client, FRANCE)
    turns = [
        *FRANCE,
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "How many legs does a spider have?"},
    ]
    second = chat(client, turns)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens


def test_completions(client: Any, alone: Model) -> None:
    prompt = "<|user|>What is the capital of France?<|end|><|assistant|>"
    found = client.completions.create(model="any", prompt=prompt, max_tokens=40)
    assert found.choices[0].text == alone.complete(prompt).text
    chunks = list(client.completions.create(model="any", prompt=prompt, max_tokens=40, stream=True))
    assert "".join(one.choices[0].text for one in chunks) == found.choices[0].text
    short = client.completions.create(model="any", prompt=prompt, echo=True, max_tokens=2, logprobs=0)
    assert short.choices[0].text == prompt + "The capital" and short.choices[0].finish_reason == "length"
    assert short.choices[0].logprobs.text_offset == [len(prompt), len(prompt) + 3]


def test_a_call_is_text_in_a_completion(client: Any) -> None:
    item = json.loads((EVAL / "tools.jsonl").read_text("utf-8").splitlines()[0])
    found = client.completions.create(model="any", prompt=item["prompt"], max_tokens=80)
    assert found.choices[0].text == item["reference"]


def test_models(client: Any) -> None:
    assert [one.id for one in client.models.list()] == ["phi4-nano"]
    assert client.models.retrieve("phi4-nano").owned_by == "pocketphi"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4o")
    assert caught.value.code == "model_not_found"


def test_errors_are_the_packages_own(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, FRANCE, n=2)
    assert (caught.value.code, caught.value.param) == ("unsupported_value", "n")
    with pytest.raises(openai.UnprocessableEntityError):
        chat(client, user(sound(b"no sound at all"), text("What?")))
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, [{"role": "user", "content": "word " * 9000}])
    assert caught.value.code == "context_length_exceeded"
