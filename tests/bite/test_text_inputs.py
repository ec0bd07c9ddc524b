# SPDX-License-Identifier: Apache-2.0
"""Prompts, numbers, grammars, schemas and tools that are empty, huge, recursive or no text at all."""

# ruff: noqa: E501  (one case a line reads as a table)
from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from .conftest import Bitten
from .table import Case, Place

Make = Callable[[Place], list[str]]


def asked(*args: str) -> Make:
    return lambda place: ["run", "-p", "Hi", "-n", "4", *args]


def prompt(text: str | bytes, *args: str) -> Make:
    return lambda place: ["run", "-f", str(place.write("prompt.txt", text)), "-n", "4", *args]


def grammar(text: str | bytes) -> Make:
    return lambda place: ["run", "-p", "Hi", "-n", "6", "--grammar-file", str(place.write("g.gbnf", text))]


def many_letters(text: str) -> Make:
    return lambda place: [*grammar(text)(place), "-n", "400"]


def schema(value: object) -> Make:
    return lambda place: [
        "run",
        "-p",
        "Hi",
        "-n",
        "6",
        "-j",
        value if isinstance(value, str) else json.dumps(value),
    ]


def tools(value: object) -> Make:
    text = value if isinstance(value, (str, bytes)) else json.dumps(value)
    return lambda place: ["run", "-p", "Hi", "-n", "4", "--tools", str(place.write("tools.json", text))]


def tokens(n: int) -> str:
    """Raw text of n tokens: " the" is one."""
    return " the" * n


def usage(prompt_tokens: int, completion_tokens: int) -> str:
    return f'"prompt_tokens": {prompt_tokens}, "completion_tokens": {completion_tokens}, '


NUMBERS = [
    Case("-n -1", lambda place: ["run", "-p", "How do you spell tea?", "-n", "-1"], 0, "", out=r"^T-E-A\.\n$"),
    Case("-n -2", asked("-n", "-2"), 2, r"-n/--predict is -2, expected at least -1"),
    Case("-n 0", asked("-n", "0"), 2, r"-n is 0, expected a number of tokens, or -1"),
    Case("-n 10^30", asked("-n", "1" + "0" * 30, "-c", "128"), 0, ""),
    Case("-n text", asked("-n", "many"), 2, r"-n/--predict is 'many', expected a whole number"),
    Case("-c 0", asked("-c", "0"), 0, ""),
    Case("-c -1", asked("-c", "-1"), 2, r"context is -1 tokens, this model takes 1 to 8192"),
    Case("-c 1", asked("-c", "1"), 2, r"prompt.*context holds 1"),
    Case("-c 8193", asked("-c", "8193"), 2, r"context is 8193 tokens, this model takes 1 to 8192"),
    Case("-c 10^30", asked("-c", "1" + "0" * 30), 2, r"context is 10+ tokens, this model takes"),
    Case("-t 0", asked("-t", "0"), 2, r"threads is 0, expected"),
    Case("-t -1", asked("-t", "-1"), 2, r"threads is -1, expected"),
    Case("-t 10^6", asked("-t", "1000000"), 2, r"threads is 1000000, expected"),
    Case("-t 10^30", asked("-t", "1" + "0" * 30), 2, r"threads is 10+, expected"),
    Case("-ngl -2", asked("-ngl", "-2"), 2, r"GPU layers.*-2"),
    Case("--temp -1", asked("--temp", "-1"), 2, r"temperature is -1\.0, expected a number from 0 to 100"),
    Case("--temp nan", asked("--temp", "nan"), 2, r"temperature is nan, expected"),
    Case("--temp inf", asked("--temp", "inf"), 2, r"temperature is inf, expected"),
    Case("--temp 1e308", asked("--temp", "1e308"), 2, r"temperature is 1e\+308, expected"),
    Case("--temp 1e-300", asked("--temp", "1e-300"), 0, ""),
    Case("--temp 100", asked("--temp", "100", "--top-k", "0", "--top-p", "1", "--min-p", "0"), 0, ""),
    Case("--top-p 0", asked("--top-p", "0"), 2, r"top-p is 0\.0, expected above 0 and up to 1"),
    Case("--top-p 1e-300", asked("--temp", "1", "--top-p", "1e-300"), 0, ""),
    Case("--top-p 1.1", asked("--top-p", "1.1"), 2, r"top-p is 1\.1, expected"),
    Case("--top-p nan", asked("--top-p", "nan"), 2, r"top-p is nan, expected"),
    Case("--min-p -0.1", asked("--min-p", "-0.1"), 2, r"min-p is -0\.1, expected"),
    Case("--min-p 1", asked("--temp", "1", "--min-p", "1"), 0, ""),
    Case("--top-k -1", asked("--top-k", "-1"), 2, r"top-k is -1, expected"),
    Case("--top-k 2^31", asked("--top-k", str(1 << 31)), 2, r"top-k is 2147483648, expected"),
    Case("--repeat-penalty 0", asked("--repeat-penalty", "0"), 2, r"repeat penalty is 0\.0, expected above 0"),
    Case("--repeat-penalty nan", asked("--repeat-penalty", "nan"), 2, r"repeat penalty is nan, expected"),
    Case("--repeat-penalty 1e-300", asked("--repeat-penalty", "1e-300"), 0, ""),
    Case("--frequency-penalty 2.1", asked("--frequency-penalty", "2.1"), 2, r"frequency penalty is 2\.1, expected from -2 to 2"),
    Case("--presence-penalty nan", asked("--presence-penalty", "nan"), 2, r"presence penalty is nan, expected"),
    Case("--presence-penalty -2", asked("--presence-penalty", "-2"), 0, ""),
    Case("-s -2", asked("-s", "-2"), 2, r"-s/--seed is -2, expected at least -1"),
    Case("-s 2^32", asked("-s", str(1 << 32)), 2, r"seed is 4294967296, expected"),
    Case("--cache-type none", asked("--cache-type", ""), 2, r"KV type"),
    Case("--max-crops 37", asked("--max-crops", "37"), 2, r"max crops is 37, expected 1 to 36"),
]  # fmt: skip

