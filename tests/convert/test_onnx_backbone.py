# SPDX-License-Identifier: Apache-2.0
"""`convert --backbone onnx` and `both`: the directory, its plan, the same bytes, and what is refused."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper
import pytest

from pocketphi.convert import Options, convert, plan
from pocketphi.convert.in_order import in_order
from pocketphi.convert.onnx_graph import quantize_blocks
from pocketphi.runtime import bundle
from pocketphi.runtime.errors import CheckpointError, InputError, OutputError
from pocketphi.runtime.gguf_header import read_header

from .. import tiny
from ..tiny import NANO
from ..tiny_files import read_checkpoint
from .stock_llama import _QUIET
from .test_convert import Counter, Interrupt, contents, refused

Float32 = npt.NDArray[np.float32]
Made = Callable[[Options], Path]

GRAPHS = {"model.onnx", "embedding.onnx", "decoder.onnx", "model.onnx.data"}
ADAPTERS = {"adapter-vision.onnx_adapter", "adapter-speech.onnx_adapter"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`made(options)`: phi4-nano's directory, made when first asked for."""
    root, found = tmp_path_factory.mktemp("made"), dict[Options, Path]()

    def get(options: Options) -> Path:
        if options not in found:
            found[options] = convert(NANO, root / str(len(found)), options).root
        return found[options]

    return get


def test_onnx_alone(made: Made) -> None:
    root = made(Options(backbone="onnx"))
    found = bundle.load(root)
    listed = {f.path for f in found.files}
    assert listed | {bundle.MANIFEST} == set(contents(root))
    assert len(list(found.check_hashes())) == len(found.files)
    assert {n for n in listed if n.endswith(".gguf")} == {"vocabulary.gguf"}
    assert listed >= GRAPHS | ADAPTERS | {"tokenizer.json", "vision.onnx", "speech.onnx"}
    assert (found.backbones, found.decoder, found.vocabulary) == (("onnx",), None, "vocabulary.gguf")
    assert found.onnx is not None
    assert {found.onnx.model, found.onnx.embedding, found.onnx.decoder} < GRAPHS
    assert found.onnx.quant == {"linear": "int4", "qkv": "int8", "down": "int8", "head": "int8"}
    assert set(found.onnx.adapters.values()) == ADAPTERS
    assert found.recipe == "int4"
    assert found.quant == {
        "token_embd": "int8",
        "attn_qkv": "int8",
        "attn_output": "int4",
        "ffn_up": "int4",
        "ffn_down": "int8",
        "norm": "fp32",
    }
    assert {(a.file, a.quant) for a in found.adapters.values()} == {(None, "fp16")}
    assert (found.adapters["speech"].rank, found.adapters["speech"].alpha) == (64, 128)
    with pytest.raises(InputError, match="no GGUF backbone"):
        _ = found.gguf


def test_both_are_each_of_them(made: Made) -> None:
    """The same GGUF files as alone, the same graphs as alone; no vocabulary beside a backbone that has it."""
    both = bundle.load(made(Options(backbone="both")))
    assert (both.backbones, both.vocabulary, both.recipe) == (("gguf", "onnx"), None, "Q4_K_M")
    assert {a.file for a in both.adapters.values()} == {"vision-Q8_0-LoRA.gguf", "speech-Q8_0-LoRA.gguf"}
    alone = [contents(made(Options(backbone=name))) for name in ("gguf", "onnx")]
    files = contents(both.root)
    assert set(files) == (set(alone[0]) | set(alone[1])) - {"vocabulary.gguf"}
    for name, data in files.items():
        if name != bundle.MANIFEST:
            assert data == (alone[0] if name in alone[0] else alone[1])[name], name
    assert both.onnx == bundle.load(made(Options(backbone="onnx"))).onnx


@pytest.mark.parametrize(
    ("name", "lora", "want"),
    [
        ("int8", "int8", "int8"),
        ("FP16", "FP16", "fp16"),
        ("fp32", "fp32", "fp32"),
        ("Int4-Pure", "int8", "int4"),
    ],
)
def test_uniform_kinds(name: str, lora: str, want: str, made: Made) -> None:
    found = bundle.load(made(Options(backbone="ONNX", onnx_quant=name, onnx_lora=lora)))
    assert found.onnx is not None
    assert set(found.onnx.quant.values()) == {want} and found.onnx.lora_quant == lora.lower()
    assert found.recipe == name.lower()


