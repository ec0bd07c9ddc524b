# SPDX-License-Identifier: Apache-2.0
"""Penalties, bias and the most probable tokens, against a second writing of their formulas in float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pocketphi.runtime.engine import Model
from pocketphi.runtime.errors import InputError
from pocketphi.runtime.parts import Message
from pocketphi.runtime.prompt import parse_raw
from pocketphi.runtime.sampler import Sampling, most_probable
from pocketphi.runtime.sampler_ggml import GgmlSampler

SAME = 2e-3  # two orders of summing the same float32 terms, as in test_session.py
PROMPT = "<|user|>Tell me a story.<|end|><|assistant|>"  # words come again and again
FRANCE = [Message("user", "What is the capital of France?")]
NONE_MASKED = np.zeros(0, np.int32)


@pytest.fixture(scope="module", params=["gguf", "onnx"])
def model(request: pytest.FixtureRequest, exact_both: Path) -> Iterator[Model]:
    kv_type = "f32" if request.param == "gguf" else None
    with Model(exact_both, backbone=request.param, kv_type=kv_type) as found:
        yield found


def logits_after(model: Model, ids: Sequence[int]) -> npt.NDArray[np.float64]:
    """The model's own, after the prompt and some of the answer; computed anew each time."""
    model.forget()
    pieces = parse_raw(PROMPT, model.tokenizer.control_tokens)
    found = model.token_logits(ids, 1, prompt=pieces)[0].astype(np.float64)
    found[model.tokenizer.unassigned_ids] = -np.inf
    return found


def greedy(model: Model, n: int, sampling: Sampling, forced: Sequence[int] = ()) -> list[int]:
    """An answer by the reference's formula, token for token; no choice in it is near a tie."""
    ids = list(forced)
    while len(ids) < n and not (ids and ids[-1] in model.bundle.stop_ids):
        mu = logits_after(model, ids)
        for j, bias in sampling.logit_bias.items():
            mu[j] += bias
        for j, c in Counter(ids).items():
            mu[j] = mu[j] - c * sampling.frequency_penalty - float(c > 0) * sampling.presence_penalty
        second, first = np.sort(mu)[-2:]
        assert first - second > 2 * SAME
        ids.append(int(mu.argmax()))
    return ids


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(frequency_penalty=2.0),
        Sampling(frequency_penalty=-2.0),
        Sampling(presence_penalty=2.0),
        Sampling(presence_penalty=-1.5),
        Sampling(frequency_penalty=1.25, presence_penalty=0.75, logit_bias={1000: 3.5, 13: -4.0}),
    ],
)
def test_penalties_are_the_references(sampling: Sampling, model: Model) -> None:
    n = 24
    own = model.complete(PROMPT, max_tokens=n).token_ids
    found = model.complete(PROMPT, max_tokens=n, sampling=sampling).token_ids
    assert list(found) == greedy(model, n, sampling)
    assert found != own
    for draft in (found, own, [*found[:3], 1000, *found[3:]]):
        assert model.complete(PROMPT, max_tokens=n, sampling=sampling, draft=draft).token_ids == found
    forced = [own[1], own[1], own[0]]
    begun = model.complete(PROMPT, max_tokens=n, sampling=sampling, draft=forced, n_forced=3).token_ids
    assert list(begun) == greedy(model, n, sampling, forced)


def test_what_the_answer_has_counts_for_ever() -> None:
    """Not only in the 64 tokens that the repeat penalty looks back."""
    level, most = np.zeros(200, np.float32), np.float32(1.5)
    sampler = GgmlSampler(Sampling(presence_penalty=2.0), None, 200, NONE_MASKED)
    level[7] = most
    assert sampler.sample(level.copy()) == 7
    found = [sampler.sample(level.copy()) for _ in range(199)]
    sampler.close()
    assert sorted([7, *found]) == list(range(200))


