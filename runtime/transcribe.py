# SPDX-License-Identifier: Apache-2.0
"""Clips to transcripts: one pass over each piece of audio, with the model card's own prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .audio import Clip
from .engine import CompleteOptions, Model
from .errors import InputError
from .parts import Media, Message
from .segments import cut
from .transcript import Segment

_TRANSCRIBE = "Transcribe the audio clip into text."
_TRANSLATE = "Translate the audio to {language}."
_BOTH = (
    "Transcribe the audio to text, and then translate the audio to {language}. "
    "Use <sep> as a separator between the original transcript and the translation."
)
_SEPARATOR = "<sep>"


@dataclass(frozen=True, slots=True)
class Task:
    """What to make of the audio."""

    translate: str | None = None  # a language; None: transcribe
    both: bool = False  # transcript and translation in one pass
    prompt: str | None = None  # instead of the model card's

    def __post_init__(self) -> None:
        if self.translate is not None and not self.translate.strip():
            raise InputError("the language to translate to is empty")
        if self.prompt is not None and not self.prompt.strip():
            raise InputError("the prompt is empty")
        if self.both and self.translate is None:
            raise InputError("transcript and translation together need a language to translate to")
        if self.prompt is not None and (self.both or self.translate is not None):
            raise InputError("a prompt of your own replaces the one for translation: give one of them")

    @property
    def instruction(self) -> str:
        """The text beside the clip. Source: the model card of Phi-4-multimodal-instruct."""
        if self.prompt is not None:
            return self.prompt
        if self.translate is None:
            return _TRANSCRIBE
        return (_BOTH if self.both else _TRANSLATE).format(language=self.translate)


def transcribe(model: Model, clip: Clip, task: Task, options: CompleteOptions) -> Iterator[Segment]:
    """Segments as they are done, in order. A clip of up to 40 s is one pass; a longer one is cut in pauses.

    Args:
        model: with a speech encoder.
        clip: at 8 or 16 kHz.
        task: what to make of it.
        options: sampling and limits of each pass.

    Raises:
        InputError: the model cannot listen, or the clip is too short.
    """
    for start, stop in cut(clip.samples, clip.sample_rate):
        piece = Media("audio", (clip.samples[start:stop], clip.sample_rate))
        reply = model.chat([Message("user", task.instruction, media=(piece,))], **options)
        text, _, translation = reply.text.partition(_SEPARATOR) if task.both else (reply.text, "", "")
        yield Segment(
            start / clip.sample_rate,
            stop / clip.sample_rate,
            text.strip(),
            translation.strip() if task.both else None,
        )
