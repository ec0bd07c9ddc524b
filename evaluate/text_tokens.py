# SPDX-License-Identifier: Apache-2.0
"""The tokens of a text as far as they are wanted; what a long one takes in memory does not grow with it."""

from __future__ import annotations

import numpy as np

from ..runtime.engine import Model
from ..runtime.parts import Int32, Progress

_BAR_CHARS = 1 << 20  # of text that take more than a moment


def text_ids(model: Model, text: str, most: int | None, progress: Progress) -> tuple[Int32, bool]:
    """The first tokens of a text without the line end that ends it, which llama.cpp does not read either.

    Args:
        model: whose vocabulary it is.
        text: what spells a control token in it stays text.
        most: stop when there are so many; None: all.
        progress: counts characters, of a long text.

    Returns:
        int32 [n], some more than `most`, and whether they are all.

    Raises:
        InputError: half a surrogate pair, or too long a stretch that cannot be cut.
    """
    text = text.removesuffix("\n")
    found: list[Int32] = [np.zeros(0, np.int32)]
    n = read = 0
    told = progress if len(text) > _BAR_CHARS else None
    try:
        if told is not None:
            told.start(len(text), "tokens")
        for ids, n_chars in model.tokenizer.encode_pieces(text):
            found.append(ids)
            n, read = n + len(ids), read + n_chars
            if told is not None:
                told.advance(n_chars, "tokens")
            if most is not None and n >= most:
                break
    finally:
        if told is not None:
            told.finish()
    return np.concatenate(found), read == len(text)
