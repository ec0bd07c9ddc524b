# SPDX-License-Identifier: Apache-2.0
"""The whole way (checkpoint, converter, a backbone, its engine, session) against transformers' golden runs.

At F32 with an F32 cache nothing is rounded that transformers does not round too: two float32
evaluations of one graph are compared, within each case's `bound` (derived in golden/cases.py from the
golden run's own distance to float64). test_the_bound_is_tight_enough shows what that catches.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketphi.runtime import bundle as bundles
from pocketphi.runtime.engine import Model
from pocketphi.runtime.parts import EmbedSpan, Span, TokenSpan
from pocketphi.runtime.session import Session

from . import scoring, tiny
from .conftest import OPEN, Converted, open_decoder
from .golden import cases

REFERENCE = tiny.NANO.parent / "reference_outputs.json"
ITEMS = json.loads(REFERENCE.read_text("utf-8"))["items"]
TEXT_ITEMS = [i for i in ITEMS if i["mode"] == "text"]


def spans_of(case: cases.Case) -> list[Span]:
    found: list[Span] = []
    for i, run in enumerate(case.spans()):
        found.append(
            EmbedSpan(run.astype(np.float32), f"{case.name}/{i}")
            if run.ndim == 2
            else TokenSpan(run.astype(np.int32))
        )
    return found


@pytest.mark.parametrize("backbone", OPEN)
@pytest.mark.parametrize("model", cases.MODELS)
def test_logits_and_greedy_tokens(model: str, backbone: str, converted: Converted) -> None:
    bundle = bundles.load(converted(model, "F32", lora_quant="F32", backbone="both"))
    decoder = OPEN[backbone](bundle)
    notes: list[str] = []
    session = Session(decoder, limit=bundle.text.context_length, note=notes.append)
    for case in cases.load(model):
        logits, _ = session.read(spans_of(case), adapter=case.adapter)
        assert abs(logits - case.logits).max() <= case.bound, case.name
        assert decoder.table == bundle.text.rope.table(len(case.ids)), case.name
        wanted = dict(zip(case.steps.tolist(), case.step_logits, strict=True))
        for step, (token, margin) in enumerate(zip(case.greedy.tolist(), case.margins, strict=True)):
            if step in wanted:
                assert abs(logits - wanted[step]).max() <= case.bound, f"{case.name} step {step}"
            assert margin > 2 * case.bound, "or a greedy token would be a matter of luck"
            assert logits.argmax() == token, f"{case.name} step {step}"
            logits = session.step(token)
    decoder.close()
    crossed = [n for n in notes if "reading it again with the long RoPE table" in n]
    assert bool(crossed) == bundle.text.rope.is_long_rope or model == "phi4-mini-reasoning"


def test_the_bound_is_tight_enough(converted: Converted) -> None:
    """A wrong RoPE table or a missing adapter lies far outside the bound that the test above allows."""
    decoder = open_decoder(bundles.load(converted("phi4-multimodal", "F32", lora_quant="F32")))
    by_name = {case.name: case for case in cases.load("phi4-multimodal")}
    for name, table, adapter in (
        ("at", "long", None),
        ("vision-short", "short", None),
        ("vision-short", "short", "speech"),
    ):
        case = by_name[name]
        decoder.open(table=table, capacity=512 if table == "long" else 256, adapter=adapter)
        (span,) = spans_of(case)
        assert abs(decoder.feed(span) - case.logits).max() > 100 * case.bound, name
    decoder.close()


@pytest.mark.parametrize("recipe", ["F32", "F16"])
@pytest.mark.parametrize("item", TEXT_ITEMS, ids=lambda i: i["id"])
def test_phi4_nano_answers_as_the_reference(
    recipe: str, item: dict[str, object], converted: Converted
) -> None:
    with Model(converted("phi4-nano", recipe), kv_type="f32") as model:
        reply = model.complete(str(item["prompt"]), max_tokens=64)
    assert list(reply.token_ids) == item["output_ids"]
    assert reply.mode == "language"
    assert reply.adapter is None


@pytest.mark.parametrize("item", ITEMS, ids=lambda i: i["id"])
def test_every_mode_of_phi4_nano_answers_as_the_reference(item: dict[str, Any], exact_nano: Model) -> None:
    """All 24, token for token: text, tools, speech, pictures, speech about pictures."""
    reply = exact_nano.complete(item["prompt"], max_tokens=80, media=scoring.media_of(item))
    assert list(reply.token_ids) == item["output_ids"]
    assert reply.mode == {"text": "language"}.get(item["mode"], item["mode"])


@pytest.fixture(scope="module")
def exact_nano(converted: Converted) -> Iterator[Model]:
    with Model(converted("phi4-nano", "F32", lora_quant="F32", encoders="fp32"), kv_type="f32") as model:
        yield model


def test_base_text_is_the_same_whether_the_adapters_are_there_or_not(
    converted: Converted, tmp_path: Path
) -> None:
    full = converted("phi4-nano", "Q8_0")
    bare = tmp_path / "bare"
    bare.mkdir()
    manifest = json.loads((full / bundles.MANIFEST).read_text("utf-8"))
    gone = {a["file"] for a in manifest["adapters"].values()}
    manifest["files"] = [f for f in manifest["files"] if f["path"] not in gone]
    manifest["adapters"] = {}
    del manifest["sha256"]  # of the manifest itself
    (bare / bundles.MANIFEST).write_text(json.dumps(manifest), "utf-8")
    for entry in manifest["files"]:
        (bare / entry["path"]).write_bytes((full / entry["path"]).read_bytes())
    ids = np.arange(40, 90, dtype=np.int32)
    rows = []
    for directory in (full, bare):
        decoder = open_decoder(bundles.load(directory), "f16")
        decoder.open(table="short", capacity=256, adapter=None)
        rows.append(decoder.feed(TokenSpan(ids)))
        decoder.close()
    assert gone
    assert rows[0].tobytes() == rows[1].tobytes()
