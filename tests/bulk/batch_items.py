# SPDX-License-Identifier: Apache-2.0
"""A file of items of every kind, and what the Python API answers to each alone."""

from __future__ import annotations

import base64
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pocketphi.bulk.lines import LineFile
from pocketphi.bulk.performer import ItemSettings, ModelSettings, manifest_sha256
from pocketphi.runtime import audio
from pocketphi.runtime import bundle as bundles
from pocketphi.runtime.engine import Model
from pocketphi.runtime.reader import Reader
from pocketphi.runtime.sampler import Sampling
from pocketphi.runtime.segments import SegmentRules
from pocketphi.runtime.speech_task import Task
from pocketphi.runtime.transcribe import transcribe

from ..scoring import EVAL

CALL = [sys.executable, "-c", "import sys; sys.argv[0] = 'pocketphi'; from pocketphi.cli import main; main()"]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "alarm",
            "description": "Set an alarm",
            "parameters": {"hour": {"type": "int"}, "day": {"type": "str"}},
        },
    }
]
IMAGE, CLIP = EVAL / "images/img-012.png", EVAL / "audio/vs-003.flac"
QUESTIONS = [
    "What is the capital of France?",
    "How do you spell tea?",
    "Hello!",
    "What is 3 plus 4?",
    "How many legs does a spider have?",
    "Tell me where a lion lives.",
]


def user(content: Any) -> list[dict[str, Any]]:
    """A conversation of one turn."""
    return [{"role": "user", "content": content}]


def mixed() -> list[dict[str, Any]]:
    """One of each kind that has an answer."""
    clip = base64.b64encode(CLIP.read_bytes()).decode("ascii")
    picture = base64.b64encode((EVAL / "images/vs-003.png").read_bytes()).decode("ascii")
    return [
        {"id": "text", "messages": user(QUESTIONS[0])},
        {"id": "said", "type": "transcribe", "audio": str(EVAL / "audio/asr-003.flac")},
        {"id": "seen", "messages": user([
            {"type": "image", "path": str(IMAGE)}, {"type": "text", "text": "What does the text say?"},
        ])},
        {"id": "tools", "tools": TOOLS, "messages": [
            {"role": "system", "content": "You have some tools."},
            {"role": "user", "content": "Wake me up at 9 on Saturday."},
        ]},
        {"id": "both", "messages": user([
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
            {"type": "input_audio", "input_audio": {"data": clip, "format": "flac"}},
        ])},
        {"id": "french", "audio": str(EVAL / "audio/ast-000.flac"), "translate": "French", "both": True},
        {"id": "drawn", "messages": user(QUESTIONS[2]), "temperature": 1.5, "seed": 7, "max_tokens": 12},
        {"id": "schema", "messages": user(QUESTIONS[3]), "max_tokens": 16,
         "json_schema": {"type": "integer"}},
    ]  # fmt: skip


def alone(directory: Path) -> dict[str, dict[str, Any]]:
    """What the library says to each of `mixed`, in a model of its own: what an output has but for timings."""
    clip, picture = CLIP.read_bytes(), (EVAL / "images/vs-003.png").read_bytes()
    found: dict[str, dict[str, Any]] = {}

    def ask(name: str, messages: list[dict[str, Any]], **options: Any) -> None:
        with Model(directory) as model:
            reply = model.chat(messages, **options)
        usage = asdict(reply.usage)
        usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
        found[name] = {
            "id": name, "status": "ok", "text": reply.text, "finish_reason": reply.finish_reason,
            "mode": reply.mode, "usage": usage,
        }  # fmt: skip
        if reply.tool_calls:
            found[name]["tool_calls"] = [asdict(call) for call in reply.tool_calls]

    def listen(name: str, path: Path, task: Task) -> None:
        with Model(directory) as model, audio.stream(path) as sound:
            segments = list(transcribe(Reader(model, task, {}), sound, SegmentRules()))
        found[name] = {
            "id": name, "status": "ok", "text": "\n".join(s.text for s in segments),
            "segments": [asdict(s) for s in segments], "audio_seconds": sound.seconds,
        }  # fmt: skip

    ask("text", user(QUESTIONS[0]))
    listen("said", EVAL / "audio/asr-003.flac", Task())
    ask(
        "seen", user([{"type": "image", "image": IMAGE}, {"type": "text", "text": "What does the text say?"}])
    )
    tools = [TOOLS[0]["function"]]
    system = {"role": "system", "content": "You have some tools."}
    ask("tools", [system, *user("Wake me up at 9 on Saturday.")], tools=tools)
    ask("both", user([{"type": "image", "image": picture}, {"type": "audio", "audio": clip}]))
    listen("french", EVAL / "audio/ast-000.flac", Task("French", both=True))
    ask("drawn", user(QUESTIONS[2]), sampling=Sampling(1.5, seed=7), max_tokens=12)
    ask("schema", user(QUESTIONS[3]), sampling=Sampling(json_schema='{"type": "integer"}'), max_tokens=16)
    return found


def plain(record: dict[str, Any]) -> dict[str, Any]:
    """A line without what differs from run to run."""
    return {key: value for key, value in record.items() if key not in ("timings", "item_sha256")}


def write_lines(path: Path, items: list[Any]) -> Path:
    """A file of items; bytes are lines as they are."""
    lines = [one if isinstance(one, bytes) else json.dumps(one).encode("utf-8") for one in items]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def read_lines(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of an output by id, each there once."""
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    found = {one.get("custom_id", one["id"]): one for one in records}
    assert len(found) == len(records)
    return found


def settings(directory: Path, file: LineFile) -> tuple[ModelSettings, ItemSettings]:
    """Of workers, a thread each."""
    sha256 = manifest_sha256(bundles.load(directory))
    return ModelSettings(str(directory), sha256, n_threads=1), ItemSettings(str(file.folder))
