# SPDX-License-Identifier: Apache-2.0
"""The sampler on llama.cpp's sampler chain. It needs the loaded model's vocabulary only for grammars."""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp.llama_grammar import json_schema_to_gbnf

from . import gbnf, json_schema
from .errors import BundleError, InputError, one_line
from .files import check_unicode
from .ggml_log import ENGINE_LOG
from .gguf_check import read_model, read_vocabulary
from .parts import Float32, Int32
from .sampler import LogitChanges, Sampling
from .spec import TextSpec
from .stderr_capture import captured_stderr

_PENALTY_WINDOW = 64  # tokens, llama.cpp's default
_PATIENCE = 150  # times _LOOK_S: no grammar that is meant well takes 15 s for a token
_LOOK_S = 0.1
_PARTING_S = (
    1.0  # a grammar that is at work when all is given up gets so long to finish: most take microseconds
)
_IDLE = "pocketphi-decoder-grammar"  # as the decoder's thread: it works only while its caller waits
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
        parsed = json_schema.checked(parsed)
        return str(json_schema_to_gbnf(json.dumps(parsed)))
    except InputError:
        raise
    # The converter raises whatever its walk over the schema runs into: KeyError, AssertionError, …
    except Exception as exc:
        reason = one_line(exc) or type(exc).__name__
        raise InputError(f"JSON schema: cannot be turned into a grammar: {reason}") from None


class GgmlVocabulary:
    """A GGUF's vocabulary without its weights, for grammars over another engine's logits."""

    def __init__(self, path: Path, spec: TextSpec, *, alone: bool) -> None:
        """
        Args:
            path: the GGUF.
            spec: what the bundle says the model is; checked against the file.
            alone: it has a vocabulary and no tensors.

        Raises:
            BundleError: it is not such a file.
        """
        self._model: Any = None
        if alone:
            read_vocabulary(path, spec)
        else:
            read_model(path, spec)
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        ENGINE_LOG.forget()
        # In a thread, where no interrupt can cut into the log's callback; one that comes waits for the end.
        with ThreadPoolExecutor(1, thread_name_prefix=_IDLE) as worker:
            llama_cpp.llama_backend_init()
            loading = worker.submit(llama_cpp.llama_model_load_from_file, os.fsencode(path), params)
            self._model = loading.result()
        if not self._model:
            raise BundleError(f"{path}: llama.cpp cannot load its vocabulary: {ENGINE_LOG.reason}")
        self.pointer: Any = llama_cpp.llama_model_get_vocab(self._model)  # llama_vocab *

    def close(self) -> None:
        """Give back memory. Safe to call twice."""
        if self._model is not None:
            llama_cpp.llama_model_free(self._model)
            self._model = None


class GgmlSampler:
    """One answer's sampler: changes of logits, then llama.cpp's chain.

    That is the repeat penalty, then greedy or top-k, top-p, min-p, temperature and a draw.

    A grammar is checked on the chosen token first and applied to the whole vocabulary only when
    it refuses: the same result as filtering first, at a fraction of the cost for 200,064 tokens.
    """

    def __init__(self, sampling: Sampling, vocab: Any, vocab_size: int, masked_ids: Int32) -> None:
        """
        Args:
            sampling: the settings.
            vocab: `llama_vocab *` of the model; None will do without grammar and schema.
            vocab_size: rows of the logits.
            masked_ids: int32 [n], ids that must never be chosen (rows without a token).

        Raises:
            InputError: the grammar or schema does not parse, or a bias is for an id that names no token.
        """
        self._masked = masked_ids
        self._changes = LogitChanges(sampling, vocab_size, masked_ids)
        self._candidates = np.zeros(vocab_size, _CANDIDATE)
        self._ids = np.arange(vocab_size, dtype=np.int32)
        self._done = threading.Event()  # the grammar is not at work
        self._done.set()
        self._grammar = _grammar_sampler(sampling, vocab)
        self._chain = _chain(sampling, vocab_size)

    def sample(self, logits: Float32) -> int:
        """The next token id; remembers it for penalties and the grammar.

        Raises:
            InputError: the grammar leaves no token, or takes too long over one. Only `close` may follow.
        """
        logits[self._masked] = -np.inf
        self._changes.apply(logits)
        token = self._choose(logits, filtered=False)
        if self._grammar is not None and not self._allows(token):
            token = self._choose(logits, filtered=True)
        if self._grammar is not None:
            self._wait_for(lambda: llama_cpp.llama_sampler_accept(self._grammar, token))
        llama_cpp.llama_sampler_accept(self._chain, token)
        self._changes.accept(token)
        return token

    def close(self) -> None:
        """Free the chain and the grammar, but not a grammar at work: it would come upon freed memory.

        It reads the model's vocabulary too, so it is waited for a little: the model goes next.
        """
        if not self._done.wait(_PARTING_S):
            self._grammar = None
        for name in ("_chain", "_grammar"):
            sampler = getattr(self, name, None)
            if sampler is not None:
                llama_cpp.llama_sampler_free(sampler)
                setattr(self, name, None)

    def _choose(self, logits: Float32, *, filtered: bool) -> int:
        c = self._candidates
        c["id"], c["logit"], c["p"] = self._ids, logits, 0.0
        if filtered:
            self._filter(c)
            if not np.isfinite(c["logit"]).any():
                raise InputError("grammar: none of this model's tokens can go on from here")
        array = _as_array(c)
        llama_cpp.llama_sampler_apply(self._chain, ctypes.byref(array))
        return int(array.data[array.selected].id)

    def _allows(self, token: int) -> bool:
        one = np.zeros(1, _CANDIDATE)
        one["id"] = token
        self._filter(one)
        return bool(np.isfinite(one["logit"][0]))

    def _filter(self, candidates: np.ndarray[Any, Any]) -> None:
        """Set the logits to -inf that the grammar does not allow."""
        grammar = self._grammar

        def apply() -> None:  # holds the candidates for as long as llama.cpp writes to them
            array = _as_array(candidates)
            llama_cpp.llama_sampler_apply(grammar, ctypes.byref(array))

        self._wait_for(apply)

    def _wait_for(self, call: Callable[[], None]) -> None:
        """Have llama.cpp's grammar work in a thread: one with many readings may not end, and has no way to.

        The wait is for times that this thread has slept, so that a stopped program's does not run out.
        """
        self._done = done = threading.Event()  # known before the thread is: a signal may come between
        _start(call, done)
        if not _ended(done):
            raise InputError("grammar: has too many readings: a token takes longer than 15 s")


def _start(call: Callable[[], None], done: threading.Event) -> None:
    """Have it called in a thread, and the event set when it is done.

    A thread's own `is_alive` does not do: Python 3.11 takes one for dead whose `join` a signal broke off.
    """

    def work() -> None:
        try:
            call()
        finally:
            done.set()

    threading.Thread(target=work, name=_IDLE, daemon=True).start()  # a daemon: the program ends without it


def _ended(done: threading.Event) -> bool:
    """Wait for it, up to _PATIENCE; a signal's exception ends the wait."""
    return any(done.wait(_LOOK_S) for _ in range(_PATIENCE))


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
    text = grammar.encode("utf-8")
    made: list[Any] = []
    done = threading.Event()
    try:
        with captured_stderr() as said:  # the parser's complaints go there
            _start(lambda: made.append(llama_cpp.llama_sampler_init_grammar(vocab, text, b"root")), done)
            ended = _ended(done)
    except BaseException:
        done.wait(_PARTING_S)
        raise
    if not ended:
        raise InputError("grammar: has too many readings: to begin takes longer than 15 s")
    sampler = made[0]
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
