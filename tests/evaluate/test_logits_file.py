# SPDX-License-Identifier: Apache-2.0
"""Files of log-probabilities: llama.cpp's bytes, written whole or not at all, believed when checked."""

from __future__ import annotations

import gzip
import math
import resource
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pocketphi.evaluate.logits_file import (
    LogitsReader,
    LogitsWriter,
    UInt16,
    _in_range,
    _sum_to_one,
    decode,
    encode,
    file_bytes,
    scored,
)
from pocketphi.evaluate.perplexity import log_sums
from pocketphi.runtime.errors import InputError, OutputError
from pocketphi.runtime.parts import Float32

from ..golden.perplexity.golden import BASE, SMALL_CHUNKS, SMALL_N_CTX

f32 = np.float32
VOCAB = 5  # odd: a row ends with a value that is nothing
N_CTX = 8
TOKENS = np.array([[0, 1, 2, 3, 4, 3, 2, 1], [4, 4, 0, 0, 1, 1, 2, 2]], np.int32)
ROW = 4 + VOCAB + 1


def rows_of(logits: Float32) -> UInt16:
    return encode(logits, log_sums(logits)[1].astype(np.float32))


def slow_row(logits: list[float]) -> bytes:
    """One row, a second time: number by number, as the format says."""
    x = [f32(v) for v in logits]
    top, low = max(x), max(min(x), f32(max(x) - f32(16)))
    log_sum = f32(math.log(sum(float(np.exp(f32(v - top))) for v in x)))
    scale = f32(f32(top - low) / f32(65535))
    q = [0] * len(x)
    if scale > 0:
        q = [round(float(f32(f32(f32(1) / scale) * f32(v - low)))) if v > low else 0 for v in x]
    return struct.pack(f"<ff{len(x)}H", scale, f32(f32(low - top) - log_sum), *q) + b"\0\0" * (len(x) % 2)


@pytest.mark.parametrize(
    "logits",
    [
        [0.0, 1.0, 2.0, 3.0, 4.0],
        [-40.0, 3.5, 3.5, -12.49, 1e-3],  # more than 16 apart; two most likely
        [7.25, 7.25, 7.25, 7.25, 7.25],  # all alike: the scale is 0
        [1e4, -1e4, 0.0, 9999.0, 9990.0],
        list(np.random.default_rng(1).normal(0, 8, 5)),
        list(np.random.default_rng(2).normal(0, 8, 6)),
    ],
)
def test_rows_are_those_of_the_format(logits: list[float]) -> None:
    assert rows_of(np.array([logits], np.float32)).tobytes() == slow_row(logits)


def test_logits_apart_by_less_than_a_scale_can_say() -> None:
    rows = rows_of(np.array([[0, 1e-36, 0, 0, 0]], np.float32))
    assert rows.tobytes() == slow_row([0.0] * 5)


def test_decoding_is_off_by_half_a_step() -> None:
    logits = np.random.default_rng(3).normal(0, 3, (40, 999)).astype(np.float32)
    exact = logits.astype(np.float64)
    exact -= exact.max(1, keepdims=True)
    near = exact >= -16
    exact -= np.log(np.exp(exact).sum(1, keepdims=True))
    # Half a step of 16 / 65535, and five float32 roundings of numbers below 32.
    bound = 8 / 65535 + 5 * 32 * np.finfo(np.float32).eps
    assert near.mean() > 0.9
    assert (abs(decode(rows_of(logits), 999) - exact)[near] <= bound).all()


def write(path: Path) -> None:
    logits = np.random.default_rng(4).normal(0, 3, (2 * scored(N_CTX), VOCAB)).astype(np.float32)
    with LogitsWriter(path, TOKENS, VOCAB) as writer:
        writer.write(rows_of(logits))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write(tmp_path / "base")
    return tmp_path / "base"


