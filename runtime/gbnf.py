# SPDX-License-Identifier: Apache-2.0
"""Refuses grammars that llama.cpp would follow too deep, or for ever: it checks little before it recurses."""

from __future__ import annotations

import re

from .errors import InputError
from .files import check_unicode

MAX_CHARS = 1 << 20
_MAX_NESTING = 256  # llama.cpp's parser recurses: 20,000 overflow its stack
_MAX_CHAIN = 1000  # rules that begin with rules: its search for left recursion recurses too
_MAX_WAYS = 100_000  # to come to a rule's first character: it tries, and then keeps, each
_NOT_BRACKETS = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*')
_GBNF = re.compile(
    r"""\s+|\#[^\n]* | (?P<rule>[A-Za-z0-9-]+)\s*::= | (?P<name>[A-Za-z0-9-]+) | (?P<mark>[()|])
    | (?P<piece>"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|\.|!?<[^>]*>)
    | (?P<times>[*+?]|\{\s*(?P<low>\d{1,9})\s*(?:,\s*(?P<high>\d{1,9})?\s*)?\})""",
    re.DOTALL | re.VERBOSE,
)
# A rule's alternatives; of each, its parts: a rule's name or None, and whether it may be left out.
_Rules = dict[str, list[list[tuple[str | None, bool]]]]


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
    here: list[list[tuple[str | None, bool]]] = []
    around: list[list[list[tuple[str | None, bool]]]] = []
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
            here[-1].append((match["name"], text == '""'))
        elif text == "(":
            name = f"({len(rules)}"
            here[-1].append((name, False))
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
            if here[-1] and (text in "*?" or int(match["low"] or 1) == 0):
                here[-1][-1] = (here[-1][-1][0], True)
    return rules


def _check_rules(rules: _Rules) -> None:
    """Refuse what llama.cpp would follow for ever: left recursion, of which it finds some, and too many ways.

    Raises:
        InputError: which rule.
    """
    firsts = _firsts(rules)
    depth: dict[str, int] = {}
    ways: dict[str, int] = {}
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
            ways[name] = 1 + sum(ways[f] for f in firsts[name])
            if depth[name] > _MAX_CHAIN:
                raise InputError(f"grammar: rules begin with rules, more than {_MAX_CHAIN} deep")
            if ways[name] > _MAX_WAYS:
                raise InputError(f"grammar: rules can begin in more than {_MAX_WAYS} ways")
            del open_[path.pop()]


def _firsts(rules: _Rules) -> dict[str, list[str]]:
    """The rules that each rule can begin with, as often as they stand there."""
    empty = _may_be_empty(rules)
    found: dict[str, list[str]] = {}
    for name, alternatives in rules.items():
        found[name] = firsts = []
        for parts in alternatives:
            for part, optional in parts:
                if part in rules:
                    firsts.append(str(part))
                if not optional and part not in empty:
                    break
    return found


def _may_be_empty(rules: _Rules) -> set[str]:
    """The rules that nothing can satisfy: those with an alternative whose parts all may be left out."""
    needed: list[int] = []  # of each alternative: parts that are not known to be empty yet
    owner: list[str] = []
    stands_in: dict[str, list[int]] = {}
    for name, alternatives in rules.items():
        for parts in alternatives:
            for part, optional in parts:
                if part is not None and not optional:
                    stands_in.setdefault(part, []).append(len(needed))
            needed.append(sum(not optional for _, optional in parts))
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
