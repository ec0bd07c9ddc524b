# SPDX-License-Identifier: Apache-2.0
"""phi4-nano's evaluation set, beside what its model card says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pocketphi.evaluate.items import read_items
from pocketphi.evaluate.journal import Answered
from pocketphi.evaluate.report import Report, markdown, table
from pocketphi.evaluate.runner import Judge, Scored, answers
from pocketphi.runtime.engine import Model
from pocketphi.runtime.errors import InputError

from .. import scoring
from ..scoring import OPTIONS, answered, judged

JOB = {"model": "phi4-nano", "recipe": "F32", "data": "speech.jsonl", "data_sha256": "0" * 64}


@pytest.fixture(scope="module")
def speech(nano_model: Model) -> dict[str, Answered]:
    """Its answers to the clips."""
    return answered(nano_model, "speech")


@pytest.mark.parametrize("name", ["text", "vision", "vision_speech", "tools"])
def test_as_many_are_right_as_the_card_says(name: str, nano_model: Model) -> None:
    rows = judged(Judge("tool-call" if name == "tools" else "exact"), name, answered(nano_model, name))
    assert (sum(row.score for row in rows), len(rows)) == scoring.CARD[name]


@pytest.mark.parametrize("task", ["asr", "ast", "sqa"])
def test_speech_is_as_right_as_the_card_says(task: str, speech: dict[str, Answered]) -> None:
    rows = judged(Judge("exact"), "speech", speech, task)
    assert (sum(row.score for row in rows), len(rows)) == scoring.CARD[task]


def test_word_errors_are_the_card_s(speech: dict[str, Answered]) -> None:
    """10 of 239 words by the basic rules, as the card counts them.

    By the English ones digits in a row are one number: "Three four nine four zero." is one word, wrong as a
    whole. So they find 9 errors, of 207 words.
    """
    basic = judged(Judge("wer", "basic"), "speech", speech, "asr")
    assert tuple(sum(row.statistics[i] for row in basic) for i in (0, 1)) == scoring.CARD_WORDS
    assert round(100 * Judge("wer", "basic").score(basic).score, 1) == 4.2
    english = judged(Judge("wer"), "speech", speech, "asr")
    assert [sum(row.statistics[i] for row in english) for i in (0, 1)] == [9, 207]
    eighth = next(row for row in english if row.item.id == "asr-008")
    assert (eighth.hypothesis, eighth.reference) == ("3494", "34940")


def test_modes_are_grouped_so_that_adapters_change_at_most_three_times(
    nano_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One item of each set in an order that changes each time, twice; the real chain below is asked."""
    sets = ["speech", "text", "vision", "tools", "vision_speech"]
    items = [read_items(scoring.EVAL / f"{name}.jsonl").items[i] for i in (0, 1) for name in sets]
    used: list[str | None] = []
    complete = nano_model.complete

    def spy(prompt: str, **options: Any) -> Any:
        reply = complete(prompt, **options)
        used.append(reply.adapter)
        return reply

    monkeypatch.setattr(nano_model, "complete", spy)
    got = {item.id: one for item, one in answers(nano_model, items, options=OPTIONS)}
    assert used == [None] * 4 + ["vision"] * 4 + ["speech"] * 2
    # An answer does not depend on what was asked before it.
    monkeypatch.undo()
    for item in reversed(items):
        ((_, alone),) = answers(nano_model, [item], options=OPTIONS)
        assert alone.hypothesis == got[item.id].hypothesis


def test_messages_are_asked_too(nano_model: Model, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    row = {"id": "q", "messages": turns, "reference": "The capital of France is Paris."}
    (tmp_path / "q.jsonl").write_text(json.dumps(row), "utf-8")
    items = read_items(tmp_path / "q.jsonl").items
    ((item, answer),) = answers(nano_model, items, options=OPTIONS)
    assert Judge("exact").judge(item, answer).score == 1.0


def test_a_damaged_medium_is_named_with_its_item(nano_model: Model, tmp_path: Path) -> None:
    (tmp_path / "bad.flac").write_bytes(b"fLaC" + bytes(50))
    row = {
        "id": "x",
        "prompt": "<|user|><|audio_1|><|end|><|assistant|>",
        "audio": "bad.flac",
        "reference": "y",
    }
    (tmp_path / "q.jsonl").write_text("\n" + json.dumps(row), "utf-8")
    with pytest.raises(InputError, match=r"q\.jsonl: line 2: item 'x': .*bad\.flac"):
        list(answers(nano_model, read_items(tmp_path / "q.jsonl").items, options=OPTIONS))


def test_references_that_cannot_be_scored_are_named(tmp_path: Path) -> None:
    rows = [{"id": str(i), "prompt": "x", "reference": text} for i, text in enumerate(["a", "[noise]"])]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    items = read_items(tmp_path / "q.jsonl").items
    with pytest.raises(InputError, match=r"line 2: item '1': reference is empty once normalized"):
        Judge("wer").check(items)
    with pytest.raises(InputError, match=r"line 1: item '0': reference holds no tool call"):
        Judge("tool-call").check(items)
    Judge("wer", "none").check(items)


def report(judge: Judge, rows: Sequence[Scored]) -> dict[str, Any]:
    return Report(judge, JOB, rows).to_object()


def test_the_report(speech: dict[str, Answered]) -> None:
    judge = Judge("wer", "basic")
    rows = judged(judge, "speech", speech)
    found = report(judge, rows)
    errors, words = (sum(row.statistics[i] for row in rows) for i in (0, 1))
    assert (found["score"], found["wer"], found["items"]) == (errors / words, errors / words, 60)
    assert [one["task"] for one in found["tasks"]] == ["asr", "ast", "sqa"]
    low, high = found["ci95"]
    assert low < errors / words < high
    worst = [one["score"] for one in found["worst"]]
    assert worst == sorted((row.score for row in rows), reverse=True)[:10]
    assert table(found)[2].startswith(f"| wer | {100 * errors / words:.2f} % |")
    page = markdown(found)
    assert all(text in page for text in ["| model | phi4-nano |", "| normalizer | basic |", "## Worst"])


def test_what_the_bootstrap_cannot_tell_is_said(speech: dict[str, Answered]) -> None:
    """Three of three right: resamples are all alike, which is no certainty."""
    judge = Judge("exact")
    rows = judged(judge, "speech", speech)
    right = [judge.judge(row.item, replace(row.answer, hypothesis=row.item.reference)) for row in rows[:3]]
    note = "All items alike: the bootstrap cannot tell how far off the score may be."
    assert report(judge, right)["ci95"] == [1, 1]
    assert table(report(judge, right))[-2:] == ["", note]
    wrong = judge.judge(rows[0].item, replace(rows[0].answer, hypothesis="x"))
    assert note not in table(report(judge, [wrong, *right[1:]]))


def test_what_a_model_says_is_no_markup(speech: dict[str, Answered]) -> None:
    judge = Judge("exact")
    row = judged(judge, "speech", speech)[0]
    said = Answered(row.item.id, "<b>|\n# *x*\x1b[2J", "stop", row.answer.took)
    page = markdown(report(judge, [judge.judge(row.item, said)]))
    assert r"| \<b\>\| \# \*x\*" + "\N{REPLACEMENT CHARACTER}" + r"\[2J |" in page
