# SPDX-License-Identifier: Apache-2.0
"""How many workers a machine has room for, and how many threads each gets."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ..runtime import memory, ram_model
from ..runtime.bundle import Bundle
from ..runtime.parts import Mode
from ..runtime.ram_model import Estimate, Use
from ..runtime.spec import Backbone
from ..runtime.threads import default_threads

_CONTEXT = 4096  # tokens that an item is taken to need


@dataclass(frozen=True, slots=True)
class Plan:
    """Processes, and threads of each."""

    n_workers: int
    n_threads: int
    n_bytes: int = 0  # of memory that one takes; 0: nobody knows


def plan(
    bundle: Bundle,
    modes: Collection[Mode],
    n_items: int,
    *,
    backbone: Backbone,
    kv_type: str,
    max_crops: int,
    n_workers: int | None = None,
    n_threads: int | None = None,
) -> Plan:
    """As many workers as there are cores, memory for and items.

    Args:
        bundle: the model.
        modes: of the items; the one that needs the most decides.
        n_items: that are to be done.
        backbone, kv_type, max_crops: how it is opened.
        n_workers, n_threads: what the user says; None: choose. Together threads are the cores, at least one
            each.
    """
    cores = default_threads()
    sizes = ram_model.sizes_of(bundle, backbone)
    possible = set(ram_model.modes_of(sizes))
    n_ctx = min(_CONTEXT, bundle.text.context_length)
    uses = [Use(mode, n_ctx, kv_type, max_crops=max_crops) for mode in modes if mode in possible]
    found = [ram_model.estimate(sizes, use) for use in uses]
    need = max(found, key=lambda one: one.wanted, default=None)
    if n_workers is None:
        fitting = cores if need is None else _fitting(need)
        n_workers = max(1, min(cores // (n_threads or 1), fitting, n_items))
    return Plan(n_workers, n_threads or max(1, cores // n_workers), need.wanted if need is not None else 0)


def _fitting(need: Estimate) -> int:
    """How many processes have room; they share the pages of the file that stay mapped."""
    room = memory.available()
    if room is None:
        return 1
    return max(1, 1 + (room.n_bytes - need.wanted) // max(need.wanted - need.mapped, 1))
