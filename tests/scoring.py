# SPDX-License-Identifier: Apache-2.0
"""phi4-nano's evaluation set, asked and scored as its model card was: greedily, by the basic rules."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pocketphi.evaluate.bootstrap import interval
from pocketphi.evaluate.items import read_items
from pocketphi.evaluate.journal import Answered
from pocketphi.evaluate.runner import Judge, Score, Scored, answers
from pocketphi.runtime.engine import CompleteOptions, Model
from pocketphi.runtime.parts import Media
from pocketphi.runtime.selftest import edits as edits
from pocketphi.runtime.selftest import words as words

NANO = Path(__file__).resolve().parent.parent / "nano"
EVAL = NANO / "eval"
SETS = ("text", "tools", "speech", "vision", "vision_speech")
OPTIONS: CompleteOptions = {"max_tokens": 80}

# nano/README.md, column `eval/`: correct items, or words wrong of words said.
CARD = {
    "text": (56, 60),
    "tools": (13, 15),
    "asr": (31, 40),
    "ast": (10, 10),
    "sqa": (4, 10),
    "vision": (30, 40),
    "vision_speech": (4, 10),
}
CARD_WORDS = (10, 239)  # 4.2 %


@dataclass(frozen=True)
class Scores:
    """What a model made of the set."""

    wer: Score  # of the asr items, by the basic rules
    exact: Score  # the share that is right of all other items; of tools the calls count
    tasks: Mapping[str, tuple[int, int]]  # task -> right, items; asr too

    @property
    def right(self) -> int:
        """Of the items that `exact` counts."""
        return sum(right for task, (right, _) in self.tasks.items() if task != "asr")


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (EVAL / f"{name}.jsonl").read_text("utf-8").splitlines()]


def media_of(row: dict[str, Any]) -> list[Media]:
    found = [Media("image", EVAL / path) for path in row.get("images") or ()]
    return found + ([Media("audio", EVAL / row["audio"])] if row.get("audio") else [])


def answered(model: Model, name: str) -> dict[str, Answered]:
    """The answers to a set, by item."""
    items = read_items(EVAL / f"{name}.jsonl").items
    return {item.id: answer for item, answer in answers(model, items, options=OPTIONS)}


def judged(judge: Judge, name: str, done: Mapping[str, Answered], task: str | None = None) -> list[Scored]:
    """The answers to a set, or those of one task of it, beside the references."""
    items = read_items(EVAL / f"{name}.jsonl").items
    judge.check(items)
    return [judge.judge(item, done[item.id]) for item in items if task in (None, item.task)]


def score(model: Model) -> Scores:
    """Ask and score all of it."""
    done = {name: answered(model, name) for name in SETS}
    exact: dict[str, list[Scored]] = defaultdict(list)
    for name in SETS:
        for row in judged(Judge("tool-call" if name == "tools" else "exact"), name, done[name]):
            exact[row.item.task if name == "speech" else name].append(row)
    by_words = Judge("wer", "basic")
    wer = by_words.score(judged(by_words, "speech", done["speech"], "asr"))
    tasks = {task: (sum(int(row.score) for row in found), len(found)) for task, found in exact.items()}
    # Right or not is one statistic, whatever it was found by.
    statistics = np.array([row.statistics for task in exact if task != "asr" for row in exact[task]])
    right, items = statistics.sum(axis=0)
    ci95 = interval(statistics, lambda sums: sums[:, 0] / sums[:, 1])
    return Scores(wer, Score(right / items, ci95, len(statistics)), tasks)
