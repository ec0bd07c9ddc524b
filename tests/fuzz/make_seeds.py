# SPDX-License-Identifier: Apache-2.0
"""Writes the seeds that are made from phi4-nano and the tiny members: `python -m tests.fuzz.make_seeds`.

Small good inputs for every target; what fuzzing found, `found-*`, is put beside them by hand and stays.
"""

from __future__ import annotations

import io
import json
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

import cv2
import gguf
import numpy as np
import onnx
import soundfile
from onnx import TensorProto, helper, numpy_helper

from pocketphi.convert.builtin import builtin_bundle
from pocketphi.convert.safetensors_file import parse_header
from pocketphi.convert.source_file import SourceFile
from pocketphi.evaluate.logits_file import LogitsWriter, encode
from pocketphi.runtime.bundle import MANIFEST

from .. import tiny
from .target import SEEDS

CHANGES = 12  # of each document, as seeds


def put(target: str, name: str, data: bytes) -> None:
    path = SEEDS / target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def put_document(name: str, value: Any) -> None:
    put("documents", name, json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())


def put_changes(target: str, *, whole: bytes | None = None) -> None:
    """The document as it is, and changes to it: the first byte says which."""
    rng = np.random.default_rng(len(target))
    if whole is not None:
        put(target, "whole", b"\0" + whole)
    for i in range(CHANGES):
        put(target, f"change-{i:02}", bytes([1 + 2 * (i % 2)]) + rng.bytes(6 + i))


def make_documents(work: Path) -> None:
    put_document("config-mm.json", json.loads((tiny.NANO / "config.json").read_text()))
    put_document("config-mini.json", tiny.config("phi4-mini"))
    put_document("tokenizer_config.json", json.loads((tiny.NANO / "tokenizer_config.json").read_text()))
    weights = tiny.write("phi35-mini", work / "checkpoint") / "model.safetensors"
    with SourceFile(weights) as file:
        entries = json.loads(parse_header(file).raw)
    kept, at = {}, 0
    entries.pop("__metadata__", None)
    for name, entry in list(entries.items())[:6]:  # small, and without a hole
        rows = min(entry["shape"][0], 2) if entry["shape"] else 1
        shape = [rows, *(min(n, 3) for n in entry["shape"][1:])]
        size = 2 * int(np.prod(shape))
        kept[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    put_document("safetensors.json", {"__metadata__": {"format": "pt"}, **kept})
    header = json.dumps(kept).encode()
    put_changes("safetensors", whole=len(header).to_bytes(8, "little") + header + bytes(at))
    put_document(
        "index.json",
        {
            "metadata": {"total_size": at},
            "weight_map": {n: f"model-0000{i % 2}-of-2.safetensors" for i, n in enumerate(kept)},
        },
    )
    put_changes("config", whole=(tiny.NANO / "config.json").read_bytes())
    put_changes("tokenizer")
    put("documents", "bundle.json", (builtin_bundle() / MANIFEST).read_bytes())
    put_changes("bundle")


def make_texts() -> None:
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "string", "maxLength": 5},
            "b": {"type": "array", "items": {"$ref": "#/$defs/x"}},
        },
        "required": ["a"],
        "additionalProperties": False,
        "$defs": {"x": {"anyOf": [{"type": "integer"}, {"enum": ["u", None]}]}, "y": {"pattern": "^[a-z]+$"}},
    }
    put_document("schema.json", schema)
    put_changes("schema", whole=json.dumps(schema).encode())
    tool = {"name": "f", "description": "d", "parameters": {"x": {"type": "int", "description": "n"}}}
    put_document("tools.json", [tool, {"type": "function", "function": {**tool, "name": "g"}}])
    put_changes("tools", whole=json.dumps([tool]).encode())
    turns = [
        {"role": "user", "content": "Hello"},
        {
            "role": "assistant",
            "content": "<think>x</think>",
            "tool_calls": [{"name": "f", "arguments": {"x": 1}}],
        },
        {"role": "tool", "content": "[1]"},
    ]
    chat = {"format": "pocketphi-chat", "version": 1, "model": "m", "system": "s", "messages": turns}
    put_document("chat.json", chat)
    put_changes("chat", whole=json.dumps(chat).encode())
    for i, text in enumerate(
        ("<|user|>a<|end|><|assistant|>", "<|image_1|>x<|audio_1|>", "<|end|<|end|>é<|image_2|>")
    ):
        put("raw-prompt", f"text-{i}", bytes([i]) + text.encode())


