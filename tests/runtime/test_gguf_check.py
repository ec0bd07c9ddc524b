# SPDX-License-Identifier: Apache-2.0
"""What may be given to llama.cpp: every model of ours, and nothing of the tables of spoilt ones."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from pocketphi.runtime import bundle as bundles
from pocketphi.runtime.bundle import Bundle
from pocketphi.runtime.errors import BundleError
from pocketphi.runtime.gguf_check import AdapterFile, read_adapter, read_model

from .. import gguf_bytes
from ..bite.spoilt_gguf import ADAPTERS, MODELS, ODDITIES, Spoilt
from ..conftest import Converted

MEMBERS = [("phi4-nano", "Q4_K_M"), ("phi35-mini", "Q8_0"), ("phi4-14b", "F16"), ("phi4-multimodal", "F32")]


@pytest.fixture(scope="module")
def good(converted: Converted) -> Bundle:
    return bundles.load(converted("phi4-nano", "Q8_0", "Q8_0"))


@pytest.mark.parametrize(("member", "recipe"), MEMBERS)
def test_what_the_converter_writes_passes(member: str, recipe: str, converted: Converted) -> None:
    bundle = bundles.load(converted(member, recipe))
    path = bundle.path(bundle.decoder)
    read_model(path, None)
    header = read_model(path, bundle.text)
    for name, a in bundle.adapters.items():
        file = bundle.path(a.file)
        read_adapter(AdapterFile(file, a.alpha, a.rank), name, header)
        read_adapter(AdapterFile(file), None, header)


def spoil(source: Path, spoilt: Spoilt, into: Path) -> Path:
    parts = gguf_bytes.read(source)
    spoilt.edit(parts)
    into.write_bytes(parts.pack())
    return into


@pytest.mark.parametrize("what", [*MODELS, *ODDITIES])
@pytest.mark.parametrize("foreign", [True, False])
def test_models(what: str, foreign: bool, good: Bundle, tmp_path: Path) -> None:
    spoilt = (MODELS | dict(ODDITIES))[what]
    path = spoil(good.path(good.decoder), spoilt, tmp_path / "bad.gguf")
    said = spoilt.said(foreign=foreign)
    if not said:
        read_model(path, None if foreign else good.text)
        return
    with pytest.raises(BundleError, match=said) as caught:
        read_model(path, None if foreign else good.text)
    assert str(caught.value).startswith(f"{path}: ") and str(caught.value).isprintable()


@pytest.mark.parametrize("what", ADAPTERS)
@pytest.mark.parametrize("foreign", [True, False])
def test_adapters(what: str, foreign: bool, good: Bundle, tmp_path: Path) -> None:
    vision = good.adapters["vision"]
    path = spoil(good.path(vision.file), ADAPTERS[what], tmp_path / "bad.gguf")
    base = read_model(good.path(good.decoder), good.text)
    file = AdapterFile(path) if foreign else AdapterFile(path, vision.alpha, vision.rank)
    with pytest.raises(BundleError, match=ADAPTERS[what].said(foreign=foreign)) as caught:
        read_adapter(file, None if foreign else "vision", base)
    assert str(caught.value).startswith(f"{path}: ") and str(caught.value).isprintable()


def test_an_adapter_that_is_not_the_one_described(good: Bundle) -> None:
    base = read_model(good.path(good.decoder), good.text)
    vision = good.path(good.adapters["vision"].file)
    for file, name, want in (
        (AdapterFile(vision, 65.0, 32), "vision", r"has alpha 64, bundle\.json says 65 for vision"),
        (AdapterFile(vision, 64.0, 64), "vision", r"has shape \[256, 32\], expected \[256, 64\]"),
        (AdapterFile(vision, 64.0, 32), "speech", "is the vision adapter, expected the speech adapter"),
    ):
        with pytest.raises(BundleError, match=want):
            read_adapter(file, name, base)


def test_an_adapter_of_a_backbone_that_has_one_merged(good: Bundle, converted: Converted) -> None:
    merged = bundles.load(converted("phi4-nano", "F32", merge="speech"))
    base = read_model(merged.path(merged.decoder), merged.text)
    with pytest.raises(BundleError, match="has its speech adapter merged in"):
        read_adapter(AdapterFile(good.path(good.adapters["vision"].file)), None, base)


def test_foreign_adapters_say_less(good: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No fingerprint and no name: a warning. A norm that llama.cpp leaves out: another."""
    base = read_model(good.path(good.decoder), good.text)
    parts = gguf_bytes.read(good.path(good.adapters["vision"].file))
    parts.drop("pocketphi.source.fingerprint")
    parts.drop("pocketphi.adapter")
    parts.parts.append(gguf_bytes.Part(b"blk.0.attn_norm.weight", [256], 0, bytes(1024)))
    path = tmp_path / "foreign.gguf"
    path.write_bytes(parts.pack())
    with caplog.at_level(logging.WARNING):
        read_adapter(AdapterFile(path), None, base)
    assert "does not say which backbone" in caplog.text and "is not used" in caplog.text
    with pytest.raises(BundleError, match="is no part of an adapter"):
        read_adapter(AdapterFile(path), "vision", base)
