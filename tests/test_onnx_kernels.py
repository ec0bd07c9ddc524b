# SPDX-License-Identifier: Apache-2.0
"""Our kernels inside ONNX Runtime: near the formula, the same bits on any threads, no crash on any graph.

A product's bound: an activation is rounded by half a step of its scale, which up to 256 columns share; the
step's own rounding adds 127 · 2^-22 of one. Then one float32 operation for each block of 32 columns and a few
more, each off by 2^-24 of the sum of sizes; twice that is taken.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from pocketphi.convert.checkpoint import Checkpoint
from pocketphi.convert.config import read_config
from pocketphi.convert.decoder_quant import LoraKind
from pocketphi.convert.mapping import map_tensors
from pocketphi.convert.write_onnx_adapter import write_onnx_adapter
from pocketphi.convert.write_onnx_decoder import DecoderQuant, write_decoder
from pocketphi.runtime import onnx_kernels
from pocketphi.runtime.errors import BundleError, InputError

from . import tiny
from .golden import cases

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

CC = shutil.which("cc")
MICROSOFT = "com.microsoft"
EPS = 2.0**-23
SHAPES = [(1, 32), (16, 96), (17, 256), (100, 288), (513, 1280)]  # N, K: whole blocks, not always whole 256s
TOKENS = [1, 2, 15, 16, 17, 33, 600]
_X86 = ("avx2,fma,f16c", "avx2,fma,f16c,avxvnni", "")
_ARM = ("neon", "neon,dotprod", "")
MASKS = ("none", *(_X86 if platform.machine().lower() in ("x86_64", "amd64") else _ARM))

pytestmark = pytest.mark.skipif(
    not onnx_kernels.library_path().is_file(), reason="the package was built without libpk_ort"
)


def weights(n: int, k: int, bits: int, seed: int = 0) -> tuple[npt.NDArray[np.uint8], Float32, Float64]:
    """Blocks, scales, and the matrix that they are; the smallest level is among them."""
    rng = np.random.default_rng([n, k, bits, seed])
    q = rng.integers(0, 1 << bits, (n, k // 32, 32)).astype(np.uint8)
    q[:, :, 0] = 0
    scales = rng.normal(0, 0.02, (n, k // 32)).astype(np.float16).astype(np.float32)
    blocks = q if bits == 8 else q[..., 0::2] | q[..., 1::2] << 4
    w = (q.astype(np.float64) - (1 << bits - 1)) * scales[..., None]
    return blocks, scales, w.reshape(n, k)


def product(
    tensors: Mapping[str, npt.NDArray[Any]],
    domain: str = MICROSOFT,
    inputs: tuple[str, ...] = ("b", "s"),
    outer: tuple[int | str, ...] = ("t",),
    **attributes: int,
) -> bytes:
    """A graph of one MatMulNBits."""
    node = helper.make_node(
        "MatMulNBits", ["x", *inputs], ["y"], domain=domain, name="product", block_size=32, **attributes
    )
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [*outer, attributes[width]])
        for name, width in (("x", "K"), ("y", "N"))
    ]
    types = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8, "int32": TensorProto.INT32}
    stored = [
        helper.make_tensor(name, types[a.dtype.name], a.shape, a.tobytes(), raw=True)
        for name, a in tensors.items()
    ]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], stored)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(domain, 1)]
    return bytes(helper.make_model(graph, ir_version=10, opset_imports=opsets).SerializeToString())


def open_session(graph: bytes, threads: int = 2, folder: Path | None = None, ours: bool = True) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if ours:  # not `register`: that leaves the scalar code to ONNX Runtime
        options.register_custom_ops_library(str(onnx_kernels.library_path()))
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def bound(x: Float32, w: Float64, bits: int) -> Float64:
    """How far a product may be from x Wᵀ."""
    k = x.shape[1]
    shared = 256 if bits == 4 and k % 256 == 0 else 32
    step = abs(x.astype(np.float64)).reshape(len(x), k // shared, shared).max(axis=2) / 127
    rounding = np.repeat(step, shared, axis=1) * (0.5 + 127 * 2.0**-22)
    sizes = (abs(x) + rounding) @ abs(w).T
    result: Float64 = rounding @ abs(w).T + (k / 32 + 8) * EPS * sizes
    return result


# ---- numbers ----

CHILD = """
import sys
import numpy as np
from tests.test_onnx_kernels import SHAPES, TOKENS, activations, graph_of, open_session
found = {}
for bits in (4, 8):
    for n, k in SHAPES:
        sessions = [open_session(graph_of(bits, n, k), threads) for threads in (1, 2)]
        for tokens in TOKENS:
            for threads, session in enumerate(sessions, 1):
                (y,) = session.run(None, {"x": activations(tokens, k)})
                found[f"{bits} {n} {k} {tokens} {threads}"] = y
