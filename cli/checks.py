# SPDX-License-Identifier: Apache-2.0
"""Flags about speech, checked before a model is loaded for them; what is wrong is said in the flag's name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pocketphi.runtime.errors import InputError

if TYPE_CHECKING:
    from pocketphi.runtime.speech_task import Task


def a_path(text: str) -> Path:
    """A flag's path. Nothing is not the current folder."""
    if not text:
        raise typer.BadParameter("is empty, expected a path")
    return Path(text)


@contextmanager
def as_flag(flag: str, name: str) -> Iterator[None]:
    """What the library says of `name`, it says of the flag."""
    try:
        yield
    except InputError as exc:
        text = str(exc)
        raise InputError(flag + text.removeprefix(name) if text.startswith(f"{name} ") else text) from None


def task_of(translate: str | None, both: bool, words: str | None, instruction: str | None) -> Task:
    """What to make of speech."""
    from pocketphi.runtime.files import is_unicode
    from pocketphi.runtime.speech_task import Task

    texts = {"--translate": translate, "--prompt": words, "--instruction": instruction}
    for flag, text in texts.items():
        if text is None:
            continue
        if not text.strip():
            raise InputError(f"{flag} is empty")
        if not is_unicode(text):  # Python holds bytes that are no text as halves of surrogate pairs
            raise InputError(f"{flag} is not Unicode text")
    return Task(translate, both, words, instruction)
