# SPDX-License-Identifier: Apache-2.0
"""The ONNX Runtime decoder: golden runs, quantized graphs, options, and what it refuses."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from pocketphi.runtime import bundle as bundles
from pocketphi.runtime import decoder_onnx
from pocketphi.runtime.bundle import Bundle
from pocketphi.runtime.decoder_onnx import OnnxOptions, pass_rows
from pocketphi.runtime.engine import Model
from pocketphi.runtime.errors import BundleError, InputError, KernelError
from pocketphi.runtime.onnx_adapter_check import OnnxAdapter, read_adapter
from pocketphi.runtime.onnx_check import check_backbone, decoder_ends, embedding_ends
from pocketphi.runtime.onnx_session import PROVIDERS
from pocketphi.runtime.parts import EmbedSpan, Message, TokenSpan
from pocketphi.runtime.sampler import Sampling
from pocketphi.runtime.spec import RopeSpec, TextSpec

from .. import scoring, tiny
from ..conftest import Converted, open_onnx_decoder

IDS = TokenSpan(np.arange(100, 160, dtype=np.int32))
ONE = TokenSpan(np.array([7], np.int32))
ITEMS = json.loads((tiny.NANO.parent / "reference_outputs.json").read_text("utf-8"))["items"]
CAPITAL = [Message("user", "What is the capital of France?")]


@pytest.fixture(scope="module")
def exact_model(exact_both: Path) -> Iterator[Model]:
    with Model(exact_both, backbone="onnx") as model:
        yield model


@pytest.mark.parametrize("item", ITEMS, ids=lambda i: i["id"])
def test_every_mode_of_phi4_nano_answers_as_the_reference(item: dict[str, Any], exact_model: Model) -> None:
    """All 24, token for token: text, tools, speech, pictures, speech about pictures."""
    reply = exact_model.complete(item["prompt"], max_tokens=80, media=scoring.media_of(item))
    assert list(reply.token_ids) == item["output_ids"]
    assert reply.mode == {"text": "language"}.get(item["mode"], item["mode"])
    assert exact_model.engine == {"backbone": "onnx", "provider": "cpu", "kv_type": "f32"}


@pytest.mark.parametrize("lora", ["fp16", "int8"])
def test_the_directory_without_a_gguf(lora: str, converted: Converted) -> None:
    """The default quantization answers, with adapters that act; grammars have their vocabulary."""
    directory = converted("phi4-nano", "Q8_0", backbone="onnx", onnx_quant="int4", onnx_lora=lora)
    with Model(directory) as model:
        assert model.bundle.backbones == ("onnx",) and model.engine["backbone"] == "onnx"
        reply = model.chat(CAPITAL, max_tokens=20)
        assert "Paris" in reply.text
        assert model.resident == ()
        schema = '{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}'
        held = model.chat(CAPITAL, max_tokens=40, sampling=Sampling(json_schema=schema))
        assert isinstance(json.loads(held.text)["n"], int)
        logits = {a: model.token_logits(IDS.ids, 1, adapter=a) for a in (None, "vision", "speech")}
        assert abs(logits[None] - logits["vision"]).max() > 1
        assert model.resident == ("vision adapter", "speech adapter")
    with pytest.raises(InputError, match="has no GGUF backbone: convert it with --backbone gguf or both"):
        Model(directory, backbone="gguf")


def test_a_grammar_is_the_same_on_both(exact_both: Path) -> None:
    grammar = Sampling(grammar='root ::= ("yes" | "no") "."')
    texts = []
    for backbone in ("gguf", "onnx"):
        with Model(exact_both, backbone=backbone, kv_type="f32") as model:
            texts.append(
                [model.chat(CAPITAL, max_tokens=9, sampling=s).text for s in (grammar, None, grammar)]
            )
    assert texts[0] == texts[1] and texts[0][0] in ("yes.", "no.")


def test_long_prompts_are_read_in_pieces_that_attention_has_room_for() -> None:
    rope = RopeSpec(96, 1e4, 4096, 1.0, None, None)
    spec = TextSpec(3072, 32, 24, 8, 128, 8192, 200064, 131072, 1e-5, True, rope)
    assert [pass_rows(spec, n) for n in (1, 4096, 32768, 131072, 1 << 31)] == [512, 512, 85, 21, 1]


def test_pieces_of_every_size_give_the_same(exact_both: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = open_onnx_decoder(bundles.load(exact_both))
    found = []
    for rows in (512, 64, 7, 1):
        monkeypatch.setattr(decoder_onnx, "_BATCH", rows)
        decoder.open(table="long", capacity=2048, adapter="vision")
        found.append(decoder.feed_each(TokenSpan(np.resize(IDS.ids, 200)), 66))
    decoder.close()
    # Float32 sums in another order; the logits are below 32, as in test_session.py.
    assert all(abs(one - found[0]).max() < 2e-3 for one in found[1:])


def test_rows_that_are_not_finite_are_taken_back(exact_both: Path) -> None:
    decoder = open_onnx_decoder(bundles.load(exact_both))
    decoder.open(table="short", capacity=256, adapter=None)
    wanted = decoder.feed(IDS)
    with pytest.raises(KernelError, match="not finite"):
        decoder.feed(EmbedSpan(np.full((3, 256), np.nan, np.float32), "nan"))
    assert decoder.length == len(IDS)
    first = decoder.feed(ONE)
    decoder.rewind(0)
    assert decoder.feed(IDS).tobytes() == wanted.tobytes()
    assert decoder.feed(ONE).tobytes() == first.tobytes()
    decoder.close()


def test_the_guard_is_asked_before_a_cache_is_made(exact_both: Path) -> None:
    asked = []

    def refuse(before: int, after: int, copied: int) -> None:
        asked.append((before, after, copied))
        if after > 512:
            raise InputError("no room")

    decoder = open_onnx_decoder(bundles.load(exact_both))
    decoder._options = replace(decoder._options, before_cache=refuse)
    decoder.open(table="short", capacity=300, adapter=None)
    decoder.feed(IDS)
    with pytest.raises(InputError, match="no room"):
        decoder.grow(600)
    assert asked == [(0, 512, 0), (512, 768, 60)]
    assert (decoder.capacity, decoder.length) == (512, 60)
    decoder.feed(ONE)
    decoder.close()


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"n_threads": 0}, "1 to 512"),
        ({"kv_type": "f16"}, "the ONNX backbone's cache is f32"),
        ({"provider": "abacus"}, "expected one of cpu, cuda, coreml, dml, qnn, webgpu"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], want: str) -> None:
    with pytest.raises(InputError, match=want):
        OnnxOptions(**options)


@pytest.mark.parametrize("provider", [name for name in PROVIDERS if name != "cpu"])
def test_a_provider_that_this_build_lacks(provider: str, exact_both: Path) -> None:
    if PROVIDERS[provider] in onnxruntime.get_available_providers():
        pytest.skip("this build has it")
    with pytest.raises(
        InputError, match=f"provider is '{provider}', but this build of onnxruntime has only: "
    ):
        Model(exact_both, backbone="onnx", provider=provider)


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"provider": "cuda"}, "the GGUF backbone runs on llama.cpp"),
        ({"backbone": "onnx", "n_gpu_layers": -1}, "runs on a provider"),
        ({"backbone": "onnx", "kv_type": "q8_0"}, "the ONNX backbone's cache is f32"),
        ({"backbone": "paper"}, "backbone is 'paper', expected one of gguf, onnx"),
    ],
)
def test_options_of_the_other_backbone(options: dict[str, Any], want: str, exact_both: Path) -> None:
    with pytest.raises(InputError, match=want):
        Model(exact_both, **options)


def test_a_backbone_that_is_not_there(nano: Path) -> None:
    with pytest.raises(InputError, match="has no ONNX backbone: convert it with --backbone onnx or both"):
        Model(nano, backbone="onnx")


# ---- graphs ----


def ends_of(bundle: Bundle) -> dict[str, Any]:
    quant = bundle.onnx.lora_quant if bundle.onnx and bundle.adapters else None
    return {"decoder.onnx": decoder_ends(bundle.text, quant), "embedding.onnx": embedding_ends(bundle.text)}


@pytest.mark.parametrize("quant", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("lora", ["fp32", "int8"])
@pytest.mark.parametrize("model", ["phi4-multimodal", "phi4-14b"])
def test_what_the_converter_writes_passes(model: str, quant: str, lora: str, converted: Converted) -> None:
    bundle = bundles.load(converted(model, "Q8_0", backbone="onnx", onnx_quant=quant, onnx_lora=lora))
    for name, ends in ends_of(bundle).items():
        assert check_backbone(bundle.path(name), *ends) == bundle.path(name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        (
            {"d_model": 128},
            r"input 'inputs_embeds' is float32 \[any, any, 256\], expected float32 \[any, any, 128\]",
        ),
        (
            {"n_layers": 3},
            r"has the input '(blk|past_key_values)\.3\..*', which the converter does not write",
        ),
        ({"n_layers": 5}, r"has no input '(blk|past_key_values)\.4"),
        ({"n_kv_heads": 1}, r"input '.*' is .*, expected "),
        ({"vocab_size": 4000}, r"output 'logits' is float32 \[any, (1|any), 4096\]|expected float32"),
        ({"d_ff": 700}, r"input 'blk\.0\.ffn_up\.lora_B'"),
    ],
)
def test_a_graph_that_is_not_the_one_described(changes: dict[str, int], want: str, exact_both: Path) -> None:
    bundle = bundles.load(exact_both)
    with pytest.raises(BundleError, match=want):
        open_onnx_decoder(replace(bundle, text=replace(bundle.text, **changes)))


def test_adapters_of_another_type_than_the_graph_has(exact_both: Path) -> None:
    bundle = bundles.load(exact_both)
    assert bundle.onnx is not None
    with pytest.raises(BundleError, match=r"is float32 \[.*\] with a default, expected float16"):
        open_onnx_decoder(replace(bundle, onnx=replace(bundle.onnx, lora_quant="fp16")))


def without_default(model: onnx.ModelProto) -> None:
    model.graph.initializer.remove(next(t for t in model.graph.initializer if t.name == "n_logits"))


def other_data(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)
    tensor.external_data[0].value = "decoder.onnx.data"


def other_type(model: onnx.ModelProto) -> None:
    mask = next(i for i in model.graph.input if i.name == "attention_mask")
    mask.type.tensor_type.elem_type = onnx.TensorProto.INT32


def one_output_less(model: onnx.ModelProto) -> None:
    del model.graph.output[-1]


def twice(model: onnx.ModelProto) -> None:
    model.graph.input.append(model.graph.input[0])


@pytest.mark.parametrize(
    ("edit", "want"),
    [
        (without_default, r"input 'n_logits' is int64 \[1\], expected int64 \[1\] with a default"),
        (other_data, r"refers to a file other than model\.onnx\.data"),
        (other_type, r"input 'attention_mask' is int32 \[any, any\], expected int64"),
        (one_output_less, r"has no output 'present\.3\.value'"),
        (twice, "has an input twice"),
    ],
)
def test_spoilt_graphs(edit: Any, want: str, exact_both: Path, tmp_path: Path) -> None:
    bundle = bundles.load(exact_both)
    (tmp_path / "model.onnx.data").symlink_to("weights")
    shutil.copy(exact_both / "model.onnx.data", tmp_path / "weights")
    graph = onnx.load(exact_both / "decoder.onnx", load_external_data=False)
    edit(graph)
    (tmp_path / "decoder.onnx").write_bytes(graph.SerializeToString())
    with pytest.raises(BundleError, match=want) as caught:
        check_backbone(tmp_path / "decoder.onnx", *ends_of(bundle)["decoder.onnx"])
    assert "\n" not in str(caught.value)


# ---- adapters ----


def speech(bundle: Bundle) -> OnnxAdapter:
    assert bundle.onnx is not None
    return OnnxAdapter(
        bundle.path(bundle.onnx.adapters["speech"]), bundle.adapters["speech"].rank, bundle.onnx.lora_quant
    )


def test_adapters_are_read_as_onnx_runtime_reads_them(exact_both: Path, converted: Converted) -> None:
    for directory in (exact_both, converted("phi4-nano", "Q8_0", backbone="onnx", onnx_lora="int8")):
        bundle = bundles.load(directory)
        theirs = onnxruntime.AdapterFormat.read_adapter(str(speech(bundle).path))
        wanted = theirs.get_parameters()
        found = read_adapter(speech(bundle), bundle.text)
        assert found.keys() == wanted.keys()
        for name, values in found.items():
            assert np.array_equal(values, wanted[name].numpy()) and values.dtype == wanted[name].numpy().dtype
            assert not values.flags.writeable


def test_the_other_adapter_and_one_of_another_model(exact_both: Path, converted: Converted) -> None:
    bundle = bundles.load(exact_both)
    assert bundle.onnx is not None
    swapped = replace(bundle.onnx, adapters={"speech": bundle.onnx.adapters["vision"]})
    decoder = open_onnx_decoder(replace(bundle, onnx=swapped))
    with pytest.raises(
        BundleError, match=r"tensor 'blk\.0\.attn_qkv\.lora_A' is float32 \[256, \d+\], bundle"
    ):
        decoder.open(table="short", capacity=256, adapter="speech")
    with pytest.raises(KernelError, match="do not fit a cache of 0"):
        decoder.feed(IDS)
    decoder.open(table="short", capacity=256, adapter=None)
    decoder.feed(IDS)
    decoder.close()
    other = bundles.load(converted("phi4-multimodal", "Q8_0", backbone="onnx"))
    with pytest.raises(BundleError, match=r"it is an adapter of another model|bundle\.json means"):
        read_adapter(speech(other), bundle.text)


def test_an_adapter_that_does_not_act(exact_both: Path, tmp_path: Path) -> None:
    """All of B set to zero: the file is in order, and changes nothing."""
    bundle = bundles.load(exact_both)
    raw = bytearray(speech(bundle).path.read_bytes())
    for name, values in read_adapter(speech(bundle), bundle.text).items():
        if name.endswith("lora_B"):
            at = bytes(raw).index(values.tobytes())
            raw[at : at + values.nbytes] = bytes(values.nbytes)
    (tmp_path / "dead").write_bytes(raw)
    assert bundle.onnx is not None
    decoder = open_onnx_decoder(
        replace(bundle, onnx=replace(bundle.onnx, adapters={"speech": str(tmp_path / "dead")}))
    )
    with pytest.raises(KernelError, match="does not change the logits"):
        decoder.open(table="short", capacity=256, adapter="speech")
    assert decoder.resident_adapters == ()
    decoder.close()


def test_damaged_adapters(exact_both: Path, tmp_path: Path) -> None:
    """Cut anywhere, and with any byte of what is not numbers changed: refused, or read within the file."""
    bundle = bundles.load(exact_both)
    adapter = speech(bundle)
    raw = adapter.path.read_bytes()
    first = min(raw.index(v.tobytes()) for v in read_adapter(adapter, bundle.text).values())
    path = tmp_path / "adapter"

    def read(changed: bytes) -> bool:
        path.write_bytes(changed)
        try:
            found = read_adapter(replace(adapter, path=path), bundle.text)
        except BundleError as exc:
            assert "\n" not in str(exc)
            return False
        assert sum(values.nbytes for values in found.values()) < len(changed)
        return True

    assert read(raw)
    cuts = [0, 1, 4, 8, 11, 12, 19, 20, 24, 36, 40, *range(44, first, 97), first, len(raw) // 2, len(raw) - 1]
    assert not any(read(raw[:n]) for n in cuts)
    rng = np.random.default_rng(5)
    passed = 0
    head = raw[:first]
    for at in rng.integers(0, first, 400).tolist():
        changed = bytearray(head)
        changed[at] ^= int(rng.integers(1, 256))
        passed += read(bytes(changed) + raw[first:])
    assert passed < 200, "versions, padding and what ends names may be anything"


@pytest.mark.parametrize(
    ("raw", "want"),
    [
        (b"", "it has 0 bytes"),
        (b"\0" * 100, "is not an ONNX Runtime adapter"),
        (struct.pack("<I4s", 1 << 31, b"TORT") + bytes(50), "refers to byte"),
        (struct.pack("<I4s", 8, b"TORT") + struct.pack("<i", -(1 << 31)) + bytes(50), "refers to byte"),
        (struct.pack("<I4s", 8, b"TORT") + struct.pack("<i", 0) + bytes(50), "format version|no table"),
    ],
)
def test_no_adapter_at_all(raw: bytes, want: str, exact_both: Path, tmp_path: Path) -> None:
    bundle = bundles.load(exact_both)
    (tmp_path / "adapter").write_bytes(raw)
    with pytest.raises(BundleError, match=want):
        read_adapter(replace(speech(bundle), path=tmp_path / "adapter"), bundle.text)
    with pytest.raises(BundleError, match="is not a regular file"):
        read_adapter(replace(speech(bundle), path=tmp_path), bundle.text)
    with pytest.raises(BundleError, match="no such file"):
        read_adapter(replace(speech(bundle), path=tmp_path / "gone"), bundle.text)


# In a process of its own, which a crash would end. Graphs and adapters with one other bit, which pass our
# checks or do not, and then ONNX Runtime's or not.
FLIPS = """
import sys
from pathlib import Path
import numpy as np
from pocketphi.runtime import bundle as bundles
from pocketphi.runtime.backbone import BackboneOptions, OpenBackbone
from pocketphi.runtime.errors import PocketPhiError
from pocketphi.runtime.parts import TokenSpan