np.savez(sys.argv[1], **found)
"""


def activations(tokens: int, k: int) -> Float32:
    """Numbers of very different sizes: every scale matters."""
    rng = np.random.default_rng([tokens, k])
    return (rng.normal(0, 1, (tokens, k)) * np.exp2(rng.integers(-8, 5, (tokens, k)))).astype(np.float32)


def graph_of(bits: int, n: int, k: int) -> bytes:
    blocks, scales, _ = weights(n, k, bits)
    return onnx_kernels.with_our_products(product({"b": blocks, "s": scales}, K=k, N=n, bits=bits))


def python(*arguments: str, mask: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, with a mask of CPU features."""
    package = Path(onnx_kernels.__file__).parents[2]
    root = Path(__file__).resolve().parents[1]
    env = {**os.environ, "PYTHONPATH": f"{package}{os.pathsep}{root}", "POCKETPHI_CPU_MASK": mask, **more}
    command = [sys.executable, "-c", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("mask", MASKS)
def test_every_variant_is_near_the_formula(tmp_path: Path, mask: str) -> None:
    done = python(CHILD, str(tmp_path / "found.npz"), mask=mask)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "found.npz")
    assert len(found.files) == 2 * len(SHAPES) * len(TOKENS) * 2
    for name in found.files:
        bits, n, k, tokens, threads = map(int, name.split())
        x, (_, _, w) = activations(tokens, k), weights(n, k, bits)
        assert (abs(found[name] - x.astype(np.float64) @ w.T) <= bound(x, w, bits)).all(), name
        if threads == 2:  # the same bits on one thread
            assert found[name].tobytes() == found[name[:-1] + "1"].tobytes()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_bias_and_more_dimensions(bits: int) -> None:
    blocks, scales, w = weights(70, 64, bits)
    bias = np.random.default_rng(5).normal(size=70).astype(np.float32)
    stored = {"b": blocks, "s": scales, "v": bias}
    graph = product(stored, inputs=("b", "s", "", "", "v"), outer=("a", "b"), K=64, N=70, bits=bits)
    session = open_session(onnx_kernels.with_our_products(graph))
    x = activations(6, 64)
    (y,) = session.run(None, {"x": x.reshape(2, 3, 64)})
    want = x.astype(np.float64) @ w.T + bias
    assert y.shape == (2, 3, 70)
    assert (abs(y.reshape(6, 70) - want) <= bound(x, w, bits) + EPS * abs(want)).all()
    (y,) = session.run(None, {"x": np.zeros((0, 3, 64), np.float32)})
    assert y.shape == (0, 3, 70)


def test_not_a_number_stays_visible() -> None:
    x = np.zeros((2, 32), np.float32)
    x[1, 3] = np.nan
    (y,) = open_session(graph_of(8, 16, 32)).run(None, {"x": x})
    assert (y[0] == 0).all() and np.isnan(y[1]).all()


def test_our_code_ran() -> None:
    """Told by the library's own counters, and not by how fast it was."""
    if not onnx_kernels.load().active:
        pytest.skip("this CPU has only the scalar code")
    before, calls = onnx_kernels.counts(), onnx_kernels.calls()
    session = open_session(graph_of(4, 100, 256))
    for _ in range(3):
        session.run(None, {"x": activations(7, 256)})
    after = onnx_kernels.counts()
    assert {name: after[name] - before[name] for name in ("products", "tokens")} == {
        "products": 3,
        "tokens": 21,
    }
    assert after["packed_bytes"] - before["packed_bytes"] == 7 * 16 * 256 // 32 * 18
    assert onnx_kernels.calls() - calls == 3
    open_session(product_of_microsoft(), ours=False).run(None, {"x": activations(7, 256)})
    assert onnx_kernels.counts() == after


