# SPDX-License-Identifier: Apache-2.0
"""What every answer says beside the text: the model's name, ids, numbers of tokens, timings."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import Any

from ..runtime.bundle import Bundle
from ..runtime.parts import Reply


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a model before it is loaded."""

    name: str
    context: int  # tokens of a conversation, at most
    max_crops: int
    created: int  # seconds since 1970
    meta: dict[str, int]  # as llama.cpp's server has it


def facts_of(bundle: Bundle, *, n_ctx: int, max_crops: int) -> Facts:
    """The facts of a model directory, with a server's settings."""
    text = bundle.text
    meta = {
        "n_ctx_train": text.context_length,
        "n_vocab": text.vocab_size,
        "n_embd": text.d_model,
        "size": sum(file.size for file in bundle.files),
    }
    created = int((bundle.root / "bundle.json").stat().st_mtime)
    return Facts(bundle.name, n_ctx or text.context_length, max_crops, created, meta)


def stamp(kind: str) -> tuple[str, int]:
    """An id, and the time in seconds since 1970."""
    return f"{kind}-{secrets.token_urlsafe(18)}", int(time.time())


def usage_object(reply: Reply) -> dict[str, Any]:
    """Numbers of tokens; pictures and clips are the prompt's."""
    usage = reply.usage
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def timings_object(reply: Reply) -> dict[str, Any]:
    """llama.cpp's server's names, in milliseconds and tokens; and what is only here: media, adapter, mode."""
    t = reply.timings
    return {
        "cache_n": reply.usage.cached_tokens,
        "prompt_n": t.prompt_n,
        "prompt_ms": t.prompt_ms,
        "prompt_per_token_ms": t.prompt_ms / t.prompt_n if t.prompt_n else 0.0,
        "prompt_per_second": t.prompt_per_second,
        "predicted_n": t.predicted_n,
        "predicted_ms": t.predicted_ms,
        "predicted_per_token_ms": t.predicted_ms / t.predicted_n if t.predicted_n else 0.0,
        "predicted_per_second": t.predicted_per_second,
        "encode_ms": t.encode_ms,
        "ttft_ms": t.ttft_ms,
        "mode": reply.mode,
        "adapter": reply.adapter,
        "notes": list(reply.notes),
    }