@pytest.mark.parametrize("backbone", ["onnx", "both"])
def test_same_input_same_bytes_on_any_number_of_threads(backbone: str, made: Made, tmp_path: Path) -> None:
    first = contents(made(Options(backbone=backbone)))
    for threads in (1, 2, 7):
        root = convert(NANO, tmp_path / str(threads), Options(backbone=backbone, threads=threads)).root
        assert contents(root) == first


@pytest.mark.parametrize("member", ["phi4-mini", "phi4-14b", "phi35-mini"])
def test_text_models_both_layouts_of_head(member: tiny.Member, tmp_path: Path) -> None:
    source = tiny.write(member, tmp_path / "source")
    found = convert(source, tmp_path / "out", Options(backbone="onnx"))
    assert found.onnx is not None
    assert (found.adapters, found.onnx.adapters, found.encoders) == ({}, {}, {})
    assert found.quant.get("output") == (None if found.text.tied_head else "int8")
    vocab = load_vocabulary(found.path("vocabulary.gguf"))
    assert llama_cpp.llama_vocab_n_tokens(vocab) == found.text.vocab_size


# -- the plan ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        Options(backbone="onnx"),
        Options(backbone="onnx", encoders="int4", onnx_quant="int8", onnx_lora="int8"),
        Options(backbone="both", encoders="fp16", onnx_quant="fp16", onnx_lora="fp32"),
        Options(backbone="onnx", encoders="fp32", onnx_quant="fp32", merge="speech"),
        Options(backbone="onnx", encoders="int4", onnx_quant="int4-pure", onnx_lora="int8"),
    ],
    ids=["int4", "int8", "fp16", "fp32-merged", "int4-pure"],
)
def test_the_plan_comes_true(options: Options, made: Made) -> None:
    """Data files to the byte, graphs nearly, the rest at most; in all 2 % beside what a vocabulary may take.

    Of phi4-nano's 13 MB the allowance for metadata is 3 %; of a real model's 3.4 GB it is 0.4 %.
    """
    planned, root = plan(NANO, options), made(options)
    assert planned.onnx is not None
    sizes = {path.name: path.stat().st_size for path in root.iterdir()}
    for name, size in planned.onnx.files.items():
        if name.endswith(".data"):
            assert size == sizes[name]
        elif name.endswith("_adapter"):
            assert sizes[name] <= size < 1.001 * sizes[name]
        else:
            assert abs(size - sizes[name]) < 0.2 * sizes[name] + 10_000
    ours = {f for f in sizes if f.startswith(("vision", "speech")) and ".onnx" in f}
    listed = {*planned.onnx.files, *planned.other_files, *(s.file for s in planned.steps)}
    assert set(sizes) - ours - listed <= {"vocabulary.gguf"}
    encoders = sum(sizes[name] for name in ours)
    assert encoders <= planned.encoders.nbytes < 1.01 * encoders
    total = sum(sizes.values())
    assert total <= planned.total_bytes < 1.02 * total + planned.metadata_bytes


def test_the_plan_shows_it() -> None:
    planned = plan(NANO, Options(backbone="onnx"))
    assert planned.onnx is not None and planned.steps == ()
    raw = json.loads(planned.to_json())
    assert (raw["backbones"], raw["recipe"], raw["tensors"]) == (["onnx"], "int4", [])
    assert raw["quant"]["ffn_down"] == "int8"
    assert raw["onnx_files"] == dict(planned.onnx.files)
    assert set(raw["onnx_files"]) >= GRAPHS | ADAPTERS | {"genai_config.json"}
    lines = planned.format().splitlines()
    assert all(any(line.startswith(f"{name}: about ") for line in lines) for name in planned.onnx.files)
    both = plan(NANO, Options(backbone="both"))
    assert both.total_bytes > planned.total_bytes + both.tensor_bytes - planned.metadata_bytes
    assert plan(NANO, Options()).onnx is None


