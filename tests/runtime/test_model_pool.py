# SPDX-License-Identifier: Apache-2.0
"""Several models on one directory: each answers as a model alone does, whatever the others are asked."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from pocketphi.runtime import memory_guard
from pocketphi.runtime.engine import Model
from pocketphi.runtime.errors import BundleError, InputError, KernelError, MemoryShortError
from pocketphi.runtime.model_pool import ModelPool
from pocketphi.runtime.parts import Reply
from pocketphi.runtime.sampler import Sampling

from .. import scoring, tiny
from ..conftest import Converted

ITEMS: list[dict[str, Any]] = json.loads((tiny.NANO.parent / "reference_outputs.json").read_text("utf-8"))[
    "items"
]
QUESTION = [{"role": "user", "content": "What is the month after August?"}]


@pytest.fixture(scope="module")
def pool(nano: Path) -> Iterator[ModelPool]:
    with ModelPool(nano, 4, n_ctx=2048, kv_type="f32", n_threads=2) as loaded:
        yield loaded


def answer(model: Model, item: dict[str, Any]) -> Reply:
    return model.complete(item["prompt"], media=scoring.media_of(item), max_tokens=80)


@pytest.mark.parametrize("recipe", ["F32", "F16"])
def test_reference_answers_four_at_a_time_in_mixed_modes(recipe: str, converted: Converted) -> None:
    """Greedy tokens of every item are transformers', in whatever company they are written."""
    assert len({item["mode"] for item in ITEMS}) == 4
    mixed = [item for i in range(6) for item in ITEMS[i::6]]  # neighbours differ in their mode
    directory = converted("phi4-nano", recipe, lora_quant=recipe)
    with ModelPool(directory, 4, n_ctx=2048, kv_type="f32" if recipe == "F32" else "f16") as pool:
        free: SimpleQueue[Model] = SimpleQueue()
        for model in pool:
            free.put(model)

        def run(item: dict[str, Any]) -> tuple[int, ...]:
            model = free.get()
            try:
                return answer(model, item).token_ids
            finally:
                free.put(model)

        with ThreadPoolExecutor(4) as threads:
            for item, found in zip(mixed, threads.map(run, mixed), strict=True):
                assert list(found) == item["output_ids"], item["id"]
        passes, rows = pool.passes
        assert rows > passes


def test_encoders_and_weights_are_loaded_once(pool: ModelPool) -> None:
    item = next(item for item in ITEMS if item["mode"] == "speech")
    with ThreadPoolExecutor(4) as threads:
        replies = list(threads.map(lambda model: answer(model, item), pool))
    assert {reply.token_ids for reply in replies} == {tuple(item["output_ids"])}
    assert all(set(model.resident) == set(pool.models[0].resident) for model in pool)
    assert "speech encoder" in pool.models[3].resident and "speech adapter" in pool.models[3].resident
    assert len({id(model._parts.media) for model in pool}) == 1


def test_conversations_are_each_models_own(pool: ModelPool) -> None:
    a, b = pool.models[:2]
    first = a.chat(QUESTION, max_tokens=4)
    b.chat([{"role": "user", "content": "Say x."}], max_tokens=4)
    b.forget()
    again = a.chat(QUESTION, max_tokens=4)
    assert again.token_ids == first.token_ids
    assert again.usage.cached_tokens == first.usage.prompt_tokens - 1
    assert b.context_used == 0 and a.context_limit == 2048
    assert a.engine == {"backbone": "gguf", "provider": "cpu", "kv_type": "f32"}


def test_a_model_of_a_pool_can_be_closed_and_the_others_go_on(pool: ModelPool) -> None:
    a, b = pool.models[:2]
    wanted = b.chat(QUESTION, max_tokens=4).text
    a.close()
    assert b.chat(QUESTION, max_tokens=4).text == wanted


def test_a_conversation_passes_the_short_table_beside_others(pool: ModelPool, nano_model: Model) -> None:
    """1,024 tokens are phi4-nano's short table: one slot goes over to the long one, the others stay."""
    ids = [i % 2000 + 300 for i in range(1020)]
    with ThreadPoolExecutor(4) as threads:
        texts = [threads.submit(model.chat, QUESTION, max_tokens=8) for model in pool.models[1:]]
        long = threads.submit(pool.models[0].token_logits, [*ids, *range(300, 310)], 1)
        alone = nano_model.chat(QUESTION, max_tokens=8)
        assert {one.result().text for one in texts} == {alone.text}
        wanted = nano_model.token_logits([*ids, *range(300, 310)], 1)
        assert abs(long.result() - wanted).max() < 2e-3  # two orders of summing, as in test_session.py
    nano_model.forget()


def test_grammars_begin_at_the_same_time(pool: ModelPool) -> None:
    """What their parser writes goes through the one stderr of the process, which is as it was afterwards."""
    before = os.fstat(2)
    barrier = threading.Barrier(4)

    def run(model: Model) -> list[str]:
        found = []
        for i in range(12):
            barrier.wait(60)
            if i % 2:
                with pytest.raises(InputError, match="grammar"):
                    model.chat(QUESTION, max_tokens=2, sampling=Sampling(grammar="root ::= nothing"))
            else:
                grammar = Sampling(grammar='root ::= "yes" | "no"')
                found.append(model.chat(QUESTION, max_tokens=4, sampling=grammar).text)
        return found

    with ThreadPoolExecutor(4) as threads:
        for texts in threads.map(run, pool.models):
            assert set(texts) <= {"yes", "no"}
    after = os.fstat(2)
    assert (after.st_dev, after.st_ino) == (before.st_dev, before.st_ino)


def test_what_a_pool_refuses(nano: Path, exact_both: Path, tmp_path: Path) -> None:
    for n in (0, -1, 65):
        with pytest.raises(InputError, match=f"conversations at a time is {n}, expected 1 to 64"):
            ModelPool(nano, n)
    with pytest.raises(InputError, match="context is 99999999 tokens"):
        ModelPool(nano, 2, n_ctx=99_999_999)
    with pytest.raises(InputError, match="need the GGUF backbone"):
        ModelPool(exact_both, 2, n_ctx=1024, backbone="onnx")
    with pytest.raises(BundleError):
        ModelPool(tmp_path, 2)


def test_a_closed_pool(nano: Path) -> None:
    pool = ModelPool(nano, 2, n_ctx=512)
    pool.close()
    pool.close()
    with pytest.raises(KernelError, match="has been closed"):
        pool.models[1].chat(QUESTION)
    pool.models[1].close()


def test_memory_for_all_conversations_is_asked_for_at_once(
    nano: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before there is a prompt that would have to be refused."""
    asked: list[tuple[int, int, int]] = []

    def refuse(_: memory_guard.Guard, *tokens: int) -> None:
        asked.append(tokens)  # type: ignore[arg-type]
        raise MemoryShortError("no")

    monkeypatch.setattr(memory_guard.Guard, "cache", refuse)
    with pytest.raises(MemoryShortError):
        ModelPool(nano, 3, n_ctx=512)
    assert asked == [(0, 3 * 512, 0)]
