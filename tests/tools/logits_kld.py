# SPDX-License-Identifier: Apache-2.0
"""How far a quantized phi4-nano's logits are from F32's, with the plug-in and with stock ggml.

    python -m tests.tools.logits_kld [--recipes Q4_K_M Q4_0 …] [--json]

Every position of the evaluation set's text and tool items (prompt, answer and end: over 3,000) is compared,
read in one pass and token by token. Prints the mean Kullback-Leibler divergence from F32 in nats, ours /
stock with its standard error, and the share of positions with F32's most likely token. F32 has an F32
cache and stock ggml, the others an f16 cache. Each path runs in a process of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import llama_cpp
import numpy as np
import numpy.typing as npt

from pocketphi import convert as converter
from pocketphi.runtime import bundle as bundles
from pocketphi.runtime import ggml_plugin
from pocketphi.runtime.bundle import Bundle
from pocketphi.runtime.prompt import TextPiece, parse_raw
from pocketphi.runtime.tokenizer import Tokenizer

from ..scoring import NANO, rows

Ids = npt.NDArray[np.int32]
Logits = npt.NDArray[np.float32]

RECIPES = ("Q4_K_M", "Q4_0")
PATHS = {"ours": "auto", "stock": "stock"}  # to POCKETPHI_KERNELS
ROOT = Path(__file__).resolve().parents[2]
CELLS = 1024  # of the cache: the most that keeps phi4-nano on its short RoPE table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--json", action="store_true", help="one object for each row instead of a table")
    parser.add_argument("--child", nargs=3, metavar=("DIR", "KV", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        write_logits(Path(args.child[0]), args.child[1], Path(args.child[2]))
        return
    with tempfile.TemporaryDirectory() as work:
        found = [row for recipe in args.recipes for row in compare(Path(work), recipe)]
    if args.json:
        print("\n".join(json.dumps(row) for row in found))
    else:
        print_table(found)


def compare(work: Path, recipe: str) -> Iterator[dict[str, Any]]:
    """Rows of the table for one recipe: one for each way of reading."""
    truth = run(work, "F32", "stock", "f32")["one pass"]
    paths = {path: run(work, recipe, path, "f16") for path in PATHS}
    for reading in ("one pass", "token by token"):
        row: dict[str, Any] = {"recipe": recipe, "reading": reading, "positions": len(truth)}
        divergences = {path: divergence(truth, logits[reading]) for path, logits in paths.items()}
        for path, logits in paths.items():
            row[path] = {
                "kld": float(divergences[path].mean()),
                "agreement": float((truth.argmax(1) == logits[reading].argmax(1)).mean()),
            }
        stock = row["stock"]["kld"]
        yield row | {
            "ratio": row["ours"]["kld"] / stock,
            # Of the positions' differences: most of the divergence is the weights', the same in both.
            "ratio_error": standard_error(divergences["ours"] - divergences["stock"]) / stock,
        }


def print_table(found: list[dict[str, Any]]) -> None:
    print("| recipe | read | positions | KLD ours | KLD stock | ours / stock | same token ours | stock |")
    print("|---" * 8 + "|")
    for row in found:
        kld = [f"{row[p]['kld']:.3e}" for p in PATHS]
        same = [f"{100 * row[p]['agreement']:.2f} %" for p in PATHS]
        ratio = f"{row['ratio']:.3f} ± {row['ratio_error']:.3f}"
        cells = [row["recipe"], row["reading"], str(row["positions"]), *kld, ratio, *same]
        print("| " + " | ".join(cells) + " |")


def standard_error(x: npt.NDArray[np.float64]) -> float:
    return float(x.std() / np.sqrt(len(x)))


def divergence(truth: Logits, other: Logits) -> npt.NDArray[np.float64]:
    """Kullback-Leibler divergence of each row, in nats."""
    p, q = log_softmax(truth), log_softmax(other)
    return np.asarray((np.exp(p) * (p - q)).sum(1))


def log_softmax(x: Logits) -> npt.NDArray[np.float64]:
    y = x.astype(np.float64) - x.max(1, keepdims=True)
    return np.asarray(y - np.log(np.exp(y).sum(1, keepdims=True)))


def run(work: Path, recipe: str, path: str, kv_type: str) -> dict[str, Logits]:
    """A child's logits: float32 [positions, vocabulary], in "one pass" and "token by token"."""
    directory, out = work / recipe, work / f"{recipe}-{path}.npz"
    if not directory.exists():
        converter.convert(NANO / "checkpoint", directory, converter.Options(recipe=recipe, encoders="fp32"))
    if not out.exists():
        command = [sys.executable, "-m", __spec__.name, "--child", str(directory), kv_type, str(out)]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"POCKETPHI_KERNELS": PATHS[path]}, check=True)
    with np.load(out) as file:
        if path == "ours" and not file["matmuls"]:
            raise SystemExit("the plug-in was not at work; nothing to compare")
        return {name: file[name] for name in file.files if name != "matmuls"}


