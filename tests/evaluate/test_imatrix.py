# SPDX-License-Identifier: Apache-2.0
"""Importance matrices: llama-imatrix's numbers, the adapters' beside them, what `convert` does with both."""

from __future__ import annotations

import ctypes
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from pocketphi import convert as converter
from pocketphi.convert.checkpoint import Checkpoint
from pocketphi.convert.ggml_types import Q4_0, Q6_K
from pocketphi.convert.quantize import Quantizer
from pocketphi.evaluate.imatrix import Importances, collect, gguf_bytes, write
from pocketphi.runtime import ggml_observer, ggml_plugin
from pocketphi.runtime.engine import Model
from pocketphi.runtime.errors import InputError, KernelError, OutputError
from pocketphi.runtime.files import check_writable
from pocketphi.runtime.ggml_observer import MatmulObserver
from pocketphi.runtime.spec import AdapterName

from ..scoring import EVAL, NANO

Float32 = npt.NDArray[np.float32]

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "imatrix"
TEXT, CHUNK = GOLDEN / "text.txt", 128
LAYERS, D_MODEL, D_FF = 4, 256, 768
WEIGHTS = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
ULP = 2.0**-24  # half a unit in the last place of float32
HEAD = "token_embd.weight"


def opener(path: Path, kv_type: str = "f32") -> Callable[[MatmulObserver], Model]:
    return lambda observer: Model(path, kv_type=kv_type, observer=observer)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Float32]]:
    """Keys and tensors, by the gguf package."""
    reader = gguf.GGUFReader(path)
    keys = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    return keys, {t.name: np.array(t.data) for t in reader.tensors}


