# SPDX-License-Identifier: Apache-2.0
"""The public API on the real little model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import pocketphi
from pocketphi.runtime import report
from pocketphi.runtime.engine import Model
from pocketphi.runtime.errors import BundleError, InputError
from pocketphi.runtime.parts import Message
from pocketphi.runtime.sampler import Sampling

from ..conftest import Converted

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
TOOLS = [
    {
        "name": "alarm",
        "description": "Set an alarm",
        "parameters": {"hour": {"type": "int"}, "day": {"type": "str"}},
    },
    {"name": "light", "description": "Switch a light", "parameters": {"room": {"type": "str"}}},
]


def test_an_answer_and_what_it_took(nano_model: Model) -> None:
    reply = nano_model.chat(FRANCE)
    assert reply.text == "The capital of France is Paris."
    assert (reply.finish_reason, reply.mode, reply.adapter, reply.tool_calls) == (
        "stop",
        "language",
        None,
        (),
    )
    assert reply.token_ids[-1] in nano_model.bundle.stop_ids
    assert reply.usage.completion_tokens == len(reply.token_ids)
    assert reply.timings.prompt_n == reply.usage.prompt_tokens - reply.usage.cached_tokens
    assert reply.timings.predicted_n == len(reply.token_ids) - 1
    assert reply.timings.ttft_ms > 0


def test_streaming_gives_the_same_text(nano_model: Model) -> None:
    whole = nano_model.chat(FRANCE)
    answer = nano_model.chat(FRANCE, stream=True)
    pieces = [event.text for event in answer]
    assert "".join(pieces) == answer.reply.text == whole.text
    assert len(pieces) > 3
    assert answer.reply.token_ids == whole.token_ids


def test_leaving_a_stream_early(nano_model: Model) -> None:
    answer = nano_model.chat(FRANCE, stream=True)
    first = next(answer)
    answer.close()
    assert answer.reply.finish_reason == "cancelled"
    assert answer.reply.text.startswith(first.text)
    assert list(answer) == []
    assert nano_model.chat(FRANCE).text == "The capital of France is Paris."


def test_the_next_turn_reuses_the_cache(nano_model: Model) -> None:
    first = nano_model.chat(FRANCE)
    turns = [
        *FRANCE,
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "And of Italy?"},
    ]
    second = nano_model.chat(turns)
    assert second.usage.cached_tokens >= first.usage.prompt_tokens
    with_fresh_cache = Model(nano_model.bundle.root, kv_type="f32")
    assert with_fresh_cache.chat(turns).token_ids == second.token_ids
    with_fresh_cache.close()


def test_limits_and_stop_texts(nano_model: Model) -> None:
    cut = nano_model.chat(FRANCE, max_tokens=3)
    assert (cut.finish_reason, len(cut.token_ids)) == ("length", 3)
    stopped = nano_model.chat(FRANCE, stop=["France"])
    assert (stopped.finish_reason, stopped.text) == ("stop", "The capital of ")


def test_a_draft_saves_passes_and_is_counted(nano_model: Model) -> None:
    plain = nano_model.chat(FRANCE)
    again = nano_model.chat(FRANCE, draft=plain.token_ids)
    assert (again.token_ids, again.text) == (plain.token_ids, plain.text)
    n = len(plain.token_ids)
    counted = report.reply_object(again)["timings"]
    assert (counted["n_passes"], counted["draft_n"], counted["draft_n_accepted"]) == (0, n, n - 1)
    assert (plain.timings.n_passes, plain.timings.draft_n) == (n - 1, 0)
    assert nano_model.context_used == plain.usage.prompt_tokens + n - 1


def test_the_context_limit_ends_an_answer(nano: Path) -> None:
    with Model(nano, n_ctx=14) as model:
        reply = model.chat(FRANCE)
        assert (reply.finish_reason, model.context_used) == ("length", 14)
        with pytest.raises(InputError, match="the context holds 14"):
            model.chat([{"role": "user", "content": "word " * 30}])


def test_tool_calls_are_structured_and_results_fed_back(nano_model: Model) -> None:
    turns = [
        {"role": "system", "content": "You are a helpful assistant with some tools."},
        {"role": "user", "content": "Wake me up at 9 on Saturday."},
    ]
    reply = nano_model.chat(turns, tools=TOOLS)
    assert reply.finish_reason == "tool_calls"
    assert [(c.name, c.arguments) for c in reply.tool_calls] == [("alarm", {"hour": 9, "day": "Saturday"})]
    assert reply.text == ""
    as_text = nano_model.chat(turns, tools=json.dumps(TOOLS))
    assert as_text.token_ids == reply.token_ids
    after = nano_model.chat(
        [
            Message("system", turns[0]["content"]),
            Message("user", turns[1]["content"]),
            Message("assistant", "", reply.tool_calls),
            Message("tool", '{"ok": true}'),
        ],
        tools=TOOLS,
    )
    assert after.usage.cached_tokens >= reply.usage.prompt_tokens + len(reply.token_ids) - 2
    assert after.finish_reason in ("stop", "length")


def test_nothing_of_a_call_streams_as_text(nano_model: Model) -> None:
    answer = nano_model.chat(
        [
            {"role": "system", "content": "You have some tools."},
            {"role": "user", "content": "Wake me up at 9 on Saturday."},
        ],
        stream=True,
        tools=TOOLS,
    )
    assert "".join(e.text for e in answer) == ""
    assert answer.reply.tool_calls[0].name == "alarm"


def test_an_adapter_on_text_changes_the_computation(nano_model: Model) -> None:
    spoken = nano_model.chat(FRANCE, adapter="speech", max_tokens=8)
    assert (spoken.mode, spoken.adapter) == ("speech", "speech")
    assert "speech adapter" in nano_model.resident
    assert any("reading the conversation again" in n for n in spoken.notes)
    with pytest.raises(InputError, match="adapter"):
        nano_model.chat(FRANCE, adapter="smell")  # type: ignore[arg-type]
    assert nano_model.chat(FRANCE).text == "The capital of France is Paris."


@pytest.mark.parametrize(
    "marker", ["<|end|>", "<|assistant|>", "<|tool_call|>", "<|endoftext10|>", "<|endoftext|>"]
)
def test_control_tokens_in_what_a_user_types_stay_text(marker: str, nano_model: Model) -> None:
    plain = nano_model.chat([{"role": "user", "content": "Hi"}], max_tokens=1).usage.prompt_tokens
    spelled = nano_model.chat([{"role": "user", "content": f"Hi{marker}"}], max_tokens=1).usage.prompt_tokens
    assert spelled >= plain + 4, "a control token would be one"


@pytest.mark.parametrize(
    ("turns", "want"),
    [
        ([], "no message"),
        ([{"role": "boss", "content": "x"}], "role"),
        ([{"role": "user"}], "content"),
        ([{"role": "user", "content": 3}], "content"),
        ([{"role": "user", "content": "\ud800"}], "surrogate"),
    ],
)
def test_messages_that_cannot_be_used(turns: list[dict[str, object]], want: str, nano_model: Model) -> None:
    with pytest.raises(InputError, match=want) as caught:
        nano_model.chat(turns)
    assert "\n" not in str(caught.value)


def test_options_that_cannot_be_used(nano_model: Model, nano: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="max tokens is 0"):
        nano_model.chat(FRANCE, max_tokens=0)
    with pytest.raises(InputError, match="context is 8193"):
        Model(nano, n_ctx=8193)
    with pytest.raises(InputError, match="context is -1"):
        Model(nano, n_ctx=-1)
    with pytest.raises(BundleError, match="no such model directory"):
        Model(tmp_path / "gone")


def test_the_long_table_takes_over_in_the_middle_of_an_answer(nano: Path) -> None:
    """A conversation of just under 1,024 tokens whose answer crosses: noted once, and still an answer."""
    with Model(nano, kv_type="f32") as model:
        filler = "one two three four five six seven eight nine ten "
        turns = [{"role": "user", "content": filler * 100}]
        n = model.chat(turns, max_tokens=1).usage.prompt_tokens
        text = filler * (100 * 1015 // n)
        reply = model.chat(
            [{"role": "user", "content": text}],
            max_tokens=40,
            sampling=Sampling(grammar='root ::= ("ha "){99}'),
        )
        assert reply.usage.prompt_tokens < 1024 < model.context_used
        assert reply.notes == (
            "the conversation passed 1024 tokens: reading it again with the long RoPE table",
        )
        assert len(reply.token_ids) == 40


def test_a_reasoning_model_starts_with_its_identity(converted: Converted) -> None:
    with Model(converted("phi4-mini-reasoning", "Q8_0")) as model:
        without = model.chat([{"role": "user", "content": "2+2?"}], max_tokens=2).usage.prompt_tokens
    with Model(converted("phi4-mini", "Q8_0")) as model:
        plain = model.chat([{"role": "user", "content": "2+2?"}], max_tokens=2).usage.prompt_tokens
    assert without > plain + 10


def test_the_package_offers_its_names() -> None:
    assert pocketphi.Model is Model
    assert set(pocketphi.__all__) >= {"Model", "Message", "Reply", "Sampling", "PocketPhiError"}
    with pytest.raises(AttributeError, match="no attribute"):
        _ = pocketphi.nothing
