# SPDX-License-Identifier: Apache-2.0
"""The vision encoder of phi4-nano against transformers' own rows; padding; damaged files."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketphi.convert.checkpoint import Checkpoint
from pocketphi.convert.config import read_config
from pocketphi.convert.onnx_graph import ENCODER_QUANTS, EncoderQuant
from pocketphi.convert.write_onnx_vision import write_vision
from pocketphi.runtime import hd, image, kernels
from pocketphi.runtime.errors import BundleError, KernelError
from pocketphi.runtime.image import ImageInput
from pocketphi.runtime.vision_encoder import VisionEncoder, VisionFiles, patches

from ..golden.vision.pictures import EVAL, HERE, SIZES, picture
from ..tiny import NANO

ROWS = np.load(HERE / "rows.npz")
ENCODED = [name.split("/")[0] for name in ROWS if name.endswith("/rows")]
LEAST_COSINE = {"fp16": 0.999, "int8": 0.998}  # of an image's rows together

Open = Callable[[EncoderQuant], VisionEncoder]


def files(directory: Path) -> VisionFiles:
    return VisionFiles(directory / "vision.onnx", directory / "vision-projector.onnx")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """phi4-nano's vision encoder in every kind."""
    made = {}
    with Checkpoint.open(NANO) as source:
        config = read_config(source.config, "config.json")
        for quant in ENCODER_QUANTS:
            made[quant] = tmp_path_factory.mktemp(quant)
            write_vision(made[quant], source, config, quant)
    return made


@pytest.fixture(scope="module")
def encoders(directories: dict[str, Path]) -> dict[str, VisionEncoder]:
    return {quant: VisionEncoder(files(path), n_threads=2) for quant, path in directories.items()}


def prepared(name: str) -> ImageInput:
    return image.prepare(picture(*SIZES[name]) if name in SIZES else image.load(EVAL / f"{name}.png"))


def cosine(a: Any, b: Any) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("name", ENCODED)
def test_rows_equal_the_reference(name: str, encoders: dict[str, VisionEncoder]) -> None:
    """Every row at fp32; the bound also tells a wrong order, mask or separator, which move rows by 1e-1."""
    prepared_image = prepared(name)
    at, want = ROWS[f"{name}/at"], ROWS[f"{name}/rows"]
    got = encoders["fp32"].encode(prepared_image)
    assert got.dtype == np.float32 and got.shape == (prepared_image.n_tokens, 256)
    error = np.linalg.norm(got[at] - want, axis=1) / np.linalg.norm(want, axis=1)
    assert error.max() <= 1e-4
    for quant, least in LEAST_COSINE.items():
        assert cosine(encoders[quant].encode(prepared_image)[at], want) >= least, quant


def test_four_bits_are_the_small_choice(
    encoders: dict[str, VisionEncoder], directories: dict[str, Path]
) -> None:
    """Nothing is promised of 128 values a row in 4 bits but that it acts as the model; and the size."""
    rows = {quant: encoders[quant].encode(prepared("img-000")) for quant in ENCODER_QUANTS}
    assert cosine(rows["int4"], rows["fp32"]) > cosine(rows["fp32"], np.roll(rows["fp32"], 7, axis=0))
    sizes = {q: sum(f.stat().st_size for f in directories[q].iterdir()) for q in ENCODER_QUANTS}
    assert sizes["fp32"] > sizes["fp16"] > sizes["int8"] > sizes["int4"]


def test_padding_changes_nothing(encoders: dict[str, VisionEncoder]) -> None:
    """Patches that are all padding are not read: what stands there has no effect."""
    whole = prepared("wide")
    crops = whole.crops.copy()
    window = list(whole.layout.windows())[2]
    assert (window.valid_columns, window.columns) == (22, 22)
    crops[2, :, :, 22 * hd.PATCH_PIXELS :] = 7
    changed = ImageInput(crops, whole.layout, "changed")
    assert np.array_equal(encoders["int8"].encode(changed), encoders["int8"].encode(whole))


def test_an_odd_edge_takes_the_masked_patch_beside_it_in(encoders: dict[str, VisionEncoder]) -> None:
    whole = prepared("edge")
    crops = whole.crops.copy()
    assert [w.columns for w in whole.layout.windows()] == [32, 32, 2]
    crops[2, :, :, hd.PATCH_PIXELS : 2 * hd.PATCH_PIXELS] = 0
    rows, changed = (encoders["fp32"].encode(i) for i in (whole, ImageInput(crops, whole.layout, "changed")))
    differ = np.abs(rows - changed).max(axis=1) > 1e-3
    column = np.zeros(whole.n_tokens, bool)
    column[16 : 16 * 18 : 18] = True  # the last of the 17 features of each row of the mosaic
    assert np.array_equal(differ, column)


