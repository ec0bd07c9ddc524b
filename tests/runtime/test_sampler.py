# SPDX-License-Identifier: Apache-2.0
"""Sampling settings, and llama.cpp's chain as we drive it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pocketphi.runtime.engine import Model
from pocketphi.runtime.errors import InputError
from pocketphi.runtime.sampler import Sampling
from pocketphi.runtime.sampler_ggml import GgmlSampler, schema_to_grammar

VOCAB = 4096
NONE_MASKED = np.zeros(0, np.int32)


def logits(seed: int = 0) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.random.default_rng(seed).normal(0, 3, VOCAB).astype(np.float32)


def draw(sampling: Sampling, n: int, masked: np.ndarray = NONE_MASKED) -> list[int]:
    sampler = GgmlSampler(sampling, None, VOCAB, masked)
    found = [sampler.sample(logits()) for _ in range(n)]
    sampler.close()
    sampler.close()
    return found


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 2.0},
        {"repeat_penalty": 0.0},
        {"repeat_penalty": math.nan},
        {"frequency_penalty": 2.1},
        {"frequency_penalty": math.nan},
        {"presence_penalty": -2.1},
        {"logit_bias": {1: 100.5}},
        {"logit_bias": {1: math.nan}},
        {"seed": -1},
        {"seed": 1 << 32},
        {"grammar": "root ::= x", "json_schema": "{}"},
    ],
)
def test_settings_out_of_range(bad: dict[str, object]) -> None:
    with pytest.raises(InputError) as caught:
        Sampling(**bad)  # type: ignore[arg-type]
    assert "expected" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_greedy_takes_the_largest() -> None:
    assert draw(Sampling(), 3) == [int(logits().argmax())] * 3


def test_a_masked_id_is_never_chosen() -> None:
    best = int(logits().argmax())
    second = int(np.argsort(logits())[-2])
    assert draw(Sampling(), 1, np.array([best], np.int32)) == [second]
    assert best not in draw(Sampling(temperature=2.0, seed=1), 200, np.array([best], np.int32))


def test_the_seed_decides() -> None:
    hot = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    assert draw(Sampling(**hot, seed=5), 20) == draw(Sampling(**hot, seed=5), 20)
    assert draw(Sampling(**hot, seed=5), 20) != draw(Sampling(**hot, seed=6), 20)
    assert draw(Sampling(**hot), 20) != draw(Sampling(**hot), 20)


def test_the_distribution_is_the_softmax() -> None:
    """2,000 draws over the 5 most probable tokens: each count within 5 sigma of n p."""
    n = 2000
    found = draw(Sampling(temperature=1.0, top_k=5, top_p=1.0, min_p=0.0, seed=3), n)
    top = np.argsort(logits())[-5:]
    p = np.exp(logits()[top].astype(np.float64))
    p /= p.sum()
    counts = np.array([found.count(int(t)) for t in top])
    assert counts.sum() == n
    assert (abs(counts - n * p) <= 5 * np.sqrt(n * p * (1 - p)) + 1).all()


def test_min_p_and_top_p_cut_the_tail() -> None:
    p = np.exp(logits().astype(np.float64))
    p /= p.sum()
    ranked = np.argsort(-p)
    kept_top_p = set(ranked[: int(np.searchsorted(np.cumsum(p[ranked]), 0.3)) + 1].tolist())
    assert set(draw(Sampling(temperature=1.0, top_k=0, top_p=0.3, min_p=0.0, seed=1), 300)) <= kept_top_p
    kept_min_p = set(np.flatnonzero(p >= 0.5 * p.max()).tolist())
    assert set(draw(Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.5, seed=1), 300)) <= kept_min_p


def test_the_repeat_penalty_turns_greedy_away_from_what_it_said() -> None:
    found = draw(Sampling(repeat_penalty=50.0), 10)
    assert len(set(found)) == 10


SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"city": {"type": "string"}, "known": {"type": "boolean"}},
        "required": ["city", "known"],
        "additionalProperties": False,
    }
)


def test_a_schema_constrains_the_answer(nano_model: Model) -> None:
    reply = nano_model.chat(
        [{"role": "user", "content": "What is the capital of France?"}],
        sampling=Sampling(json_schema=SCHEMA),
        max_tokens=200,
    )
    if reply.finish_reason == "stop":
        found = json.loads(reply.text)
        assert set(found) == {"city", "known"}
        assert isinstance(found["known"], bool)
    else:  # the little model may go on inside the string: what there is must still be a prefix
        assert reply.text.lstrip().startswith("{")


def test_a_grammar_that_leaves_one_sentence(nano_model: Model) -> None:
    said = 'root ::= "zebra " [0-9] [0-9] " 日本 🦓"'
    for temperature in (0.0, 1.5):
        reply = nano_model.chat(
            [{"role": "user", "content": "Hello!"}], sampling=Sampling(temperature, grammar=said, seed=2)
        )
        assert reply.finish_reason == "stop"
        assert reply.text.startswith("zebra ")
        assert reply.text.endswith(" 日本 🦓")
        assert reply.text[6:8].isdigit()


@pytest.mark.parametrize("grammar", ["", "   ", "nonsense", "a ::= b", "root ::= root", 'x ::= "y"', "a\0b"])
def test_grammars_that_do_not_parse(grammar: str, nano_model: Model) -> None:
    with pytest.raises(InputError, match="grammar") as caught:
        nano_model.chat([{"role": "user", "content": "Hi"}], sampling=Sampling(grammar=grammar))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "schema",
    [
        "",
        "{",
        "[]",
        "3",
        '{"type": "no such type"}',
        '{"$ref": "#/nowhere"}',
        '{"pattern": "(", "type": "string"}',
    ],
)
def test_schemas_that_are_none(schema: str) -> None:
    with pytest.raises(InputError, match="JSON schema") as caught:
        schema_to_grammar(schema)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "schema",
    [
        '{"type": "string", "minLength": 1000000000}',
        '{"type": "integer", "minimum": 5}',
        '{"type": "array", "items": {"type": "number", "multipleOf": 3}}',
        '{"properties": {"a": {"uniqueItems": true}}}',
        '{"items": 3}',
        "{" + '"items": {' * 100 + "}" * 101,
        '{"allOf": [{"type": "integer"}]}',
        '{"allOf": [{"type": "string", "maxLength": 3}]}',
        '{"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"type": "integer"}}}',
        '{"allOf": [{"$ref": "#/$defs/a"}], "properties": {"b": {"type": "null"}},'
        ' "$defs": {"a": {"properties": {"c": {"type": "null"}}}}}',
        '{"allOf": [{"properties": {"a": {"type": "null"}}}, {"properties": {"a": {"type": "string"}}}]}',
        '{"type": "object", "anyOf": [{"type": "integer"}], "properties": {"a": {"type": "null"}}}',
        '{"oneOf": [{"type": "integer"}], "anyOf": [{"type": "string"}]}',
        '{"type": "integer", "enum": ["x"], "const": 5}',
        '{"type": "integer", "enum": ["x"]}',
        '{"type": "integer", "const": true}',
        '{"const": {"$ref": "#/$defs/a"}, "$defs": {"a": {"type": "null"}}}',
        '{"enum": []}',
        '{"enum": "abc"}',
        '{"anyOf": []}',
        '{"type": "char"}',
        '{"type": []}',
        '{"type": ["string", "null"], "maxLength": 3}',
        '{"$ref": "#/$defs/a", "maxLength": 3, "$defs": {"a": {"type": "string"}}}',
        '{"type": "string", "pattern": "^a*$", "maxLength": 3}',
        '{"type": "array", "minItems": 3}',
        '{"type": "array", "items": {"type": "null"}, "minItems": 3, "maxItems": 2}',
        '{"type": "object", "properties": {"a": {"type": "null"}}, "required": ["b"]}',
        '{"type": "object", "required": ["b"]}',
        '{"$ref": "#/default", "default": {"type": "string", "maxLength": 100000000}}',
        '{"$ref": "#/examples", "examples": {"type": "integer", "multipleOf": 7}}',
        '{"anyOf": [{"$ref": "#/$defs/a/const"}], "$defs": {"a": {"const": {"type": "integer"}}}}',
        '{"$ref": "#/$defs", "$defs": {"type": {"type": "integer"}}}',
    ],
)
def test_schemas_that_a_grammar_cannot_hold(schema: str) -> None:
    with pytest.raises(InputError, match="JSON schema"):
        schema_to_grammar(schema)


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"$ref": "#/$defs/a", "$defs": {"a": {"const": 5}}}, "5"),
        ({"$ref": "#/definitions/string", "definitions": {"string": {"enum": ["zebra"]}}}, '"zebra"'),
        ({"$ref": "#/$defs/space", "$defs": {"space": {"const": 7}}}, "7"),
        (
            {
                "anyOf": [{"$ref": "#/$defs/a"}],
                "$defs": {"a": {"const": 1}},
                "definitions": {"a": {"const": 2}},
            },
            "1",
        ),
        (
            {
                "type": "object",
                "properties": {
                    "place0": {"const": 1},
                    "b": {"$ref": "#/$defs/c"},
                    "c": {"$ref": "#/$defs/c"},
                },
                "required": ["place0", "b", "c"],
                "$defs": {"c": {"enum": [3]}},
            },
            '{"place0":1,"b":3,"c":3}',
        ),
        (
            {
                "allOf": [{"$ref": "#/$defs/a"}, {"properties": {"y": {"const": None}}}],
                "$defs": {"a": {"type": "object", "properties": {"x": {"const": 1.5}}}},
            },
            '{"x":1.5,"y":null}',
        ),
    ],
)
def test_a_schema_that_leaves_one_answer(schema: dict[str, object], text: str, nano_model: Model) -> None:
    reply = nano_model.chat(
        [{"role": "user", "content": "Hi"}], sampling=Sampling(json_schema=json.dumps(schema)), max_tokens=80
    )
    assert json.loads(reply.text) == json.loads(text)


INTERRUPTED = """
import signal, sys, threading
from pathlib import Path
from pocketphi.runtime.engine import Model
from pocketphi.runtime.sampler import Sampling

