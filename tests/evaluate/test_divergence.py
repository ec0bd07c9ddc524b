# SPDX-License-Identifier: Apache-2.0
"""KL divergence: llama.cpp's numbers on the same GGUFs and text, and what they are made of, in float64."""

from __future__ import annotations

import gzip
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketphi.evaluate.divergence import DivergenceResult, _block, compare
from pocketphi.evaluate.logits_file import LogitsReader, LogitsWriter, decode, encode, row_values, scored
from pocketphi.evaluate.perplexity import log_sums, measure
from pocketphi.runtime import bundle as bundles
from pocketphi.runtime.engine import Model
from pocketphi.runtime.errors import InputError

from ..conftest import Converted
from ..golden.perplexity.golden import (
    BASE,
    FLOAT32,
    PER_CENT,
    RECIPES,
    SMALL_CHUNKS,
    SMALL_N_CTX,
    STATISTICS,
    TEXT,
    load,
)
from ..golden.perplexity.make_perplexity import run
from ..golden.perplexity.scores import scores

QUANTIZED = ("Q8_0", "Q4_0", "Q4_K_M")
# What llama.cpp's own batches move by so much that a comparison could hardly fail: bounds of 10 % of the
# value and more. `test_statistics_of_given_numbers` has their formulas.
_SMALL = {
    "kld", "kld_error", "kld_max", "kld_p99", "kld_p95", "kld_p90", "kld_median", "kld_p10", "kld_p5",
    "kld_p1", "kld_min", "delta_p_mean", "delta_p_mean_error", "delta_p_rms", "delta_p_rms_error",
    "same_top_error",
}  # fmt: skip
_TAILS = {
    "kld_error",
    "kld_max",
    "kld_p10",
    "kld_p5",
    "kld_p1",
    "kld_min",
    "delta_p_mean",
    "delta_p_rms_error",
}
NOT_JUDGED = {
    "F32": _SMALL | {"kld_p999"},
    "F16": _SMALL | {"kld_p999"},
    "Q8_0": _SMALL | {"ln_ppl_ratio"},
    "Q4_0": _TAILS | {"kld_p90", "kld_median"},
    "Q4_K_M": _TAILS | {"kld", "kld_p999", "kld_p99", "kld_p95", "ln_ppl_ratio"},
}
HALF_STEP = 8 / 65535  # of a stored log-probability


@pytest.fixture(scope="module")
def directories(converted: Converted) -> tuple[tuple[str, str], ...]:
    return tuple((recipe, str(converted("phi4-nano", recipe))) for recipe in RECIPES)


def ours(directories: tuple[tuple[str, str], ...], kernels: str, recipe: str) -> dict[str, float]:
    """As llama.cpp prints them: some in per cent."""
    found: dict[str, float] = scores(directories, kernels)["kld"][recipe]
    for name in PER_CENT:
        found = found | {key: 100 * found[key] for key in (name, f"{name}_error")}
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_llama_cpps_statistics(recipe: str, directories: tuple[tuple[str, str], ...]) -> None:
    """Whether the golden file is about these very GGUFs is test_perplexity's to say."""
    found, theirs = ours(directories, "stock", recipe), load()["kld"][recipe]
    not_judged = set()
    for key, value in theirs.items():
        if key == "spread":
            continue
        per_cent = key.removesuffix("_error") in PER_CENT
        # As in test_perplexity: what other orders of summation do to llama.cpp's own number, four times; what
        # FLOAT32 in every ln p makes of a KLD (Σ p = 1), of a mean of ln p, of a p and, times its value, of a
        # perplexity; half of the last printed digit. A share moves by whole positions: one is allowed.
        bound = 4 * theirs["spread"][key] + (0.5e-3 if per_cent else 0.5e-6)
        bound += FLOAT32 * (100 if per_cent else max(1, theirs[key.removesuffix("_error")]))
        if key == "same_top":
            bound += 100 / found["items"]
        if bound >= abs(value) / 10:
            not_judged.add(key)
        else:
            assert found[key] == pytest.approx(value, rel=0, abs=bound), key
    assert not_judged == NOT_JUDGED[recipe]


@pytest.mark.parametrize("recipe", QUANTIZED)
def test_our_kernels_lose_no_more(recipe: str, directories: tuple[tuple[str, str], ...]) -> None:
    """They round activations at other places than stock ggml: other errors, of the same size."""
    used = tuple(pair for pair in directories if pair[0] in ("F32", *QUANTIZED))
    mine, stock = ours(used, "auto", recipe), load()["kld"][recipe]
    for key in ("kld", "ln_ppl_ratio", "same_top", "delta_p_rms"):
        # Both are estimates over the same positions, each with its own standard error; three of these for the
        # difference, as if the two were independent: they are not, which only makes it smaller.
        error = math.hypot(mine[f"{key}_error"], stock[f"{key}_error"])
        assert abs(mine[key] - stock[key]) <= 3 * error, key