@pytest.fixture(scope="module")
def of_text(nano: Path) -> Importances:
    return collect(opener(nano), TEXT, n_ctx=CHUNK)


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One item of each way: text below 16 tokens, speech, a picture, both."""
    folder = tmp_path_factory.mktemp("items")
    for name in ("audio", "images"):
        shutil.copytree(EVAL / name, folder / name)
    lines = [
        (EVAL / f"{name}.jsonl").read_text("utf-8").splitlines()[0]
        for name in ("speech", "vision", "vision_speech")
    ]
    short = {"id": "short", "prompt": "<|user|>Hi<|end|><|assistant|>", "reference": "Hi"}
    path = folder / "items.jsonl"
    path.write_text("\n".join([json.dumps(short), *lines]) + "\n", "utf-8")
    return path


@pytest.fixture(scope="module")
def of_items(nano: Path, items: Path) -> Importances:
    return collect(opener(nano), items)


def test_equals_llama_imatrix(of_text: Importances) -> None:
    """Its sums are float32, one token after the other: n roundings. And each input ends a chain of products,
    of 1,536 terms in a layer, that another CPU may sum in another order; squaring counts that twice.
    """
    keys, theirs = read(GOLDEN / "llama-imatrix.gguf")
    assert keys == {
        "general.type": "imatrix",
        "imatrix.datasets": ["text.txt"],
        "imatrix.chunk_count": of_text.chunk_count,
        "imatrix.chunk_size": CHUNK,
    }
    names = {f"blk.{i}.{weight}.weight" for i in range(LAYERS) for weight in WEIGHTS}
    assert {name.rpartition(".")[0] for name in theirs} == names
    assert set(of_text.weights) == names | {HEAD}
    for name in names:
        ours, sums = of_text.weights[name], theirs[f"{name}.in_sum2"].astype(np.float64)
        n = int(theirs[f"{name}.counts"][0])
        assert ours.tokens == n == of_text.sequences * CHUNK
        bound = (n + 2 * LAYERS * (3 * D_MODEL + D_FF)) * ULP * sums
        assert (abs(ours.squares - sums) <= bound).all(), name


def test_writes_the_bytes_of_llama_imatrix() -> None:
    path = GOLDEN / "llama-imatrix.gguf"
    assert gguf_bytes(*read(path)) == path.read_bytes()


def test_the_first_layers_inputs_are_the_normed_embeddings(nano: Path, of_text: Importances) -> None:
    """Worked out a second time, without llama.cpp: what goes into the first product."""
    with Model(nano) as model:
        ids = model.tokenizer.encode_text(TEXT.read_text("utf-8").removesuffix("\n"))
        eps = model.bundle.text.rms_eps
    with Checkpoint.open(NANO / "checkpoint") as source:
        rows, scale = (
            source.read(source.tensors[name]).astype(np.float64)
            for name in ("model.embed_tokens.weight", "model.layers.0.input_layernorm.weight")
        )
    x = rows[ids[: of_text.sequences * CHUNK]]
    x *= scale / np.sqrt(np.square(x).mean(1, keepdims=True) + eps)
    # A mean of 256 squares and its root, in float32: some 256 roundings in a row at worst, squared.
    np.testing.assert_allclose(
        of_text.weights["blk.0.attn_qkv.weight"].squares, np.square(x).sum(0), rtol=2 * D_MODEL * ULP
    )


def test_items_go_through_their_adapters(of_items: Importances) -> None:
    assert of_items.sequences == 4
    assert set(of_items.tokens) == {"none", "speech", "vision"}
    assert 0 < of_items.tokens["none"] < 16  # which llama-imatrix would have passed over
    total = sum(of_items.tokens.values())
    for name, sums in of_items.weights.items():
        adapter = name.partition(".")[0]
        assert sums.tokens == of_items.tokens.get(adapter, total), name
        assert np.isfinite(sums.squares).all() and sums.squares.any(), name
    ranks = {"speech": 64, "vision": 32}
    for adapter, rank in ranks.items():
        for i in range(LAYERS):
            for weight in WEIGHTS:
                entry = f"{adapter}.blk.{i}.{weight}.weight"
                assert of_items.weights[f"{entry}.lora_a"].squares.shape == (
                    D_FF if weight == "ffn_down" else D_MODEL,
                )
                assert of_items.weights[f"{entry}.lora_b"].squares.shape == (rank,)


def test_a_gets_what_its_weight_gets(nano: Path, items: Path, tmp_path: Path) -> None:
    found = collect(opener(nano), items, adapter="speech", chunks=2)
    assert set(found.tokens) == {"speech"}
    for i in range(LAYERS):
        for weight in WEIGHTS:
            name = f"blk.{i}.{weight}.weight"
            assert np.array_equal(found.weights[name].squares, found.weights[f"speech.{name}.lora_a"].squares)


@pytest.mark.parametrize("adapter", [None, "vision"])
def test_the_plugin_changes_no_inputs(
    adapter: AdapterName | None, converted: Any, env: dict[str, str], tmp_path: Path
) -> None:
    """Its fused steps leave nothing out that is observed, and no column is another's.

    What goes into the first product is the same up to float32. Either way the products of a Q4_0 model
    then round their inputs to 8 bits, at other places: a block of 32 in steps of a 127th of its largest,
    which is at most √32 of its root mean square. Evenly spread that is √(32 / 12) / 127 of it, 1.3 %, of
    every product, on both sides. k products on, a row is off by 1.3 % · √2k of its root mean square; e of
    a token is as good as random, so that a column's Σ (x + e)² is off by 2 Σ x e, of which six standard
    errors are allowed, and Σ e², twice. What ffn_down gets is a product of two such inputs, √2 as far
    off, and each as large as the other makes it: a few tokens are all of a column, nothing averages out.
    There all columns together may be off by one error each.
    """
    path = converted("phi4-nano", "Q4_0")
    if not ggml_plugin.load().active:
        pytest.skip("this build has no plug-in to compare with")
    ours = collect(opener(path, "f16"), TEXT, n_ctx=CHUNK, chunks=3, adapter=adapter)
    out = tmp_path / "stock.gguf"
    flags = ["-m", str(path), "--data", str(TEXT), "-c", str(CHUNK), "--chunks", "3", "-o", str(out)]
    flags += [] if adapter is None else ["--adapter", adapter]
    run(env | {"POCKETPHI_KERNELS": "stock"}, *flags)
    stock = read(out)[1]
    assert {f"{name}.in_sum2" for name in ours.weights} == {
        name for name in stock if name.endswith(".in_sum2")
    }
    for name, sums in ours.weights.items():
        theirs = stock[f"{name}.in_sum2"].astype(np.float64)
        k = products_before(name)
        share = math.sqrt(2 * k * 32 / 12) / 127
        mean = theirs.mean()  # of a column: n tokens times the mean square of a row
        bound = (
            12 * share * np.sqrt(theirs * mean / sums.tokens)
            + 2 * share**2 * mean
            + 2 * D_MODEL * ULP * theirs
        )
        off = abs(sums.squares - theirs)
        if "ffn_down" in name and not name.endswith("lora_b"):
            assert off.sum() <= 2 * math.sqrt(2) * share * theirs.sum(), name
        else:
            assert (off <= bound).all(), name


def products_before(name: str) -> int:
    """How many products an input has gone through: four in a layer, and A before B."""
    if name == HEAD:
        return LAYERS * len(WEIGHTS)
    *_, layer, weight = re.sub(r"\.weight(\.lora_[ab])?$", "", name).split(".")
    return int(layer) * len(WEIGHTS) + WEIGHTS.index(weight) + name.endswith("lora_b")


def test_conversion_uses_all_of_it(of_items: Importances, tmp_path: Path) -> None:
    """The tied head's and an adapter's too, and no adapter's for the other."""
    path = tmp_path / "i.gguf"
    write(path, of_items)
    bundle = converter.convert(
        NANO / "checkpoint",
        tmp_path / "out",
        converter.Options(recipe="Q4_0", lora_quant="Q4_0", imatrix=path, encoders="fp32"),
    )
    quantizer, mean = (
        Quantizer(),
        {n: (s.squares.astype(np.float32) / np.float32(s.tokens)) for n, s in of_items.weights.items()},
    )
    with Checkpoint.open(NANO / "checkpoint") as source:
        rows = source.read(source.tensors["model.embed_tokens.weight"])
        assert np.array_equal(
            tensor(bundle.path(bundle.decoder), HEAD), quantizer.quantize(rows, Q6_K, mean[HEAD])
        )
        name = "blk.1.ffn_up.weight.lora_a"
        for adapter, info in bundle.adapters.items():
            tensors = source.adapters[adapter].tensors
            (pair,) = [p for p in tensors if "layers.1.mlp.gate_up_proj.lora_A" in p]
            rows = source.read(tensors[pair])
            data = tensor(bundle.path(info.file), name)
            assert np.array_equal(data, quantizer.quantize(rows, Q4_0, mean[f"{adapter}.{name}"]))
            assert not np.array_equal(data, quantizer.quantize(rows, Q4_0))


