# SPDX-License-Identifier: Apache-2.0
"""The sampler on llama.cpp's sampler chain. It needs the loaded model's vocabulary only for grammars."""

from __future__ import annotations

import ctypes
import json
import secrets
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp.llama_grammar import json_schema_to_gbnf

from . import gbnf, json_schema
from .errors import InputError, one_line
from .files import check_unicode
from .parts import Float32, Int32
from .sampler import Sampling
from .stderr_capture import captured_stderr

_PENALTY_WINDOW = 64  # tokens, llama.cpp's default
# llama_token_data: the id, its logit, its probability.
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


def schema_to_grammar(schema: str) -> str:
    """GBNF for a JSON schema.

    Raises:
        InputError: not JSON, or a schema that cannot become a grammar.
    """
    if len(schema) > gbnf.MAX_CHARS:
        raise InputError(f"JSON schema: {len(schema)} characters, expected at most {gbnf.MAX_CHARS}")
    try:
        parsed = json.loads(schema)
        if not isinstance(parsed, dict):
            raise InputError("JSON schema: expected a JSON object")
        check_unicode("JSON schema", json.dumps(parsed, ensure_ascii=False))
        json_schema.check(parsed)
        json_schema.check_references(parsed)
        # The converter does not look into "$defs" beside a "$ref": say the same in allOf.
        if "$ref" in parsed:
            parsed = {k: v for k, v in parsed.items() if k != "$ref"} | {"allOf": [{"$ref": parsed["$ref"]}]}
        return str(json_schema_to_gbnf(json.dumps(parsed)))
    except InputError:
        raise
    # The converter raises whatever its walk over the schema runs into: KeyError, AssertionError, …
    except Exception as exc:
        reason = one_line(exc) or type(exc).__name__
        raise InputError(f"JSON schema: cannot be turned into a grammar: {reason}") from None


class GgmlSampler:
    """One answer's sampler: penalties, then greedy or top-k, top-p, min-p, temperature and a draw.

    A grammar is checked on the chosen token first and applied to the whole vocabulary only when
    it refuses: the same result as filtering first, at a fraction of the cost for 200,064 tokens.
    """

    def __init__(self, sampling: Sampling, vocab: Any, vocab_size: int, masked_ids: Int32) -> None:
        """
        Args:
            sampling: the settings.
            vocab: `llama_vocab *` of the loaded model.
            vocab_size: rows of the logits.
            masked_ids: int32 [n], ids that must never be chosen (rows without a token).

        Raises:
            InputError: the grammar or schema does not parse.
        """
        self._masked = masked_ids
        self._candidates = np.zeros(vocab_size, _CANDIDATE)
        self._ids = np.arange(vocab_size, dtype=np.int32)
        self._grammar = _grammar_sampler(sampling, vocab)
        self._chain = _chain(sampling, vocab_size)

    def sample(self, logits: Float32) -> int:
        """The next token id; remembers it for penalties and the grammar."""
        logits[self._masked] = -np.inf
        token = self._choose(logits, filtered=False)
        if self._grammar is not None and not self._allows(token):
            token = self._choose(logits, filtered=True)
        if self._grammar is not None:
            llama_cpp.llama_sampler_accept(self._grammar, token)
        llama_cpp.llama_sampler_accept(self._chain, token)
        return token

    def close(self) -> None:
        """Free the chain and the grammar."""
        for name in ("_chain", "_grammar"):
            sampler = getattr(self, name, None)
            if sampler is not None:
                llama_cpp.llama_sampler_free(sampler)
                setattr(self, name, None)

    def _choose(self, logits: Float32, *, filtered: bool) -> int:
        c = self._candidates
        c["id"], c["logit"], c["p"] = self._ids, logits, 0.0
        array = _as_array(c)
        if filtered:
            llama_cpp.llama_sampler_apply(self._grammar, ctypes.byref(array))
            if not np.isfinite(c["logit"]).any():
                raise InputError("grammar: none of this model's tokens can go on from here")
        llama_cpp.llama_sampler_apply(self._chain, ctypes.byref(array))
        return int(array.data[array.selected].id)

    def _allows(self, token: int) -> bool:
        one = np.zeros(1, _CANDIDATE)
        one["id"] = token
        array = _as_array(one)
        llama_cpp.llama_sampler_apply(self._grammar, ctypes.byref(array))
        return bool(np.isfinite(one["logit"][0]))


def _as_array(candidates: np.ndarray[Any, Any]) -> Any:
    data = candidates.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token_data))
    return llama_cpp.llama_token_data_array(data=data, size=len(candidates), selected=-1, sorted=False)


def _grammar_sampler(sampling: Sampling, vocab: Any) -> Any:
    grammar = sampling.grammar
    if sampling.json_schema is not None:
        grammar = schema_to_grammar(sampling.json_schema)
    if grammar is None:
        return None
    gbnf.check(grammar)
    with captured_stderr() as said:  # the parser's complaints go there
        sampler = llama_cpp.llama_sampler_init_grammar(vocab, grammar.encode("utf-8"), b"root")
    if not sampler:
        reason = " ".join(said.text.split())[:200] or "is not GBNF with a rule named root"
        raise InputError(f"grammar: {reason}")
    return sampler


def _chain(sampling: Sampling, vocab_size: int) -> Any:
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    parts = []
    if sampling.repeat_penalty != 1.0:
        parts.append(
            llama_cpp.llama_sampler_init_penalties(
                vocab_size, _PENALTY_WINDOW, sampling.repeat_penalty, 0.0, 0.0
            )
        )
    if sampling.temperature == 0.0:
        parts.append(llama_cpp.llama_sampler_init_greedy())
    else:
        seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        parts += [
            llama_cpp.llama_sampler_init_top_k(sampling.top_k),
            llama_cpp.llama_sampler_init_top_p(sampling.top_p, 1),
            llama_cpp.llama_sampler_init_min_p(sampling.min_p, 1),
            llama_cpp.llama_sampler_init_temp(sampling.temperature),
            llama_cpp.llama_sampler_init_dist(seed),
        ]
    for part in parts:
        llama_cpp.llama_sampler_chain_add(chain, part)
    return chain