def test_a_model_against_itself(nano_model: Model, tmp_path: Path) -> None:
    """Nothing but the rounding of the file remains."""
    text = TEXT.read_text("utf-8")
    saved = measure(nano_model, text, n_ctx=128, chunks=3, save_logits=tmp_path / "base")
    found = compare(nano_model, tmp_path / "base")
    details = found.details()
    bound = HALF_STEP + 5 * 64 * np.finfo(np.float32).eps  # and five float32 roundings of logits below 64
    assert abs(found.kld).max() <= bound  # Σ p_base = 1, times how far each ln p is off
    assert abs(found.score) <= HALF_STEP**2 + 5 * 64 * np.finfo(np.float32).eps + bound / math.sqrt(
        found.items
    )
    assert found.items == saved.items == 3 * scored(128)
    assert details["ppl"] == pytest.approx(saved.score, rel=1e-12)
    assert details["same_top"] == 1.0 and details["same_top_error"] == 0.0


def test_statistics_in_float64(nano_model: Model, tmp_path: Path) -> None:
    """Against a base that is far from the model: made-up logits over its own tokens."""
    rng, n_ctx, vocab = np.random.default_rng(5), 24, 4096
    tokens = nano_model.tokenizer.encode_text(TEXT.read_text("utf-8"))[: 4 * n_ctx].reshape(4, n_ctx)
    made_up = rng.normal(0, 4, (4, scored(n_ctx), vocab)).astype(np.float32)
    log_sum = np.log(np.exp(made_up.astype(np.float64) - made_up.max(2, keepdims=True)).sum(2)).astype(
        np.float32
    )
    with LogitsWriter(tmp_path / "base", tokens, vocab) as writer:
        for logits, sums in zip(made_up, log_sum, strict=True):
            writer.write(encode(logits, sums))
    found = compare(nano_model, tmp_path / "base")
    kld, delta, same = [], [], []
    with LogitsReader(tmp_path / "base", vocab) as reader:
        for c, chunk in enumerate(tokens):
            nano_model.forget()
            q = nano_model.token_logits(chunk, 12)[:-1].astype(np.float64)
            q -= q.max(1, keepdims=True)
            q -= np.log(np.exp(q).sum(1, keepdims=True))
            p = reader.log_probabilities(c, 0, scored(n_ctx)).astype(np.float64)
            kld += [float((np.exp(a) * (a - b))[a > -16].sum()) for a, b in zip(p, q, strict=True)]
            delta += [math.exp(b[i]) - math.exp(a[i]) for a, b, i in zip(p, q, chunk[13:], strict=True)]
            same += list(p.argmax(1) == q.argmax(1))
    # float32 terms p · (ln p - ln q), each with roundings of numbers below 64, and p good to two last places
    np.testing.assert_allclose(found.kld, kld, rtol=0, atol=8 * 64 * np.finfo(np.float32).eps)
    details = found.details()
    assert found.score == pytest.approx(np.mean(kld), abs=1e-4)
    assert details["kld_median"] == pytest.approx(np.median(kld), abs=1e-4)
    assert (details["kld_max"], details["kld_min"]) == (found.kld.max(), found.kld.min())
    assert details["delta_p_rms"] == pytest.approx(math.sqrt(np.mean(np.square(delta))), rel=1e-4)
    assert details["same_top"] == np.mean(same)
    low, high = found.ci95
    assert (low + high) / 2 == pytest.approx(found.score)
    assert high - low == pytest.approx(2 * 1.96 * np.std(kld) / math.sqrt(len(kld) - 1), rel=1e-4)
    assert f"{found.score:.6f}" in "\n".join(found.lines())


def test_llama_cpps_file_is_read(nano_model: Model, tmp_path: Path) -> None:
    path = tmp_path / "base"
    path.write_bytes(gzip.decompress(BASE.read_bytes()))
    whole, first = compare(nano_model, path), compare(nano_model, path, chunks=1)
    assert (whole.chunks, whole.n_ctx, first.chunks) == (SMALL_CHUNKS, SMALL_N_CTX, 1)
    np.testing.assert_array_equal(first.kld, whole.kld[: scored(SMALL_N_CTX)])
    assert abs(whole.kld).max() <= HALF_STEP + FLOAT32  # the same weights