directory, rng, ran, refused = Path(sys.argv[1]), np.random.default_rng(11), 0, 0
for name in ("decoder.onnx", "embedding.onnx", "adapter-speech.onnx_adapter"):
    good = (directory / name).read_bytes()
    for _ in range(15):
        bad = bytearray(good)
        bad[int(rng.integers(0, min(len(bad), 40_000)))] ^= 1 << int(rng.integers(0, 8))
        (directory / name).write_bytes(bad)
        try:
            d = OpenBackbone(bundles.load(directory), BackboneOptions("onnx", n_threads=1)).open()
            d.open(table="short", capacity=256, adapter="speech")
            for n in (40, 1):
                d.feed(TokenSpan(np.arange(n, dtype=np.int32)))
            d.close()
            ran += 1
        except PocketPhiError as exc:
            assert "\\n" not in str(exc)
            refused += 1
    (directory / name).write_bytes(good)
print(ran > 0, refused > 0, ran + refused)
"""


def test_one_other_bit_never_ends_the_process(converted: Converted, tmp_path: Path) -> None:
    source = converted("phi4-nano", "Q8_0", backbone="onnx", onnx_quant="int4", onnx_lora="fp16")
    shutil.copytree(source, tmp_path / "model", copy_function=shutil.copyfile)
    done = subprocess.run(
        [sys.executable, "-c", FLIPS, str(tmp_path / "model")],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr, done.returncode) == ("True True 45\n", "", 0)


# ---- what ends in the middle ----

# In a process of its own. The interrupt comes where the worker has its work already and the caller does not
# know yet, which no timer hits; then a growing cache is moved away from under what may still run.
IN_SUBMIT = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from pocketphi.runtime import bundle as bundles
from pocketphi.runtime.backbone import BackboneOptions, OpenBackbone
from pocketphi.runtime.parts import TokenSpan

class Interrupted(ThreadPoolExecutor):
    armed, last = False, None

    def submit(self, *arguments):
        future = super().submit(*arguments)
        if Interrupted.armed:
            Interrupted.armed, Interrupted.last = False, future
            raise KeyboardInterrupt
        return future

d = OpenBackbone(bundles.load(Path(sys.argv[1])), BackboneOptions("onnx", n_threads=2)).open()
d._worker = Interrupted(1)
d.open(table="long", capacity=2048, adapter=None)
Interrupted.armed = True
try:
    d.feed(TokenSpan(np.resize(np.arange(100, 160, dtype=np.int32), 2000)))
    print("not interrupted")
except KeyboardInterrupt:
    print(Interrupted.last.done(), d.length)
d.grow(4096)
print(bool(np.isfinite(d.feed(TokenSpan(np.array([7], np.int32)))).all()), d.length)
d.close()
"""


