# SPDX-License-Identifier: Apache-2.0
"""Images: pixels and layout against the reference's, every kind of file, and what is refused."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from pocketphi.runtime import hd, image, resample
from pocketphi.runtime.errors import InputError
from pocketphi.runtime.image_header import read_header

from ..golden.vision.pictures import EVAL, FILES, HERE, SIZES, digest, picture, samples

UInt8 = npt.NDArray[np.uint8]

PIXELS: dict[str, Any] = json.loads((HERE / "pixels.json").read_text("utf-8"))["images"]
ROWS = np.load(HERE / "rows.npz")
NAMES = sorted(f.name for f in FILES.iterdir())

# Two float32 evaluations of 4 + 4 products and sums: 8 roundings each, of partial sums that the weights
# (1.375 in absolute value along each axis) and pixels within ±1 keep below 1.375².
BICUBIC_BOUND = 2 * 8 * 2**-24 * 1.375**2

# width height | crops across, down | scaled | valid patches | features | tokens
TOKENS = """
224 224 1 1 448 448 32 32 16 16 545
336 336 1 1 448 448 32 32 16 16 545
448 448 1 1 448 448 32 32 16 16 545
448 447 1 1 448 447 32 32 16 16 545
449 448 2 1 449 448 33 32 17 16 561
500 300 2 1 746 448 54 32 27 16 721
100 1000 1 3 134 1344 10 96 5 48 561
336 2000 1 5 376 2240 27 160 14 80 1473
640 480 2 2 896 672 64 48 32 24 1065
800 600 2 2 896 672 64 48 32 24 1065
1280 720 3 2 1344 756 96 54 48 27 1596
1024 768 3 2 1194 896 86 64 43 32 1681
1344 896 3 2 1344 896 96 64 48 32 1841
1344 1344 3 3 1344 1344 96 96 48 48 2625
4000 3000 4 3 1792 1344 128 96 64 48 3393
4032 3024 4 3 1792 1344 128 96 64 48 3393
8000 6000 4 3 1792 1344 128 96 64 48 3393
3024 4032 3 4 1344 1792 96 128 48 64 3409
6000 400 14 1 6272 418 448 30 224 15 3648
1920 1080 5 3 2240 1260 160 90 80 45 3918
1170 2532 3 6 1242 2688 89 192 45 96 4689
1700 2200 4 5 1730 2240 124 160 62 80 5313
3840 2160 7 4 3136 1764 224 126 112 63 7392
5000 2500 8 4 3584 1792 256 128 128 64 8529
2480 3508 5 7 2217 3136 159 224 80 112 9345
2688 2688 6 6 2688 2688 192 192 96 96 9585
3000 3000 6 6 2688 2688 192 192 96 96 9585
448 16128 1 36 448 16128 32 1152 16 576 10065
448 20 1 1 448 20 32 2 16 1 290
"""


@pytest.mark.parametrize("line", TOKENS.split("\n")[1:-1])
def test_layout_and_tokens(line: str) -> None:
    width, height, *want = map(int, line.split())
    p = hd.layout(width, height)
    got = [p.columns, p.rows, p.width, p.height, p.valid_columns, p.valid_rows]
    assert [*got, p.feature_columns, p.feature_rows, p.n_tokens] == want
    assert len(p.assembly()) == p.n_tokens
    assert len(list(p.windows())) == p.n_crops == 1 + p.columns * p.rows


@pytest.mark.parametrize("size", [(500, 300), (449, 448), (336, 2000), (1170, 2532), (448, 20)])
def test_assembly(size: tuple[int, int]) -> None:
    """Features that say where they come from, put together as the model's code does with whole crops."""
    p = hd.layout(*size)
    side = hd.CROP_ROWS
    names = np.arange(p.n_crops * side * side).reshape(p.n_crops, side, side) + hd.FIRST_FEATURE
    mosaic = names[1:].reshape(p.rows, p.columns, side, side).swapaxes(1, 2)
    mosaic = mosaic.reshape(p.rows * side, p.columns * side)[: p.feature_rows, : p.feature_columns]
    want = [hd.SUB_SEPARATOR if n is None else n for row in mosaic for n in (*row, None)]
    want += [hd.GLOBAL_SEPARATOR]
    want += [hd.SUB_SEPARATOR if n is None else n for row in names[0] for n in (*row, None)]
    computed = [0, 1]  # what each of our rows is called in the whole crops
    for crop, window in zip(names, p.windows(), strict=True):
        computed += crop[: window.rows // 2, : window.columns // 2].reshape(-1).tolist()
    assert np.array(computed)[p.assembly()].tolist() == want


@pytest.mark.parametrize("valid", range(1, 33))
def test_positions(valid: int) -> None:
    """Against the reference's arithmetic: float32 steps put into the buckets of arange(1/32, 1, 1/32)."""
    window = hd.Window(valid, 32)
    steps = np.arange(valid, dtype=np.float32) * (np.float32(1) / np.float32(valid))
    bounds = np.arange(1 / 32, 1.0, 1 / 32).astype(np.float32)
    buckets = np.searchsorted(bounds, np.minimum(steps, np.float32(1 - 1e-6)), side="right")
    ids = window.position_ids.reshape(window.rows, window.columns)
    assert np.array_equal(ids[:valid], 32 * buckets[:, None] + np.arange(32))
    assert not ids[valid:].any()
    assert np.array_equal(window.keys, np.arange(valid * 32))


@pytest.mark.parametrize("name", PIXELS)
def test_pixels_equal_the_reference(name: str) -> None:
    rgb = picture(*SIZES[name]) if name in SIZES else image.load(EVAL / f"{name}.png")
    want, got = PIXELS[name], image.prepare(rgb)
    assert got.n_tokens == want["tokens"]
    assert [448 * got.layout.rows, 448 * got.layout.columns] == want["canvas"]
    assert [w.valid_rows * w.valid_columns for w in got.layout.windows()] == want["valid_patches"]
    assert digest(got.crops[1:]) == want["canvas_crops_sha256"]
    view = got.crops[0].reshape(-1)[samples(got.crops[0].size)]
    assert np.abs(view - ROWS[f"{name}/global"]).max() <= BICUBIC_BOUND


def test_pixels_of_pillow() -> None:
    """Pillow's resize, which the model was trained with: 1 of 255 apart on at most 1e-4 of the values."""
    for size, want in json.loads((HERE / "pillow.json").read_text("utf-8")).items():
        if size == "note":
            continue
        width, height = map(int, size.split("x"))
        y, x = np.mgrid[:height, :width]
        blue = (x // 32 + y // 32) % 2 * 200 + 20
        rgb = np.stack([(3 * x + 5 * y) % 256, (x * x // 64 + 2 * y) % 256, blue], axis=-1).astype(np.uint8)
        got = image.prepare(rgb)
        canvas = np.rint(got.crops[1:].astype(np.float64) * 127.5 + 127.5)
        assert abs(canvas.sum() - want["canvas_sum_uint8"]) <= 1e-4 * canvas.size
        for at, values in want["canvas_uint8_rgb_at_x_y"].items():
            i, j = map(int, at.split(","))
            assert np.abs(canvas[0][:, j, i] - values).max() <= 1
        for at, values in want["global_view_normalised_rgb_at_x_y"].items():
            i, j = map(int, at.split(","))  # five decimals, and 1 of 255 in each of the sampled pixels
            assert np.abs(got.crops[0][:, j, i] - values).max() <= 5e-6 + 1.375**2 / 127.5


@pytest.mark.parametrize("sizes", [(90, 70, 33, 41), (31, 50, 97, 60), (448, 5, 448, 11), (700, 13, 29, 13)])
def test_bilinear_is_a_triangle_filter(sizes: tuple[int, int, int, int]) -> None:
    """Against the definition in float64. Each axis rounds to 8 bits: half a unit, a little by its weights."""
    w, h, width, height = sizes
    planes = np.random.default_rng(0).integers(0, 256, (3, h, w)).astype(np.uint8)

    def matrix(n_in: int, n_out: int) -> npt.NDArray[np.float64]:
        scale = n_in / n_out
        at = (np.arange(n_in) + 0.5) - (np.arange(n_out)[:, None] + 0.5) * scale
        weights = np.maximum(0, 1 - np.abs(at) / max(scale, 1))
        return weights / weights.sum(axis=1, keepdims=True)

    want = matrix(h, height) @ planes.astype(np.float64) @ matrix(w, width).T
    got = resample.bilinear(planes, width, height)
    # 2^-14 relative is the most that weights of 15 bits can be off together; see the module.
    assert np.abs(got - want).max() <= 2 * (0.5 + 255 * 2**-14)


@pytest.mark.parametrize("name", NAMES)
def test_files_of_every_kind(name: str) -> None:
    data = (FILES / name).read_bytes()
    if name.endswith((".avif", ".jp2")) and cv2.imdecode(np.frombuffer(data, np.uint8), 1) is None:
        pytest.skip(f"this OpenCV does not read {name}")
    got, want = image.load(FILES / name), ROWS[f"files/{name}"]
    assert got.shape == want.shape and got.dtype == np.uint8
    # OpenCV rounds differently from Pillow when it leaves CMYK; all else is equal.
    assert np.abs(got.astype(int) - want).max() <= (name == "cmyk.jpg")
    assert np.array_equal(image.load(data), got)


@pytest.mark.parametrize("name", NAMES)
def test_headers(name: str) -> None:
    header = read_header((FILES / name).read_bytes())
    assert header is not None and (header.width, header.height) == (45, 30)


def encoded(suffix: str, array: npt.NDArray[Any]) -> bytes:
    ok, data = cv2.imencode(suffix, array)
    assert ok
    return bytes(data)


def test_sixteen_bits_keep_the_upper_byte() -> None:
    values = np.random.default_rng(1).integers(0, 65536, (20, 30, 3)).astype(np.uint16)
    assert np.array_equal(image.load(encoded(".png", values)), values[..., ::-1] >> 8)
    grey = image.load(encoded(".png", values[..., 0]))
    assert np.array_equal(grey, np.repeat(values[..., :1] >> 8, 3, axis=2))


def test_other_formats() -> None:
    bgr = picture(40, 30)[..., ::-1].copy()
    for suffix in (".ras", ".pam", ".pgm", ".hdr", ".pfm"):
        array = bgr.astype(np.float32) / 255 if suffix in (".hdr", ".pfm") else bgr
        array = array[..., 0] if suffix == ".pgm" else array
        assert image.load(encoded(suffix, array)).shape == (30, 40, 3)


def test_most_crops() -> None:
    """By hand, for 3 : 2. One crop: 448 × 298, 22 rows of patches. Two: 1 × 1 and 2 × 1 are as close, and the
    later wins as the image is large: 672 × 448, 48 columns. Four: likewise 2 × 2, 896 × 597, 43 rows.
    """
    rgb = picture(1344, 896)
    tokens = {n: image.prepare(rgb, n).n_tokens for n in (1, 2, 4, 6, 36)}
    rows = {1: 11 * 17, 2: 16 * 25, 4: 22 * 33, 6: 32 * 49, 36: 32 * 49}
    assert tokens == {n: count + 273 for n, count in rows.items()}
    assert image.prepare(rgb, 6).key != image.prepare(rgb, 36).key
    assert image.prepare(rgb).key == image.prepare(rgb.copy()).key != image.prepare(rgb[::-1]).key
    with pytest.raises(InputError, match="expected at least 1"):
        image.prepare(rgb, 0)


def refused(source: Path | bytes, **options: Any) -> str:
    """The one line with which an image is refused."""
    with pytest.raises(InputError) as caught:
        image.load(source, **options)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 300
    return text


@pytest.mark.parametrize("name", NAMES)
def test_truncated(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    data = (FILES / name).read_bytes()
    for cut in (1, 2, 3, 8, len(data) // 10, len(data) // 2, len(data) - 20, len(data) - 3):
        refused(data[:-cut])
    assert capfd.readouterr() == ("", ""), "the decoders say nothing by themselves"


def test_damaged() -> None:
    """Whatever the bytes, an image or an InputError."""
    rng = np.random.default_rng(2)
    for name in NAMES:
        data = np.frombuffer((FILES / name).read_bytes(), np.uint8)
        for _ in range(20):
            bad = data.copy()
            bad[rng.integers(0, len(bad), 3)] = rng.integers(0, 256, 3)
            try:
                assert image.load(bad.tobytes(), max_pixels=10**6).shape[2] == 3
            except InputError as exc:
                assert "\n" not in str(exc)


def bombs() -> dict[str, bytes]:
    """Files that say they are 60,000 × 60,000 pixels, with nothing behind the header."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    n = 60000
    ifd = struct.pack("<HHHIIHHIII", 2, 256, 4, 1, n, 257, 4, 1, n, 0)
    big = struct.pack("<QHHQQHHQQQ", 2, 256, 4, 1, n, 257, 4, 1, n, 0)
    frame = struct.pack(">BHHB", 8, n, n, 0)
    return {
        "png": b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", n, n, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b""),
        "jpeg": b"\xff\xd8\xff\xe0\0\x04\0\0\xff\xff\xc2" + struct.pack(">H", 2 + len(frame)) + frame,
        "gif": b"GIF89a" + struct.pack("<HH", n, n),
        "bmp": b"BM" + bytes(12) + struct.pack("<Iii", 40, n, -n),
        "bmp-os2": b"BM" + bytes(12) + struct.pack("<IHH", 12, n, n),
        "webp": b"RIFF\0\0\0\0WEBPVP8X" + bytes(8) + (n - 1).to_bytes(3, "little") * 2,
        "tiff": b"II\x2a\0" + struct.pack("<I", 8) + ifd,
        "bigtiff": b"II\x2b\0" + struct.pack("<HHQ", 8, 0, 16) + big,
        "pnm": b"P6 # comment\n60000 # more\n60000\n255\n",
        "pam": b"P7\nWIDTH 60000\nHEIGHT 60000\nDEPTH 3\n",
        "jp2": b"\xff\x4f\xff\x51" + bytes(4) + struct.pack(">IIII", n + 7, n + 9, 7, 9),
        "avif": b"\0\0\0\x18ftypavif" + bytes(8) + b"ispe" + bytes(4) + struct.pack(">II", n, n),
        "sun": b"\x59\xa6\x6a\x95" + struct.pack(">II", n, n),
        "hdr": b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 60000 +X 60000\n",
    }


@pytest.mark.parametrize("name", bombs())
def test_bombs_are_refused_by_their_header(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cv2, "imdecode")  # refused before anything is decoded
    assert "60000 × 60000 pixels are too many, expected at most 100,000,000" in refused(bombs()[name])


def test_sizes() -> None:
    assert image.prepare(image.load(encoded(".png", picture(1, 1)))).n_tokens == 545
    assert image.prepare(image.load(encoded(".png", picture(400, 800)))).n_tokens == 273 + 32 * 17
    for size in ((1, 20000), (20000, 1), (448, 9)):
        assert "too long and thin" in refused(encoded(".png", picture(*size)))
        with pytest.raises(InputError, match="too long and thin"):
            image.prepare(picture(*size), where="frame 3")
    assert "30 × 20 pixels are too many" in refused(encoded(".png", picture(30, 20)), max_pixels=599)
    assert image.load(encoded(".png", picture(30, 20)), max_pixels=600).shape == (20, 30, 3)
    with pytest.raises(InputError, match="too many"):
        image.load(bombs()["gif"][:6] + struct.pack("<HH", 65535, 65535))
    assert "says it is 0 × 5 pixels" in refused(b"GIF89a" + struct.pack("<HH", 0, 5))


def test_not_images(tmp_path: Path) -> None:
    assert "is empty" in refused(b"")
    for data in (b"\0", b"x", b"hello, world", b"%PDF-1.7", b"RIFF\0\0\0\0WAVEfmt ", bytes(1000)):
        assert "is not an image of a known format" in refused(data)
    text = tmp_path / "notes.png"
    text.write_text("not a picture")
    assert refused(text).startswith(f"{text}: is not an image of a known format, expected PNG, ")
    assert "no such file" in refused(tmp_path / "absent.png")
    assert "not a regular file" in refused(tmp_path)
    assert "not a regular file" in refused(Path(os.devnull))
    refused(Path("a\0b"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    assert "not a regular file" in refused(tmp_path / "pipe.png")


def test_a_lying_header() -> None:
    """The decoder's size must be the one that was checked."""
    data = (FILES / "rgb.avif").read_bytes()
    if cv2.imdecode(np.frombuffer(data, np.uint8), 1) is None:
        pytest.skip("this OpenCV does not read AVIF")
    free = b"free" + b"ispe" + struct.pack(">III", 0, 60, 30)
    said = refused(data + struct.pack(">I", 4 + len(free)) + free)
    assert "its header says 60 × 30 pixels, it holds 45 × 30" in said