def test_a_file_of_llama_imatrix_leaves_adapters_and_the_tied_head(tmp_path: Path) -> None:
    options = converter.Options(recipe="Q4_0", lora_quant="Q4_0", imatrix=GOLDEN / "llama-imatrix.gguf")
    notes = converter.plan(NANO / "checkpoint", options).notes
    # The head, and A and B of two adapters on four weights of four layers.
    assert any(f"does not cover {HEAD} and {2 * 2 * 16} more" in note for note in notes), notes


@pytest.mark.skipif(shutil.which("llama-quantize") is None, reason="llama.cpp's tools are not in PATH")
def test_llama_quantize_takes_it_and_gives_the_same_bytes(
    nano: Path, of_items: Importances, tmp_path: Path
) -> None:
    matrix, theirs = tmp_path / "i.gguf", tmp_path / "theirs.gguf"
    write(matrix, of_items)
    subprocess.run(
        ["llama-quantize", "--imatrix", matrix, nano / "backbone-F32.gguf", theirs, "Q4_K_M"],
        check=True, capture_output=True,
    )  # fmt: skip
    bundle = converter.convert(
        NANO / "checkpoint", tmp_path / "out", converter.Options(imatrix=matrix, encoders="fp32")
    )
    for i in range(LAYERS):  # of the recipe's types, those that are llama.cpp's choice too
        for name in (f"blk.{i}.ffn_up.weight", f"blk.{i}.attn_output.weight"):
            assert np.array_equal(tensor(theirs, name), tensor(bundle.path(bundle.decoder), name)), name


def tensor(path: Path, name: str) -> npt.NDArray[np.uint8]:
    (found,) = [t for t in gguf.GGUFReader(path).tensors if t.name == name]
    return np.array(found.data)


REFUSED: Mapping[str, tuple[bytes, dict[str, int], str]] = {
    "short": (b"Hello there.", {}, "has 3 tokens, expected at least one chunk of 512"),
    "empty": (b"", {}, "has 0 tokens"),
    "binary": (b"\xff\xfe\x00", {}, "is not UTF-8 text: byte 0xff at offset 0"),
    "tiny chunks": (b"Hello", {"n_ctx": 15}, "chunks have 15 tokens, expected at least 16"),
    "negative chunks": (b"Hello", {"n_ctx": -1}, "chunks have -1 tokens"),
    "beyond the context": (b"Hello", {"n_ctx": 8193}, "chunks have 8193 tokens, expected 16 to 8192"),
    "no chunks": (b"Hello", {"chunks": 0}, "chunks is 0, expected at least 1"),
    "items that are none": (b"[]\n", {}, "expected an object"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, nano: Path, tmp_path: Path) -> None:
    data, options, match = REFUSED[case]
    path = tmp_path / ("data.jsonl" if case.startswith("items") else "data.txt")
    path.write_bytes(data)
    with pytest.raises(InputError, match=match):
        collect(opener(nano), path, **options)


def test_an_item_that_does_not_fit_is_named(nano: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"id": "long", "prompt": "word " * 9000, "reference": ""}) + "\n", "utf-8")
    with pytest.raises(InputError, match=r"data.jsonl: line 1: item 'long': the prompt has \d+ tokens"):
        collect(opener(nano), path)


