# SPDX-License-Identifier: Apache-2.0
"""Writes what this folder holds with transformers' own processor and model. Run from the top folder:

    python -m tests.golden.vision.make_vision

needs the `reference` extra and torchvision. See README.md here.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")  # before numpy loads

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torchvision
import transformers
from PIL import Image, ImageOps
from transformers import Phi4MultimodalForCausalLM, Phi4MultimodalImageProcessor

from .pictures import EVAL, FILES, HERE, SIZES, digest, picture, samples

CHECKPOINT = HERE.parents[2] / "nano" / "checkpoint"
# pictures whose rows are kept: one crop or a few, unmasked and masked on either side
ENCODED = ("img-000", "vs-003", "enlarged", "wide", "edge", "thin", "grid")
KEPT_ROWS = 160


def main() -> None:
    """pixels.json, rows.npz and files/."""
    processor = Phi4MultimodalImageProcessor()
    pixels: dict[str, Any] = {
        "transformers": transformers.__version__,
        "torch": torch.__version__.split("+")[0],
        "torchvision": torchvision.__version__.split("+")[0],
        "images": {},
    }
    kept: dict[str, npt.NDArray[Any]] = {}
    image_embed = load_embedding()
    pictures = {name: picture(*size) for name, size in SIZES.items()}
    pictures |= {n: np.asarray(Image.open(EVAL / f"{n}.png").convert("RGB")) for n in ENCODED[:2]}
    for name, rgb in pictures.items():
        found = processor(Image.fromarray(rgb), return_tensors="pt")
        crops = found["image_pixel_values"][0].numpy()
        pixels["images"][name] = {
            "size": [rgb.shape[1], rgb.shape[0]],
            "tokens": int(found["num_img_tokens"][0]),
            "canvas": found["image_sizes"][0].tolist(),
            "valid_patches": found["image_attention_mask"][0].sum(dim=(1, 2)).int().tolist(),
            "canvas_crops_sha256": digest(crops[1:]),
        }
        kept[f"{name}/global"] = crops[0].reshape(-1)[samples(crops[0].size)]
        if name in ENCODED:
            rows = encode(image_embed, found)
            at = np.linspace(0, len(rows) - 1, KEPT_ROWS).astype(np.int32)
            kept[f"{name}/at"], kept[f"{name}/rows"] = at, rows[at]
        print(name, pixels["images"][name]["tokens"])
    kept |= {f"files/{name}": pixels for name, pixels in write_files().items()}
    (HERE / "pixels.json").write_text(json.dumps(pixels, indent=1) + "\n", "utf-8")
    np.savez_compressed(HERE / "rows.npz", **kept)


def write_files() -> dict[str, npt.NDArray[np.uint8]]:
    """Small files of every kind in `files/`, and what Pillow reads from them, upright as in the reference."""
    FILES.mkdir(exist_ok=True)
    rgb = Image.fromarray(picture(45, 30))
    grey, palette = rgb.convert("L"), rgb.convert("P")
    with_alpha = rgb.copy()
    with_alpha.putalpha(grey)
    frames = {"save_all": True, "append_images": [Image.new("RGB", rgb.size, c) for c in ("red", "blue")]}
    exact = {"lossless": True, "exact": True}
    made: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "rgb.png": (rgb, {}),
        "grey.png": (grey, {}),
        "bilevel.png": (rgb.convert("1"), {}),
        "palette.png": (palette, {}),
        "palette-transparent.png": (palette, {"transparency": 3}),
        "alpha.png": (with_alpha, {}),
        "grey-alpha.png": (with_alpha.convert("LA"), {}),
        "animated.png": (rgb, frames),
        "rgb.jpg": (rgb, {"quality": 90}),
        "grey.jpg": (grey, {"quality": 90}),
        "progressive.jpg": (rgb, {"quality": 90, "progressive": True}),
        "cmyk.jpg": (rgb.convert("CMYK"), {"quality": 90}),
        "palette.gif": (palette, {}),
        "animated.gif": (rgb, frames),
        "lossy.webp": (rgb, {"quality": 90}),
        "alpha.webp": (with_alpha, exact),
        "animated.webp": (rgb, frames | exact),
        "rgb.bmp": (rgb, {}),
        "rgb.tiff": (rgb, {}),
        "cmyk.tiff": (rgb.convert("CMYK"), {}),
        "rgb.ppm": (rgb, {}),
        "rgb.jp2": (rgb, {"irreversible": False}),
        "rgb.avif": (rgb, {}),
    }
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        made[f"orientation-{orientation}.jpg"] = rgb, {"quality": 90, "exif": exif}
    made["orientation-6.png"] = rgb, {"exif": made["orientation-6.jpg"][1]["exif"]}
    found = {}
    for name, (image, options) in made.items():
        image.save(FILES / name, **options)
        with Image.open(FILES / name) as read:
            found[name] = np.asarray(ImageOps.exif_transpose(read).convert("RGB"))
    return found


def load_embedding() -> Any:
    """phi4-nano's vision tower and projector, float32, with attention that looks both ways."""
    net = Phi4MultimodalForCausalLM.from_pretrained(
        CHECKPOINT, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    image_embed = net.model.embed_tokens_extend.image_embed
    # With sdpa, transformers runs the tower causally whenever no patch is masked.
    assert image_embed.img_processor.config._attn_implementation == "eager"
    return image_embed


@torch.no_grad()
def encode(image_embed: Any, found: Any) -> npt.NDArray[np.float32]:
    """float32 [tokens, d_model]: what the model puts at a prompt of image placeholders alone."""
    n = int(found["num_img_tokens"][0])
    ids = torch.full((1, n), image_embed.config.vision_config.image_token_id)
    rows = image_embed(
        ids,
        torch.zeros(1, n, image_embed.config.hidden_size),
        found["image_pixel_values"],
        found["image_sizes"],
        found["image_attention_mask"],
    )
    return rows[0].numpy()  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
