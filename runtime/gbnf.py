# SPDX-License-Identifier: Apache-2.0
"""Refuses grammars that llama.cpp would follow too deep, or for ever: it checks little before it recurses."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import InputError
from .files import check_unicode

MAX_CHARS = 1 << 20
_MAX_NESTING = 256  # llama.cpp's parser recurses: 20,000 overflow its stack
_MAX_CHAIN = 1000  # rules that begin with rules: its search for left recursion recurses too
_MAX_WAYS = 100_000  # to come to the next character: it tries, and then keeps, each
_MAX_PLACES = 4_000_000  # in the rules, 8 bytes each, that it keeps for all those ways together
_MAX_TIMES = 2000  # of a repetition: it takes more for no bound
_NOT_BRACKETS = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*')
_GBNF = re.compile(
    r"""\s+|\#[^\n]* | (?P<rule>[A-Za-z0-9-]+)\s*::= | (?P<name>[A-Za-z0-9-]+) | (?P<mark>[()|])
    | (?P<piece>"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|\.|!?<[^>]*>)
    | (?P<times>[*+?]|\{\s*(?P<low>\d{1,9})\s*(?:,\s*(?P<high>\d{1,9})?\s*)?\})""",
    re.DOTALL | re.VERBOSE,
)


@dataclass(slots=True)
class _Part:
    """A piece of an alternative."""

    rule: str | None  # its name; None: a literal, a class or a token
    optional: bool  # it may be left out
    times: int = 1  # llama.cpp writes it down so often


# A rule's alternatives; of each, its parts.
_Rules = dict[str, list[list[_Part]]]


def check(grammar: str) -> None:
    """Look at a grammar before llama.cpp does, which refuses on its own what is merely not GBNF.

    Raises:
        InputError: empty, too long, no text; not made of rules; brackets too deep, left recursion, or more
            chains and ways to begin than llama.cpp gets through.
    """
    if not grammar.strip() or len(grammar) > MAX_CHARS or "\0" in grammar:
        raise InputError(f"grammar: expected GBNF of 1 to {MAX_CHARS} characters without NUL")
    check_unicode("grammar", grammar)
    if _nesting(grammar) > _MAX_NESTING:
        raise InputError(f"grammar: brackets are nested deeper than {_MAX_NESTING}")
    _check_rules(_rules_of(grammar))


def _rules_of(grammar: str) -> _Rules:
    """What begins what in a grammar; a bracket is a rule named "(" and its number.

    Raises:
        InputError: it is not GBNF, or repeats {more,fewer} times, of which llama.cpp makes 2^64 rules.
    """
    rules: _Rules = {}
    here: list[list[_Part]] = []
    around: list[list[list[_Part]]] = []
    at = 0
    while at < len(grammar):
        match = _GBNF.match(grammar, at)
        if match is None or not (here or match["rule"] or match.lastgroup is None):
            raise InputError(f"grammar: {grammar[at : at + 20]!r} is not GBNF: a name, ::= and what it is")
        at, text = match.end(), match.group()
        if match["rule"]:
            here, around = rules.setdefault(match["rule"], []), []
            here.append([])
        elif match["name"] or match["piece"]:
            here[-1].append(_Part(match["name"], text == '""'))
        elif text == "(":
            name = f"({len(rules)}"
            here[-1].append(_Part(name, False))
            around.append(here)
            here = rules[name] = [[]]
        elif text == ")":
            if not around:
                raise InputError("grammar: closes a bracket that is not open")
            here = around.pop()
        elif text == "|":
            here.append([])
        elif match["times"]:
            if match["high"] and int(match["high"]) < int(match["low"]):
                raise InputError(f"grammar: repeats {text}, expected the smaller number first")
            if here[-1]:
                part, low = here[-1][-1], int(match["low"] or (text == "+"))
                part.optional |= text in "*?" or (text[0] == "{" and low == 0)
                exact = "," not in text and text[0] == "{"
                part.times *= min(int(match["high"] or low + (not exact)), low + _MAX_TIMES) or 1
    return rules


def _check_rules(rules: _Rules) -> None:
    """Refuse what llama.cpp would follow for ever: left recursion, of which it finds some, and too many ways.

    Raises:
        InputError: which rule.
    """
    empty = _may_be_empty(rules)
    firsts = _firsts(rules, empty)
    depth: dict[str, int] = {}
    counted: dict[str, tuple[int, int]] = {}
    for root in rules:
        path = [] if root in depth else [root]
        open_: dict[str, int] = {}  # on the path: how many of its firsts have been looked at
        while path:
            name = path[-1]
            i = open_.get(name, 0)
            open_[name] = i + 1
            if i < len(firsts[name]):
                first = firsts[name][i]
                if first in open_:
                    named = next((n for n in (first, *reversed(path)) if not n.startswith("(")), "root")
                    raise InputError(f"grammar: rule {named[:60]!r} can begin with itself: left recursion")
                if first not in depth:
                    path.append(first)
                continue
            depth[name] = 1 + max((depth[f] for f in firsts[name]), default=0)
            if depth[name] > _MAX_CHAIN:
                raise InputError(f"grammar: rules begin with rules, more than {_MAX_CHAIN} deep")
            begins = [_counted(parts, counted, empty)[0] for parts in rules[name]]
            counted[name] = 1 + sum(ways for ways, _ in begins), max(places for _, places in begins)
            _check_counted(*counted[name])
            del open_[path.pop()]
    for alternatives in rules.values():
        for parts in alternatives:
            for ways, places in _counted(parts, counted, empty):
                _check_counted(ways, places)


def _check_counted(ways: int, places: int) -> None:
    if ways > _MAX_WAYS:
        raise InputError(f"grammar: rules can go on in more than {_MAX_WAYS} ways")
    if ways * places > _MAX_PLACES:
        raise InputError(f"grammar: rules can go on in {ways} ways, up to {places} deep: too many together")


def _counted(
    parts: list[_Part], counted: dict[str, tuple[int, int]], empty: set[str]
) -> list[tuple[int, int]]:
    """For each place in an alternative: the ways to the next character, and how deep in rules the deepest is.

    Where a part may be empty, the ways of what follows are ways too. A rule that is not counted yet is no
    rule or stands behind what cannot be empty, where nobody looks before all are counted.
    """
    found = [(1, 0)]
    for part in reversed(parts):
        ways, places = counted.get(part.rule or "", (1, 0))
        passed = part.rule in empty
        if passed:
            ways *= part.times
        if len(found) > 1 or part.times > 1:
            places += 1  # what follows is kept as well; the end of an alternative is not
        if passed or part.optional:
            ways, places = ways + found[-1][0], max(places, found[-1][1])
        found.append((ways, max(places, 1)))
    return found[::-1]


def _firsts(rules: _Rules, empty: set[str]) -> dict[str, list[str]]:
    """The rules that each rule can begin with, as often as they stand there."""
    found: dict[str, list[str]] = {}
    for name, alternatives in rules.items():
        found[name] = firsts = []
        for parts in alternatives:
            for part in parts:
                if part.rule in rules:
                    firsts.append(str(part.rule))
                if not part.optional and part.rule not in empty:
                    break
    return found


def _may_be_empty(rules: _Rules) -> set[str]:
    """The rules that nothing can satisfy: those with an alternative whose parts all may be left out."""
    needed: list[int] = []  # of each alternative: parts that are not known to be empty yet
    owner: list[str] = []
    stands_in: dict[str, list[int]] = {}
    for name, alternatives in rules.items():
        for parts in alternatives:
            for part in parts:
                if part.rule is not None and not part.optional:
                    stands_in.setdefault(part.rule, []).append(len(needed))
            needed.append(sum(not part.optional for part in parts))
            owner.append(name)
    empty: set[str] = set()
    waiting = [name for name, n in zip(owner, needed, strict=True) if n == 0]
    while waiting:
        name = waiting.pop()
        if name in empty:
            continue
        empty.add(name)
        for i in stands_in.get(name, []):
            needed[i] -= 1
            if needed[i] == 0:
                waiting.append(owner[i])
    return empty


def _nesting(grammar: str) -> int:
    """How deep the brackets of a grammar go, those in literals, classes and comments apart."""
    depth = deepest = 0
    for char in _NOT_BRACKETS.sub("", grammar):
        depth += (char == "(") - (char == ")")
        deepest = max(deepest, depth)
    return deepest