def product_of_microsoft() -> bytes:
    blocks, scales, _ = weights(100, 256, 4)
    return product({"b": blocks, "s": scales}, K=256, N=100, bits=4)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_sessions_leave_nothing_behind() -> None:
    """100 sessions of 2.2 MB of packed weights each. What malloc keeps of them varies by some megabytes."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    graph = graph_of(8, 1024, 2048)

    def once() -> None:
        open_session(graph).run(None, {"x": activations(3, 2048)})

    for _ in range(10):
        once()
    before = resident()
    for _ in range(100):
        once()
    assert resident() - before < 100 * 2_200_000 / 4


def test_two_sessions_at_once() -> None:
    """They share the library's memory for a call."""
    sessions = [open_session(graph_of(bits, 513, 1280)) for bits in (4, 8)]
    inputs = [activations(tokens, 1280) for tokens in (1, 40, 200)]
    alone = [[s.run(None, {"x": x})[0].tobytes() for x in inputs] for s in sessions]

    def again(i: int) -> bool:
        return all(
            [sessions[i % 2].run(None, {"x": x})[0].tobytes() for x in inputs] == alone[i % 2]
            for _ in range(20)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(again, range(4)))


# ---- graphs that contradict themselves ----


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"N": 65}, "B has"),
        ({"N": 63}, "B has"),
        ({"N": 2**31 - 1}, "B has"),
        ({"K": 96}, "B has"),
        ({"K": 2**40}, "K = 1099511627776"),
        ({"K": 0}, "K = 0"),
        ({"N": -1}, "N = -1"),
        ({"K": 63}, "K = 63"),
        ({"bits": 8}, "B has"),
        ({"bits": 3}, "bits = 3"),
        ({"block_size": 64}, "block_size = 64"),
    ],
)
def test_sizes_that_contradict_the_weights(change: Mapping[str, int], said: str) -> None:
    blocks, scales, _ = weights(64, 64, 4)
    model = onnx.load_from_string(product({"b": blocks, "s": scales}, "pocketphi", K=64, N=64, bits=4))
    for attribute in model.graph.node[0].attribute:
        attribute.i = change.get(attribute.name, attribute.i)
    with pytest.raises(Exception, match=said):
        open_session(model.SerializeToString())


def changed(name: str, change: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> bytes:
    blocks, scales, _ = weights(64, 64, 4)
    tensors: dict[str, npt.NDArray[Any]] = {"b": blocks, "s": scales}
    tensors[name] = change(tensors[name])
    return product(tensors, "pocketphi", K=64, N=64, bits=4)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("b", lambda b: b[:63], "B has"),
        ("s", lambda s: s[:, :1], "scales has"),
        ("s", lambda s: s * np.float32(1.001), "float16"),
        ("s", lambda s: np.where(s > 0, np.float32(np.nan), s), "float16"),
        ("s", lambda s: np.full_like(s, np.inf), "float16"),
        ("s", lambda s: np.full_like(s, 1e-30), "float16"),
    ],
)
def test_weights_that_cannot_be_used(name: str, change: Any, said: str) -> None:
    with pytest.raises(Exception, match=said):
        open_session(changed(name, change))


def test_weights_that_are_not_constant() -> None:
    model = onnx.load_from_string(changed("b", lambda b: b))
    del model.graph.initializer[0]
    model.graph.input.append(helper.make_tensor_value_info("b", TensorProto.UINT8, [64, 2, 16]))
    with pytest.raises(Exception, match="not a constant"):
        open_session(model.SerializeToString())


def test_inputs_that_do_not_fit() -> None:
    blocks, scales, _ = weights(64, 64, 4)
    bias = np.zeros(63, np.float32)
    graph = product({"b": blocks, "s": scales, "v": bias}, "pocketphi", ("b", "s", "v"), K=64, N=64, bits=4)
    with pytest.raises(Exception, match="bias has 63"):
        open_session(graph).run(None, {"x": np.zeros((1, 64), np.float32)})
    model = onnx.load_from_string(graph)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "any"
    for shape in ((2, 32), (2, 128), (2, 0)):
        with pytest.raises(Exception, match="last dimension"):
            open_session(model.SerializeToString()).run(None, {"x": np.zeros(shape, np.float32)})


# ---- graphs renamed ----


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Callable[[DecoderQuant], Path]:
    """phi4-nano's model.onnx in a kind."""
    made: dict[DecoderQuant, Path] = {}

    def get(quant: DecoderQuant) -> Path:
        if quant not in made:
            made[quant] = decoder(tmp_path_factory.mktemp("nano"), quant)
        return made[quant]

    return get


def decoder(directory: Path, quant: DecoderQuant) -> Path:
    checkpoint = cases.checkpoint("phi4-nano", directory / "checkpoint")
    with Checkpoint.open(checkpoint) as source:
        config = read_config(source.config, "config.json")
        tensors = map_tensors(config, source.tensors, source.adapters, checkpoint)
        write_decoder(directory, source, config, tensors, quant)
        for adapter in tensors.adapters.values():
            write_onnx_adapter(directory, source, adapter, quant.lora)
    return directory / "model.onnx"


