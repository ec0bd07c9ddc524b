# SPDX-License-Identifier: Apache-2.0
"""Whisper's rules, a case for each of those in appendix C of its paper."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import pytest
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from pocketphi.evaluate.normalizers import NormalizerName, normalizer
from pocketphi.runtime.errors import InputError

ENGLISH = [
    ("[noise] hello", "hello"),
    ("(laughs) hello", "hello"),
    ("hmm hello um, mhm mm uh you", "hello you"),
    ("it 's", "it is"),
    ("I won't, he'd been, can't", "i will not he had been can not"),
    ("10,000 men", "10000 men"),
    ("This. Is 3.5", "this is 3.5"),
    ("café, naïve; #x", "cafe naive x"),
    ("Ten thousand dollars", "$10000"),
    ("Twenty-five and three four", "25 and 34"),
    ("the colour of a theatre", "the color of a theater"),
    ("50% of € here", "50% of here"),
    ("a \t b\n c", "a b c"),
]
BASIC = [
    ("[noise] Hello (laughs), <x> World!", "hello world"),
    ("Schöne Grüße!", "schöne grüße"),
    ("It's 10,000", "it s 10 000"),
    ("a \t b\n c ", "a b c"),
]


@pytest.mark.parametrize(("text", "wanted"), ENGLISH)
def test_english(text: str, wanted: str) -> None:
    assert normalizer("english")(text) == wanted


@pytest.mark.parametrize(("text", "wanted"), BASIC)
def test_basic(text: str, wanted: str) -> None:
    assert normalizer("basic")(text) == wanted


@pytest.mark.parametrize(
    ("name", "rules"), [("english", EnglishTextNormalizer()), ("basic", BasicTextNormalizer())]
)
def test_brackets_are_dropped_as_whisper_does(name: NormalizerName, rules: Callable[[str], str]) -> None:
    """On whatever opens and closes; ours takes linear time."""
    rng = np.random.default_rng(3)
    ours = normalizer(name)
    for _ in range(2000):
        text = "".join(rng.choice(list("<>[](){}' \n.ab1s"), rng.integers(1, 24)))
        assert ours(text) == rules(text).strip(), text
    for text in ["[" * (1 << 18), "(" * (1 << 18) + "[)]", " " * (1 << 18) + "x", "a <" * (1 << 16)]:
        assert len(ours(text)) <= 1 << 17


def test_none_only_strips() -> None:
    assert normalizer("none")(" It's  10,000.\n") == "It's  10,000."


def test_a_text_that_the_rules_cannot_take() -> None:
    with pytest.raises(InputError, match=r"^the english normalizer cannot take '1111"):
        normalizer("english")("1" * 5000)


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "whisper_normalizer.english", None)
    with pytest.raises(InputError, match=r"needs whisper-normalizer: pip install 'pocketphi\[eval\]'$"):
        normalizer("english")
    assert normalizer("none")("x") == "x"
