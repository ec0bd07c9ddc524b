# SPDX-License-Identifier: Apache-2.0
"""The llama.cpp decoder: contexts, adapters, state, and what it refuses."""

from __future__ import annotations

import _thread
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketphi.runtime import bundle as bundles
from pocketphi.runtime.decoder_ggml import KV_TYPES, GgmlDecoder, GgmlOptions
from pocketphi.runtime.errors import BundleError, InputError, KernelError
from pocketphi.runtime.gguf_check import AdapterFile
from pocketphi.runtime.parts import EmbedSpan, TokenSpan
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


def test_state_goes_into_another_context(nano: Path) -> None:
    a, b = load_decoder(nano), load_decoder(nano)
    a.open(table="short", capacity=256, adapter="speech")
    a.feed(IDS)
    state = a.save_state()
    b.open(table="short", capacity=512, adapter="speech")
    b.load_state(state, len(IDS))
    one = TokenSpan(np.array([7], np.int32))
    assert a.feed(one).tobytes() == b.feed(one).tobytes()
    with pytest.raises(KernelError, match="refused"):
        b.load_state(state, len(IDS) + 1)
    with pytest.raises(KernelError, match="refused"):
        b.load_state(state[: len(state) // 2], len(IDS))
    assert b.length == 0
    a.close()
    b.close()


def test_rewind_then_the_same_tokens_give_the_same_logits(nano: Path) -> None:
    d = load_decoder(nano)
    d.open(table="short", capacity=256, adapter=None)
    d.feed(IDS)
    one = TokenSpan(np.array([7], np.int32))
    first = d.feed(one)
    d.rewind(len(IDS))
    assert d.feed(one).tobytes() == first.tobytes()
    d.close()


@pytest.mark.parametrize(("n", "wanted"), [(60, 60), (60, 7), (60, 1), (600, 100), (600, 88), (600, 600)])
def test_the_logits_after_each_row(n: int, wanted: int, nano: Path) -> None:
    """Also where the rows lie on both sides of a cut: a batch holds 512."""
    d = load_decoder(nano)
    d.open(table="short", capacity=n, adapter="speech")
    ids = np.resize(IDS.ids, n)
    found = d.feed_each(TokenSpan(ids), wanted)
    assert found.shape == (wanted, d.spec.vocab_size)
    assert d.length == n
    first = n - wanted
    d.rewind(0)
    rows = [d.feed(TokenSpan(ids[: first + 1]))]
    rows += [d.feed(TokenSpan(ids[i : i + 1])) for i in range(first + 1, n)]
    assert abs(found - np.stack(rows)).max() < 2e-3  # as in test_session.py: two orders of summing
    d.close()


def test_the_logits_after_each_embedded_row(nano: Path) -> None:
    d = load_decoder(nano)
    d.open(table="short", capacity=256, adapter="speech")
    rows = np.random.default_rng(3).normal(0, 0.05, (12, 256)).astype(np.float32)
    found = d.feed_each(EmbedSpan(rows, "clip"), 12)
    d.rewind(0)
    one_by_one = [d.feed(EmbedSpan(rows[i : i + 1], "row")) for i in range(12)]
    assert abs(found - np.stack(one_by_one)).max() < 2e-3
    for n in (0, 13):
        with pytest.raises(KernelError, match=f"logits of {n} rows"):
            d.feed_each(EmbedSpan(rows, "clip"), n)
    assert d.length == 12
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
        bundle.path(bundle.decoder),
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
    d = GgmlDecoder(bundle.path(bundle.decoder), bundle.text, paths, GgmlOptions())
    with pytest.raises(BundleError, match="of another checkpoint"):
        d.open(table="short", capacity=256, adapter="speech")
    with pytest.raises(InputError, match="it has: speech"):
        d.open(table="short", capacity=256, adapter="vision")
    d.close()


def test_a_model_file_that_is_none(tmp_path: Path, nano: Path) -> None:
    bundle = bundles.load(nano)
    good = bundle.path(bundle.decoder).read_bytes()
    for i, raw in enumerate((b"", b"GGUF", good[:1000], b"\0" * 5000, good[: len(good) // 2])):
        path = tmp_path / f"{i}.gguf"
        path.write_bytes(raw)
        with pytest.raises(BundleError, match=r"is not a GGUF file|ends ") as caught:
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


def test_embeddings_of_the_wrong_width(nano: Path) -> None:
    d = load_decoder(nano)
    d.open(table="short", capacity=256, adapter=None)
    with pytest.raises(KernelError, match="expected \\[n, 256\\]"):
        d.feed(EmbedSpan(np.zeros((3, 128), np.float32), "x"))
    with pytest.raises(KernelError, match="do not fit"):
        d.feed(TokenSpan(np.zeros(257, np.int32)))
    d.close()


def test_ctrl_c_stops_a_long_prefill_and_the_decoder_goes_on(nano: Path) -> None:
    """A real interrupt of the main thread while C code runs; what was half read is dropped."""
    d = load_decoder(nano)
    d.open(table="long", capacity=8192, adapter=None)
    d.feed(IDS)
    long = TokenSpan(np.resize(IDS.ids, 8000))
    timer = threading.Timer(0.05, _thread.interrupt_main)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        for _ in range(100):  # far more work than the timer waits
            d.feed(long)
            d.rewind(len(IDS))
    assert d.length in (len(IDS), 0) or d.length == len(IDS) + len(long)
    d.rewind(min(d.length, len(IDS)))
    one = TokenSpan(np.array([7], np.int32))
    after = d.feed(one)
    d.rewind(0)
    d.feed(IDS)
    assert abs(d.feed(one) - after).max() < 2e-3
    d.close()


# In a process of its own. The handler raises for the first interrupt, and again and again while the
# decoder waits for its C code to stop; outside it never does, so that the script itself cannot be hit.
IMPATIENT = """
import os, signal, sys, threading, time
from pathlib import Path
import numpy as np
from pocketphi.runtime import bundle as bundles
from pocketphi.runtime.decoder_ggml import GgmlDecoder, GgmlOptions
from pocketphi.runtime.parts import TokenSpan

bundle = bundles.load(Path(sys.argv[1]))
d = GgmlDecoder(bundle.path(bundle.decoder), bundle.text, {}, GgmlOptions(n_threads=2))
d.open(table="long", capacity=8192, adapter=None)
raised = 0

def handler(*_):
    global raised
    if raised == 0 or d._abort:
        raised += 1
        raise KeyboardInterrupt

def pester():
    time.sleep(0.05)
    for _ in range(200):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.0002)

signal.signal(signal.SIGINT, handler)
thread = threading.Thread(target=pester)
thread.start()
try:
    d.feed(TokenSpan(np.resize(np.arange(100, 160, dtype=np.int32), 8000)))
    print("not interrupted")
except KeyboardInterrupt:
    pass
thread.join()
d.rewind(0)
print(bool(np.isfinite(d.feed(TokenSpan(np.array([7], np.int32)))).all()), raised >= 1, d.length)
d.close()
"""


def test_a_second_ctrl_c_does_not_break_the_decoder(nano: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPATIENT, str(nano)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("True True 1\n", "")


def test_default_threads_is_at_least_one() -> None:
    assert 1 <= default_threads() <= 4096
