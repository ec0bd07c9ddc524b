# SPDX-License-Identifier: Apache-2.0
"""Recognizes MP3 and AAC that begin with a frame of sound, where other formats have a magic number.

Source: ISO/IEC 11172-3 (MPEG 1), 13818-3 (MPEG 2), 13818-7 (the ADTS frames of AAC).
"""

from __future__ import annotations

from collections.abc import Callable

_HEADER_BYTES = 8  # enough of either kind
_RATES = (44100, 48000, 32000)  # Hz, of MPEG 1; half of it in MPEG 2, a quarter in what is called 2.5
_KBITS_1 = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)  # layer III
_KBITS_2 = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_LARGEST_AAC = 2048  # bytes: 6144 bits for each of two channels, and the header


def format_of(peek: Callable[[int], bytes]) -> str | None:
    """MP3 or AAC, where two frames in a row begin the stream: one alone may be samples by chance.

    Args:
        peek: gives the first n bytes of the stream, fewer where it ends.
    """
    first = peek(_HEADER_BYTES)
    kind, size = _frame(first)
    if kind is None:
        return None
    second = peek(size + _HEADER_BYTES)[size:]
    # Version, layer and rate stay; the bit rate and the padding may change.
    same = _frame(second)[0] == kind and second[1] == first[1] and (second[2] ^ first[2]) & 0x0C == 0
    return kind if same else None


def _frame(head: bytes) -> tuple[str | None, int]:
    """What frame begins like this, and its bytes."""
    if len(head) < _HEADER_BYTES or head[0] != 0xFF or head[1] < 0xE0:
        return None, 0
    if head[1] & 0xF6 == 0xF0:
        size = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
        return ("AAC", size) if _HEADER_BYTES <= size <= _LARGEST_AAC else (None, 0)
    version, layer = head[1] >> 3 & 3, head[1] >> 1 & 3  # 3: MPEG 1, 2: MPEG 2, 0: 2.5; 1: layer III
    bits, rate = head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or layer != 1 or bits in (0, 15) or rate == 3:
        return None, 0
    halvings = {3: 0, 2: 1, 0: 2}[version]
    samples, kbits = (1152, _KBITS_1) if version == 3 else (576, _KBITS_2)
    padding = head[2] >> 1 & 1
    return "MP3", samples // 8 * 1000 * kbits[bits - 1] // (_RATES[rate] >> halvings) + padding
