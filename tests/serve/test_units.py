# SPDX-License-Identifier: Apache-2.0
"""The server's small parts alone: jobs, budgets, held text, grammars, schemas, metrics, a model to stop."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from pocketphi.runtime.engine import Model
from pocketphi.runtime.sampler import Sampling
from pocketphi.serve import chat, completions
from pocketphi.serve.errors import Refusal
from pocketphi.serve.facts import Facts
from pocketphi.serve.jobs import Job, Piece
from pocketphi.serve.limits import Budget, Limits
from pocketphi.serve.metrics import Histogram
from pocketphi.serve.schema import ChatRequest, CompletionRequest, Function, parse
from pocketphi.serve.screen import Screen
from pocketphi.serve.served_model import ServedModel, Stopped
from pocketphi.serve.tool_grammar import calls_grammar

from .served import FRANCE


def job(wakes: list[int]) -> Job:
    return Job("language", lambda model, job: None, answer_s=1.0, wake=lambda: wakes.append(1))


def test_a_job_wakes_only_who_has_found_nothing() -> None:
    wakes: list[int] = []
    one = job(wakes)
    one.put(Piece("a"))
    one.put(Piece("b"))
    assert len(wakes) == 1
    assert one.take() == ([Piece("a"), Piece("b")], False)
    one.put(Piece("c"))  # the handler rests and comes again by itself
    assert len(wakes) == 1
    assert one.take() == ([Piece("c")], False)
    assert one.take() == ([], False)
    one.put(Piece("d"))
    one.end()
    one.end()
    assert len(wakes) == 3
    assert one.take() == ([Piece("d")], True)


def test_a_job_loses_nothing_between_threads() -> None:
    came = threading.Event()
    one = Job("language", lambda model, job: None, answer_s=1.0, wake=came.set)

    def work() -> None:
        for i in range(5000):
            one.put(Piece(str(i)))
        one.end()

    thread = threading.Thread(target=work)
    thread.start()
    found: list[object] = []
    ended = False
    while not ended:
        events, ended = one.take()
        found += events
        if not events and not ended:
            assert came.wait(30)
            came.clear()
    thread.join()
    assert found == [Piece(str(i)) for i in range(5000)]


def test_a_budget_is_given_back() -> None:
    budget = Budget(100)
    budget.take(60)
    with pytest.raises(Refusal) as caught:
        budget.take(41)
    assert (caught.value.status, caught.value.retry_after, budget.held) == (429, 1, 60)
    budget.give_back(60)
    budget.take(100)


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["He", "llo"], ["He", "llo"]),
        (["[", '{"name": "f", "arguments": {}}]'], ["", ""]),
        ([" ", " {", "}"], ["", "", ""]),
        (["fun", "ny"], ["", "funny"]),
        (["func", "tools", "[1]"], ["", "", ""]),
        (["functional"], ["functional"]),
        (["", "\n", "Hi"], ["", "", "\nHi"]),
    ],
)
def test_text_that_may_be_a_call_is_held(pieces: list[str], shown: list[str]) -> None:
    screen = Screen(hold_calls=True)
    assert [screen.push(one) for one in pieces] == shown
    whole = "".join(pieces)
    assert "".join(shown) + screen.rest(whole) == whole
    assert screen.rest("") == ""  # it was a call


def test_text_of_a_model_without_tools_is_not_held() -> None:
    assert Screen(hold_calls=False).push("[1") == "[1"


def test_references_in_parameters_stay_what_they_are() -> None:
    node = {
        "type": "object",
        "properties": {"next": {"$ref": "#/$defs/node"}, "v": {"type": "integer"}},
        "required": ["v"],
    }
    tools = [
        Function(name="a", parameters={"$ref": "#/$defs/node", "$defs": {"node": node}}),
        Function(
            name="b",
            parameters={
                "type": "object",
                "properties": {"x": {"$ref": "#/$defs/x"}},
                "required": ["x"],
                "$defs": {"x": {"enum": ["only this"]}},
            },
        ),
    ]
    grammar = calls_grammar(tools, one=False, tagged=True)
    assert grammar.startswith("root ::= <|tool_call|> calls <|/tool_call|>\n")
    assert "only this" in grammar


def test_parameters_that_are_no_grammar() -> None:
    """Any object, unless the tool is strict."""
    odd = {"type": "object", "properties": {"x": {"type": "string", "not": {"const": "y"}}}}
    assert calls_grammar([Function(name="a", parameters=odd)], one=True, tagged=False)
    with pytest.raises(Exception, match="not"):
        calls_grammar([Function(name="a", parameters=odd, strict=True)], one=True, tagged=False)


def test_a_forced_call_without_tags(alone: Model) -> None:
    """As a model of the family without the control tokens would have it: the whole answer is the call."""
    tool = Function(name="light", parameters={"room": {"type": "str"}, "on": {"type": "bool"}})
    grammar = calls_grammar([tool], one=True, tagged=False)
    sampling = Sampling(grammar=grammar)
    described = [{"name": "light", "parameters": tool.parameters}]
    reply = alone.chat(
        [{"role": "user", "content": "Light!"}], tools=described, sampling=sampling, max_tokens=400
    )
    (call,) = reply.tool_calls
    assert call.name == "light" and call.arguments.keys() == {"room", "on"}
    assert isinstance(call.arguments["on"], bool)


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"", "invalid_json", None),
        (b"{", "invalid_json", None),
        (b"[]", "invalid_json", None),
        (b"\xff\xfe{}", "invalid_json", None),
        (b'{"messages": "\xff"}', "invalid_json", None),
        (b'{"messages": "\\ud800"}', "invalid_json", None),
        (b"[" * 100_000, "invalid_json", None),
        (b'{"a":' * 100_000, "invalid_json", None),
        (b'{"temperature": NaN, "messages": []}', "invalid_json", None),
        (b'{"temperature": 1e999, "messages": []}', "invalid_type", "temperature"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "invalid_json", None),
        (b"{}", "missing_required_parameter", "messages"),
        (b'{"messages": [{"content": "a"}]}', "missing_required_parameter", "messages.0.role"),
        (b'{"messages": [{"role": "king", "content": "a"}]}', "invalid_type", "messages.0.role"),
        (b'{"messages": [{"role": "user", "content": 1}]}', "invalid_type", "messages.0.content"),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}',
            "invalid_type",
            "messages.0.content.0.image_url.image_url",
        ),
        (b'{"messages": [], "temperature": "1"}', "invalid_type", "temperature"),
        (b'{"messages": [], "stream": 1}', "invalid_type", "stream"),
        (b'{"messages": [], "presence_penalty": "0.5"}', "invalid_type", "presence_penalty"),
        (b'{"messages": [], "logit_bias": {"5": "1"}}', "invalid_type", "logit_bias"),
        (b'{"messages": [], "top_logprobs": true}', "invalid_type", "top_logprobs"),
        (b'{"messages": [], "n": 0}', "unsupported_value", "n"),
        (b'{"messages": [], "modalities": ["audio"]}', "unsupported_value", "modalities"),
        (b'{"messages": [], "functions": [1]}', "unsupported_value", "functions"),
    ],
)
def test_a_body_that_is_no_request(body: bytes, code: str, param: str | None) -> None:
    with pytest.raises(Refusal) as caught:
        parse(ChatRequest, body)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, code, param)
    assert len(caught.value.message) < 1000 and "\n" not in caught.value.message


def test_fields_that_change_nothing_are_ignored() -> None:
    body = {
        "messages": [],
        "user": "me",
        "metadata": {"a": "b"},
        "store": True,
        "n": 1,
        "presence_penalty": 0,
        "logit_bias": {},
        "top_logprobs": 0,
        "modalities": ["text"],
        "no such field": [1],
    }
    assert parse(ChatRequest, json.dumps(body).encode()).messages == []


FACTS = Facts("one", 8192, 36, 0, {"n_vocab": 4096})


def prepared(**fields: object) -> chat.Chat:
    body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
    return chat.prepare(parse(ChatRequest, json.dumps(body).encode()), Limits(), FACTS, None)


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("temperature", {"temperature": -1.0}),
        ("frequency_penalty", {"frequency_penalty": 2.01}),
        ("presence_penalty", {"presence_penalty": -2.01, "frequency_penalty": 2.0}),
        ("logit_bias", {"logit_bias": {"5": 100.01}}),
        ("logit_bias", {"logit_bias": {"4096": 1}}),
        ("logit_bias", {"logit_bias": {"-1": 1}}),
        ("logit_bias", {"logit_bias": {"1_0": 1}}),
        ("logit_bias", {"logit_bias": {"\u0663": 1}}),
        ("logit_bias", {"logit_bias": {" the": 1}}),
        ("logit_bias", {"logit_bias": {"": 1}}),
        ("logit_bias", {"logit_bias": {"9" * 5000: 1}}),
        ("logit_bias", {"logit_bias": {str(i): 1 for i in range(301)}}),
        ("top_logprobs", {"top_logprobs": 1}),
        ("top_logprobs", {"top_logprobs": 1, "logprobs": False}),
        ("top_logprobs", {"top_logprobs": 21, "logprobs": True}),
        ("top_logprobs", {"top_logprobs": -1, "logprobs": True}),
    ],
)
def test_settings_that_cannot_be(param: str, fields: dict[str, object]) -> None:
    with pytest.raises(Refusal) as caught:
        prepared(**fields)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_value", param)
    assert len(caught.value.message) < 200 and "\n" not in caught.value.message


def test_settings_at_their_limits() -> None:
    bias = {str(i): -100 if i % 2 else 100.0 for i in range(3796, 4096)}
    found = prepared(
        frequency_penalty=-2, presence_penalty=2, logit_bias=bias, logprobs=True, top_logprobs=20
    ).work.options
    wanted = {int(key): value for key, value in bias.items()}
    assert found["sampling"] == Sampling(frequency_penalty=-2, presence_penalty=2, logit_bias=wanted)
    assert (found["logprobs"], found["top_logprobs"]) == (True, 20)


@pytest.mark.parametrize("n", [-1, 6])
def test_log_probabilities_of_a_completion_that_cannot_be(n: int) -> None:
    request = parse(CompletionRequest, json.dumps({"prompt": "Hi", "logprobs": n}).encode())
    with pytest.raises(Refusal) as caught:
        completions.prepare(request, Limits(), FACTS)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_value", "logprobs")


def test_a_histogram_counts_up() -> None:
    one = Histogram((0.1, 1.0))
    for value in (0.1, 0.5, 3.0):
        one.add(value)
    assert one.lines("x") == [
        'x_bucket{le="0.1"} 1',
        'x_bucket{le="1"} 2',
        'x_bucket{le="+Inf"} 3',
        "x_sum 3.600000",
        "x_count 3",
    ]


@pytest.fixture(scope="module")
def served(nano: Path) -> ServedModel:
    with ServedModel(nano, kv_type="f32", n_threads=1) as found:
        yield found


def test_a_prompt_of_many_passes_is_read_as_ever(served: ServedModel, alone: Model) -> None:
    """Also beyond the short RoPE table, and where only the end is new."""
    for n in (700, 1023, 1024, 1025):
        ids = (np.arange(n) % 900 + 100).tolist()
        for k in (1, 5, 600):
            assert np.array_equal(served.token_logits(ids, k), alone.token_logits(ids, k)), (n, k)


def test_a_prompt_is_left_between_two_passes(served: ServedModel) -> None:
    """The model is none the worse."""
    words = [{"role": "user", "content": "word " * 3000}]
    asked: list[int] = []
    expected = served.chat(FRANCE).text

    def stop_at(most: int) -> None:
        asked.clear()
        served.should_stop = lambda: asked.append(1) or len(asked) >= most  # type: ignore[func-returns-value]

    for most in (1, 2, 3, 5):
        stop_at(most)
        with pytest.raises(Stopped):
            served.chat(words, max_tokens=1)
        assert len(asked) == most
        served.should_stop = lambda: False
        assert served.chat(FRANCE).text == expected
