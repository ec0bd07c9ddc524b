# SPDX-License-Identifier: Apache-2.0
"""Scores phi4-nano's evaluation set through the public API, as its model card was scored."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketphi.runtime.engine import Model
from pocketphi.runtime.parts import Media, Reply
from pocketphi.runtime.selftest import edits, words

NANO = Path(__file__).resolve().parent.parent / "nano"
EVAL = NANO / "eval"
SETS = ("text", "tools", "speech", "vision", "vision_speech")

# nano/README.md, column `eval/`: correct items, or words wrong of words said.
CARD = {
    "text": (56, 60),
    "tools": (13, 15),
    "ast": (10, 10),
    "sqa": (4, 10),
    "vision": (30, 40),
    "vision_speech": (4, 10),
}
CARD_ASR_EXACT, CARD_WER = (31, 40), 4.2  # per cent


@dataclass(frozen=True)
class Scores:
    """What a model made of the set."""

    exact: dict[str, tuple[int, int]]  # task -> correct, items
    wer: float  # per cent, over the 40 asr items
    seconds: float  # of generation and encoding, all items


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (EVAL / f"{name}.jsonl").read_text("utf-8").splitlines()]


def media_of(row: dict[str, Any]) -> list[Media]:
    found = [Media("image", EVAL / path) for path in row.get("images") or ()]
    return found + ([Media("audio", EVAL / row["audio"])] if row.get("audio") else [])


def answer(model: Model, row: dict[str, Any]) -> Reply:
    return model.complete(row["prompt"], max_tokens=80, media=media_of(row))


def score(model: Model, sets: tuple[str, ...] = SETS) -> Scores:
    exact: dict[str, list[bool]] = defaultdict(list)
    wrong = said = 0
    seconds = 0.0
    for name in sets:
        for row in rows(name):
            reply = answer(model, row)
            t = reply.timings
            seconds += (t.encode_ms + t.prompt_ms + t.predicted_ms) / 1e3
            task = row["task"] if name == "speech" else name
            exact[task].append(is_right(row, reply))
            if task == "asr":
                wanted = words(row["reference"])
                wrong += edits(words(reply.text), wanted)
                said += len(wanted)
    counts = {task: (sum(found), len(found)) for task, found in exact.items()}
    return Scores(counts, 100 * wrong / said if said else 0.0, seconds)


def is_right(row: dict[str, Any], reply: Reply) -> bool:
    if row["task"] != "tool":
        return bool(reply.text == row["reference"])
    wanted = json.loads(row["reference"].removeprefix("<|tool_call|>").removesuffix("<|/tool_call|>"))
    return bool([{"name": c.name, "arguments": c.arguments} for c in reply.tool_calls] == wanted)