def write_logits(directory: Path, kv_type: str, out: Path) -> None:
    """In the child: read every sequence, both ways."""
    ggml_plugin.load()
    context = open_context(bundles.load(directory), kv_type)
    sequences = read_sequences(bundles.load(directory))
    whole = [decode(context, ids, len(ids)) for ids in sequences]
    single = [decode(context, ids, 1) for ids in sequences]
    np.savez(
        out,
        matmuls=np.array(ggml_plugin.counts(ggml_plugin.load()).get("matmuls", 0)),
        **{"one pass": np.concatenate(whole), "token by token": np.concatenate(single)},
    )


def read_sequences(bundle: Bundle) -> list[Ids]:
    tokenizer = Tokenizer(bundle.path(bundle.tokenizer), bundle.text.vocab_size)
    texts = [r["prompt"] + r["reference"] + "<|end|>" for name in ("text", "tools") for r in rows(name)]
    pieces = [cast("list[TextPiece]", parse_raw(text, tokenizer.control_tokens)) for text in texts]
    return [tokenizer.encode(p) for p in pieces]


def open_context(bundle: Bundle, kv_type: str) -> Any:
    """A llama_context; the process ends with it."""
    path = os.fsencode(bundle.path(bundle.decoder))
    llama_cpp.llama_backend_init()
    silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silence, ctypes.c_void_p())
    model = llama_cpp.llama_model_load_from_file(path, llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = CELLS
    params.n_ubatch = 512
    params.n_threads = params.n_threads_batch = 2
    params.type_k = params.type_v = {"f32": 0, "f16": 1}[kv_type]
    # With flash attention ggml rounds a float32 cache to float16.
    params.flash_attn_type = (
        llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if kv_type == "f32"
        else llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    )
    context = llama_cpp.llama_init_from_model(model, params)
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(), ctypes.c_void_p())
    assert context, path
    return context


def decode(context: Any, ids: Ids, step: int) -> Logits:
    """Logits after every token, `step` tokens at a time: float32 [n, vocabulary]."""
    vocabulary = llama_cpp.llama_vocab_n_tokens(
        llama_cpp.llama_model_get_vocab(llama_cpp.llama_get_model(context))
    )
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    found = []
    for start in range(0, len(ids), step):
        part = np.ascontiguousarray(ids[start : start + step])
        wanted = np.ones(len(part), np.int8)
        batch = llama_cpp.llama_batch(n_tokens=len(part))
        batch.token = part.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token))
        batch.logits = wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        assert llama_cpp.llama_decode(context, batch) == 0
        rows_of: Any = llama_cpp.llama_get_logits(context)
        found.append(np.ctypeslib.as_array(rows_of, (len(part), vocabulary)).copy())
    return np.concatenate(found)


if __name__ == "__main__":
    main()
