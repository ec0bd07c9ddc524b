# SPDX-License-Identifier: Apache-2.0
"""One reading of one utterance: what the model hears in it, with what it heard before as a draft."""

from __future__ import annotations

import itertools
import math
import time
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from .engine import CompleteOptions, Model
from .errors import InputError
from .growing_speech import GrowingSpeech
from .parts import Media, Message
from .repetition import loop_start
from .speech_task import SEPARATOR, Task

_ROWS_PER_S = 12.5  # of the speech encoder
_TOKENS_PER_S = 12.5  # written at most; people speak 3 or 4 a second, fast ones 8
_TOKENS_MORE = 32
_MARKUP_TOKENS = 8  # around the instruction, at most


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read, and what it took."""

    token_ids: tuple[int, ...]  # of the transcript: no control token, no separator, no translation
    logprobs: tuple[float, ...]  # of these
    text: str
    translation: str | None
    finish: Literal["stop", "length", "loop"]
    is_final: bool  # the whole answer; otherwise the transcript alone
    n_samples: int  # of the window that was read
    seconds: float  # all of it
    n_passes: int = 0  # forward passes after the prompt's
    draft_n: int = 0
    draft_n_accepted: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt's, those that were in the cache
    n_overruled: int = 0  # forced tokens that this reading alone would have read otherwise


class ReadsSpeech(Protocol):
    """What transcription, live or not, asks for readings: `Reader`, or somebody who has one elsewhere."""

    def check(self, longest_s: float) -> None:
        """See `Reader.check`."""

    def read(
        self, speech: GrowingSpeech, *, draft: Sequence[int] = (), n_forced: int = 0, final: bool = True
    ) -> Reading:
        """See `Reader.read`."""

    def text_of(self, token_ids: Sequence[int]) -> str:
        """See `Reader.text_of`."""

    def starts_word(self, token_id: int) -> bool:
        """See `Reader.starts_word`."""


class Reader:
    """A model that transcribes."""

    def __init__(self, model: Model, task: Task, options: CompleteOptions) -> None:
        """
        Args:
            model: with a speech encoder.
            task: what to make of speech.
            options: sampling and the most tokens of a reading, beside the limit from the utterance's length.
        """
        self._model, self._task, self._options = model, task, options
        self._control_ids = frozenset(model.tokenizer.control_tokens.values())

    def check(self, longest_s: float) -> None:
        """Whether utterances of up to `longest_s` seconds can be read: better found out before one is spoken.

        Raises:
            InputError: the model cannot listen, or its context is too small.
        """
        self._model.bundle.encoder("speech", "listen")
        rows = math.ceil(_ROWS_PER_S * longest_s)
        words = len(self._model.tokenizer.encode_text(self._task.text)) + _MARKUP_TOKENS
        needed, limit = rows + words + self._most_tokens(longest_s), self._model.context_limit
        if limit < needed:
            raise InputError(
                f"the context holds {limit} tokens, an utterance of {longest_s:g} s needs {needed} (see -c)"
            )

    def read(
        self, speech: GrowingSpeech, *, draft: Sequence[int] = (), n_forced: int = 0, final: bool = True
    ) -> Reading:
        """Read the utterance as far as it has come.

        Args:
            speech: with its window set.
            draft: the transcript that is expected: what an earlier reading gave. It changes what the reading
                costs, not what it gives.
            n_forced: tokens of the draft that are not open to question.
            final: everything; otherwise, where a translation follows the transcript, not that.

        Raises:
            InputError: the model cannot listen, or the window is shorter than one frame.
        """
        started = time.perf_counter()
        most = self._most_tokens(len(speech.window) / speech.sample_rate)
        options: CompleteOptions = {
            **self._options,
            "max_tokens": max(min(self._options.get("max_tokens") or most, most), n_forced + 1),
            "draft": draft,
            "n_forced": n_forced,
            "logprobs": True,
            "stop_ids": self._control_ids,
            "stop": () if final or not self._task.both else (SEPARATOR,),
        }
        answer = self._model.chat(
            [Message("user", self._task.text, media=(Media("audio", speech),))], stream=True, **options
        )
        loop: int | None = None
        for _ in answer:
            if len(answer.token_ids) > n_forced and (loop := loop_start(answer.token_ids)) is not None:
                answer.close()
                break
        reply = answer.reply
        # What is settled stays, even where the loop begins in it.
        written = reply.token_ids if loop is None else reply.token_ids[: max(loop, n_forced)]
        text_ids = self._transcript(written, n_forced)
        _, separator, translation = self.text_of(written[len(text_ids) :]).partition(SEPARATOR)
        return Reading(
            token_ids=text_ids,
            logprobs=reply.logprobs[: len(text_ids)],
            text=self.text_of(text_ids),
            translation=translation.strip() if separator and self._task.both and final else None,
            finish="loop" if loop is not None else "length" if reply.finish_reason == "length" else "stop",
            is_final=final or not self._task.both,
            n_samples=len(speech.window),
            seconds=time.perf_counter() - started,
            n_passes=reply.timings.n_passes,
            draft_n=reply.timings.draft_n,
            draft_n_accepted=reply.timings.draft_n_accepted,
            prompt_tokens=reply.usage.prompt_tokens,
            cached_tokens=reply.usage.cached_tokens,
            n_overruled=reply.n_overruled,
        )

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Text from ids, control tokens left out."""
        return self._model.tokenizer.decode(i for i in token_ids if i not in self._control_ids).strip()

    def starts_word(self, token_id: int) -> bool:
        """Whether a token begins a word: with a space, or with a character of a script that writes none."""
        raw = self._model.tokenizer.token_bytes(token_id)
        if raw[:1].isspace():
            return True
        try:
            first = raw.decode("utf-8")[:1]
        except UnicodeDecodeError:  # half a character
            return False
        return (
            bool(first) and unicodedata.category(first) == "Lo" and unicodedata.east_asian_width(first) == "W"
        )

    def _most_tokens(self, seconds: float) -> int:
        """Of one reading of so much audio."""
        texts = 3 if self._task.both else 2 if self._task.translate else 1  # a translation may be longer
        return int(_TOKENS_MORE + _TOKENS_PER_S * seconds) * texts

    def _transcript(self, token_ids: Sequence[int], n_forced: int) -> tuple[int, ...]:
        """The ids up to the first control token or separator, those that are settled at least."""
        end = next((i for i, token in enumerate(token_ids) if token in self._control_ids), len(token_ids))
        if self._task.both:
            pieces = [self._model.tokenizer.token_bytes(token) for token in token_ids[:end]]
            before, separator, _ = b"".join(pieces).partition(SEPARATOR.encode())
            if separator:
                ends = itertools.accumulate(len(piece) for piece in pieces)
                end = sum(at <= len(before.rstrip()) for at in ends)
        return tuple(token_ids[: max(end, n_forced)])
