# SPDX-License-Identifier: Apache-2.0
"""Perplexity: llama.cpp's numbers on the same GGUF and text, and what it is made of, in float64."""

from __future__ import annotations

import gzip
import hashlib
import math
import tracemalloc
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

from pocketphi.evaluate import perplexity
from pocketphi.evaluate.logits_file import LogitsReader, file_bytes, scored
from pocketphi.evaluate.perplexity import measure, predictions
from pocketphi.runtime import bundle as bundles
from pocketphi.runtime.engine import Model
from pocketphi.runtime.errors import InputError, KernelError, OutputError
from pocketphi.runtime.parts import Float32, Int32

from ..conftest import Converted
from ..golden.perplexity.golden import BASE, FLOAT32, N_CTX, RECIPES, SMALL_CHUNKS, SMALL_N_CTX, TEXT, load
from ..golden.perplexity.scores import scores

EPS = float(np.finfo(np.float32).eps)


@pytest.fixture(scope="module")
def golden(converted: Converted) -> dict[str, dict[str, float]]:
    """What llama.cpp printed, if it was about these very files."""
    found = load()
    assert hashlib.sha256(TEXT.read_bytes()).hexdigest() == found["text_sha256"], "text.txt is another: stale"
    for recipe in RECIPES:
        bundle = bundles.load(converted("phi4-nano", recipe))
        now = hashlib.sha256(bundle.path(bundle.decoder).read_bytes()).hexdigest()
        assert now == found["ppl"][recipe]["gguf_sha256"], (
            f"the converter makes another {recipe} GGUF than the one that perplexity.json is about: "
            "the golden file is stale, make it anew (tests/golden/README.md)"
        )
    ppl: dict[str, dict[str, float]] = found["ppl"]
    return ppl


@pytest.mark.parametrize("recipe", RECIPES)
def test_llama_cpps_perplexity(
    recipe: str, golden: dict[str, dict[str, float]], converted: Converted
) -> None:
    directories = tuple((name, str(converted("phi4-nano", name))) for name in RECIPES)
    ours, theirs = scores(directories, "stock")["ppl"][recipe], golden[recipe]
    # `spread` is how far llama.cpp is from itself when it batches the same tokens in other ways, which takes
    # other kernels and orders of summation. So does another CPU. Four times that, as for the golden logits;
    # FLOAT32 of the mean; half of the last digit that is printed.
    bound = 4 * theirs["spread"] + FLOAT32 * theirs["ppl"]
    assert ours["ppl"] == pytest.approx(theirs["ppl"], rel=0, abs=bound + 0.5e-4)
    # ± is the perplexity times the standard error of the mean, which moves no faster than the mean does.
    assert ours["ppl_error"] == pytest.approx(theirs["ppl_error"], rel=0, abs=bound + 0.5e-5)


def test_the_text_has_llama_cpps_tokens(nano_model: Model) -> None:
    found = load()
    ids = nano_model.tokenizer.encode_text(TEXT.read_text("utf-8").removesuffix("\n"))
    used = ids[: found["chunks"] * N_CTX]
    assert len(ids) // N_CTX == found["chunks"]
    assert hashlib.sha256(used.astype("<i4").tobytes()).hexdigest() == found["tokens_sha256"]


@pytest.mark.parametrize(
    ("text", "alike"),
    [
        ("<|user|>What is 2 plus 4?<|end|><|assistant|>", True),
        ("Le garçon mange à l'école.  \n\n \t it's <|image_1|> <|endoftext|>\n", True),
        (
            "<|tool_call|>[]<|/tool_call|>",
            False,
        ),  # not `special` in tokenizer.json: llama.cpp knows it in any text
    ],
)
def test_markup_is_text_as_in_llama_cpp(nano_model: Model, text: str, alike: bool) -> None:
    raw = text.encode("utf-8")
    theirs = (llama_cpp.llama_token * len(raw))()
    n = llama_cpp.llama_tokenize(nano_model._decoder.vocab, raw, len(raw), theirs, len(raw), True, False)
    ours = nano_model.tokenizer.encode_text(text).tolist()
    assert (ours == list(theirs[:n])) == alike
    assert not set(ours) & set(nano_model.tokenizer.control_tokens.values())


def negative_log_p(logits: Float32, ids: Int32) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """-ln p of each id, in float64."""
    exact = logits.astype(np.float64)
    found: np.ndarray[tuple[int], np.dtype[np.float64]] = np.log(np.exp(exact - exact.max(1)[:, None]).sum(1))
    return found + exact.max(1) - exact[np.arange(len(ids)), ids]


