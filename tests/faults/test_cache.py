# SPDX-License-Identifier: Apache-2.0
"""A cache that cannot be written, or is no folder; and several processes that want to make the same in it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from pocketphi.runtime import bundle as bundles

from .conftest import needs_linux
from .worlds import ONE, World, one_error, whole_model

pytestmark = needs_linux

TEA = ["run", "-p", "How do you spell tea?", *ONE]
ANSWER = b"T-E-A.\n"


@pytest.fixture
def own(world: World) -> World:
    """With an empty cache at `cache`."""
    (world.path / "cache").mkdir()
    world.env = {**world.env, "XDG_CACHE_HOME": str(world.path / "cache")}
    return world


def prepare(how: str, folder: Path) -> tuple[object, ...]:
    """A mount that is read-only, or a folder's bits; the latter mean nothing to root with all its powers."""
    if how == "mount":
        return ("read_only", str(folder))
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    return ("powerless",)


@pytest.mark.parametrize("how", ["mount", "bits"])
def test_read_only_and_filled(how: str, own: World) -> None:
    """The model is there: it answers, and tries to remember nothing, without a word about it."""
    own.done(TEA)
    cache = own.path / "cache"
    (cache / "pocketphi" / "verified.json").unlink()
    before = sorted(cache.rglob("*"))
    outcome = own.run(TEA, prepare(how, cache))
    if b"not permitted" in outcome.err:
        pytest.skip("this system lets nobody mount")
    assert (outcome.code, outcome.out, outcome.err) == (0, ANSWER, b"")
    assert sorted(cache.rglob("*")) == before


@pytest.mark.parametrize("how", ["mount", "bits"])
def test_read_only_and_empty(how: str, own: World, model: Path) -> None:
    """No model and no place for one: one line. With a model of the user's own nothing is missed."""
    (own.path / "cache" / "pocketphi").mkdir()
    way = prepare(how, own.path / "cache")
    outcome = own.run(TEA, way)
    if b"not permitted" in outcome.err:
        pytest.skip("this system lets nobody mount")
    one_error(outcome, 6, "POCKETPHI_CACHE")
    outcome = own.run([*TEA, "-m", str(model)], way)
    assert (outcome.code, outcome.out, outcome.err) == (0, ANSWER, b"")
    assert own.names("cache/pocketphi") == []


@pytest.mark.parametrize("how", ["mount", "bits"])
def test_read_only_and_damaged(how: str, own: World) -> None:
    """A damaged built-in model cannot be made anew there: it is said, and never answered from."""
    own.done(TEA)
    (folder,) = (own.path / "cache" / "pocketphi").glob("phi4-nano-*")
    decoder = folder / bundles.load(folder).decoder
    raw = bytearray(decoder.read_bytes())
    raw[len(raw) // 2] ^= 1
    decoder.write_bytes(raw)
    outcome = own.run(TEA, prepare(how, own.path / "cache"))
    if b"not permitted" in outcome.err:
        pytest.skip("this system lets nobody mount")
    one_error(outcome, 3, decoder.name)
    assert outcome.out == b""


def test_no_home(own: World, model: Path) -> None:
    """Neither a variable nor an entry for the user: what needs no cache works."""
    own.env = {k: v for k, v in own.env.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    homeless = ("unknown_user",)
    outcome = own.run(TEA, homeless)
    if b"not permitted" in outcome.err:
        pytest.skip("only root can become somebody unknown")
    one_error(outcome, 6, "set POCKETPHI_CACHE")
    outcome = own.run([*TEA, "-m", str(model)], homeless)
    assert (outcome.code, outcome.out, outcome.err) == (0, ANSWER, b"")
    own.extra = {"POCKETPHI_CACHE": str(own.path / "cache")}
    outcome = own.run(TEA, homeless)
    assert (outcome.code, outcome.out, outcome.err) == (0, ANSWER, b"")
    outcome = own.run(["chat", *ONE], homeless, stdin=b"How do you spell tea?\n/save ~/a.json\n")
    assert (outcome.code, outcome.out) == (0, ANSWER)
    assert outcome.err.startswith(b"error: '~/a.json': cannot be written: "), outcome.err
    assert outcome.err.count(b"\n") == 1


@pytest.mark.parametrize("kind", ["file", "dangling link", "link to itself", "pipe"])
def test_what_is_no_folder(kind: str, own: World, model: Path) -> None:
    place = own.path / "cache" / "pocketphi"
    if kind == "file":
        place.write_bytes(b"somebody's")
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to(place if kind == "link to itself" else own.path / "gone" / "away")
    one_error(own.run(TEA), 6, "POCKETPHI_CACHE")
    outcome = own.run([*TEA, "-m", str(model)])
    assert (outcome.code, outcome.out, outcome.err) == (0, ANSWER, b"")
    assert own.names("cache") == ["pocketphi"]
    if kind == "file":
        assert place.read_bytes() == b"somebody's"


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("found", ["nothing", "damage", "what the dead left"])
def test_several_make_the_built_in_model_at_once(n: int, found: str, own: World) -> None:
    """All answer, from one directory, and nothing of the others' work stays."""
    place = own.path / "cache" / "pocketphi"
    if found != "nothing":
        own.done(TEA)
        (whole,) = place.glob("phi4-nano-*")
        if found == "damage":
            (whole / bundles.load(whole).tokenizer).write_bytes(b"cut")
        else:
            for _ in range(3):
                shutil.copytree(whole, place / f".{whole.name}.partial-{_:08x}")
            shutil.rmtree(whole)
    outcomes = [child.wait() for child in [own.start(TEA) for _ in range(n)]]
    assert [(o.code, o.out, o.err) for o in outcomes] == [(0, ANSWER, b"")] * n
    (folder,) = [name for name in own.names("cache/pocketphi") if name != "verified.json"]
    assert whole_model(place / folder)
