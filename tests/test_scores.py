# SPDX-License-Identifier: Apache-2.0
"""The built-in default on phi4-nano's evaluation set, beside its model card. F32: evaluate/test_runner.py."""

from __future__ import annotations

from pocketphi.runtime.engine import Model

from . import scoring
from .conftest import Converted


def test_the_built_in_default_is_at_most_one_item_a_task_apart(converted: Converted) -> None:
    with Model(converted("phi4-nano", "Q8_0", lora_quant="Q8_0", encoders="int8")) as model:
        found = scoring.score(model)
    for task, (right, items) in scoring.CARD.items():
        assert found.tasks[task][1] == items
        assert abs(found.tasks[task][0] - right) <= 1, task
    wrong, said = scoring.CARD_WORDS
    assert abs(found.wer.score - wrong / said) <= 0.01
    assert found.exact.items == sum(items for task, (_, items) in scoring.CARD.items() if task != "asr")
    assert found.exact.score == found.right / found.exact.items
