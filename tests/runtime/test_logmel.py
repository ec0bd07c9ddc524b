# SPDX-License-Identifier: Apache-2.0
"""Log-mel features against golden values; the numpy way where there is no library; what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pocketphi.runtime import kernels, logmel
from pocketphi.runtime.errors import InputError

Float32 = npt.NDArray[np.float32]
Way = Callable[[Float32, int], Float32]

GOLDEN = Path(__file__).parents[1] / "golden" / "logmel"
WAYS = [logmel.log_mel, logmel.log_mel_numpy]

# One feature of a front end that works in float32 after the FFT, in units of 2^-24 of the energy: rounding
# the components 1 and taking their magnitude 2, doubled and 1 more by the square; a weight 1, its product 1,
# a sum of at most 15 terms 15. Then ln of values below 28: one unit in the last place there, half a one here.
FLOAT32_PIPELINE = (2 * (1 + 2) + 1 + 1 + 1 + 15 + (2 + 1) * 28) * 2**-24
FIVE_DECIMALS = 5e-6


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return dict(json.loads((GOLDEN / "golden_audio.json").read_text("utf-8")))


def two_tones(rate: int) -> Float32:
    n = np.arange(rate)
    x = 0.5 * np.sin(2 * np.pi * 440 * n / rate) + 0.25 * np.sin(2 * np.pi * 3000 * n / rate)
    return x.astype(np.float32)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rate", [16000, 8000])
def test_golden_tones(way: Way, rate: int, golden: dict[str, Any]) -> None:
    want = golden[str(rate)]
    got = way(two_tones(rate), rate)
    assert list(got.shape) == want["shape"]
    bound = FLOAT32_PIPELINE + FIVE_DECIMALS
    assert np.abs(got[0] - want["frame0"]).max() <= bound
    assert np.abs(got[50] - want["frame50"]).max() <= bound
    assert abs(got.mean(dtype=np.float64) - want["mean_all"]) <= bound
    if rate == 8000:
        assert not got[:, 62:].any(), "there is nothing above 4 kHz"


@pytest.mark.parametrize("way", WAYS)
def test_golden_impulse(way: Way, golden: dict[str, Any]) -> None:
    wave = np.zeros(16000, np.float32)
    wave[1000] = 1
    got = way(wave, 16000)
    want = golden["impulse_at_1000"]
    assert np.abs(got[6, :8] - want["frame6_first8"]).max() <= FLOAT32_PIPELINE + FIVE_DECIMALS
    assert np.abs(got[6, -4:] - want["frame6_last4"]).max() <= FLOAT32_PIPELINE + FIVE_DECIMALS
    assert (got[10] == golden["silence_value"]).all()


@pytest.mark.parametrize("way", WAYS)
def test_golden_transformers(way: Way) -> None:
    data = np.load(GOLDEN / "transformers.npz")
    got = way(data["wave"].astype(np.float32) / 32768, 16000)
    want = data["features"]
    assert got.shape == want.shape
    assert np.abs(got - want)[:, :79].max() <= FLOAT32_PIPELINE
    # Their band 79 also takes bin 246: never less than ours, and somewhere more. We follow the original.
    assert (want[:, 79] >= got[:, 79] - FLOAT32_PIPELINE).all()
    assert (want[:, 79] - got[:, 79]).max() > 100 * FLOAT32_PIPELINE


def test_mel_matrix(golden: dict[str, Any]) -> None:
    mel = logmel._mel_matrix()
    ranges = [[int(np.flatnonzero(c)[0]), int(np.flatnonzero(c)[-1])] for c in mel.T]
    assert ranges == golden["mel_filter_nonzero_bin_ranges_inclusive"]
    for row in (0, 79):
        for k, weight in golden[f"mel_filter_row{row}"].items():
            assert abs(mel[int(k), row] - weight) <= FIVE_DECIMALS


@pytest.mark.parametrize(
    ("seconds", "frames"), [(0.025, 1), (0.5, 48), (1, 98), (5, 498), (30, 2998), (60, 5998)]
)
@pytest.mark.parametrize("rate", [16000, 8000])
@pytest.mark.parametrize("way", WAYS)
def test_frame_counts(way: Way, rate: int, seconds: float, frames: int) -> None:
    got = way(np.zeros(int(seconds * rate), np.float32), rate)
    assert got.shape == (frames, 80)
    assert got.dtype == np.float32
    assert not got.any()


@pytest.mark.parametrize("rate", [16000, 8000])
@pytest.mark.parametrize("seconds", [1, 45])  # 45 s is more than one of numpy's blocks
def test_numpy_and_kernel_agree(rate: int, seconds: int) -> None:
    wave = np.random.default_rng(1).uniform(-1, 1, seconds * rate).astype(np.float32)
    native, fallback = kernels.log_mel(wave, rate), logmel.log_mel_numpy(wave, rate)
    # Both work in float64 and round once. Before that they differ by far less than a rounding of a feature
    # below 32 (tests/kernels derives it), so at most one step of float32 there lies between them.
    assert native.max() < 32
    assert np.abs(native - fallback).max() <= 2**-19


def test_a_strided_or_read_only_wave_is_fine() -> None:
    stereo = np.random.default_rng(2).uniform(-1, 1, (4000, 2)).astype(np.float32)
    stereo.flags.writeable = False
    assert np.array_equal(logmel.log_mel(stereo[:, 0]), logmel.log_mel(stereo[:, 0].copy()))


@pytest.mark.parametrize(
    ("wave", "rate", "message"),
    [
        (np.zeros(0, np.float32), 16000, "audio has 0 samples, expected at least 400 (25 ms)"),
        (np.zeros(399, np.float32), 16000, "audio has 399 samples, expected at least 400 (25 ms)"),
        (np.zeros(199, np.float32), 8000, "audio has 199 samples, expected at least 200 (25 ms)"),
        (np.zeros((400, 2), np.float32), 16000, "audio is float32 [400, 2], expected mono float32 [samples]"),
        (np.zeros(400), 16000, "audio is float64 [400], expected mono float32 [samples]"),
        (np.zeros(400, np.int16), 16000, "audio is int16 [400], expected mono float32 [samples]"),
        (np.zeros(400, np.float32), 44100, "audio is at 44100 Hz, expected 16000 or 8000"),
        (
            np.full(400, np.nan, np.float32),
            16000,
            "audio has a sample that is not finite, expected values in [-1, 1]",
        ),
        (
            np.full(400, -np.inf, np.float32),
            16000,
            "audio has a sample that is not finite, expected values in [-1, 1]",
        ),
    ],
)
def test_refused(wave: Float32, rate: int, message: str) -> None:
    with pytest.raises(InputError) as caught:
        logmel.log_mel(wave, rate)
    assert str(caught.value) == message


def copied_package(folder: Path) -> Path:
    """The installed runtime, real files, without its native library; returns the lib/ folder to be filled."""
    package = folder / "pocketphi"
    package.mkdir()
    (package / "__init__.py").write_text("")
    source = Path(str(kernels.__file__)).parent
    shutil.copytree(source, package / "runtime", ignore=shutil.ignore_patterns("__pycache__"))
    (package / "lib").mkdir()
    return package / "lib"


def run_in(folder: Path, code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    return done.stdout


SHOW_FEATURES = """
import numpy as np
from pocketphi.runtime import kernels, logmel
x = np.sin(np.arange(1600, dtype=np.float32))
print(kernels.__file__, kernels.is_available())
print(logmel.log_mel(x).tolist() == logmel.log_mel_numpy(x, 16000).tolist())
try:
    kernels.cpu_features()
