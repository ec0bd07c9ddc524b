# SPDX-License-Identifier: Apache-2.0
"""The backbone's graphs on ONNX Runtime against transformers' golden runs; adapters, files, refusals."""

from __future__ import annotations

import dataclasses
import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest

from pocketphi.convert.checkpoint import Checkpoint
from pocketphi.convert.config import read_config
from pocketphi.convert.mapping import Adapter, LoraPair, map_tensors
from pocketphi.convert.onnx_graph import quantize_blocks
from pocketphi.convert.onnx_lora import LoraKind
from pocketphi.convert.write_onnx_adapter import write_onnx_adapter
from pocketphi.convert.write_onnx_decoder import DecoderQuant, write_decoder
from pocketphi.runtime.errors import CheckpointError, OutputError
from pocketphi.runtime.spec import TextSpec

from .. import tiny
from ..golden import cases, decoder64
from ..tiny_files import read_checkpoint

Float32 = npt.NDArray[np.float32]
Made = Callable[..., "Engine"]

EXACT = DecoderQuant.uniform("fp32", "fp32")
GRAPHS = ["model.onnx", "embedding.onnx", "decoder.onnx"]
DATA = "model.onnx.data"


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # below: a warning for each input that has a default
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class Engine:
    """The two parts of a model, and one sequence."""

    def __init__(self, directory: Path, text: TextSpec) -> None:
        self.directory, self.text = directory, text
        self.embedding = session(directory / "embedding.onnx")
        self.decoder = session(directory / "decoder.onnx")
        self.names = [f"{n}.{part}" for n in range(text.n_layers) for part in ("key", "value")]
        self.adapters: dict[str, Any] = {}

    def embed(self, ids: npt.NDArray[Any]) -> Float32:
        found: Float32 = self.embedding.run(None, {"input_ids": np.asarray(ids, np.int64)[None]})[0]
        return found

    def rows(self, case: cases.Case) -> Float32:
        rows = self.embed(np.maximum(case.ids, 0))
        rows[0, case.ids < 0] = case.rows
        return rows

    def none(self) -> list[Float32]:
        """An empty past."""
        return [np.zeros((1, self.text.n_kv_heads, 0, self.text.head_dim), np.float32) for _ in self.names]

    def options(self, adapter: str | None) -> Any:
        options = onnxruntime.RunOptions()
        if adapter is not None:
            if adapter not in self.adapters:
                self.adapters[adapter] = onnxruntime.LoraAdapter()
                self.adapters[adapter].Load(str(self.directory / f"adapter-{adapter}.onnx_adapter"))
            options.add_active_adapter(self.adapters[adapter])
        return options

    def run(
        self, rows: Float32, past: list[Float32] | None = None, adapter: str | None = None, n_logits: int = 1
    ) -> tuple[Float32, list[Float32]]:
        """Logits [n_logits, v] after one pass over `rows`, and the present."""
        past = self.none() if past is None else past
        total = past[0].shape[2] + rows.shape[1]
        feeds = {"inputs_embeds": rows, "attention_mask": np.ones((1, total), np.int64)}
        feeds["n_logits"] = np.array([n_logits])
        feeds |= {f"past_key_values.{name}": value for name, value in zip(self.names, past, strict=True)}
        outputs = ["logits", *(f"present.{name}" for name in self.names)]
        logits, *present = self.decoder.run(outputs, feeds, self.options(adapter))
        return logits[0], present


