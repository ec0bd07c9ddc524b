# SPDX-License-Identifier: Apache-2.0
"""Every file of a model directory cut, emptied, and with one bit flipped: named each time, and never answered
from.

The directory is one that has been run from: its files are known by their stat, so that what is missed here
would be missed on a user's disk.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pocketphi.runtime.bundle import MANIFEST

from ..bite.zygote import Zygote
from .conftest import needs_linux
from .worlds import CLIP, EVAL, ONE, World, one_error

pytestmark = needs_linux

Damage = Callable[[bytes], bytes]
FILES = [
    MANIFEST, "backbone-Q8_0.gguf", "chat_template.jinja", "speech-Q8_0-LoRA.gguf", "speech-front.onnx",
    "speech-front.onnx.data", "speech-projector.onnx", "speech-projector.onnx.data",
    "speech-vision-projector.onnx",
    "speech-vision-projector.onnx.data", "speech.onnx", "speech.onnx.data", "tokenizer.json",
    "vision-Q8_0-LoRA.gguf", "vision-projector.onnx", "vision-projector.onnx.data", "vision.onnx",
    "vision.onnx.data",
]  # fmt: skip


def flipped(part: float) -> Damage:
    def damage(raw: bytes) -> bytes:
        at = int(part * (len(raw) - 1))
        return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]

    return damage


DAMAGES: dict[str, Damage] = {
    "one byte short": lambda raw: raw[:-1],
    "empty": lambda raw: b"",
    "first bit": flipped(0),
    "middle bit": flipped(0.5),
    "last bit": flipped(1),
}


@pytest.fixture(scope="module")
def used(
    zygote: Zygote, user: dict[str, str], model: Path, tmp_path_factory: pytest.TempPathFactory
) -> World:
    """A copy of the model, known to be right: pictures and sound have been asked about."""
    place = tmp_path_factory.mktemp("used")
    copy = shutil.copytree(model, place / "model", copy_function=shutil.copyfile)
    assert sorted(p.name for p in copy.iterdir()) == sorted(FILES), "a new file needs a row here"
    for path in copy.iterdir():
        os.utime(path, (1e9, 1e9))
    time.sleep(0.2)  # what changed in the last 0.1 s is not remembered, and no call sets a file's ctime
    world = World(zygote, {**user, "XDG_CACHE_HOME": str(place / "cache")}, place)
    picture = str(EVAL / "images" / "img-012.png")
    world.done(
        ["run", "-m", "model", "--image", picture, "--audio", str(CLIP), "-p", "What?", "-n", "1", *ONE]
    )
    assert (place / "cache" / "pocketphi" / "verified.json").exists()
    return world


@pytest.mark.parametrize("name", FILES)
def test_each_file(name: str, used: World) -> None:
    path = used.path / "model" / name
    whole, before = path.read_bytes(), path.stat()
    try:
        for what, damage in DAMAGES.items():
            path.write_bytes(damage(whole))
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a disk damages, not as a person
            for args in (["info", "--check", "model"], ["run", "-m", "model", "-p", "Hi", "-n", "1", *ONE]):
                outcome = used.run(args)
                assert outcome.code == 3, (what, args, outcome.out[-200:], outcome.err[-500:])
                one_error(outcome, 3, name)
                assert outcome.out == b"", (what, args)
    finally:
        path.write_bytes(whole)
    used.done(["info", "--check", "model"])
