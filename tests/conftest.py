# SPDX-License-Identifier: Apache-2.0
"""Models that several tests share: real checkpoints, converted by the real converter, once a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from pocketphi import convert as converter
from pocketphi.runtime import bundle as bundles
from pocketphi.runtime.bundle import Bundle
from pocketphi.runtime.cache import CACHE_VARIABLE
from pocketphi.runtime.decoder_ggml import GgmlDecoder, GgmlOptions
from pocketphi.runtime.decoder_onnx import OnnxDecoder, OnnxOptions
from pocketphi.runtime.engine import Model
from pocketphi.runtime.gguf_check import AdapterFile
from pocketphi.runtime.onnx_adapter_check import OnnxAdapter

from .golden import cases

Converted = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def _no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What runs in this process, or inherits its environment, writes nothing into the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """`converted(model, recipe, …)`: the model directory, made when first asked for.

    `model` is a member of tests/tiny.py or "phi4-nano".
    """
    made: dict[tuple[str, ...], Path] = {}
    root = tmp_path_factory.mktemp("converted")

    def get(
        model: str, recipe: str, lora_quant: str = "F16", merge: str | None = None, encoders: str = "fp32",
        backbone: str = "gguf", onnx_quant: str = "fp32", onnx_lora: str = "fp32",
    ) -> Path:  # fmt: skip
        key = (model, recipe, lora_quant, str(merge), encoders)
        if backbone != "gguf":
            key = (*key, backbone, onnx_quant, onnx_lora)
        if key not in made:
            source = cases.checkpoint(model, root / "checkpoints")
            options = converter.Options(
                recipe=recipe, lora_quant=lora_quant, merge=merge, encoders=encoders, name=model,
                backbone=backbone, onnx_quant=onnx_quant, onnx_lora=onnx_lora,
            )  # fmt: skip
            out = root / "-".join(key)
            converter.convert(source, out, options)
            made[key] = out
        return made[key]

    return get


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A user with a cache and a home of their own."""
    home = tmp_path_factory.mktemp("home")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("POCKETPHI_", "XDG_", "HF_"))}
    return clean | {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "NO_COLOR": "1"}


@pytest.fixture(scope="session")
def nano(converted: Converted) -> Path:
    """phi4-nano at F32."""
    return converted("phi4-nano", "F32")


@pytest.fixture(scope="session")
def exact_both(converted: Converted) -> Path:
    """phi4-nano at F32 with both backbones; adapters and encoders are float32 too."""
    return converted("phi4-nano", "F32", lora_quant="F32", backbone="both")


@pytest.fixture(scope="session")
def nano_model(nano: Path) -> Iterator[Model]:
    """phi4-nano at F32 with an exact cache, shared: tests that change what is global open their own."""
    with Model(nano, kv_type="f32") as model:
        yield model


def open_decoder(bundle: Bundle, kv_type: str = "f32") -> GgmlDecoder:
    """The decoder of a model directory, without the engine around it."""
    return GgmlDecoder(
        bundle.gguf,
        bundle.text,
        {n: AdapterFile(bundle.path(a.file), a.alpha, a.rank) for n, a in bundle.adapters.items() if a.file},
        GgmlOptions(n_threads=2, kv_type=kv_type),
    )


def open_onnx_decoder(bundle: Bundle) -> OnnxDecoder:
    """The same of its ONNX backbone."""
    onnx = bundle.onnx
    assert onnx is not None
    adapters = {
        name: OnnxAdapter(bundle.path(file), bundle.adapters[name].rank, onnx.lora_quant)
        for name, file in onnx.adapters.items()
    }
    return OnnxDecoder(
        bundle.path(onnx.decoder),
        bundle.path(onnx.embedding),
        bundle.text,
        adapters,
        OnnxOptions(n_threads=2),
    )


OPEN: Mapping[str, Callable[[Bundle], GgmlDecoder | OnnxDecoder]] = {
    "gguf": open_decoder,
    "onnx": open_onnx_decoder,
}
"""Every decoder, exact, of a model directory with both backbones."""


def load_decoder(directory: Path, kv_type: str = "f32") -> GgmlDecoder:
    """`open_decoder` of a directory."""
    return open_decoder(bundles.load(directory), kv_type)