@pytest.mark.skipif(shutil.which("llama-perplexity") is None, reason="needs llama.cpp's llama-perplexity")
def test_llama_cpp_reads_our_file(nano_model: Model, nano: Path, tmp_path: Path) -> None:
    measure(nano_model, TEXT.read_text("utf-8"), n_ctx=128, save_logits=tmp_path / "base")
    details, bundle = compare(nano_model, tmp_path / "base").details(), bundles.load(nano)
    flags = "-c", "128", "--kl-divergence", "--kl-divergence-base", str(tmp_path / "base")
    program = Path(str(shutil.which("llama-perplexity")))
    printed = run(program, bundle.path(bundle.decoder), "f32", "Same top p:", *flags)
    for name, bound in (
        # What is in the file: scale · q + offset, numbers below 32, with or without a fused multiply-add.
        ("ppl_base", 2 * 32 * float(np.finfo(np.float32).eps)),
        ("ppl", FLOAT32),
    ):
        line = next(row for row in printed.splitlines() if row.startswith(STATISTICS[name]))
        theirs = float(line.split(":")[1].split()[0])
        assert math.log(theirs) == pytest.approx(math.log(details[name]), rel=0, abs=bound), name


def given(n: int = 37, scale: float = 1.0) -> DivergenceResult:
    rng = np.random.default_rng(9)
    kld, nll, nll_base = scale * rng.exponential(0.3, n), rng.exponential(2, n), rng.exponential(2, n)
    return DivergenceResult(24, 4, kld, nll, nll_base, rng.random(n) < 0.8, rng.random(n) < 0.2)


def test_statistics_of_given_numbers() -> None:
    """Every formula, a second time: some tens of float64 operations on numbers of like size."""
    one = given()
    n, d = one.items, one.details()

    def mean(x: list[float]) -> tuple[float, float]:
        m = sum(x) / n
        return m, math.sqrt((sum(v * v for v in x) / n - m * m) / (n - 1))

    def percentile(q: float) -> float:
        x, at = sorted(one.kld.tolist()), q / 100 * (n - 1)
        low = min(int(at), n - 2)
        return float(x[low] + (at - low) * (x[low + 1] - x[low]))

    p, base = ([math.exp(-v) for v in x.tolist()] for x in (one.nll, one.nll_base))
    delta = [a - b for a, b in zip(p, base, strict=True)]
    square, square_error = mean([v * v for v in delta])
    ln_q, ln_base, ln_ratio = (mean(x.tolist()) for x in (one.nll, one.nll_base, one.nll - one.nll_base))
    same = sum(one.same_top.tolist()) / n
    wanted = {
        "kld_error": mean(one.kld.tolist())[1],
        "kld_max": max(one.kld.tolist()), "kld_min": min(one.kld.tolist()),
        "kld_p999": percentile(99.9), "kld_p99": percentile(99), "kld_p95": percentile(95),
        "kld_p90": percentile(90), "kld_median": percentile(50), "kld_p10": percentile(10),
        "kld_p5": percentile(5), "kld_p1": percentile(1),
        "same_top": same, "same_top_error": math.sqrt(same * (1 - same) / (n - 1)),
        "delta_p_mean": mean(delta)[0], "delta_p_mean_error": mean(delta)[1],
        "delta_p_rms": math.sqrt(square), "delta_p_rms_error": square_error / (2 * math.sqrt(square)),
        "ppl": math.exp(ln_q[0]), "ppl_error": math.exp(ln_q[0]) * ln_q[1],
        "ppl_base": math.exp(ln_base[0]), "ppl_base_error": math.exp(ln_base[0]) * ln_base[1],
        "ppl_ratio": math.exp(ln_ratio[0]), "ppl_ratio_error": math.exp(ln_ratio[0]) * ln_ratio[1],
        "ln_ppl_ratio": ln_ratio[0], "ln_ppl_ratio_error": ln_ratio[1],
        "ppl_base_cut_off": sum(one.cut_off.tolist()), "n_ctx": 24, "chunks": 4,
    }  # fmt: skip
    assert set(wanted) == set(d)
    for key, value in wanted.items():
        assert d[key] == pytest.approx(value, rel=1e-10), key
    assert one.score == pytest.approx(mean(one.kld.tolist())[0], rel=1e-12)


