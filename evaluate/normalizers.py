# SPDX-License-Identifier: Apache-2.0
"""What two texts are made equal in before they are compared: Whisper's English or basic rules."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal, get_args

from ..runtime.errors import InputError, one_line

NormalizerName = Literal["english", "basic", "none"]
NORMALIZERS: tuple[NormalizerName, ...] = get_args(NormalizerName)
Normalize = Callable[[str], str]

_BRACKETED = re.compile(r"[<\[][^>\]]*[>\]]")  # the first of Whisper's rules


def normalizer(name: NormalizerName) -> Normalize:
    """A function from text to text, without white space at its ends.

    "english" and "basic" are those of Whisper: both drop what stands in brackets, punctuation and capitals;
    English writes contractions out, numbers in digits and the rest in American spelling. "none" strips.

    Raises:
        InputError: `whisper-normalizer` is not installed. From the function: a text its rules cannot take.

    Source: appendix C of "Robust Speech Recognition via Large-Scale Weak Supervision".
    """
    if name == "none":
        return str.strip
    try:
        from whisper_normalizer.basic import BasicTextNormalizer
        from whisper_normalizer.english import EnglishTextNormalizer
    except ImportError:
        raise InputError(
            f"--normalizer {name} needs whisper-normalizer: pip install 'pocketphi[eval]'"
        ) from None
    rules = EnglishTextNormalizer() if name == "english" else BasicTextNormalizer()

    def normalize(text: str) -> str:
        try:
            return str(rules(_without_brackets(text))).strip()
        except (AssertionError, ArithmeticError, ValueError) as exc:  # a number of thousands of digits
            said = one_line(exc) or "a number in it is too long"
            raise InputError(f"the {name} normalizer cannot take {text[:40]!r}…: {said}") from None

    return normalize


def _without_brackets(text: str) -> str:
    """A text that the rules make the same of in linear time.

    Their patterns look for the end of a bracket from each one that opens, and for an apostrophe from each
    white space of a run: thousands that lead to nothing would take hours.
    """
    text = _BRACKETED.sub("", _never_closed(text, "<[", ">]"))
    return " ".join(_never_closed(text, "(", ")").split())


def _never_closed(text: str, opening: str, closing: str) -> str:
    """What opens after the last that closes becomes a bracket that no rule knows."""
    end = max(text.rfind(c) for c in closing) + 1
    return text[:end] + text[end:].translate(dict.fromkeys(map(ord, opening), "{"))
