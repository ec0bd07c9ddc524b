# SPDX-License-Identifier: Apache-2.0
"""A model directory's list of contents, beside files of the sizes that the good list gives."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from pocketphi.runtime import bundle
from pocketphi.runtime.errors import BundleError

from ..documents import document
from ..target import SEEDS, Target, attempt, promise, scratch


@functools.cache
def _directory() -> tuple[Path, Any]:
    base = json.loads((SEEDS / "documents" / "bundle.json").read_text("utf-8"))
    root = scratch() / "model"
    for entry in base["files"]:
        path = root / entry["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.truncate(entry["size"])
    return root, base


def one_input(data: bytes) -> None:
    """Whatever it lists is a file inside; whatever it says can be written as the same again."""
    root, base = _directory()
    (root / bundle.MANIFEST).write_bytes(document(data, base))
    found = attempt(lambda: bundle.load(root), BundleError)
    if found is None:
        return
    listed = {entry.path for entry in found.files}
    for entry in found.files:
        path = found.path(entry.path)
        promise(
            path.is_file() and path.resolve().is_relative_to(root.resolve()), f"{entry.path!r} leads away"
        )
        promise(path.stat().st_size == entry.size, f"{entry.path!r} has another size")
    promise({found.decoder, found.tokenizer} <= listed, "uses what it does not list")
    t = found.text
    promise(
        all(0 <= i < t.vocab_size for i in found.stop_ids) and bool(found.stop_ids), "a stop id that is none"
    )
    found.to_json().encode("utf-8")


TARGETS = (Target("bundle", one_input, runs=2500),)