def test_patches() -> None:
    crop = np.random.default_rng(0).standard_normal((3, 448, 448), np.float32)
    window = hd.Window(5, 3)
    found = patches(crop, window)
    assert found.shape == (6 * 4, 588)
    assert np.array_equal(found[1 * 4 + 2], crop[:, 14:28, 28:42].reshape(-1))


def test_progress(encoders: dict[str, VisionEncoder]) -> None:
    seen: list[tuple[int, int]] = []
    encoders["int8"].encode(prepared("wide"), lambda done, of: seen.append((done, of)))
    assert seen == [(1, 3), (2, 3), (3, 3)]

    def stop(done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encoders["int8"].encode(prepared("wide"), stop)


def refused(directory: Path) -> str:
    """The one line with which an encoder is refused."""
    with pytest.raises(BundleError) as caught:
        VisionEncoder(files(directory), n_threads=1).encode(prepared("thin"))
    text = str(caught.value)
    assert "\n" not in text and str(directory) in text
    return text


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def test_damaged_graphs(directories: dict[str, Path], tmp_path: Path) -> None:
    good = directories["int8"]
    raw = (good / "vision.onnx").read_bytes()
    for n, bad in enumerate((b"", b"x", raw[: len(raw) // 2], raw[:-1], json.dumps({"a": 1}).encode())):
        directory = copy(good, tmp_path / f"cut{n}")
        (directory / "vision.onnx").write_bytes(bad)
        refused(directory)
    directory = copy(good, tmp_path / "swapped")
    shutil.copy(directory / "vision-projector.onnx", directory / "vision.onnx")
    refused(directory)
    directory = copy(good, tmp_path / "absent")
    (directory / "vision-projector.onnx").unlink()
    assert "no such file" in refused(directory)


def test_damaged_weights(directories: dict[str, Path], tmp_path: Path) -> None:
    directory = copy(directories["fp32"], tmp_path / "short")
    data = directory / "vision.onnx.data"
    data.write_bytes(data.read_bytes()[:-4096])
    refused(directory)
    data.unlink()
    refused(directory)
    directory = copy(directories["fp32"], tmp_path / "nan")
    data = directory / "vision-projector.onnx.data"
    data.write_bytes(b"\xff" * data.stat().st_size)
    assert "not finite" in refused(directory)


@pytest.mark.parametrize("target", ["../secret.data", "/etc/passwd", "sub/x.data", "other.onnx.data"])
def test_weights_from_elsewhere(target: str, directories: dict[str, Path], tmp_path: Path) -> None:
    """A graph that names any file but its own data is not opened, wherever in it the name stands."""
    directory = copy(directories["fp32"], tmp_path / "model")
    shutil.copy(directory / "vision.onnx.data", tmp_path / "secret.data")
    graph = directory / "vision.onnx"
    own = b"vision.onnx.data"
    entry = b"\x12" + bytes([len(own)]) + own
    other = b"\x12" + bytes([len(own)]) + target.encode().ljust(len(own), b"/")[: len(own)]
    raw = graph.read_bytes()
    assert entry in raw
    graph.write_bytes(raw.replace(entry, other, 1))
    assert "refers to a file other than vision.onnx.data" in refused(directory)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="a matter of x86")
def test_eight_bits_without_vnni(
    encoders: dict[str, VisionEncoder], directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exact way for CPUs without VNNI gives the same integers, and so the same rows."""
    monkeypatch.setattr(kernels, "is_available", lambda: False)
    other = VisionEncoder(files(directories["int8"]), n_threads=2).encode(prepared("thin"))
    rows = encoders["int8"].encode(prepared("thin"))
    # What differs is the order in which float32 scales are applied: a value near the middle between two
    # steps may be rounded to the other one, which moves the rows by a small part of int8's own error.
    exact = encoders["fp32"].encode(prepared("thin"))
    assert np.linalg.norm(other - rows) <= 0.1 * np.linalg.norm(rows - exact)


def test_wrong_input_is_a_kernel_error(encoders: dict[str, VisionEncoder]) -> None:
    with pytest.raises(KernelError, match="ONNX Runtime failed"):
        encoders["fp32"]._tower.run(patches=np.zeros((1, 4, 587), np.float32))
