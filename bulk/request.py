# SPDX-License-Identifier: Apache-2.0
"""What an item asks for, checked: a conversation to answer, or a recording to write down.

A field that is not known is an error: a misspelt one would be a setting that a million answers lack. Those of
OpenAI's that cannot change an answer here are let through.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.engine import ChatOptions, CompleteOptions
from ..runtime.errors import InputError
from ..runtime.files import check_unicode
from ..runtime.parts import Message
from ..runtime.sampler import Sampling, token_id
from ..runtime.segments import SegmentRules
from ..runtime.speech_task import Task as SpeechTask
from .content import base64_audio, messages_of, path_of
from .lines import Task, is_openai, object_of

CHAT_URL = "/v1/chat/completions"
_MAX_STOPS = 16
_MAX_BIASES = 300
_IGNORED = frozenset({"model", "user", "metadata", "store", "service_tier", "safety_identifier"})
_ONLY: Mapping[str, tuple[object, ...]] = {  # fields of OpenAI's with the values that mean what is done here
    "n": (1, None),
    "stream": (False, None),
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "logit_bias": (None,),
    "logprobs": (False, None),
    "top_logprobs": (0, None),
    "tool_choice": ("auto", None),
    "parallel_tool_calls": (True, None),
    "modalities": (["text"], None),
}
_SAMPLING = {"temperature", "top_k", "top_p", "min_p", "repeat_penalty", "seed", "grammar", "json_schema"}
_CHANGES = {"frequency_penalty", "presence_penalty", "logit_bias"}
_FORM = {"tools", "stop", "max_tokens", "max_completion_tokens", "response_format"}
_CHAT = {"messages"} | _FORM | _SAMPLING | _CHANGES
_SPOKEN = {"audio", "translate", "both", "prompt", "instruction", "pause"}
_TRANSCRIBE = _SPOKEN | {"max_tokens", "temperature", "seed"}


@dataclass(frozen=True, slots=True, eq=False)
class Chat:
    """A conversation to answer."""

    messages: tuple[Message, ...]
    options: ChatOptions

    @property
    def files(self) -> list[Path]:
        """The files that it needs, in order."""
        media = [one for message in self.messages for one in message.media]
        return [one.source for one in media if isinstance(one.source, Path)]


@dataclass(frozen=True, slots=True, eq=False)
class Transcription:
    """A recording to write down."""

    audio: Path | bytes
    speech: SpeechTask
    rules: SegmentRules
    options: CompleteOptions

    @property
    def files(self) -> list[Path]:
        """The files that it needs."""
        return [self.audio] if isinstance(self.audio, Path) else []


def request_of(task: Task, folder: Path, max_tokens: int | None) -> Chat | Transcription:
    """Read an item.

    Args:
        task: the item.
        folder: what paths are relative to.
        max_tokens: where the item does not say; None: until the model stops.

    Raises:
        InputError: it cannot be used; says what was found and what was wanted.
    """
    raw = task.text.encode("utf-8")
    found = object_of(raw, task.where)
    seed = int.from_bytes(hashlib.sha256(raw).digest()[:4], "big")  # without one: the same again, anywhere
    try:
        fields = _fields(found)
        if fields.pop("type") == "chat":
            return _chat(fields, folder, max_tokens, seed)
        return _transcription(fields, folder, max_tokens, seed)
    except InputError as exc:
        raise InputError(f"{task.where}: {exc}") from None
    except RecursionError:
        raise InputError(f"{task.where}: is nested too deeply") from None


def _fields(found: dict[str, Any]) -> dict[str, Any]:
    """What matters of an item, with its "type"."""
    if is_openai(found):
        body, url = found["body"], found.get("url", CHAT_URL)
        if url != CHAT_URL or found.get("method", "POST") != "POST":
            raise InputError(f"url is {str(url)[:60]!r}, expected POST to {CHAT_URL}")
        if not isinstance(body, dict):
            raise InputError(f"body is a JSON {type(body).__name__}, expected an object")
        return {**body, "type": "chat"}
    fields = {key: value for key, value in found.items() if key != "id"}
    kind = fields.get("type", "chat" if "messages" in fields else "transcribe")
    if kind not in ("chat", "transcribe"):
        raise InputError(f"type is {str(kind)[:40]!r}, expected chat or transcribe")
    return fields | {"type": kind}


def _check_known(fields: Mapping[str, Any], known: set[str]) -> None:
    for key, value in fields.items():
        if key in known or key in _IGNORED:
            continue
        if key not in _ONLY:
            raise InputError(f"has a field {key[:40]!r}, expected some of {', '.join(sorted(known))}")
        if value not in _ONLY[key]:
            raise InputError(f"{key} is {str(value)[:40]!r}, expected {_ONLY[key][0]!r} or none")


def _chat(fields: Mapping[str, Any], folder: Path, max_tokens: int | None, seed: int) -> Chat:
    tools = fields.get("tools")
    if fields.get("tool_choice") == "none":
        tools, fields = None, {k: v for k, v in fields.items() if k != "tool_choice"}
    _check_known(fields, _CHAT)
    most = _whole(fields, "max_completion_tokens", _whole(fields, "max_tokens", max_tokens))
    options: ChatOptions = {
        "sampling": _sampling(fields, _schema(fields), seed),
        "max_tokens": most,
        "stop": _stops(fields.get("stop")),
    }
    if tools:
        if not isinstance(tools, list) or not all(isinstance(one, dict) for one in tools):
            raise InputError("tools is not a list of objects")
        options["tools"] = tools
    return Chat(messages_of(fields.get("messages"), folder), options)


def _transcription(
    fields: Mapping[str, Any], folder: Path, max_tokens: int | None, seed: int
) -> Transcription:
    _check_known(fields, _TRANSCRIBE)
    audio = fields.get("audio")
    source = base64_audio(audio, "audio") if isinstance(audio, dict) else path_of(audio, "audio", folder)
    both = fields.get("both", False)
    if not isinstance(both, bool):
        raise InputError(f"both is {str(both)[:40]!r}, expected true or false")
    words, texts = _text(fields, "prompt"), (_text(fields, "translate"), _text(fields, "instruction"))
    options: CompleteOptions = {
        "sampling": _sampling(fields, None, seed),
        "max_tokens": _whole(fields, "max_tokens", max_tokens),
    }
    return Transcription(
        source,
        SpeechTask(texts[0], both, words, texts[1]),
        SegmentRules(pause_s=_number(fields, "pause", SegmentRules().pause_s)),
        options,
    )


def _sampling(fields: Mapping[str, Any], schema: str | None, seed: int) -> Sampling:
    plain = Sampling()
    chosen = _whole(fields, "seed", seed)
    return Sampling(
        temperature=_number(fields, "temperature", plain.temperature),
        top_k=_whole(fields, "top_k", plain.top_k) or 0,
        top_p=_number(fields, "top_p", plain.top_p),
        min_p=_number(fields, "min_p", plain.min_p),
        repeat_penalty=_number(fields, "repeat_penalty", plain.repeat_penalty),
        seed=chosen,
        grammar=_text(fields, "grammar"),
        json_schema=schema,
        frequency_penalty=_number(fields, "frequency_penalty", plain.frequency_penalty),
        presence_penalty=_number(fields, "presence_penalty", plain.presence_penalty),
        logit_bias=_biases(fields),
    )


def _biases(fields: Mapping[str, Any]) -> dict[int, float]:
    """By token id. Whether the model has such a token is seen when it is asked."""
    given = fields.get("logit_bias")
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise InputError(f"logit_bias is a JSON {type(given).__name__}, expected an object")
    if len(given) > _MAX_BIASES:
        raise InputError(f"logit_bias has {len(given)} tokens, expected at most {_MAX_BIASES}")
    found: dict[int, float] = {}
    for key, value in given.items():
        if (token := token_id(key)) is None:
            raise InputError(f"logit_bias has {key[:40]!r}, expected token ids")
        if type(value) not in (int, float) or abs(value) > 1e9:
            raise InputError(f"logit_bias has {str(value)[:40]!r} for {key}, expected a number")
        found[token] = float(value)
    return found


def _schema(fields: Mapping[str, Any]) -> str | None:
    """The schema that the answer must match: ours in `json_schema`, OpenAI's in `response_format`."""
    raw, wanted = fields.get("json_schema"), fields.get("response_format")
    if wanted is not None:
        if raw is not None:
            raise InputError("has both json_schema and response_format, expected one of them")
        kind = wanted.get("type") if isinstance(wanted, dict) else None
        if kind == "json_object":
            raw = {"type": "object"}
        elif kind == "json_schema":
            inner = wanted.get("json_schema")
            raw = inner.get("schema") if isinstance(inner, dict) else None
            if raw is None:
                raise InputError("response_format has no schema")
        elif kind != "text":
            raise InputError(f"response_format has the type {str(kind)[:40]!r}")
    if raw is None or isinstance(raw, str):
        return raw
    if not isinstance(raw, dict):
        raise InputError(f"json_schema is a JSON {type(raw).__name__}, expected an object")
    return json.dumps(raw, ensure_ascii=False)


def _stops(raw: object) -> tuple[str, ...]:
    found = () if raw is None else (raw,) if isinstance(raw, str) else raw
    if not isinstance(found, (list, tuple)) or not all(isinstance(one, str) for one in found):
        raise InputError("stop is not text or a list of texts")
    if len(found) > _MAX_STOPS:
        raise InputError(f"stop has {len(found)} texts, expected at most {_MAX_STOPS}")
    return tuple(found)


def _whole(fields: Mapping[str, Any], key: str, default: int | None) -> int | None:
    value = fields.get(key)
    if value is None:
        return default
    if type(value) is not int:
        raise InputError(f"{key} is {str(value)[:40]!r}, expected a whole number")
    return value


def _number(fields: Mapping[str, Any], key: str, default: float) -> float:
    value = fields.get(key)
    if value is None:
        return default
    if type(value) not in (int, float) or abs(value) > 1e9:
        raise InputError(f"{key} is {str(value)[:40]!r}, expected a number")
    return float(value)


def _text(fields: Mapping[str, Any], key: str) -> str | None:
    value = fields.get(key)
    if value is None:
        return None
    if not isinstance(value, str):
        raise InputError(f"{key} is a JSON {type(value).__name__}, expected text")
    check_unicode(key, value)
    return value
