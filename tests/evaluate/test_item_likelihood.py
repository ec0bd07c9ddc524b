# SPDX-License-Identifier: Apache-2.0
"""Likelihoods of reference answers: beside logits taken token by token, and what cannot be measured."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pocketphi.evaluate.item_likelihood import (
    check_base,
    figures,
    item_prompt,
    likelihoods,
    log_probabilities,
    predictions,
    reference_ids,
)
from pocketphi.evaluate.items import Item, read_items
from pocketphi.evaluate.journal import Answered, Journal, Took, finished, row
from pocketphi.evaluate.likelihood_judge import LikelihoodJudge
from pocketphi.evaluate.report import Report, markdown, table
from pocketphi.runtime.bundle import Bundle
from pocketphi.runtime.engine import Model
from pocketphi.runtime.errors import InputError, KernelError
from pocketphi.runtime.prompt import Control, Text, parse_raw

from ..conftest import Converted
from ..scoring import EVAL

Float64 = npt.NDArray[np.float64]

ADAPTERS = {"text": None, "tools": None, "speech": "speech", "vision": "vision", "vision_speech": "vision"}
END = 2853  # <|end|> of phi4-nano
N_TOKENS = 2862  # of its 4,096 ids: those after have no token
# Two ways to read a sequence: each is within 2.2e-5 of exact (tests/golden/README.md). Quantized weights are
# multiplied in whole numbers, what is float beside them is the same.
LOGITS = 2 * 2.2e-5
LN_P = 2 * LOGITS  # a logit and the logarithm of a sum of such
JOB = {"model": "m", "recipe": "F32", "data": "d.jsonl", "data_sha256": "0" * 64, "metric": "kld"}
TOOK = Took(0.0, 1, 1.0, 0, 0.0, 0.0)


def first(name: str) -> tuple[Item, ...]:
    return read_items(EVAL / f"{name}.jsonl", limit=2).items


def item(tmp_path: Path, **values: Any) -> Item:
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"id": "x", "prompt": "<|user|>Hi<|end|><|assistant|>"} | values), "utf-8")
    return read_items(path).items[0]


@pytest.fixture(scope="module")
def q4_model(converted: Converted) -> Iterator[Model]:
    with Model(converted("phi4-nano", "Q4_0"), kv_type="f32") as model:
        yield model


def expected_ids(model: Model, one: Item) -> list[int]:
    """By hand: text, or a call in its two control tokens; then the end."""
    text = one.reference
    tag, end_tag = "<|tool_call|>", "<|/tool_call|>"
    inner = text.removeprefix(tag).removesuffix(end_tag)
    pieces = [Control(tag), Text(inner), Control(end_tag)] if text.startswith(tag) else [Text(text)]
    return [*model.tokenizer.encode(pieces).tolist(), END]


def token_by_token(model: Model, one: Item, adapter: str | None) -> Float64:
    """ln p at each place of the reference, float64 [n, ids with a token]: one forward pass for each token."""
    model.forget()
    assert one.prompt is not None
    spans = model._request(parse_raw(one.prompt, model.tokenizer.control_tokens, one.media), {}, False).spans
    found = [model._session.read(spans, adapter=adapter)[0]]
    found += [model._session.step(i) for i in expected_ids(model, one)[:-1]]
    logits = np.array(found, np.float64)[:, :N_TOKENS]
    return logits - np.log(np.exp(logits).sum(axis=1))[:, None]


@pytest.mark.parametrize("name", ADAPTERS)
def test_each_mode_beside_one_pass_for_each_token(name: str, nano_model: Model, q4_model: Model) -> None:
    for one, found in likelihoods(q4_model, first(name), base=nano_model):
        ids = expected_ids(nano_model, one)
        ln_p, ln_base = (token_by_token(model, one, ADAPTERS[name]) for model in (q4_model, nano_model))
        rows = np.arange(len(ids))
        assert set(map(len, found.positions.values())) == {len(ids)}
        np.testing.assert_allclose(found.positions["nll"], -ln_p[rows, ids], rtol=0, atol=LN_P)
        np.testing.assert_allclose(found.positions["nll_base"], -ln_base[rows, ids], rtol=0, atol=LN_P)
        gap, p = ln_base - ln_p, np.exp(ln_base)
        # Of Σ p · gap: p is off by a factor e^±LN_P, gap by twice LN_P.
        room = math.expm1(LN_P) * (p * abs(gap)).sum(1) + 2 * LN_P * math.exp(LN_P)
        assert (abs(found.positions["kld"] - (p * gap).sum(1)) <= room).all()
        tops, base_tops = ln_p.argmax(1), ln_base.argmax(1)
        np.testing.assert_array_equal(found.positions["same_top"], tops == base_tops)
        assert found.hypothesis == q4_model.tokenizer.decode(tops)
        ((_, alone),) = likelihoods(q4_model, [one])
        assert alone.positions == {"nll": found.positions["nll"]}
        assert found.took.prompt_n == 2 * alone.took.prompt_n


def test_a_model_is_no_way_from_itself(nano: Path, nano_model: Model) -> None:
    """The same products in the same order: the same bits, so every term is p · 0."""
    items = [first(name)[0] for name in ADAPTERS]
    with Model(nano, kv_type="f32") as base:
        for _, found in likelihoods(nano_model, items, base=base):
            assert set(found.positions["kld"]) == {0.0}
            assert set(found.positions["same_top"]) == {1.0}
            assert found.positions["nll"] == found.positions["nll_base"]


def test_messages_are_read_as_chat_reads_them(nano_model: Model, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}]
    (tmp_path / "turns.jsonl").write_text(json.dumps({"id": "x", "messages": turns, "reference": "Hello."}))
    ((_, by_turns),) = likelihoods(nano_model, read_items(tmp_path / "turns.jsonl").items)
    ((_, by_markup),) = likelihoods(nano_model, [item(tmp_path, reference="Hello.")])
    assert by_turns.positions == by_markup.positions


def test_formulas_in_another_notation() -> None:
    rng = np.random.default_rng(7)
    logits, of_base = rng.normal(0, 20, (2, 5, 11)).astype(np.float32)
    ids, gone = np.array([0, 3, 9, 3, 1], np.int32), np.array([2, 10], np.int32)
    kept = [i for i in range(11) if i not in gone]
    found = figures(log_probabilities(logits, gone), ids, log_probabilities(of_base, gone))
    for i in range(5):
        p, q = ([math.exp(x) for x in one[i, kept].tolist()] for one in (of_base, logits))
        p, q = [x / math.fsum(p) for x in p], [x / math.fsum(q) for x in q]
        expected = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        # Σ p · gap: gaps up to some 150 with an ulp each of the logits, of up to 80
        assert found["kld"][i] == pytest.approx(expected, rel=1e-12, abs=1e-12)
        assert found["nll"][i] == pytest.approx(-math.log(q[kept.index(ids[i])]), rel=1e-12, abs=1e-12)
        assert found["same_top"][i] == (np.argmax(p) == np.argmax(q))


def test_what_is_scored(nano_model: Model, tmp_path: Path) -> None:
    text = nano_model.tokenizer.encode_text("Hello.").tolist()
    assert reference_ids(nano_model, "Hello.").tolist() == [*text, END]
    assert reference_ids(nano_model, "Hello.<|end|>").tolist() == [*text, END]
    assert reference_ids(nano_model, "").tolist() == [END]
    ((_, found),) = likelihoods(nano_model, [item(tmp_path, reference="")])
    logits = nano_model.next_token_logits("<|user|>Hi<|end|><|assistant|>").astype(np.float64)[:N_TOKENS]
    assert len(found.positions["nll"]) == 1
    assert found.positions["nll"][0] == pytest.approx(np.log(np.exp(logits).sum()) - logits[END], abs=LN_P)


@pytest.mark.parametrize(("n_prompt", "n_reference"), [(400, 600), (900, 400), (1100, 10)])
def test_all_of_an_item_has_one_rope_table(
    n_prompt: int,
    n_reference: int,
    nano_model: Model,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Short; crossed in the reference; long. References of over 256 tokens take several passes."""
    words = nano_model.tokenizer.encode_text("The capital of France is Paris. " * 300)
    prompt = nano_model.tokenizer.decode(words[:n_prompt])
    one = item(tmp_path, prompt=prompt, reference=nano_model.tokenizer.decode(words[:n_reference]))
    ids, pieces = reference_ids(nano_model, one.reference), item_prompt(nano_model, one)
    found = np.concatenate(list(predictions(nano_model, pieces, ids)))
    assert not caplog.records  # that something is read again is nobody's concern here
    nano_model.forget()
    whole = nano_model.token_logits(ids[:-1], len(ids), prompt=pieces)
    # As in test_perplexity: past 1,000 positions each way is within 1.3e-3; the wrong table moves 0.1.
    assert found.shape == whole.shape
    assert abs(found - whole).max() <= 2 * 1.3e-3


