# SPDX-License-Identifier: Apache-2.0
"""What is reused, what is read again, and that neither changes a logit beyond float32 noise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pocketphi.runtime import bundle as bundles
from pocketphi.runtime.decoder_ggml import GgmlDecoder
from pocketphi.runtime.decoder_onnx import OnnxDecoder
from pocketphi.runtime.errors import InputError
from pocketphi.runtime.onnx_cache import KvCache
from pocketphi.runtime.parts import EmbedSpan, TokenSpan
from pocketphi.runtime.session import Session

from ..conftest import OPEN

# Two orders of summing the same float32 terms: a batch of n against batches that add up to n.
# The logits of these prompts are below 32, and test_reference.py measures their noise at 5e-4 at most.
SAME = 2e-3
ORIGINAL = 1024  # phi4-nano's


AnyDecoder = GgmlDecoder | OnnxDecoder


@pytest.fixture(scope="module", params=OPEN)
def decoder(request: pytest.FixtureRequest, exact_both: Path) -> Iterator[AnyDecoder]:
    loaded = OPEN[request.param](bundles.load(exact_both))
    yield loaded
    loaded.close()


def ids(n: int, seed: int = 1) -> TokenSpan:
    return TokenSpan(np.random.default_rng(seed).integers(0, 2800, n, dtype=np.int32))


def fresh(decoder: AnyDecoder, limit: int = 8192) -> tuple[Session, list[str]]:
    notes: list[str] = []
    return Session(decoder, limit=limit, note=notes.append), notes


def test_a_common_prefix_is_not_read_again(decoder: AnyDecoder) -> None:
    session, notes = fresh(decoder)
    first, second = ids(40), ids(10, seed=2)
    assert session.read([first], adapter=None)[1] == 0
    logits, kept = session.read([first, second], adapter=None)
    assert kept == 40
    alone, none_kept = fresh(decoder)[0].read([first, second], adapter=None)
    assert none_kept == 0
    assert abs(logits - alone).max() <= SAME
    assert notes == []


def test_the_same_prompt_reads_its_last_token_for_the_logits(decoder: AnyDecoder) -> None:
    session, _ = fresh(decoder)
    before, _ = session.read([ids(40)], adapter=None)
    after, kept = session.read([ids(40)], adapter=None)
    assert kept == 39
    assert abs(before - after).max() <= SAME


def test_a_difference_in_the_middle_rewinds_to_it(decoder: AnyDecoder) -> None:
    session, _ = fresh(decoder)
    span = ids(40)
    session.read([span], adapter=None)
    changed = span.ids.copy()
    changed[25] += 1
    _, kept = session.read([TokenSpan(changed)], adapter=None)
    assert kept == 25
    assert session.length == decoder.length == 40


def test_another_adapter_reads_everything_again_and_says_so(decoder: AnyDecoder) -> None:
    session, notes = fresh(decoder)
    base, _ = session.read([ids(20)], adapter=None)
    vision, kept = session.read([ids(20)], adapter="vision")
    assert kept == 0
    assert notes == ["adapter vision: reading the conversation again"]
    assert abs(base - vision).max() > 1
    back, _ = session.read([ids(20)], adapter=None)
    assert back.tobytes() == base.tobytes()


def test_switching_adapters_many_times_comes_back_to_the_same_bytes(decoder: AnyDecoder) -> None:
    session, _ = fresh(decoder)
    wanted = {a: session.read([ids(5)], adapter=a)[0].tobytes() for a in (None, "vision", "speech")}
    for turn in range(60):
        adapter = (None, "vision", "speech")[turn % 3]
        assert session.read([ids(5)], adapter=adapter)[0].tobytes() == wanted[adapter]


def test_the_crossing_is_one_read_with_the_long_table(decoder: AnyDecoder) -> None:
    session, notes = fresh(decoder)
    start = ids(ORIGINAL - 1)
    session.read([start], adapter=None)
    session.step(7)
    assert (session.length, decoder.table) == (ORIGINAL, "short")
    stepped = session.step(8)
    assert (session.length, decoder.table) == (ORIGINAL + 1, "long")
    assert len(notes) == 1
    whole = TokenSpan(np.append(start.ids, [7, 8]).astype(np.int32))
    direct, _ = fresh(decoder)[0].read([whole], adapter=None)
    assert stepped.tobytes() == direct.tobytes()


def test_going_back_below_the_boundary_returns_to_the_short_table(decoder: AnyDecoder) -> None:
    session, notes = fresh(decoder)
    session.read([ids(ORIGINAL + 50)], adapter=None)
    assert decoder.table == "long"
    short, kept = session.read([TokenSpan(ids(ORIGINAL + 50).ids[:100])], adapter=None)
    assert (kept, decoder.table) == (0, "short")
    assert "back within" in notes[-1]
    direct, _ = fresh(decoder)[0].read([TokenSpan(ids(ORIGINAL + 50).ids[:100])], adapter=None)
    assert short.tobytes() == direct.tobytes()


def test_memory_grows_with_the_conversation_and_keeps_it(decoder: AnyDecoder) -> None:
    session, notes = fresh(decoder)
    session.read([ids(250)], adapter=None)
    assert decoder.capacity == 256
    for token in range(300, 310):
        logits = session.step(token)
    assert 260 <= decoder.capacity < 8192
    whole = TokenSpan(np.concatenate([ids(250).ids, np.arange(300, 310, dtype=np.int32)]))
    direct, _ = fresh(decoder)[0].read([whole], adapter=None)
    assert abs(logits - direct).max() <= SAME
    assert notes == []


def test_embedded_rows_are_recognised_by_their_key(decoder: AnyDecoder) -> None:
    rows = np.random.default_rng(3).normal(0, 0.05, (12, 256)).astype(np.float32)
    session, _ = fresh(decoder)
    session.read([ids(5), EmbedSpan(rows, "clip"), ids(4, seed=9)], adapter="speech")
    _, kept = session.read([ids(5), EmbedSpan(rows, "clip"), ids(6, seed=8)], adapter="speech")
    assert kept >= 17
    _, kept = session.read([ids(5), EmbedSpan(rows, "other"), ids(6, seed=8)], adapter="speech")
    assert kept == 5
    _, kept = session.read([ids(5), EmbedSpan(rows, "other")], adapter="speech")
    assert kept == 16, "cut inside the rows, all but the last"


def test_the_limit(decoder: AnyDecoder) -> None:
    session, _ = fresh(decoder, limit=20)
    with pytest.raises(InputError, match="21 tokens, the context holds 20"):
        session.read([ids(21)], adapter=None)
    with pytest.raises(InputError, match="empty"):
        session.read([TokenSpan(np.zeros(0, np.int32))], adapter=None)
    session.read([ids(20)], adapter=None)
    with pytest.raises(InputError, match="full"):
        session.step(1)


def test_tokens_read_ahead_are_part_of_the_sequence(decoder: AnyDecoder) -> None:
    """The prompt and what is proposed, then more, all in batches; against a read of each length."""
    session, _ = fresh(decoder)
    prompt, more = ids(40), ids(9, seed=2).ids
    ahead, kept = session.read_ahead([prompt], more[:5], adapter=None)
    assert (ahead.shape[0], kept, session.length) == (6, 0, 45)
    rows = np.concatenate([ahead, session.extend(more[5:])])
    assert session.length == decoder.length == 49
    for n, row in enumerate(rows):
        whole = TokenSpan(np.concatenate([prompt.ids, more[:n]]))
        direct, _ = fresh(decoder)[0].read([whole], adapter=None)
        assert abs(row - direct).max() <= SAME
    again, kept = fresh(decoder)[0].read_ahead([ids(40)], more, adapter=None)
    assert abs(again - rows).max() <= SAME


def test_what_is_read_ahead_is_used_again(decoder: AnyDecoder) -> None:
    session, _ = fresh(decoder)
    more = ids(9, seed=2)
    session.read_ahead([ids(40)], more.ids, adapter=None)
    rows, kept = session.read_ahead([ids(40)], more.ids, adapter=None)
    assert (rows.shape[0], kept) == (10, 39), "the logits after the prompt are needed"
    _, kept = session.read([ids(40), more, ids(2, seed=3)], adapter=None)
    assert kept == 49


def test_dropped_tokens_leave_no_trace(decoder: AnyDecoder) -> None:
    session, _ = fresh(decoder)
    rows = EmbedSpan(np.random.default_rng(3).normal(0, 0.05, (12, 256)).astype(np.float32), "clip")
    session.read_ahead([ids(40), rows], ids(9, seed=2).ids, adapter=None)
    session.drop(5)
    session.drop(0)
    assert session.length == decoder.length == 56
    logits = session.step(77)
    kept_tokens = np.append(ids(9, seed=2).ids[:4], np.int32(77))
    direct, _ = fresh(decoder)[0].read([ids(40), rows, TokenSpan(kept_tokens)], adapter=None)
    assert abs(logits - direct).max() <= SAME
    session.reset()
    session.read([ids(40), rows], adapter=None)
    session.drop(3)
    assert session.read([ids(40), rows], adapter=None)[1] == 49, "into the middle of the rows"
    session.drop(1000)
    assert session.length == decoder.length == 0


def test_the_room_ends_where_everything_would_be_read_again(decoder: AnyDecoder) -> None:
    session, notes = fresh(decoder, limit=ORIGINAL + 6)
    assert session.room == 0, "nothing is read yet"
    rows, _ = session.read_ahead([ids(ORIGINAL - 3)], ids(9).ids, adapter=None)
    assert (rows.shape[0], session.length, session.room) == (4, ORIGINAL, 0)
    session.drop(1)
    assert session.room == 1
    with pytest.raises(InputError, match="2 tokens are added"):
        session.extend(ids(2).ids)
    session.step(7)
    assert notes == []
    crossed = session.extend(np.array([8], np.int32))[0]
    assert (decoder.table, session.room, len(notes)) == ("long", 5, 1)
    whole = np.concatenate([ids(ORIGINAL - 3).ids, ids(9).ids[:2], [7, 8]]).astype(np.int32)
    direct, _ = fresh(decoder)[0].read([TokenSpan(whole)], adapter=None)
    assert crossed.tobytes() == direct.tobytes()
    with pytest.raises(InputError, match="full"):
        session.extend(ids(6).ids)
    session.drop(2)
    assert session.room == 0, "the next token is one of the short table"
    session.step(9)
    assert (decoder.table, session.length) == ("short", ORIGINAL)


def test_an_interrupted_read_leaves_a_usable_session(decoder: AnyDecoder) -> None:
    session, _ = fresh(decoder)
    session.read([ids(30)], adapter=None)
    bad = TokenSpan(np.array([5, 99999], np.int32))
    with pytest.raises(InputError, match="token ids"):
        session.read([ids(30), bad], adapter=None)
    logits, kept = session.read([ids(30), ids(3, seed=4)], adapter=None)
    assert kept == 30
    direct, _ = fresh(decoder)[0].read([ids(30), ids(3, seed=4)], adapter=None)
    assert abs(logits - direct).max() <= SAME


def test_an_interrupt_while_the_cache_grows_costs_a_read_and_no_truth(
    decoder: AnyDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is half copied then: the next read must not believe in it."""
    session, _ = fresh(decoder)
    session.read([ids(250)], adapter=None)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if isinstance(decoder, OnnxDecoder):
            patch.setattr(KvCache, "write", interrupted)
        else:
            patch.setattr(decoder, "_restore", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.read([ids(250), ids(300, seed=2)], adapter=None)
    logits, kept = session.read([ids(250), ids(300, seed=2)], adapter=None)
    assert kept == 0
    direct, _ = fresh(decoder)[0].read([ids(250), ids(300, seed=2)], adapter=None)
    assert logits.tobytes() == direct.tobytes()
