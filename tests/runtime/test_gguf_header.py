# SPDX-License-Identifier: Apache-2.0
"""A GGUF's header through ggml's reader, against the gguf package's, and what is no model of ours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pocketphi.runtime import bundle as bundles
from pocketphi.runtime.errors import BundleError
from pocketphi.runtime.gguf_header import read_header, text_spec

from ..conftest import Converted

MEMBERS = [("phi4-nano", "Q4_K_M"), ("phi35-mini", "Q8_0"), ("phi4-14b", "F16"), ("phi4-mini", "Q4_0")]


@pytest.mark.parametrize(("member", "recipe"), MEMBERS)
def test_the_header_is_what_the_gguf_package_reads(member: str, recipe: str, converted: Converted) -> None:
    import gguf

    bundle = bundles.load(converted(member, recipe))
    path = bundle.path(bundle.decoder)
    header, reader = read_header(path), gguf.GGUFReader(path)
    assert [(t.name, t.n_values, t.n_bytes) for t in header.tensors] == [
        (t.name, int(t.n_elements), int(t.n_bytes)) for t in reader.tensors
    ]
    for t, wanted in zip(header.tensors, reader.tensors, strict=True):
        assert t.shape == (*map(int, wanted.shape), *[1] * (4 - len(wanted.shape)))
    for name, field in reader.fields.items():
        if name.startswith("GGUF."):
            continue  # the package's own names for counts and versions
        value = field.contents()
        if isinstance(value, str):
            assert header.texts[name] == value
        elif isinstance(value, int | float) and not isinstance(value, bool):
            assert header.numbers[name] == value
        else:
            assert name not in header.texts
            assert name not in header.numbers


@pytest.mark.parametrize(("member", "recipe"), MEMBERS)
def test_the_shape_is_the_one_of_bundle_json(member: str, recipe: str, converted: Converted) -> None:
    bundle = bundles.load(converted(member, recipe))
    found, wanted = text_spec(read_header(bundle.path(bundle.decoder))), bundle.text
    assert found.rope.theta == pytest.approx(wanted.rope.theta, rel=1e-7)  # float32 in the file
    assert found.rope.attention_factor == pytest.approx(wanted.rope.attention_factor, rel=1e-7)
    assert found.rms_eps == pytest.approx(wanted.rms_eps, rel=1e-7)
    assert found.rope.is_long_rope == wanted.rope.is_long_rope
    rope = replace(wanted.rope, **{f: getattr(found.rope, f) for f in ROPE_APPROXIMATE})
    assert found == replace(wanted, rms_eps=found.rms_eps, rope=rope)


ROPE_APPROXIMATE = ("theta", "attention_factor", "short_factor", "long_factor")


def test_files_that_are_none(tmp_path: Path, nano: Path) -> None:
    bundle = bundles.load(nano)
    good = bundle.path(bundle.decoder).read_bytes()
    (tmp_path / "folder").mkdir()
    for i, raw in enumerate((b"", b"GGUF", good[:100], b"\0" * 5000, good[:8] + b"\xff" * 16 + good[24:])):
        (tmp_path / f"{i}.gguf").write_bytes(raw)
    for path in (*sorted(tmp_path.iterdir()), tmp_path / "gone"):
        with pytest.raises(BundleError, match="is not a GGUF file") as caught:
            read_header(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


def test_an_adapter_is_no_model(converted: Converted) -> None:
    bundle = bundles.load(converted("phi4-nano", "Q4_0"))
    with pytest.raises(BundleError, match="is an adapter, expected a model"):
        text_spec(read_header(bundle.path(bundle.adapters["vision"].file)))


def test_what_lacks_a_number_or_is_of_another_kind(nano: Path) -> None:
    bundle = bundles.load(nano)
    header = read_header(bundle.path(bundle.decoder))
    for changed, want in (
        (replace(header, texts=header.texts | {"general.architecture": "llama"}), "architecture 'llama'"),
        (replace(header, texts={}), "architecture 'none'"),
        (replace(header, numbers={}), "has no number 'phi3."),
        (replace(header, numbers=header.numbers | {"phi3.block_count": 0.0}), "block_count 0, expected 1"),
        (replace(header, numbers=header.numbers | {"phi3.attention.head_count": -1.0}), "head_count -1"),
        (replace(header, tensors=()), "has no tensor 'token_embd.weight'"),
    ):
        with pytest.raises(BundleError, match=want):
            text_spec(changed)
