# SPDX-License-Identifier: Apache-2.0
"""What every error promises: one line that a terminal shows as it is."""

from __future__ import annotations

import pytest

from pocketphi.runtime.errors import InputError, PocketPhiError, shortened


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("a.png: no such file", "a.png: no such file"),
        ("×  é: 1 … 2", "×  é: 1 … 2"),
        ("a\nb: no such file", "a\\nb: no such file"),
        ("\x1b[2J\0\ud800", "\\x1b[2J\\x00\\ud800"),
    ],
)
def test_a_message_is_one_printable_line(given: str, shown: str) -> None:
    assert str(InputError(given)) == shown
    assert str(PocketPhiError(given)).isprintable()


def test_a_message_is_cut_in_its_middle() -> None:
    found = str(InputError("a.png: " + "x" * 60_000 + ", expected a name"))
    assert len(found) <= 1000
    assert found.startswith("a.png: xx") and found.endswith("xx, expected a name") and "x … x" in found
    assert shortened("x" * 1000) == "x" * 1000