def test_a_bias_changes_the_odds() -> None:
    """4,000 draws of two tokens with equal logits, one with a bias of log 3: 3 of 4 within 5 sigma."""
    n = 4000
    level = np.full(50, -100.0, np.float32)
    level[[5, 9]] = 0.0
    hot = Sampling(1.0, top_k=0, top_p=1.0, min_p=0.0, seed=4, logit_bias={9: float(np.log(3))})
    sampler = GgmlSampler(hot, None, 50, NONE_MASKED)
    found = Counter(sampler.sample(level.copy()) for _ in range(n))
    sampler.close()
    assert found[5] + found[9] == n
    assert abs(found[9] - 0.75 * n) <= 5 * np.sqrt(n * 0.75 * 0.25)


def test_a_bias_forbids_and_forces(nano_model: Model) -> None:
    own = nano_model.chat(FRANCE).token_ids
    banned = nano_model.chat(FRANCE, sampling=Sampling(logit_bias=dict.fromkeys(own, -100.0)), max_tokens=40)
    assert not set(banned.token_ids) & set(own)
    forced = nano_model.chat(FRANCE, sampling=Sampling(logit_bias={own[3]: 100.0}), max_tokens=5)
    assert list(forced.token_ids) == [own[3]] * 5


def test_a_bias_chooses_among_what_a_grammar_allows(nano_model: Model) -> None:
    grammar = 'root ::= "zebra" | "lion"'
    own = nano_model.chat(FRANCE, sampling=Sampling(grammar=grammar))
    other = {"zebra": "lion", "lion": "zebra"}[own.text]
    spelled = map(nano_model.tokenizer.token_bytes, range(4096))
    ban = {i: -100.0 for i, raw in enumerate(spelled) if raw and own.text.encode().startswith(raw)}
    found = nano_model.chat(FRANCE, sampling=Sampling(grammar=grammar, logit_bias=ban))
    assert found.text == other


@pytest.mark.parametrize(
    ("token", "want"),
    [
        (-1, "token is -1, expected 0 to 4095"),
        (4096, "expected 0 to 4095"),
        (1 << 80, "expected 0 to 4095"),
        (4095, "4095 names no token"),
    ],
)
def test_a_bias_for_no_token(token: int, want: str, nano_model: Model) -> None:
    with pytest.raises(InputError, match=want) as caught:
        nano_model.chat(FRANCE, sampling=Sampling(logit_bias={token: 1.0}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("n", [1, 20, 100])
def test_the_most_probable_tokens_are_the_models_own(n: int, model: Model) -> None:
    """Whatever was chosen; each logit may be off by SAME, and so may the sum under the logarithm."""
    changed = Sampling(1.5, seed=4, frequency_penalty=1.5, logit_bias={1000: 9.0})
    reply = model.complete(PROMPT, top_logprobs=n, sampling=changed, max_tokens=8)
    assert len(reply.top_logprobs) == len(reply.logprobs) == len(reply.token_ids)
    for i, place in enumerate(reply.top_logprobs):
        logits = logits_after(model, reply.token_ids[:i])
        wanted = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        ids, values = [token for token, _ in place], np.array([value for _, value in place])
        assert len(set(ids)) == n
        assert (np.diff(values) <= 0).all()
        assert (abs(values - wanted[ids]) <= 2 * SAME).all()
        assert (abs(values - np.sort(wanted)[::-1][:n]) <= 2 * SAME).all()
        if (token := reply.token_ids[i]) in ids:
            assert dict(place)[token] == reply.logprobs[i]


def test_the_most_probable_token_is_the_greedy_one(nano_model: Model) -> None:
    reply = nano_model.chat(FRANCE, top_logprobs=2)
    assert [place[0][0] for place in reply.top_logprobs] == list(reply.token_ids)
    assert nano_model.chat(FRANCE, logprobs=True).top_logprobs == ()


def test_of_equally_probable_tokens_the_lower_comes_first() -> None:
    logits = np.array([1, 3, -np.inf, 2, 3, 2, 3, -np.inf], np.float32)
    ranked = [1, 4, 6, 3, 5, 0]
    for n in range(1, 10):
        assert most_probable(logits, n) == ranked[:n]


@pytest.mark.parametrize("n", [-1, 101])
def test_how_many_most_probable_tokens(n: int, nano_model: Model) -> None:
    with pytest.raises(InputError, match=f"top logprobs is {n}, expected 0 to 100"):
        nano_model.chat(FRANCE, top_logprobs=n)