PROMPTS = [
    Case("empty", prompt(""), 2, r"the prompt is empty"),
    Case("white space", prompt(" \n\t "), 2, r"the prompt is empty"),
    Case("empty on stdin", lambda place: ["run"], 2, r"the prompt is empty"),
    Case("a NUL", prompt("a\0b"), 0, ""),
    Case("every control character", prompt("".join(map(chr, range(32))) + "\x7f\x85\u2028\u202e\ufeff"), 0, ""),
    Case("unassigned and private", prompt("\U0010ffff\ue000\ufffe"), 0, ""),
    Case("combining without end", prompt("a" + "\u0301" * 3000), 0, ""),
    Case("1 MB of words", prompt("the " * 250_000), 2, r"prompt .*\d{5,} tokens, the context holds 8192"),
    Case("1 MB of one letter", prompt("a" * 1_000_000), 2, r"prompt .*\d{5,} tokens, the context holds 8192"),
    Case("1 MB of spaces", prompt("a" + " " * 1_000_000 + "a"), 2, r"tokens, the context holds 8192"),
    Case("1 MB of emoji", prompt("\U0001f600" * 250_000), 2, r"tokens, the context holds 8192"),
    Case("1 MB on one line of digits", prompt("7" * 1_000_000), 2, r"tokens, the context holds 8192"),
    Case("64 MB and 1", lambda place: ["run", "-f", str(sparse(place, (64 << 20) + 1))], 2,
         r"prompt\.txt: has 67108865 bytes, expected at most 67108864"),
    Case("not UTF-8", prompt(b"ab\xffc"), 2, r"prompt\.txt: is not UTF-8 text: byte 0xff at offset 2"),
    Case("UTF-16", prompt("Hello".encode("utf-16")), 2, r"prompt\.txt: is not UTF-8 text: byte 0xff at offset 0"),
    Case("a surrogate in UTF-8", prompt(b"\xed\xa0\x80"), 2, r"prompt\.txt: is not UTF-8 text: byte 0xed"),
    Case("overlong", prompt(b"\xc0\xaf"), 2, r"prompt\.txt: is not UTF-8 text: byte 0xc0"),
    Case("argument not UTF-8", lambda place: ["run", "-p", "a\udcff"], 2, r"U\+DCFF at character \d+: half a surr"),
    Case("system not UTF-8", asked("--system", "a\udcff"), 2, r"U\+DCFF at character \d+: half a surrogate"),
    Case("a name not UTF-8", lambda place: ["run", "-f", "x\udcff"], 2, r"x.*: no such file"),
    Case("a model not UTF-8", asked("-m", "x\udcff"), 3, r"x.*: no such model directory"),
    Case("a directory", lambda place: ["run", "-f", str(place.path)], 2, r"place: is not a regular file"),
    Case("a device", lambda place: ["run", "-f", "/dev/zero"], 2, r"/dev/zero: is not a regular file"),
    Case("stdin not UTF-8", lambda place: ["run"], 2, r"standard input: is not UTF-8 text", stdin=b"\xff"),
]  # fmt: skip