def test_only_what_is_ours_changes(nano: Callable[[DecoderQuant], Path]) -> None:
    raw = nano(DecoderQuant()).read_bytes()
    ours = onnx_kernels.with_our_products(raw)
    before, after = onnx.load_from_string(raw), onnx.load_from_string(ours)
    kinds = [node.op_type for node in after.graph.node if node.domain == "pocketphi"]
    layers = sum(node.op_type == "GroupQueryAttention" for node in before.graph.node)
    assert kinds.count("MatMulNBits") == 4 * layers + 1 and kinds.count("SwiGLU") == layers
    assert kinds.count("Lora") == 4 * layers
    assert not any(node.op_type in ("QuickGelu", "Split", "MatMul") for node in after.graph.node)
    assert {o.domain: o.version for o in after.opset_import} == {
        **{o.domain: o.version for o in before.opset_import},
        "pocketphi": 1,
    }
    others = {node.name: node for node in before.graph.node}
    for node in after.graph.node:
        if node.op_type == "MatMulNBits":
            node.domain = MICROSOFT
        if node.op_type not in ("SwiGLU", "Lora"):
            assert node == others.pop(node.name)
    assert {node.op_type for node in others.values()} == {
        "Split",
        "QuickGelu",
        "Mul",
        "Cast",
        "MatMul",
        "Add",
    }
    del before.graph.node[:], after.graph.node[:], before.opset_import[:], after.opset_import[:]
    assert before == after


def test_a_graph_without_work_for_us_keeps_its_bytes(nano: Callable[[DecoderQuant], Path]) -> None:
    raw = nano(DecoderQuant.uniform("fp32", lora="fp32")).read_bytes()
    stays = onnx.load_from_string(raw)
    gates = onnx.load_from_string(onnx_kernels.with_our_products(raw))
    assert {node.op_type for node in gates.graph.node if node.domain == "pocketphi"} == {
        "SwiGLU",
        "Lora",
    }
    assert not any(node.op_type == "MatMulNBits" for node in stays.graph.node)
    embedding = nano(DecoderQuant()).with_name("embedding.onnx").read_bytes()
    assert onnx_kernels.with_our_products(embedding) == embedding


@pytest.mark.parametrize(
    ("inputs", "change"),
    [
        (("b", "s", "z"), {}),
        (("b", "s", "", "z"), {}),
        (("b", "s"), {"block_size": 64}),
        (("b", "s"), {"bits": 2}),
        (("b", "s"), {"K": 48}),
    ],
)
def test_other_products_stay(inputs: tuple[str, ...], change: Mapping[str, int]) -> None:
    blocks, scales, _ = weights(64, 64, 4)
    model = onnx.load_from_string(product({"b": blocks, "s": scales}, inputs=inputs, K=64, N=64, bits=4))
    for attribute in model.graph.node[0].attribute:
        attribute.i = change.get(attribute.name, attribute.i)
    raw = model.SerializeToString()
    assert onnx_kernels.with_our_products(raw) == raw


@pytest.mark.parametrize(
    "how", ["uneven", "half used twice", "half is an output", "another alpha", "halves swapped"]
)
def test_other_gates_stay(how: str) -> None:
    sizes = np.array([3, 5] if how == "uneven" else [4, 4], np.int64)
    halves = ["up", "gate"] if how == "halves swapped" else ["gate", "up"]
    nodes = [
        helper.make_node("Split", ["x", "sizes"], halves, axis=-1),
        helper.make_node(
            "QuickGelu", ["gate"], ["silu"], domain=MICROSOFT, alpha=1.702 if "alpha" in how else 1.0
        ),
        helper.make_node("Mul", ["silu", "up"], ["y"]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["t", 4])]
    if how == "half used twice":
        nodes.append(helper.make_node("Neg", ["up"], ["z"]))
    if how == "half is an output":
        outputs.append(helper.make_tensor_value_info("up", TensorProto.FLOAT, ["t", 4]))
    stored = [helper.make_tensor("sizes", TensorProto.INT64, [2], sizes.tobytes(), raw=True)]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["t", 8])
    model = helper.make_model(helper.make_graph(nodes, "g", [x], outputs, stored), ir_version=10)
    raw = model.SerializeToString()
    assert onnx_kernels.with_our_products(raw) == raw


