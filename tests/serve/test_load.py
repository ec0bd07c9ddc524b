# SPDX-License-Identifier: Apache-2.0
"""A small load in mixed modes: no answer is lost or another's, no unannounced status, nothing stays behind.

`python -m tests.tools.load_serve` is the same with 64 clients for a minute, and measures.
"""

from __future__ import annotations

import pytest

from pocketphi.runtime.engine import Model
from pocketphi.runtime.parts import Message

from ..scoring import media_of, rows
from .conftest import Serve
from .recordings import directly, encoded

pytest.importorskip("websockets")

from ..tools.load_audio import RecordingItem, SessionItem, sentences
from ..tools.load_requests import PER_SET, TOKENS, Heard, words_of
from ..tools.load_serve import KINDS, LEAVING, Clients, grown, left_behind, lone, n_threads, questions


def test_eight_clients(serve: Serve, alone: Model) -> None:
    """Four are answered at a time and two wait: so some are told to come again, and do."""
    server = serve("--parallel", 4, "--queue", 2).ready()
    items = questions()
    answers = lone(server.url, items)
    asked = [row for name, n in PER_SET.items() for row in rows(name)[:n]]
    check_answers(alone, asked, answers[: len(asked)])
    for item, found in zip(items[len(asked) :], answers[len(asked) :], strict=True):
        assert isinstance(item, (RecordingItem, SessionItem))
        read = directly(alone, encoded(sentences(*item.numbers)))
        assert found.text == " ".join(segment.text for segment, _ in read)
        assert len(read) == len(item.numbers)
    threads = n_threads(server)
    clients = Clients(server.url, items, answers, n=8, most=8)
    clients.run()
    tally = clients.tally
    assert tally.wrong == []
    over = {(kind, status): n for (kind, status), n in tally.statuses.items() if status != 429}
    assert sum(over.values()) == 8 * 8
    assert {kind for kind, _ in over} >= {*KINDS, *LEAVING}  # by chance, but by the same every time
    assert any(kind.startswith("malformed") for kind, _ in over)
    assert left_behind(server, threads) == []
    assert server.metric("pocketphi_pass_rows_total") > server.metric("pocketphi_passes_total") > 0
    assert server.stop() == 0
    assert not any("Traceback" in line or "failed" in line for line in server.log)


def check_answers(alone: Model, asked: list[dict[str, str]], answers: list[Heard]) -> None:
    """Whether they are what the Python API says."""
    for row, found in zip(asked, answers, strict=True):
        wanted = alone.chat([Message("user", words_of(row), media=tuple(media_of(row)))], max_tokens=TOKENS)
        text = f"{wanted.text}|{wanted.finish_reason}"
        assert (found.text, found.tokens) == (text, wanted.usage.completion_tokens)


def test_memory_that_grows() -> None:
    """Judged after it is warm, by what it was then; a short load never is."""
    mib = 1 << 20
    assert grown([50 * mib, 100 * mib, 104 * mib, 106 * mib], 60) == [
        "memory grows: 100 MiB after half of the time, 106 at the end"
    ]
    assert grown([50 * mib, 100 * mib, 120 * mib, 105 * mib], 60) == []
    assert grown([50 * mib, 100 * mib, 150 * mib, 200 * mib], 20) == []
