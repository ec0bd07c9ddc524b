# SPDX-License-Identifier: Apache-2.0
"""Real faults: processes that are killed, disks that are full, files that are damaged, clocks that jump."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..bite.conftest import user, zygote
from ..bite.zygote import Zygote
from ..conftest import Converted
from .worlds import HERE, World, preloaded

__all__ = ["user", "zygote"]  # as fixtures

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="forks, mounts and preloads as Linux does")


@pytest.fixture
def world(zygote: Zygote, user: dict[str, str], tmp_path: Path) -> World:
    """A user with the built-in model, and a folder of their own."""
    place = tmp_path / "place"
    place.mkdir()
    return World(zygote, user, place)


@pytest.fixture(scope="session")
def crashing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Its programs die where CRASH_AT says."""
    with preloaded(HERE / "crash_point.c", tmp_path_factory.mktemp("crash")) as running:
        yield running


@pytest.fixture(scope="session")
def model(converted: Converted) -> Path:
    """phi4-nano as the built-in one is, in a folder that nobody damages."""
    return converted("phi4-nano", "Q8_0", lora_quant="Q8_0", encoders="int8")
