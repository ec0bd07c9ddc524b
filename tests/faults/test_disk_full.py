# SPDX-License-Identifier: Apache-2.0
"""A disk that gets full, at any point: exit code 6, one line, and nothing half-written under a final name.

The disk is a tmpfs of a few pages, seen by the program alone; it lies there empty of others' files, and is
copied out when the program has ended. One that has room and no file entries left refuses each new file in
turn; where the program looks for room first, a limit on the size of one file fails it half-way all the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import pytest
import soundfile

from pocketphi.runtime.repl import read_chat

from ..bite.zygote import Outcome, Zygote
from ..tiny import NANO
from .conftest import needs_linux
from .test_kill import OLD_CHAT, compare
from .worlds import CLIP, EVAL, ONE, TEXT, World, one_error, whole_model

pytestmark = needs_linux

ITEMS = ["eval", "--data", str(EVAL / "text.jsonl"), "--metric", "exact", "--limit", "6", "-n", "20", *ONE]
TRANSCRIBE = ["transcribe", str(CLIP), "--format", "txt,srt,json", *ONE]
CONVERT = ["convert", str(NANO), "-q", "Q4_0", *ONE]


@pytest.fixture(scope="module", autouse=True)
def can_mount(zygote: Zygote, user: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Root can, and others where the system lets them have a namespace of users."""
    place = tmp_path_factory.mktemp("mount")
    tried = World(zygote, user, place).run(["--help"], ("small_disk", str(place), "size=4k"))
    if tried.code != 0:
        pytest.skip(f"this system lets nobody mount a disk: {tried.err[-200:]!r}")


class Disk:
    """Runs a command with a small disk at `disk`; what was on it is at `found` afterwards."""

    def __init__(self, world: World) -> None:
        self.world, self._numbers = world, count()
        self.found = world.path
        (world.path / "disk").mkdir()

    def run(
        self, options: str, args: Sequence[str], *more: tuple[object, ...], stdin: bytes = b"",
        env: dict[str, str] | None = None,
    ) -> Outcome:  # fmt: skip
        disk = str(self.world.path / "disk")
        self.found = self.world.path / f"found{next(self._numbers)}"
        self.world.extra = env or {}
        return self.world.run(
            args, ("keep", disk, str(self.found)), ("small_disk", disk, options), *more, stdin=stdin
        )

    def names(self, but: str = "^$") -> list[str]:
        return sorted(p.name for p in self.found.iterdir() if not re.search(but, p.name))


@pytest.fixture
def disk(world: World) -> Disk:
    return Disk(world)


def sizes(most: int) -> Iterator[str]:
    """Every size in pages up to one at which it must have worked."""
    for pages in range(1, most):
        yield f"size={4 * pages}k"


def test_a_conversion_finds_no_entry_for_its_next_file(disk: Disk) -> None:
    """There is room for the bytes, so each of its files in turn is the one that cannot be made."""
    args = [*CONVERT, "-o", "disk/out"]
    failed = 0
    for entries in range(1, 30):
        outcome = disk.run(f"size=64m,nr_inodes={entries + 1}", args)
        if outcome.code == 0:
            break
        failed += 1
        one_error(outcome, 6, "No space left on device")
        assert disk.names() == []
    assert failed > 15, "a directory and 17 files"
    assert whole_model(disk.found / "out")


def test_a_conversion_that_would_not_fit_is_not_begun(disk: Disk) -> None:
    one_error(disk.run("size=4m", [*CONVERT, "-o", "disk/out"]), 6, "bytes free, the output needs")
    assert disk.names() == []


def test_a_conversion_whose_file_stops_growing(world: World) -> None:
    """In the tokenizer, the backbone's header, its data, an adapter, an encoder's weights."""
    for limit in (1 << 10, 100 << 10, 200 << 10, 1 << 20, 2 << 20):
        one_error(world.run([*CONVERT, "-o", "out"], ("largest_file", limit)), 6, "File too large")
        assert world.names() == []


def test_a_model_is_not_replaced_by_one_that_does_not_fit(world: World) -> None:
    """The old one stays whole."""
    world.done([*CONVERT, "-o", "out"])
    before = {p.name: p.read_bytes() for p in (world.path / "out").iterdir()}
    limit = ("largest_file", 1 << 20)
    one_error(world.run([*CONVERT, "-o", "out", "--overwrite"], limit), 6, "File too large")
    assert {p.name: p.read_bytes() for p in (world.path / "out").iterdir()} == before
    assert world.names() == ["out"]


@pytest.mark.parametrize(
    ("args", "resumed"), [(TRANSCRIBE, "TRANSCRIPT"), (ITEMS, "ITEMS")], ids=["transcribe", "eval"]
)
def test_what_can_be_resumed_is_resumed_elsewhere(
    args: list[str], resumed: str, disk: Disk, world: World
) -> None:
    """Whatever was kept on the full disk goes on, on one with room, to what an undisturbed run gives."""
    world.done([*args, "-o", "whole"])
    failed = 0
    for size in [*sizes(12), *(f"size=1m,nr_inodes={n}" for n in range(1, 8))]:
        outcome = disk.run(size, [*args, "-o", "disk/out"])
        if outcome.code == 0:
            compare(disk.found / "out", world.path / "whole", all_of_them=True)
            continue
        failed += 1
        one_error(outcome, 6, "No space left on device")
        out = disk.found / "out"
        compare(out, world.path / "whole", all_of_them=False)
        if out.is_dir():
            left = [p.name for p in out.iterdir()]
            assert not any(".partial-" in name for name in left), left
            world.extra = {}
            world.done([*args, "-o", str(out), "--resume"])
            compare(out, world.path / "whole", all_of_them=True)
    assert failed >= 4


