# SPDX-License-Identifier: Apache-2.0
"""The small frozen values that pass between stages. A stage knows these and not its neighbours."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]

RGB = npt.NDArray[np.uint8]  # [height, width, 3]
Waveform = tuple[Float32, int]  # mono samples in [-1, 1], and their rate in Hz

AudioProjector = Literal["speech", "vision"]  # which of the speech encoder's two heads
MediaKind = Literal["image", "audio"]
Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]
Mode = Literal["language", "vision", "speech", "vision_speech"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call the model asks for. `arguments` is the decoded JSON object."""

    name: str
    arguments: dict[str, Any]


class Progress(Protocol):
    """Told how much of the work is done; `progress` draws such. What it raises ends the work."""

    def start(self, total: int, what: str, /) -> None:
        """Work begins on `total` bytes or things; `what` names it."""

    def advance(self, n: int, what: str, /) -> None:
        """`n` more are done; `what` is being worked on."""

    def finish(self) -> None:
        """All are done, or the work has failed."""


class Silent:
    """The Progress that shows nothing."""

    def start(self, total: int, what: str) -> None:
        """Do nothing."""

    def advance(self, n: int, what: str) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""


class SpeechWindow(Protocol):
    """An utterance as far as it has been spoken; `growing_speech.GrowingSpeech` is one."""

    sample_rate: int  # Hz

    @property
    def window(self) -> Float32:
        """float32 [n], mono."""


@dataclass(frozen=True, slots=True, eq=False)
class Media:
    """A picture or a clip of a conversation: where it is, or what it is."""

    kind: MediaKind
    source: Path | bytes | RGB | Waveform | SpeechWindow
    name: str = ""  # for messages about it; a file names itself
    max_crops: int | None = None  # of this picture; None: the model's setting


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. `content` is text as the person or the tool gave it, never markup.

    The one exception: in a message with media, `<|image_1|>` and `<|audio_1|>` say where each goes. The
    number is for the reader; the order of appearance decides. Without them the media come first.
    """

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()  # of an assistant turn, to be rendered back into history
    media: tuple[Media, ...] = ()  # of a user turn


@dataclass(frozen=True, slots=True, eq=False)
class TokenSpan:
    """Consecutive token ids: int32 [n]."""

    ids: Int32

    def __len__(self) -> int:
        return int(self.ids.shape[0])


@dataclass(frozen=True, slots=True, eq=False)
class EmbedSpan:
    """Consecutive projected embeddings: float32 [n, d_model], as an encoder gives them.

    `key` names the content (a digest of what was encoded): equal keys mean equal rows, so that a
    cached prefix can be recognised without comparing megabytes.
    """

    rows: Float32
    key: str

    def __len__(self) -> int:
        return int(self.rows.shape[0])


Span = TokenSpan | EmbedSpan


@dataclass(frozen=True, slots=True)
class TextEvent:
    """A piece of the answer while it streams: whole UTF-8 characters, never half of one."""

    text: str
    kind: Literal["answer", "reasoning"] = "answer"


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompt, taken from the KV cache


@dataclass(frozen=True, slots=True)
class Timings:
    """Where one request's time went, in milliseconds; the names are llama.cpp's."""

    load_ms: float
    encode_ms: float  # pictures and clips to rows; 0 when they were cached or there were none
    prompt_n: int
    prompt_ms: float
    predicted_n: int
    predicted_ms: float
    ttft_ms: float  # from the call to the first token
    n_passes: int = 0  # forward passes after the prompt's own
    draft_n: int = 0  # tokens of a draft that were read ahead
    draft_n_accepted: int = 0  # of these, how many the answer took

    @property
    def prompt_per_second(self) -> float:
        """Prefill tokens per second; 0 when nothing was read."""
        return 1e3 * self.prompt_n / self.prompt_ms if self.prompt_ms > 0 else 0.0

    @property
    def predicted_per_second(self) -> float:
        """Decoded tokens per second; 0 when nothing was decoded."""
        return 1e3 * self.predicted_n / self.predicted_ms if self.predicted_ms > 0 else 0.0


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One line of `bench`: medians over the repetitions of one case."""

    name: str
    prompt_n: int  # tokens read, embedded rows included
    encode_ms: float
    prompt_ms: float
    prompt_per_second: float
    ttft_ms: float
    predicted_per_second: float
    peak_rss_bytes: int | None  # of the process so far


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer and what it took."""

    text: str
    reasoning: str  # what stood inside <think>…</think>, empty for models that do not reason aloud
    tool_calls: tuple[ToolCall, ...]
    token_ids: tuple[int, ...]  # every generated id, the stop token included
    mode: Mode
    adapter: str | None
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    notes: tuple[str, ...] = field(default=())  # e.g. that the long RoPE table came into use
    resident: tuple[str, ...] = field(default=())  # adapters and encoders in memory: "speech adapter", …
    n_overruled: int = 0  # forced tokens where the model's most probable one was another
    logprobs: tuple[float, ...] = ()  # of each of token_ids, when asked for
    # In the place of each of token_ids the most probable ids with theirs, in falling order, when asked for.
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
