# SPDX-License-Identifier: Apache-2.0
"""A text that says the same again and again is found, and nothing that people say."""

from __future__ import annotations

import pytest

from pocketphi.runtime.repetition import loop_start


@pytest.mark.parametrize("before", [0, 1, 7])
@pytest.mark.parametrize("unit", [1, 2, 3, 5, 12, 40])
def test_a_loop_is_cut_after_its_first_copy(before: int, unit: int) -> None:
    head = [1000 + i for i in range(before)]
    one = list(range(unit))
    least = max(4 * unit, 16)
    text = head + (one * 17)[:least]
    assert loop_start(text) == before + unit
    assert loop_start(text[:-1]) is None  # found with the very token that makes it one
    assert loop_start(head + (one * 18)[: least + unit // 2]) == before + unit  # and as it goes on


@pytest.mark.parametrize(
    "text",
    [
        [],
        [7],
        [7] * 15,
        [1, 2, 3, 4, 5] * 3,
        list(range(200)),
        [1, 2] * 7 + [3],
        list(range(41)) * 5,  # a unit longer than a sentence is no loop of this kind
        [5] * 20 + [6],  # it came out of the loop by itself
    ],
)
def test_what_is_no_loop(text: list[int]) -> None:
    assert loop_start(text) is None


def test_every_beginning_of_a_text_may_be_asked() -> None:
    text = [3, 1, 4, 1, 5] + [9, 2] * 30
    found = [loop_start(text[:n]) for n in range(len(text) + 1)]
    first = next(i for i, at in enumerate(found) if at is not None)
    assert first == 5 + 16  # eight copies of two
    assert set(found[first:]) == {7}