@pytest.mark.parametrize("options", [Options(backbone="onnx"), Options(backbone="both", merge="vision")])
def test_progress_adds_up(options: Options, tmp_path: Path) -> None:
    told = Counter()
    convert(NANO, tmp_path / "out", options, told)
    planned = plan(NANO, options)
    assert told.finished and told.total == planned.source_bytes
    padding = planned.tensor_bytes - sum(s.nbytes for s in planned.steps)
    assert told.done + padding == told.total


# -- the vocabulary ---------------------------------------------------------------------------------


def load_vocabulary(path: Path) -> Any:
    """llama.cpp's vocabulary of a GGUF, without its tensors. The model lives as long as the process."""
    llama_cpp.llama_log_set(_QUIET, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    assert model, f"llama.cpp does not load {path}"
    return llama_cpp.llama_model_get_vocab(model)


def piece(vocab: Any, token: int) -> bytes:
    room = ctypes.create_string_buffer(600)
    n = llama_cpp.llama_token_to_piece(vocab, token, room, len(room), 0, True)
    assert n >= 0
    return room.raw[:n]


def test_the_vocabulary_is_the_backbones(made: Made) -> None:
    path = made(Options(backbone="onnx")) / "vocabulary.gguf"
    assert read_header(path).tensors == {}
    whole = bundle.load(made(Options())).gguf
    ours, theirs = load_vocabulary(path), load_vocabulary(whole)
    n = llama_cpp.llama_vocab_n_tokens(theirs)
    assert llama_cpp.llama_vocab_n_tokens(ours) == n == 4096
    for token in range(n):
        assert piece(ours, token) == piece(theirs, token)
        assert llama_cpp.llama_vocab_is_eog(ours, token) == llama_cpp.llama_vocab_is_eog(theirs, token)


# -- merging ----------------------------------------------------------------------------------------


def initializer(directory: Path, name: str) -> Float32:
    graph = onnx.load(directory / "model.onnx", load_external_data=False).graph
    tensor = next(t for t in graph.initializer if t.name == name)
    return onnx.numpy_helper.to_array(tensor, str(directory))


def test_a_merged_adapter_is_in_the_weights(tmp_path: Path) -> None:
    """W + alpha / rank · B A, within what adding up `rank` products in float32 may lose."""
    source = tiny.write("phi4-multimodal", tmp_path / "source")
    options = Options(backbone="onnx", onnx_quant="fp32", merge="speech")
    found = convert(source, tmp_path / "out", options)
    assert found.onnx is not None
    assert (found.merged, found.adapters, found.onnx.adapters) == ("speech", {}, {})
    assert not ADAPTERS & set(contents(found.root))
    assert "lora" not in str(onnx.load(found.root / "model.onnx", load_external_data=False).graph.input)
    target, layer = "model.layers.1.mlp.down_proj", "blk.1.ffn_down"
    lora = tiny.adapter_tensors("speech")
    a, b = (lora[f"base_model.model.{target}.lora_{part}.weight"].astype(np.float64) for part in "AB")
    config = tiny.adapter_config("speech")
    rank, scale = config["r"], config["lora_alpha"] / config["r"]
    plain = read_checkpoint(source)[f"{target}.weight"].astype(np.float64)
    merged = initializer(found.root, f"{layer}.weight")
    room = (rank + 3) * 2.0**-24 * (abs(plain) + scale * abs(b) @ abs(a))
    assert np.all(abs(merged - (plain + scale * b @ a)) <= room)
    assert abs(merged - plain).max() > 100 * room.max()


# -- failures leave nothing -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (Options(backbone="ggml"), "--backbone 'ggml': expected one of gguf, onnx, both"),
        (Options(backbone="onnx", onnx_quant="Q4_0"), "ONNX backbone type 'Q4_0' is not known"),
        (Options(backbone="both", onnx_lora="int4"), "ONNX adapter type 'int4' is not known"),
        (Options(backbone="onnx", imatrix=Path("x.gguf")), "--imatrix"),
        (Options(backbone="onnx", merge="text"), "text"),
    ],
)
def test_options_that_cannot_be(options: Options, match: str, tmp_path: Path) -> None:
    assert match in refused(NANO, tmp_path / "out", InputError, options)


