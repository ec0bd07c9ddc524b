# SPDX-License-Identifier: Apache-2.0
"""Holds back streamed text that may be a tool call without its tags: JSON from the first character."""

from __future__ import annotations

_FUNCTOOLS = "functools"


class Screen:
    """One answer's text on its way out."""

    def __init__(self, *, hold_calls: bool) -> None:
        """`hold_calls`: the model was told of tools."""
        self._holding = hold_calls
        self._held: list[str] = []
        self._start = ""  # as much of the beginning as decides
        self._given = 0  # characters

    def push(self, text: str) -> str:
        """What of it can be shown."""
        if not self._holding:
            self._given += len(text)
            return text
        self._held.append(text)
        if len(self._start) < len(_FUNCTOOLS):
            self._start = (self._start + text).lstrip()[: len(_FUNCTOOLS)]
        may_be = self._start.startswith(("[", "{")) or _FUNCTOOLS.startswith(self._start)
        if may_be:
            return ""
        self._holding = False
        shown = "".join(self._held)
        self._held.clear()
        self._given += len(shown)
        return shown

    def rest(self, text: str) -> str:
        """What has not been shown of the whole answer's text."""
        return text[self._given :]