def test_what_does_not_fit_is_named(nano: Path, nano_model: Model, tmp_path: Path) -> None:
    with Model(nano, n_ctx=24) as small:
        for values in ({"reference": "Paris. " * 20}, {"prompt": "Paris. " * 20, "reference": ""}):
            line = r"one\.jsonl: line 1: item 'x': the prompt has \d+ tokens, the context holds 24"
            with pytest.raises(InputError, match=line):
                list(likelihoods(small, [item(tmp_path, **values)]))
    with pytest.raises(InputError, match=r"item 'x': the text has a <\|image_1\|> place, but no pictures"):
        list(likelihoods(nano_model, [item(tmp_path, reference="<|image_1|>")]))
    (tmp_path / "bad.png").write_bytes(b"\x89PNG" + bytes(50))
    broken = item(tmp_path, prompt="<|user|><|image_1|><|end|>", images="bad.png", reference="y")
    with pytest.raises(InputError, match=r"item 'x': .*bad\.png"):
        list(likelihoods(nano_model, [broken]))


def test_a_base_is_of_the_same_checkpoint(nano_model: Model) -> None:
    ours: Bundle = nano_model.bundle
    check_base(ours, replace(ours, recipe="F16", name="another"))
    other = replace(ours, source=replace(ours.source, fingerprint="f" * 64))
    with pytest.raises(
        InputError, match=r"base has checkpoint fingerprint f{16}, expected [0-9a-f]{16} as in"
    ):
        check_base(ours, other)
    with pytest.raises(InputError, match=r"base has vocabulary size 8, expected 4096 as in"):
        check_base(ours, replace(ours, text=replace(ours.text, vocab_size=8)))