def test_a_file_has_the_layout_of_llama_cpp(file: Path) -> None:
    raw = file.read_bytes()
    assert raw[:20] == b"_logits_" + struct.pack("<Iii", N_CTX, VOCAB, 2)
    assert raw[20 : 20 + 4 * TOKENS.size] == struct.pack("<16i", *TOKENS.ravel())
    assert len(raw) == 20 + 4 * 16 + 2 * 3 * ROW * 2 == file_bytes(2, N_CTX, VOCAB)
    with LogitsReader(file, VOCAB) as reader:
        np.testing.assert_array_equal(reader.tokens, TOKENS)
        for chunk, first, n in ((0, 0, 3), (1, 0, 1), (1, 1, 2)):
            at = 20 + 4 * 16 + 2 * ROW * (3 * chunk + first)
            rows = np.frombuffer(raw[at : at + 2 * ROW * n], "<u2").reshape(n, ROW)
            np.testing.assert_array_equal(reader.log_probabilities(chunk, first, n), decode(rows, VOCAB))


def test_llama_cpps_own_file(tmp_path: Path) -> None:
    """Its rows are distributions, and coding what they say gives the same numbers again."""
    path = tmp_path / "base"
    path.write_bytes(gzip.decompress(BASE.read_bytes()))
    n = scored(SMALL_N_CTX)
    with LogitsReader(path, 4096) as reader:
        assert reader.tokens.shape == (SMALL_CHUNKS, SMALL_N_CTX)
        log_p = np.concatenate([reader.log_probabilities(c, 0, n) for c in range(SMALL_CHUNKS)])
    total = np.exp(log_p.astype(np.float64)).sum(1)
    # Each p is off by half a step of 16 / 65535; what is too small is stored as e^-16 of the greatest.
    assert (abs(total - 1) <= 8 / 65535 + 4096 * math.exp(-16) + 1e-5).all()
    raw = np.frombuffer(path.read_bytes()[20 + 4 * SMALL_CHUNKS * SMALL_N_CTX :], "<u2").reshape(
        len(log_p), -1
    )
    np.testing.assert_array_equal(rows_of(log_p)[:, 4:], raw[:, 4:])


