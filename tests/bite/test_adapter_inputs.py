# SPDX-License-Identifier: Apache-2.0
"""Adapters that are none, of another backbone, or that llama.cpp would end the process for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pocketphi.runtime.bundle import MANIFEST, load

from .. import gguf_bytes
from .conftest import Bitten
from .spoilt_gguf import ADAPTERS
from .table import Case, Place, seal
from .test_gguf_inputs import MEASURE, good, listener, pipe

Make = Callable[[Place], list[str]]


def adapter(model: Path, name: str) -> Path:
    bundle = load(model)
    return bundle.path(bundle.adapters[name].file)


def measured(place: Place, lora: Path) -> list[str]:
    return ["bench", "-m", str(good(place)), "--lora", str(lora), *MEASURE]


def asked(model: Path) -> list[str]:
    """A question that needs the speech adapter, without the time that a clip takes."""
    return ["run", "-m", str(model), "--adapter", "speech", "-p", "Hi", "-n", "1"]


def bare(what: str) -> Make:
    def make(place: Place) -> list[str]:
        parts = gguf_bytes.read(adapter(place.shared_model("phi4-nano", "Q8_0"), "vision"))
        ADAPTERS[what].edit(parts)
        return measured(place, place.write("l.gguf", parts.pack()))

    return make


def other_member(place: Place) -> list[str]:
    return measured(place, adapter(place.shared_model("phi4-multimodal", "F32"), "speech"))


def vision_as_speech(place: Place) -> list[str]:
    model = place.model()
    adapter(model, "speech").write_bytes(adapter(model, "vision").read_bytes())
    return asked(seal(model))


def of_other_numbers(place: Place) -> list[str]:
    """The speech adapter with half of its rank, and B's rows to fit: only bundle.json knows better."""
    model = place.model()
    path = adapter(model, "speech")
    parts = gguf_bytes.read(path)
    for part in parts.parts:
        row = part.dims[0] * 2  # F16
        if part.name.endswith(b"lora_a"):
            part.dims[1] //= 2
            part.data = part.data[: len(part.data) // 2]
        else:
            part.data = b"".join(part.data[i : i + row // 2] for i in range(0, len(part.data), row))
            part.dims[0] //= 2
    path.write_bytes(parts.pack())
    return asked(seal(model))


def not_finite(place: Place) -> list[str]:
    model = place.model()
    path = adapter(model, "speech")
    parts = gguf_bytes.read(path)
    for part in parts.parts:
        part.data = b"\xff" * len(part.data)
    path.write_bytes(parts.pack())
    return asked(seal(model))


def one_file_for_both(place: Place) -> list[str]:
    """The same adapter twice, under both names."""
    model = place.model()
    manifest = model / MANIFEST
    plain = json.loads(manifest.read_text("utf-8"))
    plain["adapters"]["speech"] = plain["adapters"]["vision"]
    manifest.write_text(json.dumps(plain), "utf-8")
    return asked(seal(model))


def without_origin(place: Place) -> list[str]:
    """As earlier versions wrote them: what bundle.json says is enough."""
    model = place.model()
    path = adapter(model, "speech")
    parts = gguf_bytes.read(path)
    parts.drop("pocketphi.source.fingerprint")
    parts.drop("pocketphi.adapter")
    path.write_bytes(parts.pack())
    return asked(seal(model))


CASES = [
    *(Case(what, bare(what), 3, rf"l\.gguf: .*({one.line})") for what, one in ADAPTERS.items()),
    Case("of another model", other_member, 3, "is an adapter of another checkpoint"),
    Case("the model itself", lambda p: measured(p, good(p)), 3, "is not an adapter"),
    Case("nothing there", lambda p: measured(p, p.path / "gone"), 3, "gone: no such file"),
    Case("empty", lambda p: measured(p, p.write("l.gguf", b"")), 3, "is not a GGUF file"),
    Case("pipe", lambda p: measured(p, pipe(p)), 3, "is not a regular file", max_seconds=10),
    Case("socket", lambda p: measured(p, listener(p)), 3, "is not a regular file"),
    Case("/dev/zero", lambda p: measured(p, Path("/dev/zero")), 3, "is not a regular file"),
    Case("folder", lambda p: measured(p, p.path), 3, "is not a regular file"),
    Case("vision as speech", vision_as_speech, 3, r"speech.*: (has alpha 64, bundle|is the vision adapter)"),
    Case("of another rank", of_other_numbers, 3, r"has shape \[256, 32\], expected \[256, 64\]"),
    Case("NaN", not_finite, 4, "gave logits that are not finite"),
    Case(
        "the same adapter twice", one_file_for_both, 3, "is the vision adapter, expected the speech adapter"
    ),
    Case("without its origin", without_origin, 0, ""),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_adapter(case: Case, bitten: Bitten) -> None:
    bitten(case)
