# SPDX-License-Identifier: Apache-2.0
"""The lines of an output: what came of an item, in the form in which it was asked.

    {"id", "status": "ok", "text", …, "timings", "item_sha256"}
    {"id", "status": "error", "error": {"kind", "message"}, "item_sha256"}

An item in OpenAI's form gets `{"id", "custom_id", "response" or "error", "item_sha256"}`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..runtime.files import is_unicode
from ..runtime.parts import Reply
from ..runtime.transcript import Segment
from .lines import Entry
from .request import CHAT_URL

ErrorKind = Literal["input", "memory", "engine", "worker", "bug"]
"""What is to blame: the item, too little memory, the engine, what ended its process twice, this program."""

_COMPLETION = CHAT_URL.removeprefix("/v1/").replace("/", ".")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of an item: its line of the output, and what is counted of it."""

    record: dict[str, Any]
    ok: bool
    tokens: int = 0  # written by the model; of transcripts nobody counts them
    audio_s: float = 0.0  # of recordings that were written down

    @property
    def line(self) -> str:
        """Of the output, with its end. Half a surrogate pair, which no file holds, becomes an escape."""
        text = json.dumps(self.record, ensure_ascii=False, allow_nan=False)
        return (text if is_unicode(text) else json.dumps(self.record, allow_nan=False)) + "\n"


def digest_of(line_sha256: bytes, files: Iterable[Path]) -> str:
    """What an item is known by: SHA-256, hex, of its line, and of name, size and time of each of its files.

    The bytes of the files are not read: a million recordings are a day of reading.
    """
    stamps: list[tuple[str, int, int]] = []
    for path in files:
        try:
            s = path.stat()
            stamps.append((path.name, s.st_size, s.st_mtime_ns))
        except (OSError, ValueError):
            stamps.append((path.name, -1, -1))
    return hashlib.sha256(json.dumps([line_sha256.hex(), stamps]).encode("ascii")).hexdigest()


def answered(name: str, reply: Reply, digest: str, seconds: float) -> Outcome:
    """A conversation's answer."""
    used, timings = reply.usage, reply.timings
    usage = asdict(used) | {"total_tokens": used.prompt_tokens + used.completion_tokens}
    record: dict[str, Any] = {"id": name, "status": "ok", "text": reply.text}
    if reply.reasoning:
        record["reasoning"] = reply.reasoning
    if reply.tool_calls:
        record["tool_calls"] = [asdict(call) for call in reply.tool_calls]
    record |= {"finish_reason": reply.finish_reason, "mode": reply.mode, "usage": usage}
    record["timings"] = {
        "encode_ms": timings.encode_ms,
        "prompt_ms": timings.prompt_ms,
        "predicted_ms": timings.predicted_ms,
        "ttft_ms": timings.ttft_ms,
        "seconds": seconds,
    }
    return Outcome(record | {"item_sha256": digest}, True, used.completion_tokens)


def written_down(name: str, segments: list[Segment], audio_s: float, digest: str, seconds: float) -> Outcome:
    """A recording's transcript."""
    record = {
        "id": name,
        "status": "ok",
        "text": "\n".join(one.text for one in segments),
        "segments": [asdict(one) for one in segments],
        "audio_seconds": audio_s,
        "timings": {"seconds": seconds},
        "item_sha256": digest,
    }
    return Outcome(record, True, audio_s=audio_s)


def failed(entry_id: str, kind: ErrorKind, message: str, digest: str) -> Outcome:
    """An item that has no answer, and why."""
    error = {"kind": kind, "message": message}
    return Outcome({"id": entry_id, "status": "error", "error": error, "item_sha256": digest}, False)


def in_form(outcome: Outcome, entry: Entry, model: str, created: int) -> Outcome:
    """The outcome as the item's form has it.

    Args:
        outcome: in our own.
        entry: the item.
        model: what the model is called.
        created: seconds since 1970.
    """
    if not entry.in_openai_form:
        return outcome
    ours = outcome.record
    name = f"batch_req_{ours['item_sha256'][:24]}"
    error, response = None, None
    if outcome.ok:
        body = _completion(ours, model, created)
        response = {"status_code": 200, "request_id": name, "body": body}
    else:
        error = {"code": ours["error"]["kind"], "message": ours["error"]["message"]}
    record = {"id": name, "custom_id": entry.id, "response": response, "error": error}
    return Outcome(record | {"item_sha256": ours["item_sha256"]}, outcome.ok, outcome.tokens, outcome.audio_s)


def _completion(ours: Mapping[str, Any], model: str, created: int) -> dict[str, Any]:
    calls = [
        {
            "id": f"call_{ours['item_sha256'][:16]}_{i}",
            "type": "function",
            "function": {
                "name": call["name"],
                "arguments": json.dumps(call["arguments"], ensure_ascii=False),
            },
        }
        for i, call in enumerate(ours.get("tool_calls", ()))
    ]
    message: dict[str, Any] = {"role": "assistant", "content": ours["text"] or (None if calls else "")}
    if "reasoning" in ours:
        message["reasoning_content"] = ours["reasoning"]
    if calls:
        message["tool_calls"] = calls
    usage = ours["usage"]
    return {
        "id": f"chatcmpl-{ours['item_sha256'][:24]}",
        "object": _COMPLETION.removesuffix("s"),
        "created": created,
        "model": model,
        "choices": [
            {"index": 0, "message": message, "finish_reason": ours["finish_reason"], "logprobs": None}
        ],
        "usage": {key: usage[key] for key in ("prompt_tokens", "completion_tokens", "total_tokens")},
        "timings": ours["timings"],
    }


def outcome_of(found: Mapping[str, Any]) -> tuple[str, bool, str] | None:
    """Id, whether it is an answer, and the item's digest, of a line of an output; None: it is none."""
    digest = found.get("item_sha256")
    if "custom_id" in found:
        name, ok, whole = found["custom_id"], found.get("error") is None, "response" in found
    else:
        status = found.get("status")
        name, ok, whole = found.get("id"), status == "ok", status in ("ok", "error")
    if not isinstance(name, str) or not isinstance(digest, str) or not whole:
        return None
    return name, ok, digest