def test_blocks_of_given_logits() -> None:
    """Against float64, on a base that was stored, and whose unlikely tokens were cut off."""
    rng, n, vocab = np.random.default_rng(11), 40, 300
    logits, base = (rng.normal(0, scale, (n, vocab)).astype(np.float32) for scale in (3, 8))
    following = rng.integers(vocab, size=n).astype(np.int32)
    following[0], following[1] = base[0].argmin(), base[1].argmax()
    log_sum = log_sums(base)[1]
    stored = decode(encode(base, log_sum.astype(np.float32)), vocab)
    kld, nll, nll_base, same, cut_off = _block(logits, stored.copy(), following)
    p, q = stored.astype(np.float64), logits.astype(np.float64)
    q -= np.log(np.exp(q - q.max(1, keepdims=True)).sum(1, keepdims=True)) + q.max(1, keepdims=True)
    rows = np.arange(n)
    # float32 terms p · (ln p - ln q), Σ p = 1, with roundings of numbers below 64, p good to two last places
    atol = 8 * 64 * float(np.finfo(np.float32).eps)
    wanted = (np.exp(p) * (p - q) * (p > -16)).sum(1)
    np.testing.assert_allclose(kld, wanted, rtol=0, atol=atol)
    assert wanted.min() > 100 * atol  # it could fail
    np.testing.assert_allclose(nll, -q[rows, following], rtol=0, atol=atol)
    np.testing.assert_array_equal(nll_base, -p[rows, following])
    np.testing.assert_array_equal(same, p.argmax(1) == q.argmax(1))
    np.testing.assert_array_equal(cut_off, base[rows, following] <= base.max(1) - 16)
    assert cut_off[0] and not cut_off[1]


def test_what_the_file_cuts_off_is_said() -> None:
    one = given()
    n = one.details()["ppl_base_cut_off"]
    assert 0 < n < one.items
    assert f"{n} of the 37 tokens are less likely to the base" in "\n".join(one.lines())
    none = DivergenceResult(24, 4, one.kld, one.nll, one.nll_base, one.same_top, np.zeros(37, np.bool_))
    assert "less likely to the base" not in "\n".join(none.lines())


def test_no_divergence_is_below_zero() -> None:
    kld = np.array([1.0, *[0.0] * 36])
    one = given()
    skewed = DivergenceResult(24, 4, kld, one.nll, one.nll_base, one.same_top, one.cut_off)
    low, high = skewed.ci95
    assert kld.mean() - 1.96 * kld.std() / 6 < 0 == low < kld.mean() < high


def test_a_damaged_base_is_named(nano_model: Model, tmp_path: Path) -> None:
    path = tmp_path / "base"
    measure(nano_model, TEXT.read_text("utf-8"), n_ctx=16, chunks=2, save_logits=path)
    raw = bytearray(path.read_bytes())
    at = 20 + 4 * 2 * 16 + 2 * row_values(4096) * (scored(16) + 1)  # the second chunk's second row
    raw[at + 8 : at + 8 + 2 * 4096] = b"\xff" * (2 * 4096)  # every token is the most likely one
    path.write_bytes(raw)
    with pytest.raises(
        InputError, match="base: chunk 2 has a row that is no distribution: the file is damaged"
    ):
        compare(nano_model, path)
    assert compare(nano_model, path, chunks=1).chunks == 1


def test_what_cannot_be_compared(nano_model: Model, nano: Path, tmp_path: Path) -> None:
    def base(n_ctx: int, vocab_size: int) -> Path:
        with LogitsWriter(tmp_path / "base", np.zeros((1, n_ctx), np.int32), vocab_size) as writer:
            flat = np.zeros((scored(n_ctx), vocab_size), np.float32)
            writer.write(encode(flat, np.full(len(flat), math.log(vocab_size), np.float32)))
        return tmp_path / "base"

    with pytest.raises(InputError, match="its vocabulary has 100 tokens, this model's 4096"):
        compare(nano_model, base(16, 100))
    with pytest.raises(
        InputError, match="has chunks of 7 tokens, expected 8 to the 8192 of this model's context"
    ):
        compare(nano_model, base(7, 4096))
    with pytest.raises(InputError, match="chunks is 0, expected at least 1"):
        compare(nano_model, base(16, 4096), chunks=0)
    with pytest.raises(InputError, match="no such file"):
        compare(nano_model, tmp_path / "none")
    assert compare(nano_model, base(16, 4096)).items == scored(16)
    with (
        Model(nano, n_ctx=16, n_threads=1) as small,
        pytest.raises(InputError, match="has chunks of 17 tokens, expected 8 to the 16"),
    ):
        compare(small, base(17, 4096))


def test_statistics_of_equal_values() -> None:
    """Nothing divides by nothing."""
    n: dict[str, Any] = {name: np.zeros(3) for name in ("kld", "nll", "nll_base")}
    found = DivergenceResult(8, 1, same_top=np.ones(3, np.bool_), cut_off=np.zeros(3, np.bool_), **n)
    assert found.ci95 == (0, 0)
    assert found.details()["delta_p_rms_error"] == 0
    assert found.details()["ppl_ratio"] == 1
