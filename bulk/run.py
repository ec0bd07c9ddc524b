# SPDX-License-Identifier: Apache-2.0
"""A run: the items that are not done go to workers, and what comes of them into the output."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from ..runtime.errors import InputError
from ..runtime.parts import Progress
from .lines import ChangedError, Entry, LineFile, in_order_of_modes
from .output import Output
from .performer import ItemSettings
from .records import Outcome, digest_of, in_form
from .request import request_of


class Workers(Protocol):
    """What answers items: processes here, or machines of a cluster."""

    def run(self, entries: Sequence[Entry]) -> Iterator[tuple[Entry, Outcome]]:
        """Answer each once; outcomes come as they are ready."""

    def taken(self) -> None:
        """One more outcome is where it belongs: another item may be begun."""


@dataclass(slots=True)
class Summary:
    """What a run did."""

    items: int  # of the input
    before: int  # done by earlier runs
    failed_before: int = 0  # of these
    ok: int = 0
    failed: int = 0
    seconds: float = 0.0
    tokens: int = 0  # written in answers
    audio_seconds: float = 0.0  # of recordings that were written down

    def to_object(self) -> dict[str, Any]:
        """For JSON."""
        rate = self.tokens / self.seconds if self.seconds > 0 else 0.0
        return asdict(self) | {"tokens_per_second": rate}


def begun(file: LineFile, output: Output) -> Summary:
    """A run that has done nothing yet."""
    n_failed = sum(not ok for ok, _ in output.done.values())
    return Summary(len(file.entries), output.n_before, n_failed)


def left_to_do(file: LineFile, output: Output, items: ItemSettings) -> list[Entry]:
    """The items without a line in the output, when those with one are what they were.

    Raises:
        InputError: one that is done has changed, or is not in the input any more.
    """
    by_id = {entry.id: entry for entry in file.entries if entry.id in output.done}

    def digest(name: str) -> str | None:
        entry = by_id.get(name)
        if entry is None:
            return None
        ok, _ = output.done[name]
        return digest_of(entry.sha256, _files(file, entry, items) if ok else ())

    output.check(digest)
    return [entry for entry in file.entries if entry.id not in output.done]


def work(
    file: LineFile,
    output: Output,
    workers: Workers,
    todo: Sequence[Entry],
    *,
    model_name: str,
    keep_order: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Do what is left.

    Args:
        file: the items.
        output: where outcomes go.
        workers: answer them.
        todo: from `left_to_do`.
        model_name: for answers in OpenAI's form.
        keep_order: write in the order of the input; what is ready early waits in memory.
        progress: told of every item.

    Raises:
        PocketPhiError: no item can be answered, the input changed, or the output cannot be written. What
            was done is in the output.
    """
    summary = begun(file, output)
    started = time.perf_counter()
    order = list(todo) if keep_order else in_order_of_modes(list(todo))
    waiting: dict[str, tuple[Entry, Outcome]] = {}
    expected = 0
    for entry, outcome in workers.run(order):
        waiting[entry.id] = entry, outcome
        ready = [waiting.pop(entry.id)] if not keep_order else []
        while keep_order and expected < len(order) and order[expected].id in waiting:
            ready.append(waiting.pop(order[expected].id))
            expected += 1
        for one, found in ready:
            output.add(one.id, in_form(found, one, model_name, int(time.time())))
            workers.taken()
            summary.ok += found.ok
            summary.failed += not found.ok
            summary.tokens += found.tokens
            summary.audio_seconds += found.audio_s
            summary.seconds = time.perf_counter() - started
            if progress is not None:
                progress.advance(1, one.id)
    output.sync()
    summary.seconds = time.perf_counter() - started
    return summary


def _files(file: LineFile, entry: Entry, items: ItemSettings) -> list[Path]:
    """The files of an item; none where it cannot be used any more, which its digest will tell."""
    try:
        return request_of(file.task(entry), Path(items.folder), items.max_tokens).files
    except ChangedError:
        raise
    except InputError:
        return []