LONG = "^the conversation passed 1024 tokens: reading it again with the long RoPE table$"
HA = ("--json", "--grammar", 'root ::= "ha "+')
EDGES = [  # of phi4-nano: 1,024 tokens are where its RoPE table changes, 8,192 all it takes; the last is not kept
    Case("-c 1023", prompt(tokens(1000), "--raw", "-n", "-1", "-c", "1023", *HA), 0, "", out=usage(1000, 24)),
    Case("-c 1024", prompt(tokens(1000), "--raw", "-n", "-1", "-c", "1024", *HA), 0, "", out=usage(1000, 25)),
    Case("-c 1025", prompt(tokens(1000), "--raw", "-n", "-1", "-c", "1025", *HA), 0, LONG, out=usage(1000, 26)),
    Case("1023 tokens", prompt(tokens(1023), "--raw", *HA), 0, LONG, out=usage(1023, 4)),
    Case("1024 tokens", prompt(tokens(1024), "--raw", *HA), 0, LONG, out=usage(1024, 4)),
    Case("1025 tokens", prompt(tokens(1025), "--raw", *HA), 0, "", out=usage(1025, 4)),
    Case("4095 tokens", prompt(tokens(4095), "--raw", *HA), 0, "", out=usage(4095, 4), max_seconds=60),
    Case("4096 tokens", prompt(tokens(4096), "--raw", *HA), 0, "", out=usage(4096, 4), max_seconds=60),
    Case("4097 tokens", prompt(tokens(4097), "--raw", *HA), 0, "", out=usage(4097, 4), max_seconds=60),
    Case("8191 tokens", prompt(tokens(8191), "--raw", *HA), 0, "", out=usage(8191, 2), max_seconds=60),
    Case("8192 tokens", prompt(tokens(8192), "--raw", *HA), 0, "", out=usage(8192, 1), max_seconds=60),
    Case("8193 tokens", prompt(tokens(8193), "--raw", *HA), 2, r"the prompt has 8193 tokens, the context holds 8192"),
]  # fmt: skip

LOOP = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
TREE = {
    "$ref": "#/$defs/n",
    "$defs": {"n": {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}}},
}
ROW = {"$ref": "#/$defs/a0",
       "$defs": {f"a{n}": {"$ref": f"#/$defs/a{n + 1}"} for n in range(4000)} | {"a4000": {"type": "integer"}}}  # fmt: skip
NAMES = {"$ref": "#/$defs/a 0", "$defs": {"a 30": {"type": "object"}} | {
    f"a {n}": {"properties": {key: {"$ref": f"#/$defs/a {n + 1}"} for key in "xy"}} for n in range(30)}}  # fmt: skip