@pytest.mark.parametrize("after", [1, 15, 40, 100])
@pytest.mark.parametrize("backbone", ["onnx", "both"])
def test_an_interrupt_leaves_nothing(backbone: str, after: int, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(NANO, tmp_path / "out", Options(backbone=backbone), Interrupt(after))
    assert list(tmp_path.iterdir()) == []


def test_one_takes_the_place_of_the_other(tmp_path: Path) -> None:
    source = tiny.write("phi4-mini", tmp_path / "source")
    convert(source, tmp_path / "out", Options())
    with pytest.raises(OutputError, match="not empty"):
        convert(source, tmp_path / "out", Options(backbone="onnx"))
    convert(source, tmp_path / "out", Options(backbone="onnx", overwrite=True))
    assert not (tmp_path / "out" / "backbone-Q4_K_M.gguf").exists()
    again = convert(source, tmp_path / "out", Options(overwrite=True))
    assert not GRAPHS & set(contents(again.root))


@pytest.mark.parametrize(
    ("quant", "bad"), [("int4", 1e6), ("int8", 65536.0), ("fp16", 1e6), ("fp32", np.inf)]
)
def test_impossible_weights_are_named(quant: str, bad: float, tmp_path: Path) -> None:
    """Scales are float16's numbers: a block that needs a larger one is refused, not written as infinity."""
    source = tiny.write("phi4-mini", tmp_path / "source")
    weights = tiny.tensors("phi4-mini")
    name = "model.layers.1.self_attn.o_proj.weight"
    weights[name][-1, -1] = bad
    tiny.save_tensors(source / "model.safetensors", weights, "f32", metadata=None)
    options = Options(backbone="onnx", onnx_quant=quant)
    assert repr(name) in refused(source, tmp_path / "out", CheckpointError, options)


# -- blocks and threads -----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_scales_are_numbers_that_float16_has(bits: int) -> None:
    """From float32's subnormals to the largest float16, and within half a scale of every weight."""
    rng, half = np.random.default_rng(bits), 1 << (bits - 1)
    sizes = np.exp2(np.linspace(-149, np.log2(65504), 4096)).astype(np.float32)
    sizes[-1] = 65504
    weight = np.clip(rng.standard_normal((4096, 32), np.float32) / 3, -1, 1)
    weight[np.arange(4096), rng.integers(0, 32, 4096)] = rng.choice([-1, 1], 4096)
    weight *= sizes[:, None]
    packed, scale = quantize_blocks(weight, bits, 32)
    assert np.all(np.isfinite(scale)) and np.all(scale != 0)
    assert np.array_equal(scale.astype(np.float16).astype(np.float32), scale)
    q = packed if bits == 8 else np.stack([packed & 15, packed >> 4], axis=-1).reshape(4096, 1, 32)
    values = (q[:, 0].astype(np.float64) - half) * scale
    error, step = abs(values - weight), abs(scale.astype(np.float64))
    # Dividing rounds once more, which matters where a quotient is within half an ulp of a tie.
    near = 0.5 + half * 2.0**-23
    other_end = np.sign(weight) == np.sign(scale)  # levels end one short of the scale's own side
    assert np.all(error <= np.where(other_end, 1 + near, near) * step)
    assert np.all(error[~other_end] <= near * np.broadcast_to(step, error.shape)[~other_end])
    inside = abs(weight) <= (half - 1) * step
    assert np.all(error[inside] <= near * np.broadcast_to(step, error.shape)[inside])


def test_a_block_depends_on_its_own_weights_alone() -> None:
    """Rows are rounded in pieces, here by one row and by all of them."""
    weight = np.random.default_rng(2).standard_normal((70, 8192), np.float32)
    packed, scale = quantize_blocks(weight, 4, 32)
    for row in range(70):
        q, one = quantize_blocks(weight[row : row + 1], 4, 32)
        assert np.array_equal(q[0], packed[row]) and np.array_equal(one[0], scale[row])


def test_results_come_in_order_and_an_error_in_its_turn() -> None:
    def job(n: int) -> int:
        return 100 // (20 - n)

    got = []
    with pytest.raises(ZeroDivisionError):
        for tag, value in in_order(((n, lambda n=n: job(n)) for n in range(40)), 3):
            got.append((tag, value))
    assert got == [(n, job(n)) for n in range(20)]