def write(checkpoint: Path, out: Path, quant: DecoderQuant = EXACT) -> TextSpec:
    out.mkdir()
    with Checkpoint.open(checkpoint) as source:
        config = read_config(source.config, "config.json")
        tensors = map_tensors(config, source.tensors, source.adapters, checkpoint)
        made = write_decoder(out, source, config, tensors, quant)
        assert [f.path for f in made] == [*GRAPHS, DATA]
        made += [write_onnx_adapter(out, source, a, quant.lora) for a in tensors.adapters.values()]
        assert {f.path: f.size for f in made} == {f.name: f.stat().st_size for f in out.iterdir()}
    return config.text


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`made(model, quant)`: written when first asked for."""
    root, found = tmp_path_factory.mktemp("onnx"), {}

    def get(model: str, quant: DecoderQuant = EXACT) -> Engine:
        if (model, quant) not in found:
            out = root / str(len(found))
            found[model, quant] = Engine(out, write(cases.checkpoint(model, root / "from"), out, quant))
        return found[model, quant]

    return get


@pytest.mark.parametrize("model", cases.MODELS)
def test_logits_and_greedy_tokens(model: str, made: Made) -> None:
    """The prompt in one pass, then token by token through the cache; a crossing reads all of it again.

    The bound is each case's own, see golden/cases.py; 1e-4 of the largest logit is the promise.
    """
    engine = made(model)
    for case in cases.load(model):
        rows = engine.rows(case)
        table = engine.text.rope.table(rows.shape[1])
        logits, past = engine.run(rows, None, case.adapter)
        wanted = dict(zip(case.steps.tolist(), case.step_logits, strict=True))
        assert abs(logits[-1] - case.logits).max() <= case.bound, case.name
        assert abs(logits[-1] - case.logits).max() <= 1e-4 * abs(case.logits).max(), case.name
        for step, token in enumerate(case.greedy.tolist()):
            if step in wanted:
                assert abs(logits[-1] - wanted[step]).max() <= case.bound, f"{case.name} step {step}"
            assert logits[-1].argmax() == token, f"{case.name} step {step}"
            new = engine.embed(np.array([token]))
            rows = np.concatenate([rows, new], axis=1)
            crossed = engine.text.rope.table(rows.shape[1]) != table
            if crossed:
                table = engine.text.rope.table(rows.shape[1])
            logits, past = engine.run(rows if crossed else new, None if crossed else past, case.adapter)


@pytest.mark.parametrize(("name", "other"), [("vision-short", "speech"), ("vision-short", None)])
def test_another_adapter_or_none_is_far_outside_the_bound(name: str, other: str | None, made: Made) -> None:
    engine = made("phi4-multimodal")
    case = next(c for c in cases.load("phi4-multimodal") if c.name == name)
    logits, _ = engine.run(engine.rows(case), None, other)
    assert abs(logits[-1] - case.logits).max() > 100 * case.bound


@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_rounded_adapters(kind: LoraKind, made: Made) -> None:
    """A float16 adapter is exact here: the tiny checkpoints' values suit it, and alpha / rank is 2.

    int8 is compared with float64 over the very numbers that the file holds.
    """
    engine = made("phi4-multimodal", dataclasses.replace(EXACT, lora=kind))
    folder = cases.checkpoint("phi4-multimodal", engine.directory.parent / "again")
    config, weights = json.loads((folder / "config.json").read_text("utf-8")), read_checkpoint(folder)
    for name in ("vision", "speech"):
        case = next(c for c in cases.load("phi4-multimodal") if c.name == f"{name}-medium")
        logits, _ = engine.run(engine.rows(case), None, name)
        want: npt.NDArray[Any] = case.logits
        if kind == "int8":
            held = parameters(engine.directory / f"adapter-{name}.onnx_adapter")
            table = weights["model.embed_tokens.weight"]
            want = decoder64.logits(config, weights, table[case.ids], (dequantized(held), 1.0))
        assert abs(logits[-1] - want).max() <= case.bound
        none, _ = engine.run(engine.rows(case))
        assert abs(none[-1] - case.logits).max() > 1e3 * case.bound


def parameters(path: Path) -> dict[str, npt.NDArray[Any]]:
    """An adapter file by ONNX Runtime's own reader, which verifies the flatbuffer."""
    adapter = onnxruntime.AdapterFormat.read_adapter(str(path))  # it owns what the values refer to
    return {name: value.numpy().copy() for name, value in adapter.get_parameters().items()}


LINEARS = {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}


def peft_stem(name: str) -> str:
    _, layer, group = name.split(".")
    return f"base_model.model.model.layers.{layer}.{LINEARS[group]}"