def test_damaged_graphs(nano: Callable[[DecoderQuant], Path]) -> None:
    """Any bytes give bytes or a BundleError; whether those are a graph is for others to say."""
    blocks, scales, _ = weights(16, 32, 4)
    whole = product({"b": blocks, "s": scales}, K=32, N=16, bits=4)
    real = nano(DecoderQuant()).read_bytes()
    rng = np.random.default_rng(0)
    damaged = [whole[:n] for n in range(len(whole))]
    for source, times in ((whole, 2000), (real, 20)):
        for _ in range(times):
            raw = bytearray(source)
            for at in rng.integers(0, len(raw), 3):
                raw[at] = rng.integers(0, 256)
            damaged.append(bytes(raw))
    refused = 0
    for raw in damaged:
        try:
            assert isinstance(onnx_kernels.with_our_products(raw), bytes)
        except BundleError:
            refused += 1
    assert 100 < refused < len(damaged)


def test_a_gate_is_near_its_formula() -> None:
    nodes = [
        helper.make_node("Split", ["x", "sizes"], ["gate", "up"], axis=-1),
        helper.make_node("QuickGelu", ["gate"], ["silu"], domain=MICROSOFT, alpha=1.0),
        helper.make_node("Mul", ["silu", "up"], ["y"]),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["t", n])
        for name, n in (("x", 9002), ("y", 4501))
    ]
    sizes = np.array([4501, 4501], np.int64)
    stored = [helper.make_tensor("sizes", TensorProto.INT64, [2], sizes.tobytes(), raw=True)]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    model = helper.make_model(graph, ir_version=10, opset_imports=opsets)
    session = open_session(onnx_kernels.with_our_products(model.SerializeToString()))
    x = np.random.default_rng(0).normal(0, 10, (5, 9002)).astype(np.float32)
    before = onnx_kernels.counts().get("gates", 0)
    (y,) = session.run(None, {"x": x})
    gate, up = np.split(x.astype(np.float64), 2, axis=1)
    want = gate / (1 + np.exp(-gate)) * up
    # exp within 2 ulp of float32, then a sum, a quotient and a product; near zero in steps of 2^-149
    assert (abs(y - want) <= 4 * EPS * abs(want) + 2.0**-148 * (1 + abs(up))).all()
    assert onnx_kernels.counts().get("gates", 1) - before == 1


# ---- adapters ----

LORA_SHAPES = [
    (9, 33, 5),
    (64, 96, 8),
    (70, 257, 1),
    (300, 530, 320),
    (33, 17, 0),
    (400, 40, 33),
]  # in, out, rank
LORA_ROWS = [1, 7, 8, 9, 100, 250]
LORA_TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "int8": TensorProto.INT8}

LORA_CHILD = """
import sys
import numpy as np
from tests.test_onnx_kernels import LORA_ROWS, LORA_SHAPES, LORA_TYPES, lora_feeds, lora_graph, open_session
from pocketphi.runtime import onnx_kernels
found = {}
for kind in LORA_TYPES:
    graph = onnx_kernels.with_our_products(lora_graph(kind))
    sessions = [open_session(graph, threads) for threads in (1, 2)]
    for i in range(len(LORA_SHAPES)):
        for rows in LORA_ROWS:
            for threads, session in enumerate(sessions, 1):
                (out,) = session.run(None, lora_feeds(kind, i, rows))
                found[f"{kind} {i} {rows} {threads}"] = out
np.savez(sys.argv[1], **found)
"""


def lora_graph(kind: str, change: str = "") -> bytes:
    """What `convert`'s add_lora writes, of any sizes; or that with something changed."""
    a, b, scale = ("lora_A", "lora_B", "lora_scale")
    ends = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "s", "in"]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "s", "out"]),
        helper.make_tensor_value_info(a, LORA_TYPES[kind], ["in", "rank"]),
        helper.make_tensor_value_info(b, LORA_TYPES[kind], ["rank", "out"]),
    ]
    nodes = []
    if kind != "fp32":
        nodes += [helper.make_node("Cast", [name], [f"{name} f"], to=TensorProto.FLOAT) for name in (a, b)]
        a, b = (f"{name} f" for name in (a, b))
    nodes.append(helper.make_node("MatMul", ["x", a], ["inner"]))
    inner = "inner"
    if kind == "int8" or change == "scaled":
        ends.append(helper.make_tensor_value_info(scale, TensorProto.FLOAT, ["rank"]))
        nodes.append(helper.make_node("Mul", ["inner", scale], ["scaled"]))
        inner = "scaled"
    nodes.append(helper.make_node("MatMul", [inner, b], ["more"]))
    nodes.append(helper.make_node("Add", ["more", "y"] if change == "y second" else ["y", "more"], ["out"]))
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["b", "s", "out"])]
    if change == "inner is an output":
        outputs.append(helper.make_tensor_value_info("inner", TensorProto.FLOAT, ["b", "s", "rank"]))
    if change == "more used twice":
        nodes.append(helper.make_node("Neg", ["more"], ["less"]))
    if change == "three dimensions":
        ends[2] = helper.make_tensor_value_info("lora_A", LORA_TYPES[kind], ["b", "in", "rank"])
    if change == "A computed":
        nodes.insert(0, helper.make_node("Neg", ["a"], ["lora_A"]))
        ends[2] = helper.make_tensor_value_info("a", LORA_TYPES[kind], ["in", "rank"])
    graph = helper.make_graph(nodes, "g", ends, outputs)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])
    return bytes(model.SerializeToString())