def test_perplexity_in_float64(nano_model: Model) -> None:
    text, n_ctx, chunks = TEXT.read_text("utf-8"), 41, 5
    found = measure(nano_model, text, n_ctx=n_ctx, chunks=chunks)
    ids = nano_model.tokenizer.encode_text(text.removesuffix("\n"))
    nll = []
    for start in range(0, chunks * n_ctx, n_ctx):
        chunk = ids[start : start + n_ctx]
        nano_model.forget()
        logits = nano_model.token_logits(chunk, n_ctx)
        nll += [negative_log_p(logits[i : i + 1], chunk[i + 1 : i + 2])[0] for i in range(20, n_ctx - 1)]
    assert found.items == len(nll) == chunks * 20
    assert (found.n_ctx, found.chunks, found.tokens) == (n_ctx, chunks, len(ids))
    # float32 subtractions of the greatest logit, below 64, and exponentials good to two last places
    assert found.mean_nll == pytest.approx(np.mean(nll), rel=0, abs=(64 + 2) * EPS)
    assert found.mean_nll_error == pytest.approx(np.std(nll) / math.sqrt(len(nll) - 1), rel=1e-4)
    assert found.score == pytest.approx(math.exp(found.mean_nll))
    low, high = found.ci95
    assert low * high == pytest.approx(found.score**2)
    assert math.log(high / low) == pytest.approx(2 * 1.96 * found.mean_nll_error)
    assert found.details()["ppl_error"] == pytest.approx(found.score * found.mean_nll_error)


def test_our_file_is_llama_cpps(nano_model: Model, tmp_path: Path) -> None:
    path, theirs = tmp_path / "ours", tmp_path / "theirs"
    theirs.write_bytes(gzip.decompress(BASE.read_bytes()))
    measure(nano_model, TEXT.read_text("utf-8"), n_ctx=SMALL_N_CTX, chunks=SMALL_CHUNKS, save_logits=path)
    head = 20 + 4 * SMALL_CHUNKS * SMALL_N_CTX
    assert path.read_bytes()[:head] == theirs.read_bytes()[:head]
    assert path.stat().st_size == theirs.stat().st_size == file_bytes(SMALL_CHUNKS, SMALL_N_CTX, 4096)
    with LogitsReader(path, 4096) as a, LogitsReader(theirs, 4096) as b:
        for chunk in range(SMALL_CHUNKS):
            ours, base = (r.log_probabilities(chunk, 0, scored(SMALL_N_CTX)) for r in (a, b))
            # And a step where a rounding falls the other way.
            assert abs(ours - base).max() <= 16 / 65535 + FLOAT32


def test_saving_changes_nothing_and_keeps_what_it_says(nano_model: Model, tmp_path: Path) -> None:
    text, path = TEXT.read_text("utf-8"), tmp_path / "base"
    plain = measure(nano_model, text, n_ctx=64, chunks=2)
    saved = measure(nano_model, text, n_ctx=64, chunks=2, save_logits=path)
    assert (saved.score, saved.saved) == (plain.score, path)
    assert plain.details()["saved_logits"] is None and str(path) in "\n".join(saved.lines())
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


class Told:
    def __init__(self) -> None:
        self.steps: list[int | str] = []

    def start(self, total: int, what: str) -> None:
        self.steps.append(f"start {total}")

    def advance(self, n: int, what: str) -> None:
        self.steps.append(n)

    def finish(self) -> None:
        self.steps.append("finish")


def test_progress(nano_model: Model) -> None:
    told = Told()
    measure(nano_model, TEXT.read_text("utf-8"), n_ctx=32, chunks=3, progress=told)
    assert told.steps == ["start 96", 32, 32, 32, "finish"]