def dequantized(held: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[np.float64]]:
    """An int8 adapter under PEFT's names; the scale goes to A."""
    found = {}
    for name in {n.rpartition(".")[0] for n in held}:
        scale = held[f"{name}.lora_scale"].astype(np.float64)
        found[f"{peft_stem(name)}.lora_A.weight"] = held[f"{name}.lora_A"].T * scale[:, None]
        found[f"{peft_stem(name)}.lora_B.weight"] = held[f"{name}.lora_B"].T.astype(np.float64)
    return found


def test_adapter_files_hold_the_adapter(made: Made) -> None:
    exact, rounded = (
        made("phi4-multimodal", dataclasses.replace(EXACT, lora=kind)).directory for kind in ("fp32", "int8")
    )
    for adapter, (rank, alpha) in tiny.LORA.items():
        held = parameters(exact / f"adapter-{adapter}.onnx_adapter")
        source = tiny.adapter_tensors(adapter)
        assert len(held) == len(source)
        near = dequantized(parameters(rounded / f"adapter-{adapter}.onnx_adapter"))
        for name in {n.rpartition(".")[0] for n in held}:
            a, b = (source[f"{peft_stem(name)}.lora_{part}.weight"] for part in "AB")
            assert np.array_equal(held[f"{name}.lora_A"], a.T)
            assert np.array_equal(held[f"{name}.lora_B"], b.T * np.float32(alpha / rank))
            # Each of A's rows and B's columns is within half a step of 1/127 of its largest value.
            got_a, got_b = (near[f"{peft_stem(name)}.lora_{part}.weight"] for part in "AB")
            want, got = alpha / rank * b.astype(np.float64) @ a, got_b @ got_a
            steps = 0.5 * (1 + 1e-4) / 127
            a_top, b_top = abs(a).max(1), abs(b).max(0) * alpha / rank
            room = (abs(b) * alpha / rank) @ np.broadcast_to((a_top * steps)[:, None], a.shape)
            room = room + (b_top * steps) @ (abs(a) + (a_top * steps)[:, None])
            assert np.all(abs(got - want) <= room)


def test_adapter_file_layout(made: Made) -> None:
    """The fields by hand: identifier, root, and numbers where a vector of 64 bytes can be loaded."""
    raw = (made("phi4-multimodal").directory / "adapter-vision.onnx_adapter").read_bytes()
    (root,) = struct.unpack_from("<I", raw, 0)
    assert raw[4:8] == b"TORT"
    version, _, _, to_vector = struct.unpack_from("<4I", raw, root + 4)
    vector = root + 16 + to_vector
    (count,) = struct.unpack_from("<I", raw, vector)
    assert version == 1 and count == len(tiny.adapter_tensors("vision"))
    end = 0
    for i in range(count):
        slot = vector + 4 + 4 * i
        table = slot + struct.unpack_from("<I", raw, slot)[0]
        data = table + 16 + struct.unpack_from("<I", raw, table + 16)[0]
        assert (data + 4) % 64 == 0
        end = data + 4 + struct.unpack_from("<I", raw, data)[0]
    assert end == len(raw)


def test_pieces_and_rows_of_logits(made: Made) -> None:
    """Logits of many positions are those of each alone; pieces of a prompt give what the whole gives."""
    engine = made("phi4-mini")
    case = next(c for c in cases.load("phi4-mini") if c.name == "medium")
    rows = engine.rows(case)
    every, _ = engine.run(rows, n_logits=1 << 40)
    assert every.shape == (33, engine.text.vocab_size)
    past: list[Float32] | None = None
    for start, stop in ((0, 7), (7, 8), (8, 33)):
        logits, past = engine.run(rows[:, start:stop], past, n_logits=3)
        want = every[max(start, stop - 3) : stop]
        assert logits.shape == want.shape and abs(logits - want).max() <= case.bound
    assert abs(every[-1] - case.logits).max() <= case.bound