def test_nothing_runs_any_more_after_an_interrupt_that_hid_it(exact_both: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_SUBMIT, str(exact_both)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("True 0\nTrue 1\n", "")


def test_embeddings_of_another_length_than_the_tokens(exact_both: Path, tmp_path: Path) -> None:
    """A graph that passes the check may still give whatever it likes."""
    shutil.copytree(exact_both, tmp_path / "model")
    graph = onnx.load(exact_both / "embedding.onnx", load_external_data=False)
    out = graph.graph.output[0].name
    for node in graph.graph.node:
        node.output[:] = ["one" if name == out else name for name in node.output]
    graph.graph.node.append(onnx.helper.make_node("Concat", ["one", "one"], [out], axis=1))
    (tmp_path / "model" / "embedding.onnx").write_bytes(graph.SerializeToString())
    bundle = bundles.load(exact_both)
    decoder = open_onnx_decoder(replace(bundle, root=tmp_path / "model"))
    decoder.open(table="short", capacity=256, adapter=None)
    with pytest.raises(KernelError, match=r"1 tokens became embeddings of shape \[1, 2, 256\]"):
        decoder.feed(ONE)
    assert decoder.length == 0
    decoder.close()


@pytest.mark.parametrize("changes", [{"context_length": 16_384}, {"rope": {"original_context": 2048}}])
def test_another_rope_table_than_the_graph_has(changes: dict[str, Any], exact_both: Path) -> None:
    """A graph that switches tables where the session does not would read the same tokens otherwise."""
    bundle = bundles.load(exact_both)
    rope = replace(bundle.text.rope, **changes.pop("rope", {}))
    with pytest.raises(BundleError, match=r"tensor 'rope\.cos' is \(9216, \d+\), bundle\.json means \("):
        open_onnx_decoder(replace(bundle, text=replace(bundle.text, rope=rope, **changes)))


def test_data_that_the_manifest_does_not_list(exact_both: Path, tmp_path: Path) -> None:
    """Unlisted, its hash is never looked at."""
    shutil.copytree(exact_both, tmp_path / "model")
    manifest = tmp_path / "model" / "bundle.json"
    plain = json.loads(manifest.read_text("utf-8"))
    del plain["sha256"]
    plain["onnx"]["model"] = "decoder.onnx"  # and so model.onnx and its data are nobody's
    plain["files"] = [f for f in plain["files"] if f["path"] != "model.onnx.data"]
    manifest.write_text(json.dumps(plain), "utf-8")
    with pytest.raises(BundleError, match=r"'model\.onnx\.data' is used but not in its list of files"):
        bundles.load(tmp_path / "model")
