# SPDX-License-Identifier: Apache-2.0
"""Which grammars never reach llama.cpp; what it makes of the others is tested with a model."""

from __future__ import annotations

import json

import pytest
from llama_cpp import llama_grammar

from pocketphi.runtime import gbnf
from pocketphi.runtime.errors import InputError
from pocketphi.runtime.sampler_ggml import schema_to_grammar

MID = 'root ::= "b" ' + "x0 " * 2000 + '"c"\n' + "".join(f"x{n} ::= x{n + 1}? x{n + 1}?\n" for n in range(14))
MANY = 'root ::= "b" ' + "x " * 1000 + '"c"\nx ::= ' + " | ".join(f'"a{n}"' for n in range(1000)) + ' | ""'
AGAIN = 'root ::= "b" x{1000} "c"\nx ::= ' + " | ".join(f'"a{n}"' for n in range(1000)) + ' | ""'
DEEP = (
    'root ::= "b" a0\n'
    + "".join(f'a{n} ::= ("x" | a{n + 1}) ("y" | "z")\n' for n in range(450))
    + "a450 ::= "
)
DEEP += " | ".join(f'"a{n}"' for n in range(10_000))


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        ("", "of 1 to 1048576 characters"),
        ('root ::= "\ud800"', "U\\+D800"),
        ("root ::= root", "'root' can begin with itself"),
        ('root ::= e root "x"\ne ::= "y"?', "left recursion"),
        ("root ::= " + "(" * 257 + '"a"' + ")" * 257, "deeper than 256"),
        ('root ::= "a"{5,2}', "smaller number first"),
        (MID + 'x14 ::= "a"', "more than 100000 ways"),
        (MANY, "more than 100000 ways"),
        (AGAIN, "more than 100000 ways"),
        (DEEP, "deep: too many together"),
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


SHIPPED = [name for name in dir(llama_grammar) if name.endswith("_GBNF")]


@pytest.mark.parametrize("name", SHIPPED)
def test_grammars_that_come_with_llama_cpp_are_passed_on(name: str) -> None:
    gbnf.check(getattr(llama_grammar, name))


def record(n: int) -> dict[str, object]:
    """One of 40 kinds of record that refer to each other."""
    return {
        "type": "object",
        "properties": {f"note {i}": {"type": ["string", "null"]} for i in range(30)}
        | {
            "kind": {"enum": [f"word {n} {i}" for i in range(300)]},
            "next": {"anyOf": [{"$ref": f"#/$defs/record {(n + 1) % 40}"}, {"type": "null"}]},
            "list": {"type": "array", "items": {"$ref": f"#/$defs/record {n * 7 % 40}"}, "maxItems": 20},
            "text": {"type": "string", "maxLength": 200},
        },
        "required": ["kind"],
    }


RECORDS = {"$ref": "#/$defs/record 0", "$defs": {f"record {n}": record(n) for n in range(40)}}
KINDS = [
    {"type": "object", "properties": {"of": {"const": n}, "is": {"enum": [f"{n} {i}" for i in range(200)]}}}
    for n in range(100)
]
WORDS = {"type": "array", "items": {"enum": [f"word {n}" for n in range(5000)]}, "maxItems": 200}
WIDE = {"type": "object", "properties": {f"p{n}": {"enum": list("abcdefgh")} for n in range(300)}}


@pytest.mark.parametrize(
    "schema", [RECORDS, {"anyOf": KINDS}, WORDS, WIDE], ids=("records", "kinds", "words", "wide")
)
def test_grammars_of_large_schemas_are_passed_on(schema: dict[str, object]) -> None:
    gbnf.check(schema_to_grammar(json.dumps(schema)))
