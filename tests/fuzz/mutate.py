# SPDX-License-Identifier: Apache-2.0
"""Inputs made from seeds, the same for the same seeds and number: for where no coverage leads."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

_MOST_BYTES = 1 << 16
_NUMBERS = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63,
    2**64 - 1,
)


def inputs(seeds: Sequence[bytes], number: int) -> Iterator[bytes]:
    """Every seed, every eighth of its beginnings, then changed and mixed ones without end."""
    yield b""
    yield from seeds
    for seed in seeds:
        yield from (seed[: len(seed) * i // 8] for i in range(1, 8))
    rng = random.Random(number)
    while True:
        data = bytearray(
            rng.choice(seeds) if seeds and rng.random() < 0.97 else rng.randbytes(rng.randrange(300))
        )
        for _ in range(1 << rng.randrange(5)):
            _change(data, seeds, rng)
        yield bytes(data[:_MOST_BYTES])


def _change(data: bytearray, seeds: Sequence[bytes], rng: random.Random) -> None:
    at, kind = rng.randrange(len(data) + 1), rng.randrange(8)
    if kind == 0 and at < len(data):
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1 and at < len(data):
        data[at] = rng.randrange(256)
    elif kind == 2:
        del data[at : len(data) if rng.random() < 0.2 else at + rng.randrange(1, 17)]
    elif kind == 3:
        data[at:at] = rng.randbytes(rng.randrange(1, 9))
    elif kind == 4:  # a number in place of some bytes
        size = rng.choice((1, 2, 4, 8))
        number = rng.choice(_NUMBERS) + rng.randrange(-1, 2)
        data[at : at + size] = (number % 256**size).to_bytes(size, rng.choice(("little", "big")))
    elif kind == 5:  # some of it again
        size = rng.randrange(1, 65)
        data[at:at] = data[at : at + size]
    elif kind == 6 and seeds:  # a part of another
        other = rng.choice(seeds)
        start = rng.randrange(len(other) + 1)
        data[at : at + rng.randrange(65)] = other[start : start + rng.randrange(65)]
    elif at < len(data):
        data[at] = (data[at] + rng.choice((-1, 1))) % 256
