# SPDX-License-Identifier: Apache-2.0
"""What a page sent, as the Python API takes it: the same question asked without a server."""

from __future__ import annotations

import base64
import json
from typing import Any

from pocketphi.runtime.engine import Model
from pocketphi.runtime.parts import Media, Message, Reply, ToolCall


def parts(message: dict[str, Any], kind: str) -> list[Any]:
    """The parts of one kind of a message."""
    content = message["content"]
    return [part[kind] for part in content if part["type"] == kind] if isinstance(content, list) else []


def pictures(message: dict[str, Any]) -> list[bytes]:
    """The files."""
    return [base64.b64decode(one["url"].partition(",")[2]) for one in parts(message, "image_url")]


def sounds(message: dict[str, Any]) -> list[bytes]:
    """The files."""
    return [base64.b64decode(one["data"]) for one in parts(message, "input_audio")]


def words(message: dict[str, Any]) -> str:
    """The text of it."""
    content = message["content"] or ""
    return content if isinstance(content, str) else "".join(parts(message, "text"))


def reply_to(body: dict[str, Any], model: Model) -> Reply:
    """What the Python API answers."""
    options: dict[str, Any] = {}
    if "max_tokens" in body:
        options["max_tokens"] = body["max_tokens"]
    if "tools" in body:
        options["tools"] = [one["function"] for one in body["tools"]]
    return model.chat([_message(one) for one in body["messages"]], **options)


def _message(sent: dict[str, Any]) -> Message:
    media = [Media("image", one) for one in pictures(sent)] + [Media("audio", one) for one in sounds(sent)]
    called = [one["function"] for one in sent.get("tool_calls", ())]
    calls = tuple(ToolCall(one["name"], json.loads(one["arguments"])) for one in called)
    return Message(sent["role"], words(sent), calls, tuple(media))