def make_evaluation(work: Path) -> None:
    items = [
        {
            "id": "a",
            "task": "qa",
            "prompt": "<|user|><|image_1|>x<|end|>",
            "images": ["images/a.png"],
            "reference": "r",
        },
        {"id": "b", "prompt": "p", "audio": "images/a.png", "reference": "r"},
        {
            "id": "c",
            "messages": [{"role": "user", "content": "x"}],
            "tools": [{"name": "f"}],
            "reference": "r",
        },
    ]
    put_document("items.json", items)
    put_changes("items", whole=b"\n".join(json.dumps(item).encode() for item in items))
    rng = np.random.default_rng(5)
    rows = rng.normal(0, 3, (2 * 3, 37)).astype(np.float32)
    top = rows.max(1, keepdims=True)
    path = work / "logits"
    with LogitsWriter(path, rng.integers(0, 37, (2, 8)).astype(np.int32), 37) as writer:
        writer.write(encode(rows, np.log(np.exp(rows - top).sum(1)).astype(np.float32)))
    put("logits", "two-chunks", path.read_bytes())
    put("logits", "header", path.read_bytes()[:20])


def make_gguf(work: Path) -> None:
    path = work / "small.gguf"
    for name, architecture in (("model", "phi3"), ("adapter", "phi3")):
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_uint32("phi3.embedding_length", 32)
        writer.add_uint32("phi3.attention.head_count", 2)
        writer.add_float32("phi3.rope.freq_base", 1e4)
        if name == "adapter":
            writer.add_string("general.type", "adapter")
            writer.add_float32("adapter.lora.alpha", 4.0)
            writer.add_tensor("blk.0.attn_q.weight.lora_a", np.ones((2, 32), np.float32))
            writer.add_tensor("blk.0.attn_q.weight.lora_b", np.ones((32, 2), np.float32))
        else:
            for key in ("block_count", "attention.head_count_kv", "feed_forward_length", "context_length"):
                writer.add_uint32(f"phi3.{key}", 1)
            writer.add_uint32("phi3.rope.dimension_count", 16)
            writer.add_float32("phi3.attention.layer_norm_rms_epsilon", 1e-5)
            writer.add_string("tokenizer.ggml.model", "gpt2")
            writer.add_array("tokenizer.ggml.tokens", ["a", "b", "", "é"])
            writer.add_array("tokenizer.ggml.token_type", [1, 1, 3, 1])
            writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
            writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
            writer.add_tensor("blk.0.attn_norm.weight", np.ones(32, np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        put("gguf", name, path.read_bytes())
    put("gguf", "header", path.read_bytes()[:24])


def make_media(work: Path) -> None:
    picture = np.random.default_rng(3).integers(0, 255, (12, 16, 3), np.uint8)
    for kind in (
        "png",
        "jpg",
        "webp",
        "bmp",
        "tiff",
        "jp2",
        "ppm",
        "gif",
        "hdr",
        "ras",
        "pam",
        "pfm",
        "avif",
    ):
        try:
            ok, data = cv2.imencode(
                f".{kind}", picture.astype(np.float32) if kind in ("hdr", "pfm") else picture
            )
        except cv2.error:
            continue
        if ok:
            put("image", kind, b"\1" + data.tobytes())
    samples = (0.3 * np.sin(np.arange(800) / 5)).astype(np.float32)
    for name, rate, form, subtype in (
        ("wav", 16000, "WAV", "PCM_16"),
        ("wav24", 44100, "WAVEX", "PCM_24"),
        ("float", 8000, "WAV", "FLOAT"),
        ("flac", 16000, "FLAC", "PCM_16"),
        ("ogg", 16000, "OGG", "VORBIS"),
        ("mp3", 16000, "MP3", "MPEG_LAYER_III"),
        ("aiff", 16000, "AIFF", "PCM_S8"),
        ("au", 16000, "AU", "ULAW"),
    ):
        made = io.BytesIO()
        soundfile.write(
            made, np.stack([samples] * 2, 1) if name == "wav24" else samples, rate, subtype, format=form
        )
        put("sound", name, made.getvalue())
    put("sound", "raw", (samples[:400] * 9000).astype("<i2").tobytes())
    put("sound", "adts", bytes.fromhex("fff1508001fffc") * 40)


def make_graphs(work: Path) -> None:
    weights = numpy_helper.from_array(np.ones((2, 2), np.float32), "w")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in ("x", "y"))
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weights])
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )  # the converter's
    put("onnx", "inside", model.SerializeToString())
    outside = work / "graph.onnx"
    onnx.save_model(model, outside, save_as_external_data=True, location="graph.onnx.data", size_threshold=0)
    put("onnx", "outside", outside.read_bytes())


def make_kernels() -> None:
    """For each family (the first byte) some inputs, whose bytes choose call, variant, shapes and data."""
    rng = np.random.default_rng(9)
    for family in range(9):
        for i in range(12):
            data = bytearray(rng.bytes(24))
            data[0] = i  # the call or type, in most
            put("kernels", f"{family}-{i:02}", struct.pack("B", family) + bytes(data))


def main() -> None:
    for folder in SEEDS.glob("*"):
        for path in folder.iterdir():
            if not path.name.startswith("found-"):
                path.unlink()
    work = Path(tempfile.mkdtemp())
    try:
        make_documents(work)
        make_texts()
        make_evaluation(work)
        make_gguf(work)
        make_media(work)
        make_graphs(work)
        make_kernels()
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
