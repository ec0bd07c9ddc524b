# SPDX-License-Identifier: Apache-2.0
"""A small load in mixed modes: no answer is lost or another's, no unannounced status, nothing stays behind.

`python -m tests.tools.load_serve` is the same with 64 clients for a minute, and measures.
"""

from __future__ import annotations

from pocketphi.runtime.engine import Model
from pocketphi.runtime.parts import Message

from ..scoring import media_of, rows
from ..tools.load_serve import PER_SET, TOKENS, Clients, lone, questions, words_of
from .conftest import Serve


def test_eight_clients(serve: Serve, alone: Model) -> None:
    """Four are answered at a time and two wait: so some are told to come again."""
    server = serve("--parallel", 4, "--queue", 2).ready()
    items = questions()
    answers = lone(server.url, items)
    asked = [row for name, n in PER_SET.items() for row in rows(name)[:n]]
    for row, found in zip(asked, answers, strict=True):
        wanted = alone.chat([Message("user", words_of(row), media=tuple(media_of(row)))], max_tokens=TOKENS)
        assert (found.text, found.tokens) == (
            f"{wanted.text}|{wanted.finish_reason}",
            wanted.usage.completion_tokens,
        )
    clients = Clients(server.url, items, answers, n=8, most=10)
    clients.run()
    tally = clients.tally
    assert tally.wrong == []
    assert sum(tally.statuses.values()) == 8 * 10
    assert all(tally.statuses[kind, 200] for kind in (*PER_SET, "leaves"))
    assert any(kind.startswith("malformed") for kind, _ in tally.statuses)
    server.until(lambda: server.metric("pocketphi_requests_running") == 0)
    assert server.metric("pocketphi_queue_length") == server.metric("pocketphi_held_bytes") == 0
    assert server.metric("pocketphi_pass_rows_total") > server.metric("pocketphi_passes_total") > 0
    assert server.stop() == 0
    assert not any("Traceback" in line or "failed" in line for line in server.log)
