# SPDX-License-Identifier: Apache-2.0
"""phi4-nano's evaluation set through the whole pipeline, beside what its model card says of the reference."""

from __future__ import annotations

from pocketphi.runtime.engine import Model

from . import scoring
from .conftest import Converted


def test_f16_with_fp32_encoders_scores_what_the_model_card_says(converted: Converted) -> None:
    with Model(converted("phi4-nano", "F16")) as model:
        found = scoring.score(model)
    assert {task: found.exact[task] for task in scoring.CARD} == scoring.CARD
    assert found.exact["asr"] == scoring.CARD_ASR_EXACT
    assert round(found.wer, 1) == scoring.CARD_WER


def test_the_built_in_default_is_at_most_one_item_a_task_apart(converted: Converted) -> None:
    with Model(converted("phi4-nano", "Q8_0", lora_quant="Q8_0", encoders="int8")) as model:
        found = scoring.score(model)
    for task, (right, items) in {**scoring.CARD, "asr": scoring.CARD_ASR_EXACT}.items():
        assert found.exact[task][1] == items
        assert abs(found.exact[task][0] - right) <= 1, task
    assert abs(found.wer - scoring.CARD_WER) <= 1
