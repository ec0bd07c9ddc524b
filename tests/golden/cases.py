# SPDX-License-Identifier: Apache-2.0
"""Reads the golden decoder cases: what goes in, and what transformers says comes out."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import tiny

HERE = Path(__file__).resolve().parent
MODELS = (*tiny.MEMBERS, "phi4-nano")

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Case:
    """One sequence and its reference. n is its length, v the vocabulary, m and s are counts of this case."""

    model: str
    name: str
    adapter: str | None  # "vision", "speech" or none, on for the whole sequence
    ids: Int32  # [n], -1 where a row of `rows` stands instead of a token
    rows: Float32  # [count of -1, d_model], embedding input in order
    logits: Float32  # [v], after the last position
    greedy: Int32  # [m], argmax continuation; stop ids do not stop it
    margins: Float32  # [m], best minus second logit where each greedy token was chosen
    steps: Int32  # [s], how many greedy tokens had been appended when step_logits[i] came out
    step_logits: Float32  # [s, v]
    float32_error: float  # largest distance of logits and step_logits from decoder64's
    angle_error: float  # what angles rounded once per frequency move there: see decoder64.rope_table

    @property
    def bound(self) -> float:
        """How far a correct float32 engine may be from `logits` and `step_logits`.

        transformers and the engine each round; both are allowed twice what was measured of
        transformers and what rounded angles do. A mistake moves logits by more than 0.1.
        """
        return 4 * (self.float32_error + self.angle_error)

    def spans(self) -> list[Int32 | Float32]:
        """The input as runs of token ids (int32 [k]) and of rows (float32 [k, d_model])."""
        edges = np.flatnonzero(np.diff(self.ids < 0)) + 1
        found: list[Int32 | Float32] = []
        taken = 0
        for run in np.split(self.ids, edges):
            if run[0] < 0:
                found.append(self.rows[taken : taken + len(run)])
                taken += len(run)
            else:
                found.append(run)
        return found


def rows_of(model: str, name: str, count: int) -> Float32:
    """The embedding input of a case: float32 [count, 256]. Made, not stored; the values suit bf16."""
    return tiny.weight("golden-rows", f"{model}/{name}", (count, 256))


@functools.cache
def index() -> dict[str, Any]:
    """cases.json."""
    found: dict[str, Any] = json.loads((HERE / "cases.json").read_text("utf-8"))
    return found


def load(model: str) -> list[Case]:
    """Every case of one model, in the order of cases.json."""
    with np.load(HERE / "logits" / f"{model}.npz") as file:
        data = {name: file[name] for name in file.files}
    found = []
    for entry in index()["models"][model]["cases"]:
        name = entry["name"]
        ids = data[f"{name}/ids"]
        found.append(
            Case(
                model=model,
                name=name,
                adapter=entry["adapter"],
                ids=ids,
                rows=rows_of(model, name, int((ids < 0).sum())),
                logits=data[f"{name}/logits"],
                greedy=data[f"{name}/greedy"],
                margins=data[f"{name}/margins"],
                steps=data[f"{name}/steps"],
                step_logits=data[f"{name}/step_logits"],
                float32_error=entry["float32_error"],
                angle_error=entry["angle_error"],
            )
        )
    return found


def checkpoint(model: str, dst: Path) -> Path:
    """The folder the cases of `model` were made from: written under `dst`, or phi4-nano's own."""
    if model == "phi4-nano":
        return tiny.NANO
    member = next(m for m in tiny.MEMBERS if m == model)
    return tiny.write(member, dst / model)


def checkpoint_hash(weights: dict[str, Float32]) -> str:
    """What cases.json keeps as weights_sha256: over names, shapes and float32 values in name order."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name}{weights[name].shape}".encode() + weights[name].tobytes())
    return digest.hexdigest()