@pytest.mark.parametrize("size", ["size=8k", "size=32k", "size=64k", "size=136k"])
def test_a_recording_goes_on_being_heard(size: str, disk: Disk) -> None:
    """Its sound needs 140 KiB and a bit: the words come all the same, and the part is a WAV up to where it
    ends."""
    outcome = disk.run(size, ["live", "--file", str(CLIP), "--save-audio", "disk/kept.wav", *ONE])
    one_error(outcome, 6, "it holds the first")
    assert outcome.out == b"Send a message to Grace.\n"
    assert disk.names() == ["kept.wav.part"]
    assert 0 < len(soundfile.read(disk.found / "kept.wav.part")[0]) < soundfile.info(CLIP).frames


def test_live_transcripts(disk: Disk) -> None:
    for size in [*sizes(3), *(f"size=1m,nr_inodes={n}" for n in range(1, 6))]:
        outcome = disk.run(
            size, ["live", "--file", str(CLIP), "-o", "disk/out", "--format", "txt,srt,json", *ONE]
        )
        if outcome.code:
            one_error(outcome, 6, "No space left on device")
        names = [p.name for p in (disk.found / "out").iterdir()] if (disk.found / "out").is_dir() else []
        assert not any(".partial-" in name for name in names)
        if outcome.code == 0:
            assert [n for n in names if n.endswith(".part")] == []


@pytest.mark.parametrize("options", ["size=4k", "size=1m,nr_inodes=2"])
def test_a_chat_that_cannot_be_saved_goes_on(options: str, disk: Disk) -> None:
    """What was saved before is still there, and the conversation too."""
    before = ("fill", str(disk.world.path / "disk" / "a.json"), OLD_CHAT)
    outcome = disk.run(options, ["chat", *ONE], before, stdin=b"Hi\n/save disk/a.json\nHi\n")
    assert (outcome.code, outcome.out.count(b"\n")) == (0, 2)
    assert re.fullmatch(rb"error: 'disk/a.json': cannot be written: No space left on device\n", outcome.err)
    assert disk.names() == ["a.json"]
    assert read_chat(disk.found / "a.json")[0] == "old"


def test_an_importance_matrix(disk: Disk, world: World) -> None:
    (world.path / "text.txt").write_text(TEXT, "utf-8")
    args = ["imatrix", "--data", "text.txt", "-o", "disk/i.gguf", "-c", "64", *ONE]
    for options in ("size=4k", "size=16k", "size=24k", "size=1m,nr_inodes=1"):
        one_error(disk.run(options, args), 6, "No space left on device")
        assert disk.names() == []


def test_logits(disk: Disk, world: World) -> None:
    """Too large for the disk: said before anything is read. On one that fills up: nothing is left."""
    (world.path / "text.txt").write_text(TEXT, "utf-8")
    args = ["eval", "--data", "text.txt", "--metric", "ppl", "-c", "64", "--save-logits", "disk/l.bin", *ONE]
    one_error(disk.run("size=64k", args), 6, "the disk has")
    assert disk.names() == []
    one_error(disk.run("size=64m,nr_inodes=1", args), 6, "No space left on device")
    assert disk.names() == []
    for limit in (300, 1 << 10, 100 << 10):
        one_error(disk.run("size=64m", args, ("largest_file", limit)), 6, "File too large")
        assert disk.names() == []


def test_no_room_for_the_built_in_model(disk: Disk) -> None:
    """Without it there is no answer: one line that says which variable helps."""
    env = {"XDG_CACHE_HOME": str(disk.world.path / "disk")}
    for options in ("size=1m", "size=64m,nr_inodes=1", "size=64m,nr_inodes=9"):
        one_error(disk.run(options, ["run", "-p", "Hi", *ONE], env=env), 6, "POCKETPHI_CACHE")
        assert disk.names("^pocketphi$") == []
        folder = disk.found / "pocketphi"
        assert not folder.exists() or list(folder.iterdir()) == []


def test_no_room_to_remember_what_was_hashed(disk: Disk, model: Path) -> None:
    """A model directory is answered from all the same."""
    env = {"XDG_CACHE_HOME": str(disk.world.path / "disk")}
    for options in ("size=64m,nr_inodes=1", "size=64m,nr_inodes=2"):
        outcome = disk.run(options, ["run", "-m", str(model), "-p", "How do you spell tea?", *ONE], env=env)
        assert (outcome.code, outcome.out, outcome.err) == (0, b"T-E-A.\n", b"")
        assert [p.name for p in disk.found.rglob("*") if p.is_file()] == []


def test_standard_output_on_a_full_disk(disk: Disk) -> None:
    """`pocketphi run … > answer.txt`: the answer is lost, and that is said. A page that is taken leaves
    none."""
    taken = ("fill", str(disk.world.path / "disk" / "taken"), "x" * 4096)
    to = ("stdout_to", str(disk.world.path / "disk" / "answer.txt"))
    for args in (["run", "-p", "How do you spell tea?"], ["transcribe", str(CLIP)], ["info"],
                 ["info", "--json"], ["live", "--file", str(CLIP), "--json"],
                 ["run", "-p", "Hi", "--json"]):  # fmt: skip
        one_error(disk.run("size=4k", [*args], taken, to), 6, "standard output: cannot be written")
