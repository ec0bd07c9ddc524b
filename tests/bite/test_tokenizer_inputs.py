# SPDX-License-Identifier: Apache-2.0
"""Tokenizers, templates and configurations that are damaged, of another model, or programs."""

# ruff: noqa: E501  (one case a line reads as a table)
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import Bitten
from .table import Case, Place, seal

Plain = dict[str, Any]
Make = Callable[[Place], list[str]]


def file(name: str, content: bytes) -> Make:
    """Convert a checkpoint in which that file is another."""

    def make(place: Place) -> list[str]:
        source = place.checkpoint()
        (source / name).write_bytes(content)
        return ["convert", str(source), "-o", str(place.path / "out"), "--quant", "Q8_0"]

    return make


def edited(name: str, change: Callable[[Plain], object]) -> Make:
    """Convert a checkpoint in which fields of that file are others."""

    def make(place: Place) -> list[str]:
        source = place.checkpoint()
        plain = json.loads((source / name).read_text("utf-8"))
        change(plain)
        return file(name, json.dumps(plain).encode())(_again(place, source))

    return make


def _again(place: Place, source: Path) -> Place:
    """The place without the copy that was only read."""
    import shutil

    shutil.rmtree(source)
    return place


def config(**changes: object) -> Make:
    return edited("config.json", lambda plain: plain.update(changes))


def rope(**changes: object) -> Make:
    return edited("config.json", lambda plain: plain["rope_scaling"].update(changes))


def template(text: str) -> Make:
    """Convert with that chat template."""
    return file("chat_template.jinja", text.encode())


def running(change: Callable[[Plain], object] | bytes) -> Make:
    """`run` a model directory whose tokenizer is another, and whose list of files says so."""

    def make(place: Place) -> list[str]:
        model = place.model("phi4-mini", "Q8_0")
        path = model / "tokenizer.json"
        if isinstance(change, bytes):
            path.write_bytes(change)
        else:
            plain = json.loads(path.read_text("utf-8"))
            change(plain)
            path.write_text(json.dumps(plain), "utf-8")
        seal(model)
        return ["run", "-m", str(model), "-p", "Hi", "-n", "2"]

    return make


def added(plain: Plain, **changes: object) -> None:
    plain["added_tokens"][0].update(changes)