def lora_feeds(kind: str, i: int, rows: int) -> dict[str, npt.NDArray[Any]]:
    """Sizes of LORA_SHAPES[i]; an even number of rows is a batch of two."""
    d_in, d_out, rank = LORA_SHAPES[i]
    rng = np.random.default_rng([i, rows])
    outer = (2, rows // 2) if rows % 2 == 0 else (1, rows)
    feeds = {
        "x": activations(rows, d_in).reshape(*outer, d_in),
        "y": rng.normal(0, 1, (*outer, d_out)).astype(np.float32),
    }
    for name, shape in (("lora_A", (d_in, rank)), ("lora_B", (rank, d_out))):
        if kind == "int8":
            feeds[name] = rng.integers(-128, 128, shape).astype(np.int8)
        else:
            feeds[name] = rng.normal(0, 0.1, shape).astype(np.float16 if kind == "fp16" else np.float32)
    if kind == "int8":
        feeds["lora_scale"] = rng.uniform(1e-6, 1e-4, rank).astype(np.float32)
    return feeds


def lora_formula(feeds: Mapping[str, npt.NDArray[Any]]) -> tuple[Float64, Float64]:
    """In float64, and how far float32 may be from it.

    A value goes through one product and one sum for each column of x, the sum of 8 parts, the scale, one
    product and one sum for each of the rank, and the last sum; each is off by 2^-24 of the sum of sizes. The
    last factor allows for the products of such errors.
    """
    x, y, a, b = (feeds[name].astype(np.float64) for name in ("x", "y", "lora_A", "lora_B"))
    scale = feeds.get("lora_scale", np.ones(a.shape[1])).astype(np.float64)
    sizes = abs(y) + (abs(x) @ abs(a) * scale) @ abs(b)
    n = 2 * a.shape[0] + 8 + 1 + 2 * a.shape[1] + 1
    return y + (x @ a * scale) @ b, n * EPS / 2 * sizes * 1.001


@pytest.mark.parametrize("mask", MASKS)
def test_every_variant_of_lora_is_near_the_formula(tmp_path: Path, mask: str) -> None:
    done = python(LORA_CHILD, str(tmp_path / "found.npz"), mask=mask)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "found.npz")
    assert len(found.files) == len(LORA_TYPES) * len(LORA_SHAPES) * len(LORA_ROWS) * 2
    for name in found.files:
        kind, i, rows, threads = name.split()
        feeds = lora_feeds(kind, int(i), int(rows))
        want, off = lora_formula(feeds)
        assert found[name].shape == want.shape and (abs(found[name] - want) <= off).all(), name
        if LORA_SHAPES[int(i)][2] == 0:
            assert found[name].tobytes() == feeds["y"].tobytes()
        if threads == "2":  # the same bits on one thread
            assert found[name].tobytes() == found[name[:-1] + "1"].tobytes()


@pytest.mark.parametrize("kind", LORA_TYPES)
def test_loras_are_replaced_and_run(kind: str) -> None:
    ours = onnx_kernels.with_our_products(lora_graph(kind))
    (node,) = onnx.load_from_string(ours).graph.node
    scale = ["lora_scale"] if kind == "int8" else []
    assert (node.domain, node.op_type, list(node.output)) == ("pocketphi", "Lora", ["out"])
    assert list(node.input) == ["x", "y", "lora_A", "lora_B", *scale]
    before = onnx_kernels.counts().get("loras", 0)
    for i in (3, 4):  # the second of rank 0: nothing is counted
        open_session(ours).run(None, lora_feeds(kind, i, 3))
    assert not onnx_kernels.load().active or onnx_kernels.counts()["loras"] - before == 1


