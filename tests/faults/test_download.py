# SPDX-License-Identifier: Apache-2.0
"""kill -9 in a download: what is there is never taken for a whole checkpoint, and the next run completes it.

A hub on this machine has phi4-nano; the client that fetches it, and its cache, are the real ones.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..bite.zygote import Zygote
from ..convert.test_hub import REPOSITORY, Hub
from ..tiny import NANO
from .conftest import needs_linux
from .worlds import ONE, World, fractions, killed, seconds_of, whole_model

pytest.importorskip("huggingface_hub")
pytestmark = needs_linux

CALLS, MOMENTS = 6, 4
CONVERT = ["convert", REPOSITORY, "--from-hub", "-o", "out", "-q", "Q4_0", *ONE]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    files = {str(p.relative_to(NANO)): p.read_bytes() for p in NANO.rglob("*") if p.is_file()}
    server = Hub(files)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


class User:
    """Somebody with an empty cache of the hub's client, each time anew."""

    def __init__(self, zygote: Zygote, env: dict[str, str], root: Path, hub: Hub) -> None:
        clean = {k: v for k, v in env.items() if "proxy" not in k.lower()}
        self._env = clean | {
            "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1",
        }  # fmt: skip
        self._zygote, self._root, self._n = zygote, root, 0

    def world(self) -> World:
        self._n += 1
        path = self._root / str(self._n)
        path.mkdir()
        return World(self._zygote, self._env | {"HF_HOME": str(path / "hf")}, path)


def check(world: World) -> None:
    """Without the network, it is all there or it is said what is not; with it, the model is made."""
    world.extra.clear()
    if not whole_model(world.path / "out"):
        outcome = world.run([*CONVERT, "--offline"])
        assert outcome.code in (0, 5), outcome.err[-2000:]
        if outcome.code == 5:
            assert b"local cache, and the network is off" in outcome.err
            assert outcome.err.count(b"\n") == 1
            world.done(CONVERT)
    assert whole_model(world.path / "out")
    assert world.names() == ["hf", "out"]


def test_at_moments_spread_over_it(zygote: Zygote, user: dict[str, str], hub: Hub, tmp_path: Path) -> None:
    somebody = User(zygote, user, tmp_path, hub)
    takes_s = seconds_of(somebody.world(), CONVERT)
    hits = 0
    for part in fractions(MOMENTS, seed=5):
        world = somebody.world()
        hits += killed(world.start(CONVERT), part * takes_s)
        check(world)
    assert hits > 0, "none of the kills came in time"


def test_between_two_changes_on_the_disk(
    crashing: Zygote, user: dict[str, str], hub: Hub, tmp_path: Path
) -> None:
    somebody = User(crashing, user, tmp_path, hub)
    counting = somebody.world()
    counting.extra["CRASH_COUNT"] = str(tmp_path / "count")
    counting.done(CONVERT)
    _, *renames = map(int, (tmp_path / "count").read_text("ascii").split())
    *downloads, _ = renames  # the last one is the conversion's own
    assert len(downloads) > 5, "one for each file"
    around = sorted({call for at in downloads for call in (at - 1, at, at + 1)})
    for at in random.Random(5).sample(around, CALLS):
        world = somebody.world()
        world.extra["CRASH_AT"] = str(at)
        outcome = world.run(CONVERT)
        assert outcome.code == -9, (at, outcome.err[-2000:])
        check(world)