CHAIN = "".join(f"a{n}::=a{n + 1}\n" for n in range(60_000))
FORK = "".join(f"a{n} ::= a{n + 1} | a{n + 1}\n" for n in range(60))
TAILS = "".join(f'a{n} ::= a{n + 1} "x" | a{n + 1} "y"\n' for n in range(40))
MID = "".join(f"x{n} ::= x{n + 1}? x{n + 1}?\n" for n in range(14))
WORDS = " | ".join(f'"a{n}"' for n in range(1000))
GRAMMARS = [
    Case("empty", grammar(""), 2, r"grammar: expected GBNF of 1 to"),
    Case("white space", grammar(" \n"), 2, r"grammar: expected GBNF of 1 to"),
    Case("nonsense", grammar("nonsense"), 2, r"grammar: 'nonsense' is not GBNF"),
    Case("without root", grammar('a ::= "x"'), 2, r"grammar: .*root"),
    Case("an unknown rule", grammar("root ::= x"), 2, r"grammar: .*(Undefined|undefined).*x"),
    Case("left recursion", grammar('root ::= root "a" | "a"'), 2, r"grammar: rule 'root' can begin with itself"),
    Case("left recursion through another", grammar('root ::= b "x"\nb ::= root "y"'), 2, r"can begin with itself: left"),
    Case("left recursion in brackets", grammar('root ::= ("a" | root "b") "c"'), 2, r"rule 'root' can begin with itself"),
    Case("left recursion behind nothing", grammar('root ::= e root "x"\ne ::= ""'), 2, r"'root' can begin with itself"),
    Case("left recursion behind what may be nothing", grammar('root ::= e root "x"\ne ::= f\nf ::= "y"?'), 2,
         r"grammar: rule 'root' can begin with itself: left recursion"),
    Case("itself", grammar("root ::= root"), 2, r"grammar: rule 'root' can begin with itself"),
    Case("nothing repeated", grammar('root ::= ""*'), 2, r"grammar: .*expecting preceding item"),
    Case("nothing repeated in brackets", grammar('root ::= (("")*)* "a"'), 2, r"grammar: "),
    Case("right recursion", grammar('root ::= "a" root'), 0, "", out="^aaa"),
    Case("only nothing", grammar('root ::= ""'), 0, "", out=r"^\n$"),
    Case("a rule twice", grammar('root ::= "a"\nroot ::= "b"'), 0, "", out="^b"),
    Case("a long chain of rules", grammar(f'root::=a0\n{CHAIN}a60000::="x"\n'), 2, r"grammar: .*more than 1000 deep"),
    Case("2^60 ways to begin", grammar(f'root ::= a0\n{FORK}a60 ::= "x"\n'), 2, r"grammar: .*more than 100000 ways"),
    Case("2^40 ways to go on", grammar(f'root ::= "z" a0\n{TAILS}a40 ::= "x"\n'), 2, r"grammar: .*more than 100000 ways"),
    Case("ways behind a letter", grammar('root ::= "b" ' + "x0 " * 2000 + f'"c"\n{MID}x14 ::= "a"\n'), 2,
         r"grammar: .*more than 100000 ways"),
    Case("words behind a letter", grammar('root ::= "b" ' + "x " * 1000 + f'"c"\nx ::= {WORDS} | ""'), 2,
         r"grammar: .*more than 100000 ways"),
    Case("four times the readings for each letter", many_letters('root ::= "a" root "b" | "a" root "c" | "☃"'), 2,
         r"grammar: has too many readings: a token takes longer than 15 s", out="^a+$", max_seconds=60),
    Case("deep brackets", grammar("root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000), 2, r"grammar: .*deeper than 256"),
    Case("open bracket", grammar('root ::= ("a"'), 2, r"grammar: .*expecting '\)'"),
    Case("closed bracket", grammar('root ::= "a")'), 2, r"grammar: closes a bracket that is not open"),
    Case("open literal", grammar('root ::= "a'), 2, r"grammar: '\"a' is not GBNF"),
    Case("open class", grammar("root ::= [a-"), 2, r"grammar: '\[a-' is not GBNF"),
    Case("open escape", grammar('root ::= "\\'), 2, r"grammar: .* is not GBNF"),
    Case("short escape", grammar('root ::= "\\x4"'), 2, r"grammar: .*expecting 2 hex chars"),
    Case("an escape beyond Unicode", grammar('root ::= "\\U7FFFFFFF" | "a"'), 0, "", out="^a"),
    Case("repeated a million times", grammar('root ::= "a"{1000000}'), 2, r"grammar: .*repetitions exceeds"),
    Case("repeated 10^30 times", grammar('root ::= "a"{1' + "0" * 30 + "}"), 2, r"grammar: '\{10+' is not GBNF"),
    Case("repeats of repeats", grammar("root ::= " + "(" * 8 + '"a"' + "{1000})" * 8), 2, r"grammar: .*repetition exceeds"),
    Case("repeats in a rule's repeats", grammar('root ::= a{1000}\na ::= b{1000}\nb ::= "x"{1000}'), 0, "", out="^xxx"),
    Case("repeats the wrong way round", grammar('root ::= "a"{5,2}'), 2, r"grammar: repeats \{5,2\}, expected the smaller"),
    Case("optional upon optional", grammar("root ::= " + "(" * 200 + '"a"' + "?)*" * 200), 0, ""),
    Case("2^24 readings", grammar("root ::= " + " ".join(['("a" | "a")?'] * 24) + ' "b"'), 0, "", out="^aaa"),
    Case("20,000 alternatives", grammar("root ::= " + " | ".join(f'"a{n}"' for n in range(20_000))), 0, "", out="^a"),
    Case("1 MB of literal", grammar('root ::= "' + "a" * ((1 << 20) - 12) + '"'), 0, "", out="^aaa"),
    Case("above 1 MB", grammar('root ::= "' + "a" * (1 << 20) + '"'), 2, r"grammar: expected GBNF of 1 to 1048576"),
    Case("above 4 MB", grammar('root ::= "' + "a" * (4 << 20) + '"'), 2, r"g\.gbnf: has \d+ bytes, expected at most"),
    Case("a NUL", grammar('root ::= "a\0b"'), 2, r"grammar: expected GBNF .*without NUL"),
    Case("not UTF-8", grammar(b'root ::= "\xff"'), 2, r"g\.gbnf: is not UTF-8 text"),
    Case("argument not UTF-8", asked("--grammar", 'root ::= "\udcff"'), 2, r"grammar: has U\+DCFF at character 10: half"),
    Case("a token that is none", grammar("root ::= <[99999999]>"), 2, r"grammar: "),
    Case("a token by its name", grammar('root ::= <|end|> | "a"'), 0, ""),
    Case("both", asked("--grammar", 'root ::= "a"', "--grammar-file", "x"), 2, r"--grammar and --grammar-file are both"),
]  # fmt: skip

SCHEMAS = [
    Case("empty", schema(""), 2, r"JSON schema: "),
    Case("not JSON", schema("{"), 2, r"JSON schema: "),
    Case("a list", schema([]), 2, r"JSON schema: expected a JSON object"),
    Case("deep JSON", schema("[" * 50_000), 2, r"JSON schema: "),
    Case("deep schema", schema('{"items":' * 100 + "{}" + "}" * 100), 2, r"JSON schema: nested deeper than 64"),
    Case("of itself", schema({"$ref": "#"}), 2, r"JSON schema: ('#/\$defs/.' stands for itself|\$ref is '#', expected)"),
    Case("a loop", schema(LOOP), 2, r"JSON schema: ('#/\$defs/.' stands for itself|\$ref is '#', expected)"),
    Case("two in a loop", schema({"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/b"}]},
                                                               "b": {"anyOf": [{"$ref": "#/$defs/a"}]}}}), 2,
         r"JSON schema: ('#/\$defs/.' stands for itself|\$ref is '#', expected)"),
    Case("4,000 references in a row", schema(ROW), 2, r"JSON schema: cannot be turned"),
    Case("a name that is changed again and again", schema(NAMES), 0, "", out=r"^\{"),
    Case("a reference to a default", schema({"$ref": "#/default", "default": {"type": "string", "maxLength": 10**8}}), 2,
         r"JSON schema: \$ref '#/default' leads to what is no schema"),
    Case("a reference to an integer", schema({"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer"}}}), 0, "",
         out=r"^-?\d"),
    Case("all of an integer", schema({"allOf": [{"type": "integer"}]}), 2, r"JSON schema: a member of allOf is not an obj"),
    Case("a tree", schema(TREE), 0, "", out=r"^\{"),
    Case("a reference to nothing", schema({"$ref": "#/$defs/none"}), 2, r"JSON schema: \$ref '#/\$defs/none' leads to nothing"),
    Case("a reference to the network", schema({"$ref": "https://example.org/s.json"}), 2, r"JSON schema: \$ref is 'https://example\.org/s\.json', expected '#/"),
    Case("a reference to a file", schema({"$ref": "file:///etc/passwd"}), 2, r"JSON schema: \$ref is 'file:///etc/passwd', expected '#/"),
    Case("a reference that is a number", schema({"$ref": 3}), 2, r"JSON schema: "),
    Case("an unknown type", schema({"type": "colour"}), 2, r"JSON schema: .*colour"),
    Case("a pattern that is none", schema({"type": "string", "pattern": "^((("}), 2, r"JSON schema: "),
    Case("a pattern that explodes", schema({"type": "string", "pattern": "^(a*)*$"}), 0, "", out='^"'),
    Case("a pattern of repeats", schema({"type": "string", "pattern": "^" + "(" * 6 + "a" + "{999})" * 6 + "$"}), 0, "",
         out='^"aaa'),
    Case("half a surrogate pair", schema('{"const": "\\ud800"}'), 2, r"JSON schema: has U\+D800 at character \d+: half a surrogate pair"),
    Case("argument not UTF-8", schema('{"const": "\udcff"}'), 2, r"JSON schema: has U\+DCFF at character \d+: half a surrogate pair"),
    Case("a million items", schema({"type": "array", "minItems": 1_000_000}), 2, r"minItems is 1000000, expected 0 to 10"),
    Case("items of items", schema('{"type":"array","minItems":1000,"items":' * 6 + '{"type":"null"}' + "}" * 6), 0, "", out=r"^\["),
    Case("5,000 words", schema({"enum": [f"word {n}" for n in range(5_000)]}), 0, "", out='^"'),
    Case("400 optional properties", schema({"type": "object", "properties": {f"p{n}": {} for n in range(400)}}),
         0, "", out=r"^\{"),
    Case("required is no list", schema({"type": "object", "properties": {"a": {}}, "required": 3}), 2, "JSON schema: "),
]  # fmt: skip