def test_an_output_that_cannot_be_is_refused_before_the_work(tmp_path: Path) -> None:
    check_writable(tmp_path / "new.gguf")
    for path, match in ((tmp_path, "is a folder"), (tmp_path / "none" / "x", "there is no folder")):
        with pytest.raises(OutputError, match=match):
            check_writable(path)


def test_what_the_sink_raises_ends_the_reading_and_nothing_else(nano: Path) -> None:
    seen = []

    def sink(name: str, inputs: Float32) -> None:
        seen.append(name)
        raise KernelError(f"{name} is bad")

    ids = np.arange(20, dtype=np.int32)
    with Model(nano, observer=MatmulObserver(sink, lambda name: name.endswith("ffn_up.weight"))) as model:
        for _ in range(2):
            with pytest.raises(KernelError, match=r"blk\.0\.ffn_up\.weight is bad"):
                model.run_through(ids)
    assert seen == ["blk.0.ffn_up.weight"] * 2


def test_another_layout_of_ggml_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shifted(ctypes.Structure):
        _fields_ = (
            ("new", ctypes.c_int64),
            *ggml_observer._Tensor._fields_[:-1],
            ("name", ctypes.c_char * 48),
        )

    monkeypatch.setattr(ggml_observer, "_Tensor", Shifted)
    with pytest.raises(KernelError, match="lays out its tensors differently"):
        MatmulObserver(lambda name, inputs: None, bool)


MAIN = "import sys; sys.argv[0] = 'pocketphi'; from pocketphi.cli import main; main()"


def run(env: Mapping[str, str], *args: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", MAIN, "imatrix", *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    return done


def test_the_command(nano: Path, items: Path, env: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "i.gguf"
    found = json.loads(run(env, "-m", str(nano), "--data", str(items), "-o", str(out), "--json").stdout)
    assert found["file"] == str(out) and found["sequences"] == 4
    assert found["tokens"] == sum(found["tokens_by_adapter"].values())
    assert len(read(out)[1]) == 2 * found["weights"] == 2 * (17 + 2 * 2 * 16)
    assert [path.name for path in tmp_path.iterdir()] == ["i.gguf"]


@pytest.mark.parametrize(
    ("args", "code", "line"),
    [
        (["--data", "none.txt"], 2, "error: none.txt: no such file\n"),
        ([], 2, "error: imatrix reads a file: name it with --data\n"),
        (
            ["--data", str(TEXT), "-o", "none/i.gguf"],
            6,
            "error: 'none/i.gguf': cannot be written: there is no folder none\n",
        ),
    ],
)  # fmt: skip
def test_the_commands_errors_are_one_line(
    args: list[str], code: int, line: str, nano: Path, env: dict[str, str]
) -> None:
    done = run(env, "-m", str(nano), *args, code=code)
    assert (done.stderr, done.stdout) == (line, "")


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent to a process there")
def test_ctrl_c_leaves_nothing(nano: Path, env: dict[str, str], tmp_path: Path) -> None:
    data, out = tmp_path / "long.txt", tmp_path / "out"
    data.write_text(TEXT.read_text("utf-8") * 300, "utf-8")
    out.mkdir()
    args = [
        "imatrix",
        "-m",
        str(nano),
        "--data",
        str(data),
        "-c",
        str(CHUNK),
        "-o",
        str(out / "i.gguf"),
        "-v",
    ]
    with subprocess.Popen(
        [sys.executable, "-c", MAIN, *args],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        contexts = 0
        for line in process.stderr:  # with -v llama.cpp tells of each context it makes, one for each chunk
            contexts += line.startswith("llama_context: n_ctx ")
            if contexts == 3:  # two chunks have been read
                break
        assert contexts == 3
        process.send_signal(signal.SIGINT)
        rest, _ = process.stderr.read(), process.wait(timeout=60)
    assert process.returncode == 130 and "Traceback" not in rest
    assert list(out.iterdir()) == []
