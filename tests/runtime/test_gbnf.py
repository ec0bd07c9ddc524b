# SPDX-License-Identifier: Apache-2.0
"""Which grammars never reach llama.cpp; what it makes of the others is tested with a model."""

from __future__ import annotations

import pytest

from pocketphi.runtime import gbnf
from pocketphi.runtime.errors import InputError


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        ("", "of 1 to 1048576 characters"),
        ('root ::= "\ud800"', "U\\+D800"),
        ("root ::= root", "'root' can begin with itself"),
        ('root ::= e root "x"\ne ::= "y"?', "left recursion"),
        ("root ::= " + "(" * 257 + '"a"' + ")" * 257, "deeper than 256"),
        ('root ::= "a"{5,2}', "smaller number first"),
    ],
)
def test_refused(grammar: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        gbnf.check(grammar)


@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= "a" root | "b"',
        "root ::= " + "(" * 256 + '"a"' + ")" * 256,
        'root ::= "a" root "b" | "a" root "c" | "d"',
    ],
)
def test_passed_on(grammar: str) -> None:
    gbnf.check(grammar)
