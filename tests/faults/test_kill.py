# SPDX-License-Identifier: Apache-2.0
"""kill -9 at any moment: what is there is old or new and never half, and the next run mends the rest.

Each job is killed at moments spread over its life, which finds it in its long stretches of work, and right
before calls that change files, which finds it between the steps of putting a result in place. Those around
every rename are tried: there a name given too early, or a journal that goes too soon, would lose what was
done.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from pocketphi.runtime.repl import read_chat

from ..bite.zygote import Zygote
from ..tiny import NANO
from .conftest import needs_linux
from .worlds import CLIP, EVAL, ONE, TEXT, World, fractions, killed, seconds_of, steady, whole_model

pytestmark = needs_linux

MOMENTS = 6
OTHER_CALLS = 4
Check = Callable[[World], object]
OLD_CHAT = '{"format": "pocketphi-chat", "version": 1, "model": "x", "system": "old", "messages": []}'


@dataclass(frozen=True)
class Job:
    """Work that somebody kills."""

    args: Sequence[str]
    before: Check  # makes the folder as it is when the work begins
    after: Check  # looks at what is there after a kill
    again: Sequence[str] | None  # what mends it; None: the same
    whole: Check  # looks at what is there when it is mended
    stdin: bytes = b""


def nothing(_: World) -> None:
    """The folder is empty."""


CONVERT = ["convert", str(NANO), "-o", "out", "-q", "Q4_0", *ONE]


def old_model(world: World) -> None:
    shutil.copytree(Path(world.env["MODEL"]), world.path / "out")


def old_or_new(world: World) -> None:
    """Between its two renames the old one has another name."""
    if not whole_model(world.path / "out"):
        (old,) = world.path.glob(".out.replaced-*")
        assert whole_model(old)


def only(*names: str) -> Check:
    def check(world: World) -> None:
        assert world.names() == sorted(names)

    return check


def converted_alone(world: World) -> None:
    assert whole_model(world.path / "out")
    assert world.names() == ["out"]


def cached_model(world: World) -> None:
    for path in (world.path / "cache" / "pocketphi").glob("phi4-nano-*"):
        assert whole_model(path)


def cached_alone(world: World) -> None:
    cached_model(world)
    (folder,) = [name for name in world.names("cache/pocketphi") if name != "verified.json"]
    assert folder.startswith("phi4-nano-")
    remembered(world)


def remembered(world: World) -> None:
    """The stamps of files that were hashed: all of it or nothing."""
    path = world.path / "cache" / "pocketphi" / "verified.json"
    if path.exists():
        assert all(isinstance(value, str) for value in json.loads(path.read_text("utf-8")).values())


def remembered_alone(world: World) -> None:
    remembered(world)
    assert world.names("cache/pocketphi") == ["verified.json"]


def old_chat(world: World) -> None:
    (world.path / "a.json").write_text(OLD_CHAT, "utf-8")


def chat_is_one_of_two(world: World) -> None:
    system, turns = read_chat(world.path / "a.json")
    assert (system, len(turns)) in (("old", 0), (None, 2))


def chat_alone(world: World) -> None:
    system, turns = read_chat(world.path / "a.json")
    assert (system, len(turns)) == (None, 2)
    assert world.names() == ["a.json"]


TRANSCRIBE = ["transcribe", str(CLIP), "-o", "out", "--format", "txt,srt,json", *ONE]


def compare(folder: Path, wanted: Path, *, all_of_them: bool) -> None:
    """Every final file is there whole, or, before the work is mended, not there."""
    finals = [p.name for p in wanted.iterdir()]
    there = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    if all_of_them:
        assert there == set(finals)
    for name in there & set(finals):
        if name in ("items.jsonl", "eval.json"):
            assert steady(folder / name) == steady(wanted / name)
        elif name != "eval.md":  # it has times in it
            assert (folder / name).read_bytes() == (wanted / name).read_bytes()


def final_files(name: str, *, all_of_them: bool) -> Check:
    def check(world: World) -> None:
        compare(world.path / "out", Path(world.env[name]), all_of_them=all_of_them)

    return check


def one_file(name: str, wanted: str, *, alone: bool) -> Check:
    def check(world: World) -> None:
        path = world.path / name
        if alone or path.exists():
            assert path.read_bytes() == Path(world.env[wanted]).read_bytes()
        if alone:
            assert world.names() == sorted([name, "text.txt"])

    return check


def text_file(world: World) -> None:
    (world.path / "text.txt").write_text(TEXT, "utf-8")


LOGITS = ["eval", "--data", "text.txt", "--metric", "ppl", "-c", "64", "--save-logits", "l.bin", *ONE]
IMATRIX = ["imatrix", "--data", "text.txt", "-o", "i.gguf", "-c", "64", *ONE]
ITEMS = ["eval", "--data", str(EVAL / "text.jsonl"), "--metric", "exact", "--limit", "6", "-o", "out", *ONE]
JOBS = {
    "convert": Job(
        CONVERT, nothing, lambda w: whole_model(w.path / "out"), [*CONVERT, "--overwrite"], converted_alone
    ),
    "convert over another": Job(
        [*CONVERT, "--overwrite"], old_model, old_or_new, [*CONVERT, "--overwrite"], converted_alone
    ),
    "the built-in model": Job(["info"], nothing, cached_model, None, cached_alone),
    "what is known of files": Job(
        ["run", "-m", "MODEL", "-p", "Hi", "-n", "1", *ONE], nothing, remembered, None, remembered_alone
    ),
    "chat": Job(
        ["chat", "-n", "2", *ONE], old_chat, chat_is_one_of_two, None, chat_alone, b"Hi\n/save a.json\n"
    ),
    "transcribe": Job(TRANSCRIBE, nothing, final_files("TRANSCRIPTS", all_of_them=False),
                      [*TRANSCRIBE, "--resume"], final_files("TRANSCRIPTS", all_of_them=True)),
    "eval": Job(ITEMS, nothing, final_files("ITEMS", all_of_them=False), [*ITEMS, "--resume"],
                final_files("ITEMS", all_of_them=True)),
    "imatrix": Job(IMATRIX, text_file, one_file("i.gguf", "IMATRIX", alone=False), None,
                   one_file("i.gguf", "IMATRIX", alone=True)),
    "logits": Job(LOGITS, text_file, one_file("l.bin", "LOGITS", alone=False), None,
                  one_file("l.bin", "LOGITS", alone=True)),
}  # fmt: skip
OWN_CACHE = ("the built-in model", "what is known of files")


@pytest.fixture(scope="module")
def known(
    zygote: Zygote, user: dict[str, str], model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """What runs that nobody kills leave."""
    place = tmp_path_factory.mktemp("whole")
    (place / "text.txt").write_text(TEXT, "utf-8")
    quiet = World(zygote, user, place)
    found = {"MODEL": str(model), "IMATRIX": str(place / "i.gguf"), "LOGITS": str(place / "l.bin")}
    for args in (LOGITS, IMATRIX):
        quiet.done(args)
    for name, args in (("TRANSCRIPTS", TRANSCRIBE), ("ITEMS", ITEMS)):
        quiet.done(args)
        (place / "out").rename(place / name)
        found[name] = str(place / name)
    return {**user, **found}


class Trial:
    """One job, to be killed again and again, each time in a new folder."""

    def __init__(self, name: str, zygote: Zygote, env: dict[str, str], root: Path) -> None:
        self.job, self._own_cache = JOBS[name], name in OWN_CACHE
        self._zygote, self._env, self._root, self._n = zygote, env, root, 0
        self.args = [env["MODEL"] if one == "MODEL" else one for one in self.job.args]

    def world(self) -> World:
        self._n += 1
        path = self._root / str(self._n)
        path.mkdir()
        env = self._env | ({"XDG_CACHE_HOME": str(path / "cache")} if self._own_cache else {})
        world = World(self._zygote, env, path)
        self.job.before(world)
        return world

    def check(self, world: World) -> None:
        """Right after a kill, then when the same is done once more."""
        self.job.after(world)
        again = self.args if self.job.again is None else list(self.job.again)
        world.extra.clear()
        world.done(again, self.job.stdin)
        self.job.whole(world)
        shutil.rmtree(world.path)


@pytest.mark.parametrize("name", JOBS)
def test_at_moments_spread_over_its_life(
    name: str, zygote: Zygote, known: dict[str, str], tmp_path: Path
) -> None:
    trial = Trial(name, zygote, known, tmp_path)
    takes_s = seconds_of(trial.world(), trial.args, trial.job.stdin)
    hits = 0
    for part in fractions(MOMENTS, seed=8):
        world = trial.world()
        hits += killed(world.start(trial.args, stdin=trial.job.stdin), part * takes_s)
        trial.check(world)
    assert hits > 0, "none of the kills came in time"


@pytest.mark.parametrize("name", JOBS)
def test_between_two_changes_on_the_disk(
    name: str, crashing: Zygote, known: dict[str, str], tmp_path: Path
) -> None:
    trial = Trial(name, crashing, known, tmp_path)
    counting = trial.world()
    counting.extra["CRASH_COUNT"] = str(tmp_path / "count")
    counting.done(trial.args, trial.job.stdin)
    n, *renames = map(int, (tmp_path / "count").read_text("ascii").split())
    assert renames, "what appears whole is renamed"
    some = random.Random(8).sample(range(1, n + 1), min(OTHER_CALLS, n))
    around = {call for at in renames for call in (at, at + 1)}
    for at in sorted({*some, *around, n - 1, n} & {*range(1, n + 1)}):
        world = trial.world()
        world.extra["CRASH_AT"] = str(at)
        outcome = world.run(trial.args, stdin=trial.job.stdin)
        assert outcome.code in (-9, 0), (at, outcome.err[-2000:])
        assert outcome.code == -9 or at > n - 2, f"{at} of {n} calls is before the end"
        trial.check(world)
