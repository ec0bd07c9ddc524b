# SPDX-License-Identifier: Apache-2.0
"""What a blocking iterator gives, in a thread of its own, for the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

_MOST = 256  # items that wait to be taken; then the thread waits


class _End:
    """Behind the last item: with what was raised there, if anything was."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class InThread(Generic[T]):
    """Iterate for the items; what the iterator raises is raised where it belongs. For one task."""

    def __init__(self, items: Callable[[], Iterator[T]], *, stop: Callable[[], None], name: str) -> None:
        """Begin.

        Args:
            items: called in the thread.
            stop: called once, by `close`: what the thread waits for is not to last long after it.
            name: of the thread.
        """
        self._items, self._stop = items, stop
        self._loop = asyncio.get_running_loop()
        self._found: asyncio.Queue[T | _End] = asyncio.Queue()
        self._room = threading.Semaphore(_MOST)
        self._closed = self._ended = False
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def __aiter__(self) -> InThread[T]:
        return self

    async def __anext__(self) -> T:
        if self._ended:
            raise StopAsyncIteration
        found = await self._found.get()
        self._room.release()
        if not isinstance(found, _End):
            return found
        self._ended = True
        if found.error is not None:
            raise found.error
        raise StopAsyncIteration

    def close(self) -> None:
        """No more is wanted: the thread ends by itself, soon. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self._stop()
            self._room.release()

    def _run(self) -> None:
        try:
            for item in self._items():
                self._room.acquire()
                if self._closed:
                    break
                self._hand_over(item)
        except BaseException as exc:
            self._hand_over(_End(exc))
        else:
            self._hand_over(_End(None))

    def _hand_over(self, found: T | _End) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._found.put_nowait, found)
