# SPDX-License-Identifier: Apache-2.0
"""Many small pieces of work on some threads, their results in order and few of them at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
Tag = TypeVar("Tag")


def in_order(
    jobs: Iterable[tuple[Tag, Callable[[], T]]], threads: int
) -> Generator[tuple[Tag, T], None, None]:
    """Do jobs on `threads` threads, at most twice as many ahead of what the caller has taken.

    An exception of a job is raised when it is that job's turn. Threads end when the generator is closed.
    """
    waiting: deque[tuple[Tag, Future[T]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="quantize")
    try:
        for tag, job in jobs:
            waiting.append((tag, pool.submit(job)))
            if len(waiting) > 2 * threads:
                tag, future = waiting.popleft()
                yield tag, future.result()
        while waiting:
            tag, future = waiting.popleft()
            yield tag, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