def test_no_more_of_a_text_is_read_than_needed(nano_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four million characters, pieces are encoded until there are two chunks."""
    text = TEXT.read_text("utf-8").strip() * 300
    read: list[int] = []
    encode_text = nano_model.tokenizer.encode_text

    def counted(part: str) -> Int32:
        read.append(len(part))
        return encode_text(part)

    monkeypatch.setattr(nano_model.tokenizer, "encode_text", counted)
    told = Told()
    found = measure(nano_model, text, n_ctx=64, chunks=2, progress=told)
    assert 0 < sum(read) < 1 << 17 and found.tokens is None
    assert "the text has more" in "\n".join(found.lines())
    assert told.steps == [f"start {len(text)}", sum(read), "finish", "start 128", 64, 64, "finish"]
    monkeypatch.undo()
    assert found.score == measure(nano_model, TEXT.read_text("utf-8"), n_ctx=64, chunks=2).score


def test_a_damaged_model_has_no_perplexity(
    nano_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits are finite, and what is said of the text is not: no Infinity, no file."""
    real = nano_model.token_logits
    monkeypatch.setattr(nano_model, "token_logits", lambda *a, **k: 1e4 * real(*a, **k))
    with pytest.raises(KernelError, match=r"^the mean of -ln p is \d+.*: the model is damaged$"):
        measure(nano_model, TEXT.read_text("utf-8"), n_ctx=16, chunks=2, save_logits=tmp_path / "base")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_measured(nano_model: Model, tmp_path: Path) -> None:
    text = TEXT.read_text("utf-8")
    for words, options, line in (
        (
            "one two",
            {},
            r"^the text has \d tokens, perplexity over chunks of 512 needs at least 1024 \(see -c\)$",
        ),
        (text, {"n_ctx": 7}, r"^perplexity context is 7, expected 8 to 8192 tokens \(see -c\)$"),
        (text, {"n_ctx": 8193}, "^perplexity context is 8193, expected 8 to 8192"),
        (text, {"chunks": 0}, r"^chunks is 0, expected at least 1 \(-1: all\)$"),
        (text, {"chunks": -2}, "^chunks is -2"),
        ("\ud800" + text, {}, "half a surrogate pair"),
    ):
        with pytest.raises(InputError, match=line):
            measure(nano_model, words, save_logits=tmp_path / "base", **options)
    with pytest.raises(OutputError, match="is not a regular file"):
        measure(nano_model, text, save_logits=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_token_logits(nano_model: Model) -> None:
    ids = nano_model.tokenizer.encode_text(TEXT.read_text("utf-8"))[:40]
    nano_model.forget()
    every = nano_model.token_logits(ids, 40)
    assert (every.shape, every.dtype) == ((40, 4096), np.float32)
    np.testing.assert_array_equal(nano_model.token_logits(ids, 40)[-3:], every[-3:])
    for n in (1, 7, 39):
        # Shorter passes are other kernels: each engine is within 2.2e-5 of exact (tests/golden/README.md).
        assert abs(nano_model.token_logits(ids, n) - every[-n:]).max() <= 2 * 2.2e-5
    assert nano_model.context_used == 40
    assert abs(nano_model.token_logits(ids, 1, adapter="vision") - every[-1:]).max() > 0.1
    for bad, n, adapter, line in (
        (ids, 0, None, "logits of 0 of 40 tokens"),
        (ids, 41, None, "logits of 41 of 40 tokens"),
        ([], 1, None, "logits of 1 of 0 tokens"),
        ([1, 4096], 1, None, "token ids: expected whole numbers from 0 to 4095"),
        ([1, -1], 1, None, "token ids: expected whole numbers from 0 to 4095"),
        ([1] * 8193, 1, None, "the prompt has 8193 tokens, the context holds 8192"),
        (ids, 1, "hearing", "adapter is 'hearing', expected one of vision, speech"),
    ):
        with pytest.raises(InputError, match=line):
            nano_model.token_logits(bad, n, adapter=adapter)  # type: ignore[arg-type]


@pytest.mark.parametrize("n_ctx", [1024, 1100, 1537])  # short table; long, crossed in the second half; blocks
def test_a_chunk_has_one_rope_table(nano_model: Model, n_ctx: int) -> None:
    ids = nano_model.tokenizer.encode_text(TEXT.read_text("utf-8"))[:n_ctx]
    found, following = (np.concatenate(column) for column in zip(*predictions(nano_model, ids), strict=True))
    np.testing.assert_array_equal(following, ids[n_ctx // 2 + 1 :])
    nano_model.forget()
    whole = nano_model.token_logits(ids, n_ctx - n_ctx // 2)[:-1]
    # The same numbers by other batches: on phi4-nano past 1,000 positions each way is within 1.3e-3 of exact
    # (tests/golden/README.md). The wrong table moves logits by 0.1 and more.
    assert abs(found - whole).max() <= 2 * 1.3e-3
    if n_ctx > 1024:
        nano_model.forget()
        short = nano_model.token_logits(ids[: n_ctx // 2 + 1], 1)
        assert (abs(short - whole[0]).max() > 0.1) == (n_ctx // 2 < 1024)


@pytest.mark.parametrize(
    ("n_ctx", "passes"),  # 1024 is where the RoPE table changes
    [(1000, [256, 244]), (1026, [256, 256]), (1100, [256, 256, 38])],
)
def test_no_more_logits_at_once_than_needed(
    n_ctx: int, passes: list[int], nano_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long chunk's scored half is read in passes: memory does not grow with n_ctx."""
    asked: list[int] = []
    real = nano_model.token_logits

    def counted(ids: Int32, n: int, *, within: int) -> Float32:
        asked.append(n)
        return real(ids, n, within=within)

    monkeypatch.setattr(nano_model, "token_logits", counted)
    monkeypatch.setattr(perplexity, "_BLOCK_VALUES", 4096)  # what is worked on is one row, next to nothing
    text = TEXT.read_text("utf-8")
    measure(nano_model, text, n_ctx=n_ctx, chunks=1)  # what is loaded once is loaded
    asked.clear()
    tracemalloc.start()
    try:
        measure(nano_model, text, n_ctx=n_ctx, chunks=2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert asked == [*passes, *passes]
    # Logits are float32, and are checked to be finite, which takes a byte each. Two passes would be 8 bytes.
    assert peak < 256 * 4096 * 6
