# SPDX-License-Identifier: Apache-2.0
"""The kinds of numbers that an encoder's matrices can be stored in."""

from __future__ import annotations

from typing import Literal, cast, get_args

from ..runtime.errors import InputError

EncoderQuant = Literal["fp32", "fp16", "int8", "int4"]
ENCODER_QUANTS: tuple[EncoderQuant, ...] = get_args(EncoderQuant)


def named_quant(name: str) -> EncoderQuant:
    """An encoder type by name, in upper or lower case.

    Raises:
        InputError: no such type.
    """
    if name.lower() not in ENCODER_QUANTS:
        known = ", ".join(ENCODER_QUANTS)
        raise InputError(f"encoder type {name[:40]!r} is not known, expected one of {known}")
    return cast(EncoderQuant, name.lower())