def test_whole_graph_shared_buffer_and_batch(made: Made) -> None:
    """As onnxruntime-genai runs it: token ids, one buffer for past and present, rows of unequal length."""
    engine = made("phi4-multimodal")
    text, whole = engine.text, session(engine.directory / "model.onnx")
    first, second = (c for c in cases.load("phi4-multimodal") if c.name in ("short", "medium"))
    ids = np.zeros((2, 33), np.int64)
    ids[0, :7], ids[1] = first.ids, second.ids
    mask = (np.arange(40) < np.array([[7], [33]])).astype(np.int64)
    shape = (2, text.n_kv_heads, 40, text.head_dim)
    binding = whole.io_binding()
    buffers = {n: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for n in engine.names}
    for name, buffer in buffers.items():
        binding.bind_ortvalue_input(f"past_key_values.{name}", buffer)
        binding.bind_ortvalue_output(f"present.{name}", buffer)
    binding.bind_cpu_input("input_ids", ids)
    binding.bind_cpu_input("attention_mask", mask[:, :33])
    binding.bind_output("logits")
    whole.run_with_iobinding(binding)
    got = binding.copy_outputs_to_cpu()[-1]
    assert got.shape == (2, 1, text.vocab_size)
    assert abs(got[1, 0] - second.logits).max() <= second.bound
    # The shorter row's first token goes on in its own place: after 7 tokens, not after 33.
    binding.bind_cpu_input("input_ids", np.array([[first.greedy[0]], [second.greedy[0]]], np.int64))
    binding.bind_cpu_input("attention_mask", (np.arange(34) < np.array([[8], [34]])).astype(np.int64))
    whole.run_with_iobinding(binding)
    got = binding.copy_outputs_to_cpu()[-1]
    assert [int(row.argmax()) for row in got[:, 0]] == [first.greedy[1], second.greedy[1]]
    assert buffers["0.key"].numpy()[1, :, 34:].any() == np.False_, "what lies beyond is left alone"


def unpacked(tensor: onnx.TensorProto, directory: Path, bits: int, scale: onnx.TensorProto) -> Float32:
    """MatMulNBits' weights as float32 [out, in], by its definition."""
    stored = onnx.numpy_helper.to_array(tensor, str(directory))
    q = stored if bits == 8 else np.stack([stored & 15, stored >> 4], axis=-1).reshape(*stored.shape[:2], -1)
    steps = onnx.numpy_helper.to_array(scale, str(directory)).reshape(*stored.shape[:2], 1)
    values: Float32 = (q.astype(np.float32) - (1 << (bits - 1))) * steps
    return values.reshape(len(stored), -1)


@pytest.mark.parametrize("member", ["phi4-mini", "phi35-mini"])
def test_blocks(member: str, made: Made) -> None:
    """4 and 8 bits: ONNX Runtime's logits are float64's over the numbers that the file holds.

    At accuracy level 0 activations are not rounded, so the golden run's bound holds.
    """
    engine = made(member, DecoderQuant(accuracy_level=0))
    graph = onnx.load(engine.directory / "model.onnx", load_external_data=False).graph
    stored = {t.name: t for t in graph.initializer}
    folder = cases.checkpoint(member, engine.directory.parent / "again")
    config, weights = json.loads((folder / "config.json").read_text("utf-8")), read_checkpoint(folder)
    kinds = []
    for node in graph.node:
        if node.op_type != "MatMulNBits":
            continue
        bits = next(a.i for a in node.attribute if a.name == "bits")
        name = node.input[1].removesuffix(".weight")
        values = unpacked(stored[f"{name}.weight"], engine.directory, bits, stored[f"{name}.scale"])
        if name.startswith("blk"):
            target = f"{peft_stem(name).removeprefix('base_model.model.')}.weight"
        else:
            target = "model.embed_tokens.weight" if name == "token_embd" else "lm_head.weight"
        original = weights[target]
        steps = onnx.numpy_helper.to_array(stored[f"{name}.scale"], str(engine.directory))
        assert np.array_equal(steps.astype(np.float16).astype(np.float32), steps)
        # Half a step, a whole one for the largest value with the other sign.
        step = np.repeat(abs(original).reshape(len(original), -1, 32).max(-1) / (1 << (bits - 1)), 32, 1)
        error = abs(values - original)
        assert np.all(error <= step * (1 + 1e-5)) and np.mean(error <= step * (0.5 + 1e-5)) > 0.95
        weights[target] = values
        kinds.append((name.rpartition(".")[2], bits))
    assert set(kinds) == {
        ("attn_qkv", 8),
        ("attn_output", 4),
        ("ffn_up", 4),
        ("ffn_down", 8),
        ("token_embd" if engine.text.tied_head else "output", 8),
    }
    if not engine.text.tied_head:
        weights["model.embed_tokens.weight"] = unpacked(
            stored["token_embd.weight"], engine.directory, 8, stored["token_embd.scale"]
        )
    for case in cases.load(member):
        if case.name in ("short", "medium", "over"):
            logits, _ = engine.run(engine.rows(case))
            want = decoder64.logits(config, weights, weights["model.embed_tokens.weight"][case.ids])
            assert abs(logits[-1] - want).max() <= case.bound, case.name