grammar = 'root ::= "a" root "b" | "a" root "c" | "\u2603"'
seen = []

def look(number, frame):
    seen.append([t.ident for t in threading.enumerate() if t.name.endswith("grammar")])
    if len(seen) > 8 and seen[-1] and all(one == seen[-1] for one in seen[-8:]):
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise KeyboardInterrupt

signal.signal(signal.SIGALRM, look)
with Model(Path(sys.argv[1])) as model:
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.25, 0.25)
        model.chat([{"role": "user", "content": "Hi"}], sampling=Sampling(grammar=grammar), max_tokens=400)
    except KeyboardInterrupt:
        print("interrupted")
    again = model.chat([{"role": "user", "content": "Hi"}], sampling=Sampling(grammar='root ::= "zebra"'))
    print(again.text)
"""


def test_ctrl_c_while_a_grammar_is_at_work(nano: Path) -> None:
    """The signal comes when one call has lasted for 2 s; nothing that call still uses may be freed."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(nano)], capture_output=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"interrupted\nzebra\n", b"")


def test_brackets_too_deep_for_the_parser(nano_model: Model) -> None:
    deep = "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000
    with pytest.raises(InputError, match="nested deeper"):
        nano_model.chat([{"role": "user", "content": "Hi"}], sampling=Sampling(grammar=deep))
    literal = 'root ::= "' + "(" * 300 + '"'
    assert (
        nano_model.chat([{"role": "user", "content": "Hi"}], sampling=Sampling(grammar=literal)).text
        == "(" * 300
    )


def test_a_schema_that_refers_to_itself(nano_model: Model) -> None:
    tree = {
        "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}},
        "$ref": "#/$defs/node",
    }
    reply = nano_model.chat(
        [{"role": "user", "content": "Hi"}], sampling=Sampling(json_schema=json.dumps(tree)), max_tokens=40
    )
    assert reply.text.lstrip().startswith("{")