@pytest.mark.parametrize("before", [None, b"an older file"])
def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "base"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(KeyboardInterrupt), LogitsWriter(path, TOKENS, VOCAB) as writer:
        writer.write(np.zeros((1, ROW), np.uint16))
        assert len(list(tmp_path.iterdir())) == 1 + (before is not None)
        raise KeyboardInterrupt
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([] if before is None else [before])


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """The system refuses to let a file grow beyond so many bytes, pytest's own output too: not for longer."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("room", [0, 30, 100])  # none for the header; the tokens; the rows
def test_a_full_disk(tmp_path: Path, room: int) -> None:
    line = r"base: cannot be written: File too large$"
    with pytest.raises(OutputError, match=line), full_disk(room):
        write(tmp_path / "base")
    assert list(tmp_path.iterdir()) == []


def test_what_the_disk_cannot_hold_is_not_begun(tmp_path: Path) -> None:
    tokens = np.broadcast_to(np.int32(0), (10**10, N_CTX))
    with pytest.raises(OutputError, match=r"base: takes [\d.]+ GiB, the disk has [\d.]+ GiB left$"):
        LogitsWriter(tmp_path / "base", tokens, VOCAB)
    assert list(tmp_path.iterdir()) == []


def test_places_that_no_file_can_be_written_to(tmp_path: Path) -> None:
    for path, line in (
        (tmp_path, "is not a regular file"),
        (Path(), "is not a regular file"),
        (Path("/"), "is not a regular file"),
        (tmp_path / "none" / "base", "No such file or directory"),
        (tmp_path / "a\0b", "embedded null byte"),
    ):
        with pytest.raises(OutputError, match=line):
            LogitsWriter(path, TOKENS, VOCAB)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    """And what a living one holds is not; a name of 255 bytes is a name."""
    name = "é" * 127
    write(tmp_path / name)
    (dead,) = (tmp_path / f".{'é' * 100}.partial-{end}" for end in ("dead",))
    dead.write_bytes(b"half")
    with LogitsWriter(tmp_path / name, TOKENS, VOCAB) as living:
        living.write(np.zeros((2 * scored(N_CTX), ROW), np.uint16))
        assert not dead.exists()
        before = sorted(p.name for p in tmp_path.iterdir())
        write(tmp_path / name)
        assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_rows_that_sum_to_one_are_those_that_encoding_makes() -> None:
    """Whatever is encoded is believed, cut off or not. A thousandth more or less of every p is not,
    beyond what a cut-off may bring: e^-16 of the most likely token for each id.
    """
    rng = np.random.default_rng(6)
    for vocab, scale in ((5, 1), (999, 0.01), (999, 3), (4097, 30), (20_000, 6)):
        rows = rows_of(rng.normal(0, scale, (20, vocab)).astype(np.float32))
        assert _in_range(rows, vocab).all() and _sum_to_one(rows, decode(rows, vocab)).all()
        for sign in (-1, 1):
            more = sign * (0.001 + vocab * math.exp(-16))
            wrong = rows.copy()
            wrong[:, 2:4] = (rows[:, 2:4].copy().view("<f4") + np.float32(more)).view("<u2")
            assert not (_in_range(wrong, vocab) & _sum_to_one(wrong, decode(wrong, vocab))).any(), (
                vocab,
                more,
            )


def header(n_ctx: int, vocab_size: int, n_chunks: int) -> Callable[[bytes], bytes]:
    return lambda raw: b"_logits_" + struct.pack("<Iii", n_ctx, vocab_size, n_chunks) + raw[20:]


def token(value: int) -> Callable[[bytes], bytes]:
    return lambda raw: raw[:32] + struct.pack("<i", value) + raw[36:]


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda raw: b"", "is no file of log-probabilities"),
        (lambda raw: raw[:19], "is no file of log-probabilities"),
        (lambda raw: b"GGUF" + raw, "is no file of log-probabilities"),
        (header(N_CTX, 7, 2), "its vocabulary has 7 tokens, this model's 5"),
        (header(N_CTX, -5, 2), "its vocabulary has -5 tokens, this model's 5"),
        (header(0, VOCAB, 2), "holds 2 chunks of 0 tokens"),
        (header(2, VOCAB, 2), "holds 2 chunks of 2 tokens"),
        (header(N_CTX, VOCAB, 0), "holds 0 chunks of 8 tokens"),
        (header(N_CTX, VOCAB, -1), "holds -1 chunks of 8 tokens"),
        (header(2**32 - 1, VOCAB, 2**31 - 1), "has 204 bytes, expected 1"),
        (lambda raw: raw[:-1], "has 203 bytes, expected 204"),
        (lambda raw: raw + b"\0", "has 205 bytes, expected 204"),
        (token(-1), "holds the token id -1, expected 0 to 4"),
        (token(VOCAB), "holds the token id 5, expected 0 to 4"),
    ],
)
def test_damaged_files(file: Path, damage: Callable[[bytes], bytes], line: str) -> None:
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match=f"^{file}: {line}"):
        LogitsReader(file, VOCAB)


@pytest.mark.parametrize(
    ("scale", "offset"),
    [(math.nan, -1), (1e-4, math.inf), (-1e-4, -1), (1.0, -65536), (1e-4, 0), (1e-4, -40)],
)
def test_rows_that_are_no_distribution(file: Path, scale: float, offset: float) -> None:
    raw = bytearray(file.read_bytes())
    raw[-2 * ROW : -2 * ROW + 8] = struct.pack("<ff", scale, offset)
    file.write_bytes(raw)
    with LogitsReader(file, VOCAB) as reader:
        reader.log_probabilities(0, 0, 3)
        with pytest.raises(InputError, match="chunk 2 has a row that is no distribution"):
            reader.log_probabilities(1, 0, 3)


def test_a_file_that_shrinks_while_it_is_read(file: Path) -> None:
    with LogitsReader(file, VOCAB) as reader:
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(InputError, match="ends at 203 bytes"):
            reader.log_probabilities(1, 0, 3)


def test_what_is_no_file(tmp_path: Path) -> None:
    for path, line in ((tmp_path, "is not a regular file"), (tmp_path / "none", "no such file")):
        with pytest.raises(InputError, match=line):
            LogitsReader(path, VOCAB)
