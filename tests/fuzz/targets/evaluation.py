# SPDX-License-Identifier: Apache-2.0
"""The files of an evaluation: items, a line each, and log-probabilities of a base model."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from pocketphi.evaluate.items import read_items
from pocketphi.evaluate.logits_file import LogitsReader, scored
from pocketphi.runtime.errors import InputError

from ..documents import Source, changed, text
from ..target import SEEDS, Target, attempt, file_with, promise

_VOCABULARY = 37


@functools.cache
def _base() -> Any:
    return json.loads((SEEDS / "documents" / "items.json").read_text("utf-8"))


def items(data: bytes) -> None:
    """Every medium is a file beside the list; ids are there once."""
    if data[:1] and data[0] % 2:
        lines = changed(_base(), Source(data[1:]))
        data = b"\0" + b"\n".join(map(text, lines if isinstance(lines, list) else [lines]))
    file_with(b"x", "images/a.png")
    path = file_with(data[1:], "items.jsonl")
    found = attempt(lambda: read_items(path), InputError)
    if found is None:
        return
    promise(len({item.id for item in found.items}) == len(found.items) > 0, "an id twice, or no items")
    for item in found.items:
        item.reference.encode("utf-8")
        for medium in [*item.media, *(m for message in item.messages for m in message.media)]:
            source = medium.source
            inside = isinstance(source, Path) and source.resolve().is_relative_to(path.parent.resolve())
            promise(inside and source.is_file(), f"a medium leads away: {source!r}")  # type: ignore[union-attr]


def logits(data: bytes) -> None:
    """Rows are distributions, tokens are ids."""
    path = file_with(data, "base.logits")

    def read() -> None:
        with LogitsReader(path, _VOCABULARY) as reader:
            n_chunks, n_ctx = reader.tokens.shape
            promise(reader.tokens.min() >= 0 and reader.tokens.max() < _VOCABULARY, "a token that is none")
            for chunk in range(n_chunks):
                rows = reader.log_probabilities(chunk, 0, scored(n_ctx))
                promise(bool(np.isfinite(rows).all()) and rows.max() <= 0.01, "no probability")
                promise(rows.shape == (scored(n_ctx), _VOCABULARY) and math.isfinite(rows.sum()), "no rows")

    attempt(read, InputError)


TARGETS = (Target("items", items, runs=2500), Target("logits", logits, runs=3000))
