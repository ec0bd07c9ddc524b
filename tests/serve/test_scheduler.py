# SPDX-License-Identifier: Apache-2.0
"""The queue without a model and without time: a clock that the test sets."""

from __future__ import annotations

import pytest

from pocketphi.serve.errors import Refusal
from pocketphi.serve.scheduler import Scheduler


class Clock:
    """Seconds."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def taken(queue: Scheduler[str], group: str | None = None) -> list[str]:
    """All that is in it, as one worker takes it."""
    found = []
    while (one := queue.take(group)) is not None:
        found.append(one[0])
        group = one[1]
    return found


def filled(*items: str, **options: float) -> Scheduler[str]:
    """Items are of the group of their first letter."""
    queue: Scheduler[str] = Scheduler(100, now=Clock(), **options)  # type: ignore[arg-type]
    for one in items:
        queue.add(one, one[0])
    return queue


def test_oldest_first() -> None:
    assert taken(filled("a1", "a2", "a3")) == ["a1", "a2", "a3"]


def test_one_group_after_the_other() -> None:
    assert taken(filled("a1", "b1", "a2", "b2", "a3")) == ["a1", "a2", "a3", "b1", "b2"]
    assert taken(filled("a1", "b1", "a2"), group="b") == ["b1", "a1", "a2"]


def test_nobody_is_passed_over_too_often() -> None:
    queue = filled("a0", "b0", *(f"a{i}" for i in range(1, 20)), most_passed_over=3)
    assert taken(queue) == ["a0", "a1", "a2", "a3", "b0", *(f"a{i}" for i in range(4, 20))]


def test_a_stream_of_one_group_does_not_starve_another() -> None:
    """However many come: the other's turn is after as many as may pass."""
    queue = filled("a0", "b0", most_passed_over=5)
    group, order = None, []
    for i in range(1, 30):
        queue.add(f"a{i}", "a")
        found = queue.take(group)
        assert found is not None
        order.append(found[0])
        group = found[1]
    assert order.index("b0") == 6


def test_nobody_is_passed_over_for_too_long() -> None:
    clock = Clock()
    queue: Scheduler[str] = Scheduler(100, patience_s=10.0, now=clock)
    queue.add("b", "b")
    clock.now += 9.9
    queue.add("a1", "a")
    queue.add("a2", "a")
    assert queue.take("a") == ("a1", "a")
    clock.now += 0.1
    assert queue.take("a") == ("b", "b")


def test_a_full_queue_refuses() -> None:
    queue: Scheduler[str] = Scheduler(2, now=Clock())
    queue.add("a", "a")
    queue.add("b", "b")
    with pytest.raises(Refusal) as caught:
        queue.add("c", "c")
    assert (caught.value.status, caught.value.code, caught.value.retry_after) == (
        429,
        "rate_limit_exceeded",
        2,
    )
    assert len(queue) == 2


def test_retry_after_follows_the_pace() -> None:
    queue = filled("a1", "a2", "a3", "a4")
    for _ in range(50):
        queue.took(5.0)
    assert queue.retry_after == 20
    for _ in range(50):
        queue.took(1000.0)
    assert queue.retry_after == 60
    for _ in range(100):
        queue.took(0.0)
    assert queue.retry_after == 1


def test_what_is_discarded_does_not_come() -> None:
    queue = filled("a1", "a2", "a3")
    assert queue.discard("a2") and not queue.discard("a2")
    assert taken(queue) == ["a1", "a3"]
    assert queue.take("a") is None


def test_all_out() -> None:
    queue = filled("a1", "b1")
    assert (queue.empty(), len(queue)) == (["a1", "b1"], 0)
