# SPDX-License-Identifier: Apache-2.0
"""Puts token spans and embedded spans in prompt order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .parts import EmbedSpan, Media, Span, TokenSpan
from .prompt import Piece, Slot, TextPiece
from .tokenizer import Tokenizer


def spans(pieces: Sequence[Piece], tokenizer: Tokenizer, embed: Callable[[Media], EmbedSpan]) -> list[Span]:
    """The prompt as what the decoder reads.

    The reference repeats a placeholder token once for each row and overwrites their embeddings with
    the encoder's; text on both sides is tokenized apart, as here.

    Args:
        pieces: from `prompt.render` or `prompt.parse_raw`.
        tokenizer: for everything that is not a slot.
        embed: the rows of a picture or clip.

    Source: `Phi4MMProcessor` (placeholder expansion), `Phi4MMImageAudioEmbedding.forward`.
    """
    found: list[Span] = []
    texts: list[TextPiece] = []
    for piece in (*pieces, None):
        if isinstance(piece, (Slot, type(None))):
            ids = tokenizer.encode(texts)
            texts = []
            if len(ids):
                found.append(TokenSpan(ids))
        if isinstance(piece, Slot):
            found.append(embed(piece.media))
        elif piece is not None:
            texts.append(piece)
    return found