except kernels.KernelError as exc:
    print(exc)
"""

SHOW_ERROR = """
import numpy as np
from pocketphi.runtime import errors, logmel
try:
    logmel.log_mel(np.zeros(400, np.float32))
except errors.KernelError as exc:
    print(exc)
"""


def test_without_a_library_numpy_does_it(tmp_path: Path) -> None:
    lib = copied_package(tmp_path)
    where, same, error = run_in(tmp_path, SHOW_FEATURES).splitlines()
    assert where == f"{lib.parent / 'runtime' / 'kernels.py'} False"
    assert same == "True"
    path = lib / kernels.library_path().name
    assert error == f"{path} is missing: the package was built without its native library"


def test_a_damaged_library_is_an_error(tmp_path: Path) -> None:
    path = copied_package(tmp_path) / kernels.library_path().name
    whole = kernels.library_path().read_bytes()
    for content in (b"", b"not a library\n", whole[:100]):
        path.write_bytes(content)
        message = run_in(tmp_path, SHOW_ERROR)
        assert message.startswith(f"{path} cannot be loaded: ")
        assert message.count("\n") == 1


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler to make the wrong libraries")
def test_another_library_and_another_abi(tmp_path: Path) -> None:
    path = copied_package(tmp_path) / kernels.library_path().name
    declared = [
        "pk_version",
        "pk_status",
        "pk_check_mask",
        "pk_feature",
        "pk_known_feature",
        "pk_variant",
        "pk_logmel",
    ]
    rest = "".join(f"int {name}(void) {{ return 0; }}\n" for name in declared)
    cases = {
        "int pk_abi(void) { return 1; }\n": f"{path} cannot be loaded: ",
        f"int pk_abi(void) {{ return {kernels.ABI + 1}; }}\n{rest}": f"{path} has ABI {kernels.ABI + 1}, "
        f"expected {kernels.ABI}: reinstall pocketphi",
    }
    for code, message in cases.items():
        source = tmp_path / "wrong.c"
        source.write_text(code)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(path), str(source)], check=True, timeout=60)
        shown = run_in(tmp_path, SHOW_ERROR)
        assert shown.startswith(message)
        assert shown.count("\n") == 1


def test_the_library_of_this_test_run_is_there() -> None:
    assert kernels.is_available()  # or `log_mel` above was numpy all along
