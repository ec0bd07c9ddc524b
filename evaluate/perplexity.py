# SPDX-License-Identifier: Apache-2.0
"""Perplexity of a model over a text, as llama.cpp's perplexity tool measures it.

The text is one stretch of tokens, cut into chunks of `n_ctx`; what is left at the end is not used. Each
chunk is a sequence of its own. Its first half is read as context only, in its second half every next token
is scored: n_ctx - 1 - n_ctx // 2 positions. The perplexity is exp of the mean of -ln p over all of them.

What spells a control token stays ordinary text, as in llama.cpp. (Added tokens that are not `special`, such
as `<|tool_call|>`, llama.cpp reads as tokens even so; here they are text too.) No chunk starts with a BOS,
which no vocabulary of this family asks for. A line end that ends the text is not read, as in llama.cpp.

A chunk is read with the RoPE table of its length, where llama.cpp takes that of its context: the same for
contexts up to `original_context` and beyond it.

Source: `perplexity` and `log_softmax` in llama.cpp's tools/perplexity/perplexity.cpp.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ..runtime.engine import Model
from ..runtime.errors import InputError, KernelError
from ..runtime.parts import Float32, Int32, Progress, Silent
from .logits_file import LogitsWriter, encode, file_bytes, scored
from .text_tokens import text_ids

Float64 = npt.NDArray[np.float64]

MIN_CONTEXT = 8  # a chunk of less has no second half to speak of
_MOST_NATS = 350  # the square of e to this is still a float: an error bar may be as many times the score
Z95 = 1.96  # standard errors to either side that hold 95 %

_PASS_ROWS = 256  # logits in memory at once: 205 MB of Phi-4-mini's
_BLOCK_VALUES = (
    1 << 18
)  # logits worked on at once: one row of Phi-4-mini's, so that it stays in the CPU's cache


SILENT = Silent()


@dataclass(frozen=True, slots=True)
class PerplexityResult:
    """What was measured."""

    metric: ClassVar[str] = "ppl"

    n_ctx: int
    chunks: int
    tokens: int | None  # of the whole text; None: it was not read to its end
    items: int  # positions scored
    mean_nll: float  # -ln p, nats
    mean_nll_error: float  # its standard error
    saved: Path | None  # where the log-probabilities are

    @property
    def score(self) -> float:
        """The perplexity."""
        return exp(self.mean_nll)

    @property
    def error(self) -> float:
        """Its standard error, as llama.cpp prints it after ±."""
        return self.score * self.mean_nll_error

    @property
    def ci95(self) -> tuple[float, float]:
        """Where 95 % of measurements on as much text would be: exp of the mean's interval."""
        half = Z95 * self.mean_nll_error
        return exp(self.mean_nll - half), exp(self.mean_nll + half)

    def details(self) -> dict[str, Any]:
        """For JSON, beside metric, score, ci95 and items."""
        return {
            "ppl_error": self.error,
            "mean_nll": self.mean_nll,
            "mean_nll_error": self.mean_nll_error,
            "n_ctx": self.n_ctx,
            "chunks": self.chunks,
            "tokens": self.tokens,
            "saved_logits": None if self.saved is None else str(self.saved),
        }

    def lines(self) -> list[str]:
        """For a Markdown report."""
        low, high = self.ci95
        found = [
            f"Perplexity {self.score:.4f} ± {self.error:.4f} (95 %: {low:.4f} to {high:.4f})",
            "",
            f"{self.items} positions in {self.chunks} chunks of {self.n_ctx} tokens; "
            f"the text has {'more' if self.tokens is None else self.tokens}.",
        ]
        return found if self.saved is None else [*found, "", f"Log-probabilities: `{self.saved}`"]


