# SPDX-License-Identifier: Apache-2.0
"""Every activation packer, byte for byte against layout and rounding written a second time in numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from pocketphi.runtime import kernels

Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

VARIANTS = kernels.variants("activations")
GUARD = 64
OK, NULL, SIZE, OVERLAP, VARIANT = 0, 1, 3, 4, 6  # as in kernels/include/pk.h


def broken(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.floating]:
    x = rng.standard_normal(shape)
    return np.where(rng.random(shape) < 0.01, rng.choice([np.inf, -np.inf, np.nan], shape), x)


def limit(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.floating]:
    """Around the largest m for which 127 / m is infinite in float32."""
    least = np.float32(127) / np.finfo(np.float32).max
    near: Float32 = np.array([least, np.nextafter(least, np.float32(1))], np.float32)
    return near[rng.integers(0, 2, shape)] * np.where(rng.random(shape) < 0.5, -1, 1)


FILLS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], npt.NDArray[np.floating]]] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "heavy tails": lambda rng, shape: rng.standard_t(1, shape),
    "ties": lambda rng, shape: 0.5 * rng.integers(-254, 255, shape),  # exact where the largest is 127
    "wide": lambda rng, shape: rng.uniform(-1, 1, shape) * 2.0 ** rng.integers(-149, 128, shape),
    "zero": lambda rng, shape: rng.choice([-0.0, 0.0], shape),
    "subnormal": lambda rng, shape: rng.uniform(-1, 1, shape) * 1e-38,
    "limit": limit,
    "huge": lambda rng, shape: rng.choice([-3.4e38, 3.4e38, 1.0], shape),
    "broken": broken,
}
EACH = pytest.mark.parametrize("variant", VARIANTS)
SHARED = pytest.mark.parametrize("shared", [1, 8])  # blocks of 32 columns that have one scale


def rows_of(fill: str, tokens: int, columns: int) -> Float32:
    rng = np.random.default_rng([8, tokens, columns])
    return FILLS[fill](rng, (tokens, columns)).astype(np.float32)


def quantized(x: Float32, shared: int) -> Bytes:
    """The tile of matmul.h: per block s8 q [T][32], f32 d [T], s32 -8 sum [T], s32 -32 sum [2][T]."""
    tokens, columns = x.shape
    blocks = x.reshape(tokens, columns // 32, 32).swapaxes(0, 1)  # [blocks, T, 32]
    m = np.abs(x).reshape(tokens, -1, 32 * shared).max(axis=2)  # numpy's max keeps NaN
    m = m.repeat(shared, axis=1).T  # [blocks, T]
    with np.errstate(all="ignore"):
        inverse = np.float32(127) / m
        usable = np.isfinite(m) & np.isfinite(inverse)
        levels = np.rint(blocks * inverse[:, :, None])  # float32; ties to even
        d = np.where(usable, m / np.float32(127), np.where(np.isfinite(m), 0, np.nan)).astype(np.float32)
    assert levels.dtype == np.float32
    q = np.where(usable[:, :, None], levels, 0).astype(np.int32)
    assert np.abs(q).max() <= 127
    sums = q.reshape(*m.shape, 2, 16).sum(axis=3, dtype=np.int32)
    parts = [
        q.astype(np.int8).reshape(len(m), -1),
        np.where(np.isnan(d), np.uint32(0x7FC00000), d.view(np.uint32)).astype(np.uint32),
        -8 * (sums[:, :, 0] + sums[:, :, 1]),
        -32 * sums[:, :, 0],
        -32 * sums[:, :, 1],
    ]
    return np.concatenate([np.ascontiguousarray(p).view(np.uint8) for p in parts], axis=1)


def packed(
    x: Float32, first: int, last: int, variant: str, *, shared: int = 1, arrange: bool = False
) -> tuple[Bytes, Bytes]:
    """The tile [blocks, bytes] after one call, and the guards around it."""
    tokens, columns = x.shape
    size = 4 * columns * tokens if arrange else columns // 32 * 48 * tokens
    memory = np.full(size + 2 * GUARD, 0xA5, np.uint8)
    tile, how = memory.ctypes.data + GUARD, variant.encode()
    status = kernels._library().pk_activations(
        tile, size, x.ctypes.data, tokens, columns, first, last, shared, arrange, how
    )
    assert status == OK
    return memory[GUARD:-GUARD], np.concatenate([memory[:GUARD], memory[-GUARD:]])


@EACH
@SHARED
@pytest.mark.parametrize("fill", FILLS)
def test_quantize(variant: str, fill: str, shared: int) -> None:
    for tokens in range(1, 17):
        for columns in (32, 96, 256, 1056) if shared == 1 else (256, 1024):
            x = rows_of(fill, tokens, columns)
            got, guards = packed(x, 0, columns // 32, variant, shared=shared)
            assert np.array_equal(got.reshape(columns // 32, -1), quantized(x, shared))
            assert (guards == 0xA5).all()


@EACH
def test_the_ties_are_ties(variant: str) -> None:
    x = np.full((1, 32), 127.0, np.float32)
    x[0, 1:] = np.arange(31) - 15.5
    got, _ = packed(x, 0, 1, variant)
    assert got[1:32].view(np.int8).tolist() == [round(v) for v in x[0, 1:].tolist()]
    assert set(got[1:32].tolist()) & {0xFF, 1, 3} == set(), "ties to even leave no odd level"


@EACH
@pytest.mark.parametrize(("shared", "arrange"), [(1, False), (8, False), (1, True)])
def test_a_range_writes_its_blocks_alone(variant: str, shared: int, arrange: bool) -> None:
    for tokens in (1, 3, 4, 6, 16):
        x = rows_of("normal", tokens, 320 * shared)
        want = x.T.copy().view(np.uint8).reshape(10 * shared, -1) if arrange else quantized(x, shared)
        for first, last in ((0, 1), (2, 7), (3, 10), (9, 10)):
            first, last = first * shared, last * shared
            got, guards = packed(x, first, last, variant, shared=shared, arrange=arrange)
            blocks = got.reshape(10 * shared, -1)
            assert np.array_equal(blocks[first:last], want[first:last])
            assert (blocks[:first] == 0xA5).all() and (blocks[last:] == 0xA5).all() and (guards == 0xA5).all()


@EACH
def test_arrange(variant: str) -> None:
    for tokens in range(1, 17):
        for columns in (1, 5, 16, 31, 32, 33, 47, 64, 100):
            x = rows_of("broken", tokens, columns)
            got, guards = packed(x, 0, -(-columns // 32), variant, arrange=True)
            assert np.array_equal(got.view(np.uint32).reshape(columns, tokens), x.view(np.uint32).T)
            assert (guards == 0xA5).all()


def test_wrong_arguments_are_refused() -> None:
    call = kernels._library().pk_activations
    x, tile = np.ones((17, 64), np.float32), np.zeros(2048, np.uint8)
    a, t = x.ctypes.data, tile.ctypes.data
    assert call(None, 192, a, 2, 64, 0, 2, 1, 0, None) == NULL
    assert call(t, 192, None, 2, 64, 0, 2, 1, 0, None) == NULL
    for size, tokens, columns, first, last, shared, arrange in (
        (0, 0, 64, 0, 2, 1, 0),
        (1632, 17, 64, 0, 2, 1, 0),
        (0, 1, 0, 0, 1, 1, 1),
        (96, 2, 33, 0, 1, 1, 0),
        (191, 2, 64, 0, 2, 1, 0),
        (192, 2, 64, 0, 2, 1, 1),
        (192, 2, 64, 0, 3, 1, 0),
        (192, 2, 64, 1, 1, 1, 0),
        (192, 2, 2**61, 0, 1, 1, 0),
        (192, 2, 64, 0, 2, 0, 0),
        (192, 2, 64, 0, 2, 2, 0),
        (192, 2, 64, 0, 2, 8, 0),  # 64 columns have no scale of 256
        (480, 1, 320, 0, 8, 8, 0),
        (768, 1, 512, 0, 9, 8, 0),
        (768, 1, 512, 4, 12, 8, 0),
        (2048, 1, 512, 0, 8, 8, 1),
    ):
        assert call(t, size, a, tokens, columns, first, last, shared, arrange, None) == SIZE
    assert call(a + 256, 192, a, 2, 64, 0, 2, 1, 0, None) == OVERLAP
    assert call(t, 192, a, 2, 64, 0, 2, 1, 0, b"sse9") == VARIANT
    assert not tile.any()
    assert call(t, 192, a, 2, 64, 0, 2, 1, 0, None) == OK
    assert call(t, 768, a, 1, 512, 8, 16, 8, 0, None) == OK
