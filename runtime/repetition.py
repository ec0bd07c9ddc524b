# SPDX-License-Identifier: Apache-2.0
"""Whether a text that is being written goes round in circles."""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST_UNIT = 40  # tokens; a sentence
_LEAST_COPIES = 4  # three of the same are still said: "no, no, no", "ten, ten, ten"
_LEAST_TOKENS = 16  # of all copies together: five seconds of one word


def loop_start(token_ids: Sequence[int]) -> int | None:
    """Where the repetition begins that the text ends in: everything from there on says the same again.

    Speech recognisers that write token by token may lock into a loop on noise or cut-off speech. Two readings
    in a row agree on such a loop, so agreement is no guard against it.

    Args:
        token_ids: the text so far.

    Returns:
        The end of the first copy, if at least 4 copies of one unit of up to 40 tokens stand at the end,
        together at least 16 tokens; None otherwise.
    """
    n = len(token_ids)
    for unit in range(1, min(_LONGEST_UNIT, n // 2) + 1):
        repeated = 0  # tokens at the end that equal the one a unit before
        while repeated < n - unit and token_ids[n - 1 - repeated] == token_ids[n - 1 - repeated - unit]:
            repeated += 1
        if repeated + unit >= max(_LEAST_COPIES * unit, _LEAST_TOKENS):
            return n - repeated
    return None
