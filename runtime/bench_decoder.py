# SPDX-License-Identifier: Apache-2.0
"""One measurement of a decoder alone: read random tokens, write some more, and time both."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .decoder import Decoder
from .decoder_ggml import GgmlDecoder, GgmlOptions
from .errors import InputError
from .gguf_check import AdapterFile
from .gguf_header import GgufHeader, text_spec
from .parts import Int32, TokenSpan
from .spec import TextSpec

_ADAPTER = "lora"
_WARM_UP = 64  # tokens: every weight is used once, and pages that are mapped only are read


@dataclass(frozen=True, slots=True)
class SpeedPlan:
    """What to measure. Paths and numbers only: it goes to the peer's process as JSON."""

    model: str
    lora: str | None
    n_prompt: int  # tokens to read, into an empty cache
    n_predict: int  # tokens to write, one at a time
    depth: int  # tokens in the cache before the first of them
    n_ctx: int  # room to make; 0: as much as is needed
    n_threads: int
    n_gpu_layers: int
    kv_type: str

    @property
    def needed(self) -> int:
        """The longest sequence there will be."""
        return max(self.n_prompt, self.depth + self.n_predict)


@dataclass(frozen=True, slots=True)
class Sample:
    """One repetition, in seconds."""

    prefill_s: float
    decode_s: float


class SpeedRunner:
    """A loaded decoder that can repeat one plan."""

    def __init__(self, decoder: Decoder, plan: SpeedPlan) -> None:
        self._decoder, self._plan = decoder, plan
        n = max(plan.n_prompt, plan.depth)
        self._prompt = _random_ids(1, n, decoder.spec.vocab_size)
        self._written = _random_ids(2, plan.n_predict, decoder.spec.vocab_size)

    def warm_up(self) -> None:
        """Touch everything once; nothing of it is timed."""
        self._decoder.feed(TokenSpan(self._prompt[:_WARM_UP]))
        self._decoder.rewind(0)
        self._decoder.feed(TokenSpan(self._written[:1]))

    def sample(self) -> Sample:
        """One repetition. What is written is random too: sampling is not what is measured."""
        d, plan = self._decoder, self._plan
        d.rewind(0)
        began = time.perf_counter()
        d.feed(TokenSpan(self._prompt[: plan.n_prompt]))
        prefill_s = time.perf_counter() - began
        d.rewind(min(plan.n_prompt, plan.depth))
        if plan.depth > plan.n_prompt:
            d.feed(TokenSpan(self._prompt[plan.n_prompt :]))
        began = time.perf_counter()
        for i in range(plan.n_predict):
            d.feed(TokenSpan(self._written[i : i + 1]))
        return Sample(prefill_s, time.perf_counter() - began)


@contextmanager
def open_runner(plan: SpeedPlan, header: GgufHeader, lora: GgufHeader | None) -> Iterator[SpeedRunner]:
    """Load what a plan names, and warm it up.

    Raises:
        InputError: more tokens than the context or the model has, or an option that cannot be followed.
        BundleError: the model or the adapter cannot be loaded, or do not belong together.
        KernelError: no memory, or an adapter that does nothing.
    """
    spec = text_spec(header)
    check_room(plan, spec)
    adapters = {} if lora is None else {_ADAPTER: AdapterFile(lora.path)}
    options = GgmlOptions(plan.n_threads, plan.n_gpu_layers, plan.kv_type)
    decoder = GgmlDecoder(Path(plan.model), spec, adapters, options, foreign=True)
    try:
        capacity = max(plan.n_ctx, plan.needed)
        decoder.open(
            table=spec.rope.table(capacity), capacity=capacity, adapter=None if lora is None else _ADAPTER
        )
        runner = SpeedRunner(decoder, plan)
        runner.warm_up()
        yield runner
    finally:
        decoder.close()


def check_room(plan: SpeedPlan, spec: TextSpec) -> None:
    """Whether the tokens of a plan fit its context, and that the model.

    Raises:
        InputError: they do not.
    """
    most = plan.n_ctx or spec.context_length
    if most > spec.context_length:
        raise InputError(f"context is {plan.n_ctx} tokens, this model takes 1 to {spec.context_length}")
    if plan.needed > most:
        what = f"{plan.n_prompt} tokens to read, or {plan.n_predict} to write after {plan.depth}"
        raise InputError(f"{what}, do not fit a context of {most}")


def _random_ids(seed: int, n: int, vocab_size: int) -> Int32:
    return np.random.default_rng(seed).integers(0, vocab_size, n, np.int32)
