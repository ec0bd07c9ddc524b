# SPDX-License-Identifier: Apache-2.0
"""Every log-mel variant this CPU has, against float64, within a bound that is derived and not tuned."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import numpy.typing as npt
import pytest

from pocketphi.runtime import kernels
from pocketphi.runtime.errors import KernelError

Float64 = npt.NDArray[np.float64]
Float32 = npt.NDArray[np.float32]

SHAPES = {16000: (400, 160, 512, 246), 8000: (200, 80, 256, 128)}  # window, hop, FFT, bins used
FILLS = ["noise", "sweep", "square", "dc", "impulse", "huge", "tiny"]
MAX_SAMPLE = float(np.finfo(np.float32).max) / 2


def wave_of(fill: str, n: int) -> Float32:
    rng = np.random.default_rng(5)
    t = np.arange(n)
    x: npt.NDArray[np.floating] = np.zeros(n)
    if fill == "noise":
        x = rng.uniform(-1, 1, n)
    elif fill == "sweep":  # a clean tone: most bands hold little beside its side lobes
        x = 0.9 * np.sin(2 * np.pi * (0.01 * t + 0.2 * t**2 / n))
    elif fill == "square":
        x = np.where(t // 16 % 2, -1.0, 1.0)
    elif fill == "dc":
        x = np.ones(n)
    elif fill == "impulse":
        x[n // 2] = 1.0
    elif fill == "huge":
        x = rng.choice([-MAX_SAMPLE, MAX_SAMPLE], n)
    elif fill == "tiny":
        x = rng.uniform(-1, 1, n) * 1e-40  # subnormal in float32
    return x.astype(np.float32)


def mel_scale(hz: npt.ArrayLike) -> Float64:
    return np.asarray(1127 * np.log1p(np.asarray(hz, np.float64) / 700))


def truth(wave: Float32, rate: int) -> tuple[Float64, Float64]:
    """The definition in float64, written a second time on purpose; and how far a kernel may be from it."""
    window, hop, n_fft, bins = SHAPES[rate]
    edges = np.linspace(0, mel_scale(7690.0), 82)
    f = mel_scale(np.arange(bins) * rate / n_fft)[:, None]
    up, down = (f - edges[:-2]) / (edges[1] - edges[0]), (edges[2:] - f) / (edges[1] - edges[0])
    mel = np.clip(np.minimum(up, down), 0, None)
    mel[0] = 0

    frames = np.stack([wave[i : i + window] for i in range(0, len(wave) - window + 1, hop)])
    before = np.hstack([frames[:, :1], frames[:, :-1]])
    y = (frames - np.float32(0.97) * before).astype(np.float64) * np.hamming(window) * 32768
    magnitude = np.abs(np.fft.rfft(y, n_fft)[:, :bins])
    power = magnitude**2
    energy = power @ mel

    # Both sides: an FFT of log2 n stages errs by at most 6.7 u log2 n in the 2-norm (Higham, Accuracy and
    # Stability, 24.1: one stage has a twiddle's error u and 4 sqrt 2 u of a complex product); the window
    # and its product add 4 u.
    u = np.finfo(np.float64).eps / 2
    norm = np.sqrt(n_fft) * np.linalg.norm(y, axis=1, keepdims=True)
    d_bin = 2 * (6.7 * np.log2(n_fft) + 4) * u * norm
    d_power = 2 * magnitude * d_bin + d_bin**2
    # A mel weight: mel(f) < 2841 with 3 roundings on f's and on the centre's side, over the spacing of 34.9:
    # 490 u, on both sides of the comparison. It may also give a bin just outside the triangle a weight.
    reach = mel > 0
    reach[1:] |= mel[:-1] > 0
    reach[:-1] |= mel[1:] > 0
    taps = reach.sum(0)
    d_energy = d_power @ mel + 980 * u * (power @ reach) + 2 * (taps + 6) * u * energy
    out = np.log(np.maximum(energy, 1))
    # ln is 1 / x steep; the kernel's series errs by 2e-12 of the value; the result is rounded to float32.
    bound = d_energy / np.maximum(1, energy - d_energy) + (np.finfo(np.float32).eps / 2 + 1e-11) * out
    return out, bound


@pytest.mark.parametrize("variant", kernels.variants("logmel"))
@pytest.mark.parametrize("rate", SHAPES)
@pytest.mark.parametrize("n_frames", [1, 3, 4, 5, 18])  # less than the lanes, all, one more, several rounds
@pytest.mark.parametrize("fill", FILLS)
def test_every_variant_against_float64(variant: str, rate: int, n_frames: int, fill: str) -> None:
    window, hop, _, _ = SHAPES[rate]
    wave = wave_of(fill, window + (n_frames - 1) * hop + hop - 1)  # a tail one sample short of a frame
    guarded = np.full((n_frames + 2, 80), np.nan, np.float32)

    kernels.log_mel(wave, rate, out=guarded[1:-1], variant=variant)

    want, bound = truth(wave, rate)
    assert want.shape == (n_frames, 80)
    assert bound.max() < 2e-5, "the bound says nothing"  # rounding 207, the largest feature, is 1.2e-5 of it
    assert (np.abs(guarded[1:-1] - want) <= bound).all()
    assert np.isnan(guarded[[0, -1]]).all(), "wrote outside out"


@pytest.mark.parametrize("variant", kernels.variants("logmel"))
@pytest.mark.parametrize("rate", SHAPES)
def test_silence_is_exactly_zero(variant: str, rate: int) -> None:
    assert not kernels.log_mel(np.zeros(rate, np.float32), rate, variant=variant).any()


@pytest.mark.parametrize("variant", kernels.variants("logmel")[1:])
@pytest.mark.parametrize("rate", SHAPES)
@pytest.mark.parametrize("fill", FILLS)
def test_variants_give_the_same_bits(variant: str, rate: int, fill: str) -> None:
    wave = wave_of(fill, rate)
    scalar, simd = (kernels.log_mel(wave, rate, variant=v) for v in ("c", variant))
    assert scalar.tobytes() == simd.tobytes()


def test_a_clip_in_ranges_gives_the_same_bits() -> None:
    wave = wave_of("noise", 16000)
    whole = kernels.log_mel(wave)
    assert kernels.log_mel(wave[7 * 160 :].copy()).tobytes() == whole[7:].tobytes()


def test_the_fastest_variant_is_the_default() -> None:
    wave = wave_of("noise", 4000)
    fastest = kernels.log_mel(wave, variant=kernels.variants("logmel")[-1])
    assert kernels.log_mel(wave).tobytes() == fastest.tobytes()


def refused(**changes: object) -> str:
    arguments = {"wave": np.zeros(400, np.float32), "sample_rate": 16000} | changes
    with pytest.raises(KernelError) as caught:
        kernels.log_mel(**arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2e38, -2e38])
@pytest.mark.parametrize("at", [0, 399, 16000])  # the last one is in the tail that no frame uses
def test_values_that_are_not_finite_are_refused(bad: float, at: int) -> None:
    wave = np.zeros(16001, np.float32)
    wave[at] = bad
    out = np.full((98, 80), 7, np.float32)
    assert "not finite" in refused(wave=wave, out=out)
    assert (out == 7).all(), "wrote before it checked"


def test_wrong_arguments_are_refused() -> None:
    wave = np.zeros(720, np.float32)
    assert "float64" in refused(wave=wave.astype(np.float64))
    assert "[2, 360]" in refused(wave=wave.reshape(2, 360))
    assert "strided" in refused(wave=np.zeros(1440, np.float32)[::2])
    assert "shorter" in refused(wave=wave[:399])
    assert "shorter" in refused(wave=wave[:0])
    assert "44100" in refused(sample_rate=44100)
    assert "-16000" in refused(sample_rate=-16000)
    assert "[3, 80]" in refused(wave=wave, out=np.zeros((2, 80), np.float32))
    assert "float64" in refused(wave=wave, out=np.zeros((3, 80)))
    assert "strided" in refused(wave=wave, out=np.zeros((3, 160), np.float32)[:, ::2])
    assert "'sse9'" in refused(variant="sse9")
    read_only = np.zeros((1, 80), np.float32)
    read_only.flags.writeable = False
    assert "read-only" in refused(out=read_only)
    memory = np.zeros(479, np.float32)
    assert "share memory" in refused(wave=memory[79:], out=memory[:80].reshape(1, 80))


def test_unknown_kernel() -> None:
    with pytest.raises(KernelError, match="kernel 'matmul9' is not in libpk"):
        kernels.variants("matmul9")


def under_mask(mask: str, code: str) -> subprocess.CompletedProcess[str]:
    """A fresh process, because the mask is read once."""
    return subprocess.run(
        [sys.executable, "-c", f"from pocketphi.runtime import kernels\n{code}"],
        env=os.environ | {"POCKETPHI_CPU_MASK": mask},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_mask_none_leaves_the_scalar_code() -> None:
    done = under_mask("none", "print(kernels.cpu_features(), kernels.variants('logmel'))")
    assert (done.stdout, done.stderr) == ("() ('c',)\n", "")


def test_mask_narrows_and_never_adds() -> None:
    known = kernels.cpu_features()
    done = under_mask("avx2,neon,i8mm", "print(kernels.cpu_features())")
    assert done.stdout == f"{tuple(f for f in known if f in ('avx2', 'neon', 'i8mm'))}\n"


def test_masked_variant_is_refused() -> None:
    best = kernels.variants("logmel")[-1]
    if best == "c":
        pytest.skip("this CPU runs the scalar variant alone")
    code = f"import numpy as np\nkernels.log_mel(np.zeros(400, np.float32), variant={best!r})"
    assert "no such variant, or this CPU cannot run it" in under_mask("none", code).stderr


def test_unknown_name_in_the_mask_is_an_error() -> None:
    code = "try:\n kernels.cpu_features()\nexcept kernels.KernelError as exc:\n print(exc)"
    done = under_mask("avx2,avx3", code)
    assert done.stdout.startswith("POCKETPHI_CPU_MASK is 'avx2,avx3', expected 'none' or names from: avx2, ")
    assert done.stdout.count("\n") == 1
