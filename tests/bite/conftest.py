# SPDX-License-Identifier: Apache-2.0
"""Each bad input meets the program in a process of its own, under limits, with a home of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..conftest import Converted
from ..golden import cases
from .table import Case, Place, copy_folder, differences, faults, listing
from .zygote import Limits, Outcome, Zygote, plain_environment

_VERIFIED = "pocketphi/verified.json"  # what the program remembers of files it has hashed
_PULSE = "^pulse-"  # libpulse's, whenever microphones are looked for
Bitten = Callable[[Case], Outcome]


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    with Zygote() as running:
        yield running


@pytest.fixture(scope="session")
def user(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> dict[str, str]:
    """The environment of a user whose cache holds the built-in model already."""
    home = tmp_path_factory.mktemp("home")
    env = plain_environment() | {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "NO_COLOR": "1"}
    made = zygote.start(["run", "-p", "Hi", "-n", "1"], env=env, cwd=home, limits=Limits(120, 1000)).wait()
    assert made.code == 0, made.err
    return env


@pytest.fixture
def place(tmp_path: Path, converted: Converted, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """An empty folder, and models on demand."""

    def checkpoint(into: Path, member: str) -> Path:
        shelf = tmp_path_factory.getbasetemp() / "bite-checkpoints"
        source = shelf / member
        if member == "phi4-nano" or not source.is_dir():
            source = cases.checkpoint(member, shelf)
        return copy_folder(source, into)

    def model(member: str, recipe: str) -> Path:
        """`recipe` "onnx": a directory whose backbone is ONNX alone, at 4 bits."""
        if recipe == "onnx":
            return converted(member, "Q8_0", backbone="onnx", onnx_quant="int4", onnx_lora="fp16")
        return converted(member, recipe)

    path = tmp_path / "place"
    path.mkdir()
    return Place(
        path,
        copy_model=lambda into, member, recipe: copy_folder(model(member, recipe), into),
        copy_checkpoint=checkpoint,
        shared_model=model,
    )


@pytest.fixture
def bitten(zygote: Zygote, user: dict[str, str], place: Place, tmp_path: Path) -> Bitten:
    """`bitten(case)`: run it, and check all that its row says."""

    def run(case: Case) -> Outcome:
        args = case.make(place)
        temporary, cache = tmp_path / "tmp", Path(user["XDG_CACHE_HOME"])
        temporary.mkdir(exist_ok=True)
        before, cached = listing(place.path), listing(cache, but=_VERIFIED)
        env = user | {"TMPDIR": str(temporary)} | dict(case.env)
        limits = Limits(case.max_seconds, case.max_rss_mb)
        outcome = zygote.start(args, env=env, cwd=place.path, stdin=case.stdin, limits=limits).wait()
        found = faults(case, outcome)
        found += differences(before, listing(place.path), case.leaves)
        found += [f"temporary: {what}" for what in differences({}, listing(temporary), _PULSE)]
        found += [f"cache: {what}" for what in differences(cached, listing(cache, but=_VERIFIED))]
        verified = cache / _VERIFIED
        if verified.exists() and not isinstance(json.loads(verified.read_text("utf-8")), dict):
            found.append(f"cache: {_VERIFIED} holds no object")
        assert found == [], args
        return outcome

    return run
