# SPDX-License-Identifier: Apache-2.0
"""The llama.cpp decoder: contexts, adapters, state, and what it refuses."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketphi.runtime import bundle as bundles
from pocketphi.runtime.decoder_ggml import KV_TYPES, GgmlDecoder, GgmlOptions
from pocketphi.runtime.errors import BundleError, InputError, KernelError
from pocketphi.runtime.gguf_check import AdapterFile
from pocketphi.runtime.parts import TokenSpan
from pocketphi.runtime.threads import default_threads

from ..conftest import Converted, load_decoder, open_decoder

IDS = TokenSpan(np.arange(100, 160, dtype=np.int32))


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_every_cache_type_decodes(kv_type: str, nano: Path) -> None:
    exact, other = load_decoder(nano, "f32"), load_decoder(nano, kv_type)
    for d in (exact, other):
        d.open(table="short", capacity=100, adapter=None)
    a, b = exact.feed(IDS), other.feed(IDS)
    assert np.isfinite(b).all()
    # A cosine: q4_0 keeps 4 bits of each key and value, and still most of the direction.
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > {"f32": 1 - 1e-6, "f16": 0.9999}.get(kv_type, 0.9)
    exact.close()
    other.close()


def test_the_short_table_never_gets_a_context_that_llama_cpp_would_read_as_long(nano: Path) -> None:
    d = load_decoder(nano)
    d.open(table="short", capacity=1024, adapter=None)
    assert d.capacity == 1024
    with pytest.raises(KernelError, match="short RoPE table"):
        d.open(table="short", capacity=1025, adapter=None)
    d.open(table="long", capacity=10, adapter=None)
    assert d.capacity > 1024
    d.close()


def test_an_adapter_that_does_not_act_is_an_error(nano: Path, tmp_path: Path) -> None:
    """All of B set to zero: the file loads, and changes nothing."""
    import gguf

    bundle = bundles.load(nano)
    path = tmp_path / "dead.gguf"
    shutil.copy(bundle.path(bundle.adapters["vision"].file), path)
    reader = gguf.GGUFReader(path, "r+")
    for tensor in reader.tensors:
        if tensor.name.endswith(".lora_b"):
            tensor.data[:] = 0
    reader.data.flush()
    d = GgmlDecoder(
        bundle.gguf,
        bundle.text,
        {"vision": AdapterFile(path, bundle.adapters["vision"].alpha)},
        GgmlOptions(kv_type="f32"),
    )
    with pytest.raises(KernelError, match="does not change the logits"):
        d.open(table="short", capacity=256, adapter="vision")
    d.close()


def test_an_adapter_of_another_model_is_refused(nano: Path, converted: Converted) -> None:
    bundle = bundles.load(nano)
    other = bundles.load(converted("phi4-multimodal", "F32"))
    paths = {"speech": AdapterFile(other.path(other.adapters["speech"].file))}
    d = GgmlDecoder(bundle.gguf, bundle.text, paths, GgmlOptions())
    with pytest.raises(BundleError, match="of another checkpoint"):
        d.open(table="short", capacity=256, adapter="speech")
    with pytest.raises(InputError, match="it has: speech"):
        d.open(table="short", capacity=256, adapter="vision")
    d.close()


def test_a_model_file_that_is_none(tmp_path: Path, nano: Path) -> None:
    bundle = bundles.load(nano)
    good = bundle.gguf.read_bytes()
    for i, raw in enumerate((b"", b"GGUF", good[:1000], b"\0" * 5000, good[: len(good) // 2])):
        path = tmp_path / f"{i}.gguf"
        path.write_bytes(raw)
        with pytest.raises(BundleError, match=r"is not a GGUF file|ends |than there is room") as caught:
            GgmlDecoder(path, bundle.text, {}, GgmlOptions())
        assert "\n" not in str(caught.value)


def test_a_model_that_is_not_the_one_described(nano: Path) -> None:
    bundle = bundles.load(nano)
    with pytest.raises(BundleError, match=r"has attention\.head_count 4"):
        open_decoder(replace(bundle, text=replace(bundle.text, n_heads=8)))


def test_values_that_differ_from_the_file(nano: Path) -> None:
    bundle = bundles.load(nano)
    rope = bundle.text.rope
    for text, want in (
        (replace(bundle.text, d_ff=700), "feed_forward_length 768"),
        (replace(bundle.text, rms_eps=1e-6), "epsilon 1e-05"),
        (replace(bundle.text, rope=replace(rope, original_context=512)), "original_context_length 1024"),
        (replace(bundle.text, rope=replace(rope, attention_factor=1.0)), "attn_factor"),
    ):
        with pytest.raises(BundleError, match=want):
            open_decoder(replace(bundle, text=text))


def test_swapped_adapters(nano: Path) -> None:
    """By their numbers, and where these are the same, by their names."""
    bundle = bundles.load(nano)
    swapped = {"speech": bundle.adapters["vision"], "vision": bundle.adapters["speech"]}
    mixed = {name: replace(a, alpha=bundle.adapters[name].alpha) for name, a in swapped.items()}
    for adapters, want in (
        (mixed, r"has alpha 64, bundle\.json says 128 for speech"),
        (swapped, "is the vision adapter, expected the speech adapter"),
    ):
        decoder = open_decoder(replace(bundle, adapters=adapters))
        with pytest.raises(BundleError, match=want):
            decoder.open(table="short", capacity=256, adapter="speech")
        decoder.close()


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"n_threads": 0}, "1 to 512"),
        ({"kv_type": "q5_7"}, "expected one of"),
        ({"n_gpu_layers": 1}, "no GPU backend"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], want: str) -> None:
    with pytest.raises(InputError, match=want):
        GgmlOptions(**options)


def test_default_threads_is_at_least_one() -> None:
    assert 1 <= default_threads() <= 4096