@pytest.mark.parametrize("kind", LORA_TYPES)
@pytest.mark.parametrize(
    "change",
    ["y second", "inner is an output", "more used twice", "three dimensions", "A computed", "scaled"],
)
def test_other_loras_stay(kind: str, change: str) -> None:
    raw = lora_graph(kind, change)
    changed = not (kind == "int8" and change == "scaled")  # int8 has a scale anyway
    assert (onnx_kernels.with_our_products(raw) == raw) == changed


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("x", (1, 2, 65), "x and y are not"),
        ("x", (1, 3, 64), "x and y are not"),
        ("x", (2, 1, 64), "x and y are not"),
        ("y", (1, 2, 95), "x and y are not"),
        ("y", (1, 1, 96), "x and y are not"),
        ("lora_A", (64, 9), "A and B are not"),
        ("lora_B", (7, 96), "A and B are not"),
        ("lora_scale", (7,), "scale has 7"),
    ],
)
def test_loras_that_do_not_fit(name: str, shape: tuple[int, ...], said: str) -> None:
    session = open_session(onnx_kernels.with_our_products(lora_graph("int8")))
    feeds = lora_feeds("int8", 1, 2)
    feeds = {key: a.reshape(1, 2, -1) if a.ndim == 3 else a for key, a in feeds.items()}
    feeds[name] = np.zeros(shape, feeds[name].dtype)
    with pytest.raises(Exception, match=said):
        session.run(None, feeds)


@pytest.mark.parametrize("kind", LORA_TYPES)
@pytest.mark.parametrize("rows", [1, 40])
def test_a_decoder_with_an_adapter(nano: Callable[[DecoderQuant], Path], kind: LoraKind, rows: int) -> None:
    """The logits of phi4-nano in fp32 with each adapter, ours beside ONNX Runtime's own nodes.

    Both are float32 sums of the same numbers in other orders: in each layer off by some hundred units of
    2^-24. 2^-10 of the largest logit is above what layers make of that, and below an adapter's part.
    """
    path = nano(DecoderQuant.uniform("fp32", lora=kind))
    raw = path.read_bytes()
    sessions = [
        open_session(onnx_kernels.with_our_products(raw) if ours else raw, folder=path.parent, ours=ours)
        for ours in (False, True)
    ]
    plain: dict[str, npt.NDArray[Any]] = {
        "input_ids": np.arange(5, 5 + rows, dtype=np.int64)[None],
        "attention_mask": np.ones((1, rows), np.int64),
        "n_logits": np.array([1], np.int64),
    }
    for end in sessions[0].get_inputs():
        if end.name.startswith("past_key_values"):
            plain[end.name] = np.zeros((1, end.shape[1], 0, end.shape[3]), np.float32)
    (without,) = sessions[0].run(["logits"], plain)
    files = sorted(path.parent.glob("*.onnx_adapter"))
    assert len(files) == 2
    for file in files:
        held = onnxruntime.AdapterFormat.read_adapter(str(file)).get_parameters()
        feeds = plain | {name: value.numpy() for name, value in held.items()}
        before = onnx_kernels.counts().get("loras", 0)
        theirs, ours = (session.run(["logits"], feeds)[0] for session in sessions)
        linears = sum(name.endswith(".lora_A") for name in held)
        after = onnx_kernels.counts().get("loras", linears)
        assert linears > 0 and after - before == linears
        assert abs(ours - theirs).max() <= 2.0**-10 * abs(theirs).max() < abs(theirs - without).max()