def test_half_precision_stores_the_same_numbers(made: Made) -> None:
    engine = made("phi4-mini", DecoderQuant.uniform("fp16"))
    for case in cases.load("phi4-mini")[:3]:
        logits, _ = engine.run(engine.rows(case))
        assert abs(logits[-1] - case.logits).max() <= case.bound
    size = (engine.directory / DATA).stat().st_size
    assert size < 0.6 * (made("phi4-mini").directory / DATA).stat().st_size


def divergence(engine: Engine, exact: Engine, ids: npt.NDArray[Any]) -> float:
    """Mean KL divergence over every position but the last, in nats."""
    rows = []
    for each in (exact, engine):
        logits, _ = each.run(each.embed(ids), n_logits=len(ids))
        shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        rows.append(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
    p, q = rows
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def test_exceptions_keep_quality(made: Made) -> None:
    """On phi4-nano each step from 8 bits everywhere to 4 bits everywhere costs something."""
    exact = made("phi4-nano")
    ids = np.concatenate([c.ids for c in cases.load("phi4-nano") if c.name.startswith(("text", "tool"))])
    quants = (
        DecoderQuant.uniform("int8"),
        DecoderQuant(),
        DecoderQuant(qkv="int4"),
        DecoderQuant.uniform("int4"),
    )
    costs = [divergence(made("phi4-nano", quant), exact, ids) for quant in quants]
    assert costs[0] > 0 and costs == sorted(costs), costs


@pytest.mark.parametrize("quant", [EXACT, DecoderQuant.uniform("fp16"), DecoderQuant()])
def test_files(quant: DecoderQuant, tmp_path: Path) -> None:
    """The same bytes from both layouts and twice; data relative, in bounds; a tied head stored once."""
    native = tiny.write("phi4-multimodal", tmp_path / "native")
    original = tiny.write("phi4-multimodal", tmp_path / "original", layout="original")
    for n, checkpoint in enumerate((native, native, original)):
        write(checkpoint, tmp_path / str(n), quant)
    names = sorted(p.name for p in (tmp_path / "0").iterdir())
    for name in names:
        assert len({(tmp_path / str(n) / name).read_bytes() for n in range(3)}) == 1, name
    size = (tmp_path / "0" / DATA).stat().st_size
    for name in GRAPHS:
        graph = onnx.load(tmp_path / "0" / name, load_external_data=False).graph
        ranges = {}
        for tensor in graph.initializer:
            about = {entry.key: entry.value for entry in tensor.external_data}
            if about:
                assert about.pop("location") == DATA
                ranges[tensor.name] = tuple(int(about[key]) for key in ("offset", "length"))
                assert sum(ranges[tensor.name]) <= size and ranges[tensor.name][0] % 4096 == 0
            used = [node for node in graph.node if tensor.name in node.input]
            assert used, f"{name}: {tensor.name} is for nothing"
        head = {"token_embd.weight", "token_embd.rows"} & set(ranges)
        assert head and len({ranges[n] for n in head}) == 1
        assert not any(a.type == onnx.AttributeProto.GRAPH for node in graph.node for a in node.attribute)


def test_refusals(tmp_path: Path) -> None:
    native = tiny.write("phi4-multimodal", tmp_path / "native")
    whole = Checkpoint.rows

    class Broken(Checkpoint):
        def rows(self, info, start, stop):  # type: ignore[no-untyped-def]
            values = whole(self, info, start, stop)
            bad = "layers.1.mlp.down_proj" in info.name
            with np.errstate(invalid="ignore"):  # on the thread that reads
                return values * np.float32("inf") if bad else values

    with Checkpoint.open(native) as source:
        config = read_config(source.config, "config.json")
        tensors = map_tensors(config, source.tensors, source.adapters, native)
        with pytest.raises(
            CheckpointError, match=r"ffn_down has rows of 512 weights, expected a multiple of"
        ):
            write_decoder(
                tmp_path, source, config, tensors, dataclasses.replace(EXACT, down="int8", block=1024)
            )
        fields = {f.name: getattr(source, f.name) for f in dataclasses.fields(source)}
        broken, out = Broken(**fields), tmp_path / "out"
        out.mkdir()
        with (
            np.errstate(invalid="ignore"),
            pytest.raises(CheckpointError, match=r"layers.1.mlp.down_proj.weight' holds -?(inf|nan)"),
        ):
            write_decoder(out, broken, config, tensors, DecoderQuant())
        with (
            np.errstate(invalid="ignore"),
            pytest.raises(CheckpointError, match=r"layers.1.mlp.down_proj.lora_A.* holds -?(inf|nan)"),
        ):
            write_onnx_adapter(out, broken, tensors.adapters["vision"], "int8")
        (pair, *_) = tensors.adapters["vision"].pairs
        a, b = (dataclasses.replace(info, shape=(1 << 15, 1 << 15)) for info in (pair.a, pair.b))
        huge = Adapter("speech", 1 << 15, 1.0, (LoraPair(pair.target, a, b),))
        with pytest.raises(
            OutputError, match=r"adapter-speech.onnx_adapter: would have 8,589,.* format allows 2,147"
        ):
            write_onnx_adapter(out, source, huge, "fp32")
        assert not (out / "adapter-speech.onnx_adapter").exists()


def test_memory_is_some_rows(tmp_path: Path) -> None:
    """Matrices of 64 MB and more pass in pieces of 16 MB, with a few copies while they are rounded."""
    folder = tiny.write("phi4-mini", tmp_path / "wide")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    wide = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 1, "vocab_size": 32768}
    config |= wide | {"num_attention_heads": 16, "num_key_value_heads": 4}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    rng = np.random.default_rng(0)
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (32768, 1024),
        "model.norm.weight": (1024,),
        layer + "input_layernorm.weight": (1024,),
        layer + "post_attention_layernorm.weight": (1024,),
        layer + "self_attn.qkv_proj.weight": (1536, 1024),
        layer + "self_attn.o_proj.weight": (1024, 1024),
        layer + "mlp.gate_up_proj.weight": (16384, 1024),
        layer + "mlp.down_proj.weight": (1024, 8192),
    }
    weights = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    tiny.save_tensors(folder / "model.safetensors", weights, "bf16", metadata=None)
    del weights
    tracemalloc.start()
    try:
        write(folder, tmp_path / "out", DecoderQuant())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # A piece, |piece|, the quotient, its rounding and clipping, q as bytes; scales of 4 MB twice.
    assert peak < 7 * 16e6 < 32768 * 1024 * 4


def test_quantize_blocks_keeps_zeros_and_peaks() -> None:
    weight = np.random.default_rng(1).standard_normal((9, 64), np.float32)
    weight[2, :32] = 0
    for bits in (4, 8):
        packed, scale = quantize_blocks(weight, bits, 32)
        assert packed.shape == (9, 2, 4 * bits) and scale.shape == (9, 2)
        q = packed if bits == 8 else np.stack([packed & 15, packed >> 4], axis=-1).reshape(9, 2, 32)
        values = (q.astype(np.float32) - (1 << (bits - 1))) * scale[..., None]
        assert not values[2, 0].any()
        top = abs(weight).reshape(9, 2, 32).max(-1)
        largest = abs(values).max(-1) * (top > 0)  # at most one step of float16 above
        assert np.all((top <= largest) & (largest <= top * (1 + 2.0**-10)))