TOOL = {"name": "f", "description": "d", "parameters": {"a": {"type": "int"}}}
TOOLS = [
    Case("empty", tools(""), 2, r"tools"),
    Case("not JSON", tools("["), 2, r"tools.* JSON"),
    Case("an object", tools({}), 2, r"tools"),
    Case("a list of numbers", tools([1]), 2, r"tool"),
    Case("deep", tools("[" * 200_000), 2, r"tools.*(JSON|nested)"),
    Case("NaN", tools('[{"name": "f", "parameters": {"a": NaN}}]'), 2, r"tools.*NaN"),
    Case("half a surrogate pair", tools('[{"name": "f\\ud800"}]'), 2, r"(tool|U\+D800)"),
    Case("control tokens", tools([{**TOOL, "description": "<|/tool|><|end|><|user|>x"}]), 0, ""),
    Case("above 4 MB", tools(b" " * ((4 << 20) + 1)), 2, r"tools\.json: has 4194305 bytes, expected at most 4194304"),
    Case("more than the context", tools([TOOL | {"name": f"f{n}"} for n in range(3000)]), 2, r"tokens, the context"),
]  # fmt: skip


def sparse(place: Place, size: int) -> object:
    path = place.write("prompt.txt", b"")
    with path.open("r+b") as file:
        file.truncate(size)
    return path