def log_probabilities(path: Path, ours: bool) -> Float64:
    """Of the second half of each piece of a text, [tokens, vocabulary]."""
    from tokenizers import Tokenizer

    raw = path.read_bytes()
    session = open_session(
        onnx_kernels.with_our_products(raw) if ours else raw, folder=path.parent, ours=ours
    )
    config = json.loads((tiny.NANO / "config.json").read_text())
    heads = config["num_key_value_heads"]
    empty = np.zeros((1, heads, 0, config["hidden_size"] // config["num_attention_heads"]), np.float32)
    tokenizer = Tokenizer.from_file(str(tiny.NANO / "tokenizer.json"))
    text = (tiny.GOLDEN / "perplexity" / "text.txt").read_text()
    ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
    found, n = [], 512
    for start in range(0, len(ids) - n + 1, n):
        feeds = {
            "input_ids": ids[None, start : start + n],
            "attention_mask": np.ones((1, n), np.int64),
            "n_logits": np.array([n // 2], np.int64),
            **{i.name: empty for i in session.get_inputs() if i.name.startswith("past_key_values")},
        }
        logits = session.run(["logits"], feeds)[0][0].astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        found.append(logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))
    return np.concatenate(found)


def test_no_worse_than_theirs(nano: Callable[[DecoderQuant], Path]) -> None:
    """The mean divergence from fp32 of phi4-nano in int4, beside ONNX Runtime's products of 8-bit integers.

    The two round activations differently, so chance decides which is nearer; 5 % is less than what the
    choice of text makes: the standard error is 9 % of the mean.
    """
    exact = log_probabilities(nano(DecoderQuant.uniform("fp32", lora="fp32")), ours=False)
    path = nano(DecoderQuant())
    theirs, ours = (
        float((np.exp(exact) * (exact - log_probabilities(path, mine))).sum(axis=-1).mean())
        for mine in (False, True)
    )
    assert 0 < ours <= 1.05 * theirs


# ---- the guard ----


def test_old_hosts_are_refused() -> None:
    """A host of an unknown version is asked for its first table alone, which has what an error needs."""
    asked: list[int] = []
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(asked.append)  # None: NULL
    library = ctypes.CDLL(str(onnx_kernels.library_path()))
    library.RegisterCustomOps.restype = ctypes.c_void_p
    for version in (b"1.19.2", b"2.0.0", b"", b"1.x"):
        text = ctypes.create_string_buffer(version)
        get_version = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda text=text: ctypes.addressof(text))
        base = (ctypes.c_void_p * 2)(*(ctypes.cast(f, ctypes.c_void_p) for f in (get_api, get_version)))
        assert library.RegisterCustomOps(None, base) is None
    assert set(asked) == {1}


REGISTERED = """
import logging, onnxruntime
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
from pocketphi.runtime import onnx_kernels
for _ in range(2):
    registered = onnx_kernels.register(onnxruntime.SessionOptions())
    print(registered, onnx_kernels.calls(), dict(onnx_kernels.counts()))
"""


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"POCKETPHI_KERNELS": "stock"}, "INFO ONNX Runtime's own kernels: POCKETPHI_KERNELS is 'stock'"),
        ({"mask": "none"}, "INFO ONNX Runtime's own kernels: this CPU has none of the instruction sets"),
        ({"mask": "avx3"}, "WARNING ONNX Runtime's own kernels: POCKETPHI_CPU_MASK names an unknown"),
    ],
)
def test_what_leaves_it_out_says_so_once(variables: dict[str, str], said: str) -> None:
    done = python(REGISTERED, **variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "False 0 {}\n" * 2
    assert done.stderr.count("kernels") == 1 and done.stderr.startswith(said)


def test_an_unknown_choice_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETPHI_KERNELS", "fast")
    with pytest.raises(InputError, match="POCKETPHI_KERNELS is 'fast', expected one of auto, stock"):
        onnx_kernels.load(Path("unused"))


OTHER_ABI = """
int pk_ort_abi(void) { return 99; }
const char *pk_ort_variant(void) { return "avx2"; }
void pk_ort_counts(unsigned long long *counts) { counts[0] = 0; }
"""


@pytest.mark.parametrize(
    ("source", "said", "level"),
    [
        ("", "the package was built without libpk_ort.so", logging.INFO),
        ("int other;", "libpk_ort.so cannot be loaded: .*pk_ort_abi", logging.WARNING),
        (OTHER_ABI, "libpk_ort.so has ABI 99, this package needs 1", logging.WARNING),
        ("not C", "libpk_ort.so cannot be loaded: ", logging.WARNING),
    ],
)
@pytest.mark.skipif(not CC or not sys.platform.startswith("linux"), reason="needs a C compiler")
def test_a_library_that_is_not_ours(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, source: str, said: str, level: int
) -> None:
    path = tmp_path / "libpk_ort.so"
    if source == "not C":
        path.write_bytes(b"\x7fELF")
    elif source:
        (tmp_path / "lib.c").write_text(source)
        subprocess.run([CC or "cc", "-shared", "-fPIC", "-o", path, tmp_path / "lib.c"], check=True)
    with caplog.at_level(logging.INFO):
        state = onnx_kernels.load(path)
    assert not state.active and state.variant == ""
    (record,) = caplog.records
    assert record.levelno == level
    assert re.search(said, state.reason) and state.reason in record.message
