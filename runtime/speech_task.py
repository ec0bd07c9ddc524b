# SPDX-License-Identifier: Apache-2.0
"""What to make of speech: the instruction that stands beside a clip, and how its answer is split."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import InputError

SEPARATOR = "<sep>"  # between transcript and translation

_TRANSCRIBE = "Transcribe the audio clip into text."
_TRANSLATE = "Translate the audio to {language}."
_BOTH = (
    "Transcribe the audio to text, and then translate the audio to {language}. "
    "Use <sep> as a separator between the original transcript and the translation."
)
_WORDS = " Words that may occur: {words}."


@dataclass(frozen=True, slots=True)
class Task:
    """Transcript, translation, or both."""

    translate: str | None = None  # a language; None: transcribe
    both: bool = False  # transcript and translation in one pass
    words: str | None = None  # to expect: names and terms, added to the model card's instruction
    instruction: str | None = None  # instead of the model card's

    def __post_init__(self) -> None:
        if self.translate is not None and not self.translate.strip():
            raise InputError("the language to translate to is empty")
        if self.words is not None and not self.words.strip():
            raise InputError("the prompt is empty")
        if self.instruction is not None and not self.instruction.strip():
            raise InputError("the instruction is empty")
        if self.both and self.translate is None:
            raise InputError("transcript and translation together need a language to translate to")
        if self.instruction is not None and (
            self.both or self.translate is not None or self.words is not None
        ):
            raise InputError(
                "an instruction of your own replaces the one for words and translation: give one of them"
            )

    @property
    def text(self) -> str:
        """The text beside the clip. Source: the model card of Phi-4-multimodal-instruct."""
        if self.instruction is not None:
            return self.instruction
        if self.translate is None:
            text = _TRANSCRIBE
        else:
            text = (_BOTH if self.both else _TRANSLATE).format(language=self.translate.strip())
        return text if self.words is None else text + _WORDS.format(words=self.words.strip().rstrip("."))