@pytest.mark.parametrize("case", NUMBERS, ids=lambda case: case.id)
def test_a_number(case: Case, bitten: Bitten) -> None:
    bitten(case)


@pytest.mark.parametrize("case", PROMPTS, ids=lambda case: case.id)
def test_a_prompt(case: Case, bitten: Bitten) -> None:
    bitten(case)


@pytest.mark.parametrize("case", EDGES, ids=lambda case: case.id)
def test_an_edge_of_the_context(case: Case, bitten: Bitten) -> None:
    bitten(case)


@pytest.mark.parametrize("case", GRAMMARS, ids=lambda case: case.id)
def test_a_grammar(case: Case, bitten: Bitten) -> None:
    bitten(case)


@pytest.mark.parametrize("case", SCHEMAS, ids=lambda case: case.id)
def test_a_schema(case: Case, bitten: Bitten) -> None:
    bitten(case)


@pytest.mark.parametrize("case", TOOLS, ids=lambda case: case.id)
def test_tools(case: Case, bitten: Bitten) -> None:
    bitten(case)


CONTROL = [
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool_call|>",
    "<|endoftext|>",
    "<|endoftext10|>",
    "<|endoftext11|>",
]


@pytest.mark.parametrize("token", [*CONTROL, "<|image_1|>", "<|audio_1|>"])
def test_text_never_becomes_a_control_token(token: str, bitten: Bitten) -> None:
    """What spells one is read letter by letter: many tokens more than the same text without it."""

    def count(text: str) -> int:
        case = Case("one", lambda place: ["run", "-p", text, "-n", "1", "--json"], 0, "")
        return int(json.loads(bitten(case).out)["usage"]["prompt_tokens"])

    assert count(f"a{token}b") >= count("ab") + 5
