# SPDX-License-Identifier: Apache-2.0
"""How many workers, and threads of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from pocketphi.bulk import plan as plans
from pocketphi.bulk.plan import Plan, plan
from pocketphi.runtime import bundle as bundles
from pocketphi.runtime import memory, ram_model
from pocketphi.runtime.memory import Room
from pocketphi.runtime.parts import Mode
from pocketphi.runtime.ram_model import Use


@pytest.mark.parametrize(
    ("room_for", "cores", "n_items", "wanted", "found"),
    [
        (99, 4, 100, (None, None), (4, 1)),
        (99, 4, 3, (None, None), (3, 1)),  # a worker without an item is none
        (2, 8, 100, (None, None), (2, 4)),
        (0, 4, 100, (None, None), (1, 4)),  # it will say itself what it lacks
        (99, 8, 100, (None, 3), (2, 3)),
        (99, 4, 100, (3, None), (3, 1)),
        (1, 2, 100, (6, None), (6, 1)),  # the user knows better
        (99, 2, 100, (1, 5), (1, 5)),
    ],
)
def test_cores_memory_and_items(
    room_for: int, cores: int, n_items: int, wanted: tuple[int | None, int | None],
    found: tuple[int, int], nano: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Room for n workers: the first needs all that is wanted, the others share what stays mapped."""
    bundle = bundles.load(nano)
    modes: set[Mode] = {"language", "speech"}
    need = ram_model.estimate(ram_model.sizes_of(bundle), Use("speech", 4096))
    free = room_for * need.wanted - max(room_for - 1, 0) * need.mapped
    monkeypatch.setattr(memory, "available", lambda: Room(free, "a limit"))
    monkeypatch.setattr(plans, "default_threads", lambda: cores)
    made = plan(
        bundle, modes, n_items, backbone="gguf", kv_type="f16", max_crops=36, n_workers=wanted[0],
        n_threads=wanted[1],
    )  # fmt: skip
    assert made == Plan(*found, need.wanted)
    assert (
        room_for == 0 or _short_of_one_byte(bundle, modes, free, monkeypatch) <= room_for - 1 or room_for == 1
    )


def _short_of_one_byte(
    bundle: bundles.Bundle, modes: set[Mode], free: int, monkeypatch: pytest.MonkeyPatch
) -> int:
    """How many fit in a byte less, with cores for all."""
    monkeypatch.setattr(memory, "available", lambda: Room(free - 1, "a limit"))
    monkeypatch.setattr(plans, "default_threads", lambda: 1000)
    return plan(bundle, modes, 1000, backbone="gguf", kv_type="f16", max_crops=36).n_workers
