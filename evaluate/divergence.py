# SPDX-License-Identifier: Apache-2.0
"""How far a model's predictions are from a base model's: KL divergence, as llama.cpp measures it.

The base model's log-probabilities, and the tokens they were made from, come from a file that
`perplexity.measure` or llama.cpp wrote. For every scored position:

    KLD     Σ p_base · (ln p_base - ln p), over the ids whose ln p_base is above -16
    Δp      p - p_base of the token that did follow
    same    whether the most likely token is the same

A file keeps nothing lower than 16 below the most likely token. So the base's perplexity in it is too low, and
the ratio of the two too high, on a text with tokens that the base finds less likely than that. They are
counted.

Source: `kl_divergence` in llama.cpp's tools/perplexity/perplexity.cpp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ..runtime.engine import Model
from ..runtime.errors import InputError, KernelError
from ..runtime.parts import Float32, Int32, Progress
from .logits_file import LogitsReader, scored
from .perplexity import (
    MIN_CONTEXT,
    SILENT,
    Z95,
    Float64,
    check_chunks,
    exp,
    log_sums,
    mean_and_error,
    predictions,
)

_CUT_OFF = np.float32(16 - 8 / 65535)  # below the most likely token: half a step above the lowest value
_NEGLIGIBLE = np.float32(-16)  # ln p_base at and below which an id does not count
_PERCENTILES = {  # of the KLD, by name in `details`
    "kld_p999": 99.9,
    "kld_p99": 99.0,
    "kld_p95": 95.0,
    "kld_p90": 90.0,
    "kld_median": 50.0,
    "kld_p10": 10.0,
    "kld_p5": 5.0,
    "kld_p1": 1.0,
}


@dataclass(frozen=True, slots=True, eq=False)
class DivergenceResult:
    """What was compared; the arrays have one value for each scored position, in order."""

    metric: ClassVar[str] = "kld"

    n_ctx: int
    chunks: int
    kld: Float64  # nats
    nll: Float64  # -ln p of the token that followed, nats
    nll_base: Float64
    same_top: npt.NDArray[np.bool_]
    cut_off: npt.NDArray[np.bool_]  # what followed is 16 nats below the base's top, or more

    @property
    def items(self) -> int:
        """Positions scored."""
        return len(self.kld)

    @property
    def score(self) -> float:
        """The mean KL divergence, nats."""
        return float(self.kld.mean())

    @property
    def ci95(self) -> tuple[float, float]:
        """Where 95 % of measurements on as much text would be."""
        mean, error = mean_and_error(self.kld)
        # No divergence is below 0, where the interval of a skewed few would reach. (A mean may be, by the
        # roundings of a model that is the base.)
        return max(mean - Z95 * error, min(mean, 0.0)), mean + Z95 * error

    def details(self) -> dict[str, Any]:
        """For JSON, beside metric, score, ci95 and items.

        Probabilities are 0 to 1; `_error` is a standard error. ppl, ppl_base: perplexities, and ppl_ratio =
        ppl / ppl_base. delta_p: p - p_base of the token that followed. same_top: the share of positions
        with the same most likely token. ppl_base_cut_off: how many tokens the file has too likely.
        """
        nll, nll_error = mean_and_error(self.nll)
        base, base_error = mean_and_error(self.nll_base)
        ratio, ratio_error = mean_and_error(
            self.nll - self.nll_base
        )  # the errors of the two are not independent
        delta = np.exp(-self.nll) - np.exp(-self.nll_base)
        delta_mean, delta_error = mean_and_error(delta)
        square, square_error = mean_and_error(delta**2)
        rms = math.sqrt(square)
        same = float(self.same_top.mean())
        found = {name: float(np.percentile(self.kld, q)) for name, q in _PERCENTILES.items()}
        return {
            "kld_error": mean_and_error(self.kld)[1],
            "kld_max": float(self.kld.max()),
            **found,
            "kld_min": float(self.kld.min()),
            "same_top": same,
            "same_top_error": math.sqrt(same * (1 - same) / max(self.items - 1, 1)),
            "delta_p_mean": delta_mean,
            "delta_p_mean_error": delta_error,
            "delta_p_rms": rms,
            "delta_p_rms_error": 0.5 * square_error / rms if rms > 0 else 0.0,
            "ppl": exp(nll),
            "ppl_error": exp(nll) * nll_error,
            "ppl_base": exp(base),
            "ppl_base_error": exp(base) * base_error,
            "ppl_base_cut_off": int(self.cut_off.sum()),
            "ppl_ratio": exp(ratio),
            "ppl_ratio_error": exp(ratio) * ratio_error,
            "ln_ppl_ratio": ratio,
            "ln_ppl_ratio_error": ratio_error,
            "n_ctx": self.n_ctx,
            "chunks": self.chunks,
        }

    def lines(self) -> list[str]:
        """For a Markdown report."""
        d = self.details()
        rows = [
            ("mean KLD", f"{self.score:.6f} ± {d['kld_error']:.6f}"),
            ("median KLD", f"{d['kld_median']:.6f}"),
            ("90 % KLD", f"{d['kld_p90']:.6f}"),
            ("95 % KLD", f"{d['kld_p95']:.6f}"),
            ("99 % KLD", f"{d['kld_p99']:.6f}"),
            ("99.9 % KLD", f"{d['kld_p999']:.6f}"),
            ("maximum KLD", f"{d['kld_max']:.6f}"),
            ("same top token", f"{100 * d['same_top']:.3f} ± {100 * d['same_top_error']:.3f} %"),
            ("RMS Δp", f"{100 * d['delta_p_rms']:.3f} ± {100 * d['delta_p_rms_error']:.3f} %"),
            ("perplexity", f"{d['ppl']:.4f} ± {d['ppl_error']:.4f}"),
            ("perplexity of the base", f"{d['ppl_base']:.4f} ± {d['ppl_base_error']:.4f}"),
            ("ratio of the two", f"{d['ppl_ratio']:.6f} ± {d['ppl_ratio_error']:.6f}"),
        ]
        return [
            f"{self.items} positions in {self.chunks} chunks of {self.n_ctx} tokens; KLD in nats.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows),
            *self._caveat(),
        ]

    def _caveat(self) -> list[str]:
        n = int(self.cut_off.sum())
        if n == 0:
            return []
        return [
            "",
            f"{n} of the {self.items} tokens are less likely to the base than its file can say (16 nats "
            "below the top): its perplexity is too low, and the ratio too high.",
        ]


def compare(model: Model, base: Path, *, chunks: int = -1, progress: Progress = SILENT) -> DivergenceResult:
    """How far a model is from the one that a file of log-probabilities is from, on that file's text.

    Args:
        model: of the same vocabulary; its conversation is lost.
        base: made by `perplexity.measure(…, save_logits=…)` or llama.cpp.
        chunks: how many to compare; -1: all there are.
        progress: counts tokens.

    Raises:
        InputError: the file is damaged, of another vocabulary or of longer chunks than the model's context.
        KernelError: llama.cpp failed, or the model is damaged.
    """
    most = check_chunks(chunks)
    found: list[_Block] = []
    with LogitsReader(base, model.bundle.text.vocab_size) as reader:
        n_ctx = reader.tokens.shape[1]
        if not MIN_CONTEXT <= n_ctx <= model.context_limit:
            raise InputError(
                f"{base}: has chunks of {n_ctx} tokens, expected {MIN_CONTEXT} to the {model.context_limit} "
                "of this model's context (see -c)"
            )
        tokens = reader.tokens[:most]
        what = "KL divergence"
        progress.start(tokens.size, what)
        try:
            for c, chunk in enumerate(tokens):
                done = 0
                for logits, following in predictions(model, chunk):
                    found.append(_block(logits, reader.log_probabilities(c, done, len(logits)), following))
                    done += len(logits)
                progress.advance(n_ctx, what)
        finally:
            progress.finish()
    kld, nll, nll_base, same_top, cut_off = map(np.concatenate, zip(*found, strict=True))
    assert len(kld) == len(tokens) * scored(n_ctx)
    if not np.isfinite(kld).all():
        raise KernelError("a KL divergence is more than a number can hold: the model is damaged")
    return DivergenceResult(n_ctx, len(tokens), kld, nll, nll_base, same_top, cut_off)


_Block = tuple[Float64, Float64, Float64, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]


def _block(logits: Float32, base: Float32, following: Int32) -> _Block:
    """KLD, -ln p, -ln p_base, agreement, and what the base's file cuts off, of each row.

    Args:
        logits: float32 [n, vocab_size].
        base: float32 [n, vocab_size], log-probabilities; overwritten.
        following: int32 [n].
    """
    rows = np.arange(len(logits))
    top, log_sum = log_sums(logits)
    nll = top + log_sum - logits[rows, following]
    nll_base = -base[rows, following].astype(np.float64)
    same_top = logits.argmax(1) == base.argmax(1)
    cut_off = base[rows, following] <= base.max(1) - _CUT_OFF
    p = np.exp(base)
    p *= base > _NEGLIGIBLE
    base -= logits
    base += (top + log_sum).astype(np.float32)[:, None]
    p *= base
    return p.sum(1, dtype=np.float64), nll, nll_base, same_top, cut_off