def measure(
    model: Model,
    text: str,
    *,
    n_ctx: int = 512,
    chunks: int = -1,
    save_logits: Path | None = None,
    progress: Progress = SILENT,
) -> PerplexityResult:
    """The perplexity of a model over a text.

    Args:
        model: its conversation is lost.
        text: at least 2 · n_ctx tokens.
        n_ctx: tokens in a chunk, 8 to the model's context.
        chunks: how many to read; -1: all there are.
        save_logits: write the log-probabilities to this file, for `divergence.compare` and llama.cpp. It
            appears when it is complete. Half the tokens, times the vocabulary, times 2 bytes: 102 MB a
            chunk for Phi-4-mini's.
        progress: counts tokens.

    Raises:
        InputError: the text is too short, or an argument out of range.
        KernelError: llama.cpp failed, or the model is damaged.
        OutputError: `save_logits` cannot be written; what would not fit the disk is refused at the start.
    """
    limit, vocab_size = model.context_limit, model.bundle.text.vocab_size
    if not MIN_CONTEXT <= n_ctx <= limit:
        raise InputError(f"perplexity context is {n_ctx}, expected {MIN_CONTEXT} to {limit} tokens (see -c)")
    n_chunks = check_chunks(chunks)
    most = None if n_chunks is None else max(n_chunks, 2) * n_ctx
    ids, whole = text_ids(model, text, most, progress)
    if len(ids) < 2 * n_ctx:
        raise InputError(
            f"the text has {len(ids)} tokens, perplexity over chunks of {n_ctx} needs at least {2 * n_ctx} "
            "(see -c)"
        )
    n_chunks = min(n_chunks or len(ids), len(ids) // n_ctx)
    tokens = ids[: n_chunks * n_ctx].reshape(n_chunks, n_ctx)
    nll: list[Float64] = []
    what = "perplexity"
    with contextlib.ExitStack() as stack:
        writer = None
        if save_logits is not None:
            writer = stack.enter_context(LogitsWriter(save_logits, tokens, vocab_size))
            what = f"saving {file_bytes(n_chunks, n_ctx, vocab_size) / 2**20:,.0f} MiB"
        stack.callback(progress.finish)
        progress.start(tokens.size, what)
        for chunk in tokens:
            for logits, following in predictions(model, chunk):
                top, log_sum = log_sums(logits)
                nll.append(top + log_sum - logits[np.arange(len(logits)), following])
                if writer is not None:
                    writer.write(encode(logits, log_sum.astype(np.float32)))
            progress.advance(n_ctx, what)
        mean, error = mean_and_error(np.concatenate(nll))
        exp(mean)  # of what is damaged no file is kept
    n_tokens = len(ids) if whole else None
    return PerplexityResult(n_ctx, n_chunks, n_tokens, n_chunks * scored(n_ctx), mean, error, save_logits)


def check_chunks(chunks: int) -> int | None:
    """How many chunks at most; None for all of them. InputError for what is no number of chunks."""
    if chunks == 0 or chunks < -1:
        raise InputError(f"chunks is {chunks}, expected at least 1 (-1: all)")
    return None if chunks == -1 else chunks


def predictions(model: Model, ids: Int32) -> Iterator[tuple[Float32, Int32]]:
    """What the model says in the scored half of one chunk, block by block.

    Args:
        model: its conversation is lost.
        ids: int32 [n_ctx].

    Yields:
        logits float32 [k, vocab_size], and int32 [k], the token that follows each.
    """
    model.forget()
    first, last = len(ids) // 2, len(ids) - 1  # positions: from the first scored up to, not with, the last
    while first < last:
        stop = min(first + _PASS_ROWS, len(ids))
        # The whole chunk has one RoPE table. What was read of it is still in the cache. The last position is
        # read too, and not used: a chunk then is one batch of the shape that llama.cpp gives it.
        logits = model.token_logits(ids[:stop], stop - first, within=len(ids))[: last - first]
        block = max(1, _BLOCK_VALUES // logits.shape[1])
        for k in range(0, len(logits), block):
            part = logits[k : k + block].copy()  # a view that is held would hold the whole pass
            yield part, ids[first + k + 1 : first + k + 1 + len(part)]
        del logits
        first = stop


def log_sums(logits: Float32) -> tuple[Float32, Float64]:
    """Of each row: its greatest value, float32 [n], and ln Σ exp(logit - greatest), float64 [n].

    The exponentials are float32, their sum float64, as in llama.cpp.
    """
    top: Float32 = logits.max(1)
    return top, np.log(np.exp(logits - top[:, None]).sum(1, dtype=np.float64))


def mean_and_error(values: Float64) -> tuple[float, float]:
    """The mean and its standard error. Positions count as independent, as in llama.cpp."""
    if len(values) < 2:
        return float(values.mean()), 0.0
    return float(values.mean()), math.sqrt(float(values.var()) / (len(values) - 1))


def exp(x: float) -> float:
    """A perplexity: e to the x, the mean of -ln p.

    Raises:
        KernelError: it is more than a number can hold, or none: no model that works is off by so much.
    """
    if not x < _MOST_NATS:
        raise KernelError(f"the mean of -ln p is {x:.6g}, expected below {_MOST_NATS}: the model is damaged")
    return math.exp(x)