KLD = {"nll": (1.0, 2.0), "nll_base": (1.0, 1.0), "kld": (0.5, 0.25), "same_top": (1.0, 0.0)}


def answer(name: str, positions: dict[str, tuple[float, ...]]) -> Answered:
    return Answered(name, "said", "reference", TOOK, positions)


def test_the_report(tmp_path: Path) -> None:
    items = [replace(item(tmp_path, reference="r"), id=name, task=name) for name in "ab"]
    more = {name: values * 2 for name, values in KLD.items()} | {"kld": (0.0, 0.0, 0.0, 1.0)}
    judge = LikelihoodJudge("kld")
    rows = [judge.judge(items[0], answer("a", KLD)), judge.judge(items[1], answer("b", more))]
    found = Report(judge, JOB, rows).to_object()
    assert (found["score"], found["kld"], found["items"], found["positions"]) == (1.75 / 6, 1.75 / 6, 2, 6)
    assert found["ci95"] == [0.25, 0.375]  # of two items either is drawn twice one time in four
    assert [one["score"] for one in found["tasks"]] == [0.375, 0.25]
    assert (found["kld_median"], found["kld_max"], found["same_top"]) == (0.125, 1.0, 0.5)
    assert found["kld_p99"] == pytest.approx(np.percentile([0.5, 0.25, 0, 0, 0, 1], 99))
    assert (found["ppl"], found["ppl_base"]) == pytest.approx((math.exp(1.5), math.e))
    assert table(found)[2].startswith("| kld | 0.291667 | 0.250000 to 0.375000 | 2 |")
    assert "| same most likely token | 50.00 % | 50.00 % to 50.00 % |" in "\n".join(table(found))
    assert "| scored by | mean KL divergence of" in markdown(found)
    by_ppl = LikelihoodJudge("ppl")
    columns = ((2.0,), (0.0, 0.0, 0.0))
    rows = [by_ppl.judge(one, answer(one.id, {"nll": nll})) for one, nll in zip(items, columns, strict=True)]
    found = Report(by_ppl, JOB, rows).to_object()
    assert found["score"] == found["ppl"] == pytest.approx(math.exp(0.5))
    assert found["ci95"] == pytest.approx([1.0, math.exp(2)])
    assert [one["id"] for one in found["worst"]] == ["a"]
    with pytest.raises(KernelError, match="the model is damaged"):
        by_ppl.judge(items[0], answer("a", {"nll": (1e6,)}))


def test_the_journal_keeps_what_was_found(tmp_path: Path) -> None:
    with Journal(tmp_path, JOB, ["a"]) as journal:
        journal.add(answer("a", KLD), {})
        journal.finish([row(answer("a", KLD), {})], json.dumps({"job": JOB}), "")
    assert finished(tmp_path, JOB, ["a"]) == {"a": answer("a", KLD)}
    path = tmp_path / "items.jsonl"
    good = json.loads(path.read_text("utf-8"))
    for bad, line in (
        ([1.0], "positions is no table"),
        ({"nll": []}, "positions is no table"),
        ({"nll": [1.0], "kld": [1.0, 2.0]}, "positions is no table"),
        ({"nll": [True]}, "no finite number"),
        ({"nll": [math.inf]}, "no finite number"),
        ({"nll": [10**400]}, "no finite number"),
    ):
        path.write_text(json.dumps(good | {"positions": bad}) + "\n", "utf-8")
        with pytest.raises(InputError, match=line):
            finished(tmp_path, JOB, ["a"])
    with pytest.raises(InputError, match=r"item 'x': its journal has nll, expected"):
        LikelihoodJudge("kld").judge(item(tmp_path, reference="r"), answer("x", {"nll": (1.0,)}))


def test_a_prompt_before_the_ids(nano_model: Model) -> None:
    text = "<|user|>What is the capital of France?<|end|><|assistant|>"
    pieces = parse_raw(text, nano_model.tokenizer.control_tokens)
    nano_model.forget()
    expected = nano_model.next_token_logits(text)
    nano_model.forget()
    np.testing.assert_array_equal(nano_model.token_logits((), 1, prompt=pieces)[0], expected)
    n = nano_model.context_used
    assert nano_model.token_logits([5, 6], n + 2, prompt=pieces).shape == (n + 2, 4096)
    with pytest.raises(InputError, match=f"logits of {n + 3} of {n + 2} tokens"):
        nano_model.token_logits([5, 6], n + 3, prompt=pieces)
