# SPDX-License-Identifier: Apache-2.0
"""Models that several tests share: real checkpoints, converted by the real converter, once a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pocketphi import convert as converter
from pocketphi.runtime import bundle as bundles
from pocketphi.runtime.bundle import Bundle
from pocketphi.runtime.cache import CACHE_VARIABLE
from pocketphi.runtime.decoder_ggml import GgmlDecoder, GgmlOptions
from pocketphi.runtime.engine import Model
from pocketphi.runtime.gguf_check import AdapterFile

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
        model: str, recipe: str, lora_quant: str = "F16", merge: str | None = None, encoders: str = "fp32"
    ) -> Path:
        key = (model, recipe, lora_quant, str(merge), encoders)
        if key not in made:
            source = cases.checkpoint(model, root / "checkpoints")
            options = converter.Options(
                recipe=recipe, lora_quant=lora_quant, merge=merge, encoders=encoders, name=model
            )
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
def nano_model(nano: Path) -> Iterator[Model]:
    """phi4-nano at F32 with an exact cache, shared: tests that change what is global open their own."""
    with Model(nano, kv_type="f32") as model:
        yield model


def open_decoder(bundle: Bundle, kv_type: str = "f32") -> GgmlDecoder:
    """The decoder of a model directory, without the engine around it."""
    return GgmlDecoder(
        bundle.path(bundle.decoder),
        bundle.text,
        {name: AdapterFile(bundle.path(a.file), a.alpha, a.rank) for name, a in bundle.adapters.items()},
        GgmlOptions(n_threads=2, kv_type=kv_type),
    )


def load_decoder(directory: Path, kv_type: str = "f32") -> GgmlDecoder:
    """`open_decoder` of a directory."""
    return open_decoder(bundles.load(directory), kv_type)