GOOD = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "<|tool|><|/tool|><|system|><|user|><|assistant|>"
)
LOOP = "{% for a in range(10**9) %}{% for b in range(10**9) %}{{ a * b }}{% endfor %}{% endfor %}"
ESCAPE = "{{ ''.__class__.__mro__[1].__subclasses__()[104].__init__.__globals__['sys'].modules['os'].system('touch owned') }}"
NOT_KNOWN = r"the chat template is not one that is known: name the format with --chat-format"
HUGE = '{"a": 1' + "0" * 5000 + "}"
CASES = [
    Case("config missing", lambda place: ((s := place.checkpoint()), (s / "config.json").unlink(), ["convert", str(s), "-o", "out"])[2],
         5, r"has no config\.json, expected a Hugging Face checkpoint"),
    Case("config empty", file("config.json", b""), 5, r"config\.json: .*JSON"),
    Case("config not UTF-8", file("config.json", b'{"a": "\xff"}'), 5, r"config\.json: is not UTF-8 at byte 7"),
    Case("config UTF-16", file("config.json", "{}".encode("utf-16")), 5, r"config\.json: is not UTF-8 at byte 0"),
    Case("config a list", file("config.json", b"[]"), 5, r"config\.json: is a JSON array, expected an object"),
    Case("config deep", file("config.json", b'{"a":' * 200_000), 5, r"config\.json: is JSON nested too deeply"),
    Case("config a key twice", file("config.json", b'{"a": 1, "a": 2}'), 5, r"config\.json: .*key 'a' stands twice"),
    Case("config a huge number", file("config.json", HUGE.encode()), 5, r"config\.json: .*a number has 5001 digits"),
    Case("config of 4 MB", file("config.json", b" " * ((4 << 20) + 1)), 5, r"config\.json: has 4194305 bytes, expected at most"),
    Case("of another model", config(model_type="llama"), 5, r"config\.json: field 'model_type' is 'llama', expected"),
    Case("code of its own", config(auto_map={"AutoModel": "evil.Model"}), 0, r"out: checkpoint, Q8_0", leaves="^out/"),
    Case("quantized already", config(quantization_config={"bits": 4}), 5, r"field 'quantization_config' is set, expected plain"),
    Case("attention bias", config(attention_bias=True), 5, r"field 'attention_bias' is True, expected False"),
    Case("no heads", config(num_attention_heads=0), 5, r"field 'num_attention_heads' is 0, expected"),
    Case("heads that do not divide", config(num_attention_heads=7), 5, r"field 'hidden_size' is 256, expected a multiple of"),
    Case("KV heads that do not divide", config(num_key_value_heads=3), 5, r"'num_key_value_heads' is 3, expected a divisor"),
    Case("2^40 wide", config(hidden_size=1 << 40), 5, r"field 'hidden_size' is 1099511627776, expected"),
    Case("2^31 layers", config(num_hidden_layers=1 << 31), 5, r"field 'num_hidden_layers' is 2147483648, expected"),
    Case("513 layers", config(num_hidden_layers=513), 5, r"(num_hidden_layers|layers\.2)"),
    Case("no context", config(max_position_embeddings=0), 5, r"field 'max_position_embeddings' is 0, expected"),
    Case("a negative context", config(max_position_embeddings=-1), 5, r"field 'max_position_embeddings' is -1, expected"),
    Case("epsilon NaN", edited("config.json", lambda p: p.update(rms_norm_eps=float("nan"))), 5, r"config\.json: .*NaN"),
    Case("an active window", config(sliding_window=16), 5, r"field 'sliding_window' is 16, expected null, 0 or at least 2048"),
    Case("32 rope factors for 24", rope(long_factor=[1.0] * 32), 5, r"long_factor' is a list of 32, expected a list of 24 finite numbers"),
    Case("a rope factor of 0", rope(long_factor=[0.0] * 24), 5, r"long_factor\[0\]' is 0\.0, expected a finite number above 0"),
    Case("a rope factor below 0", rope(short_factor=[-1.0] * 24), 5, r"short_factor\[0\]' is -1\.0, expected a finite number above 0"),
    Case("an unknown rope", rope(type="spiral"), 5, r"field .*type' is 'spiral', expected 'longrope'"),
    Case("another vocabulary", config(vocab_size=200_029), 5, r"embed_tokens\.weight' has shape \[2880, 256\], expected \[200029"),
    Case("tokenizer missing", lambda place: ((s := place.checkpoint()), (s / "tokenizer.json").unlink(), ["convert", str(s), "-o", "out"])[2],
         5, r"has no tokenizer\.json, expected a Hugging Face checkpoint"),
    Case("tokenizer empty", file("tokenizer.json", b""), 5, r"tokenizer\.json: .*JSON"),
    Case("tokenizer not UTF-8", file("tokenizer.json", b'{"a": "\xff"}'), 5, r"tokenizer\.json: is not UTF-8 at byte 7"),
    Case("tokenizer an empty object", file("tokenizer.json", b"{}"), 5, r"tokenizer\.json: "),
    Case("tokenizer of 64 MB", lambda place: sparse(place), 5, r"tokenizer\.json: has 67108865 bytes, expected at most 67108864"),
    Case("another kind", edited("tokenizer.json", lambda p: p["model"].update(type="Unigram")), 5, r"tokenizer\.json: .*(Unigram|BPE)"),
    Case("a token twice", edited("tokenizer.json", lambda p: p["model"]["vocab"].update({"zzzz": 5})), 5, r"tokenizer\.json: two tokens of model\.vocab have the same id"),
    Case("an id of 2^31", edited("tokenizer.json", lambda p: p["model"]["vocab"].update({"zzzz": 1 << 31})), 5, r"tokenizer\.json: "),
    Case("an id of -1", edited("tokenizer.json", lambda p: p["model"]["vocab"].update({"zzzz": -1})), 5, r"tokenizer\.json: "),
    Case("an id that is text", edited("tokenizer.json", lambda p: p["model"]["vocab"].update({"zzzz": "5"})), 5, r"tokenizer\.json: "),
    Case("merges that are none", edited("tokenizer.json", lambda p: p["model"].update(merges=[["a"]])), 5, r"tokenizer\.json: "),
    Case("a merge of unknown tokens", edited("tokenizer.json", lambda p: p["model"]["merges"].append("qqqq zzzz")), 5, r"tokenizer\.json: "),
    Case("a regex of its own", edited("tokenizer.json", lambda p: p.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$"},
         "behavior": "Isolated", "invert": False})), 5, r"tokenizer\.json: "),
    Case("an added token of 1 MB", edited("tokenizer.json", lambda p: added(p, content="x" * (1 << 20))), 5, r"(tokenizer\.json|vocabulary)"),
    Case("an added token with a NUL", edited("tokenizer.json", lambda p: added(p, content="a\0b")), 5, r"(tokenizer\.json|vocabulary)"),
    Case("no control tokens", edited("tokenizer.json", lambda p: p.update(added_tokens=[])), 5, r"(lacks|endoftext)"),
    Case("template unknown", template("{{ messages }}"), 5, NOT_KNOWN),
    Case("template empty", template(""), 5, NOT_KNOWN),
    Case("template that loops", template(LOOP), 5, NOT_KNOWN),
    Case("template that reads attributes", template(ESCAPE), 5, NOT_KNOWN),
    Case("template known, that loops", template(GOOD + LOOP), 0, r"out: checkpoint, Q8_0", leaves="^out/"),
    Case("template known, that reads attributes", template(GOOD + ESCAPE), 0, r"out: checkpoint, Q8_0", leaves="^out/"),
    Case("template with words of its own", template(GOOD + "{{ 'You are a very helpful assistant' }}"), 5, NOT_KNOWN),
    Case("template not UTF-8", file("chat_template.jinja", b"\xff"), 5, r"chat_template\.jinja: is not UTF-8 at byte 0"),
    Case("template of 4 MB", file("chat_template.jinja", b" " * ((4 << 20) + 1)), 5, r"chat_template\.jinja: has 4194305 bytes"),
    Case("generation config a list", file("generation_config.json", b"[]"), 5, r"generation_config\.json: is a JSON array, expe"),
    Case("a stop id of 2^31", edited("generation_config.json", lambda p: p.update(eos_token_id=1 << 31)), 5, r"eos_token_id"),
    Case("a stop id that is text", edited("generation_config.json", lambda p: p.update(eos_token_id="x")), 5, r"eos_token_id"),
    Case("run: tokenizer empty", running(b""), 3, r"tokenizer\.json: cannot be read as a vocabulary"),
    Case("run: not JSON", running(b"{nonsense"), 3, r"tokenizer\.json: cannot be read as a vocabulary"),
    Case("run: not UTF-8", running(b'{"\xff": 1}'), 3, r"tokenizer\.json: cannot be read as a vocabulary"),
    Case("run: deep", running(b"[" * 500_000), 3, r"tokenizer\.json: cannot be read as a vocabulary"),
    Case("run: another kind", running(lambda p: p["model"].update(type="WordLevel", unk_token="a")), 3, r"tokenizer\.json: "),
    Case("run: an id past the model", running(lambda p: p["model"]["vocab"].update({"zzzz": 5000})), 3, r"tokenizer\.json: holds \d+ ids"),
    Case("run: an id twice", running(lambda p: p["model"]["vocab"].update({"zzzz": 5})), 3, r"tokenizer\.json: two tokens have the same id"),
    Case("run: without bytes", running(lambda p: p["model"]["vocab"].pop("!")), 3, r"tokenizer\.json: "),
    Case("run: a regex of its own", running(lambda p: p["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "(a+)+$"})), 3,
         r"tokenizer\.json: its normalizer and pre-tokenizer are neither"),
    Case("run: dropout", running(lambda p: p["model"].update(dropout=0.5)), 3, r"tokenizer\.json: uses dropout or affixes, expected"),
    Case("run: no control tokens", running(lambda p: p.update(added_tokens=[])), (2, 3), r"control token"),
]  # fmt: skip


def sparse(place: Place) -> list[str]:
    source = place.checkpoint()
    with (source / "tokenizer.json").open("wb") as content:
        content.truncate((64 << 20) + 1)
    return ["convert", str(source), "-o", "out"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_tokenizer_or_configuration(case: Case, bitten: Bitten) -> None:
    bitten(case)
