# SPDX-License-Identifier: Apache-2.0
"""From flags to what the library takes: a model, sampling, media, text; and how the commands report."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pocketphi.runtime.errors import InputError

from .options import Adapter, Engine, Provider

if TYPE_CHECKING:
    from pocketphi.runtime.engine import CompleteOptions, Model
    from pocketphi.runtime.ggml_observer import MatmulObserver
    from pocketphi.runtime.parts import Media, Mode
    from pocketphi.runtime.sampler import Sampling
    from pocketphi.runtime.spec import Backbone

_PROMPT_MAX_BYTES = 64 << 20
_GRAMMAR_MAX_BYTES = 4 << 20


def open_model(
    directory: Path | None, ctx_size: int, threads: int | None, gpu_layers: int, cache_type: str | None,
    max_crops: int = 36, observer: MatmulObserver | None = None, mode: Mode = "language",
    media: Sequence[Media] = (), backbone: Engine | None = None, provider: Provider = Provider.cpu,
) -> Model:  # fmt: skip
    """The model that -m names, or the built-in one; refused at once where `mode`, with `media`, has no room."""
    path = directory or builtin()
    from pocketphi.runtime import bundle
    from pocketphi.runtime.backbone import BackboneOptions, OpenBackbone
    from pocketphi.runtime.engine import Model
    from pocketphi.runtime.progress import ProgressBar

    kind: Backbone | None = None if backbone is None else backbone.value
    if mode != "language":  # that one the model looks after itself
        options = BackboneOptions(kind, provider.value, threads, gpu_layers, cache_type)
        OpenBackbone(bundle.load(path), options, max_crops).guard.load(mode, media)
    with ProgressBar() as progress:
        return Model(
            path,
            n_ctx=ctx_size,
            n_threads=threads,
            n_gpu_layers=gpu_layers,
            kv_type=cache_type,
            max_crops=max_crops,
            progress=progress,
            observer=observer,
            backbone=kind,
            provider=provider.value,
        )


def mode_of(media: list[Media], *, speech: bool = False) -> Mode:
    """What a request with these media, and perhaps something that is still to be said, runs in."""
    from pocketphi.runtime.router import route

    kinds = {one.kind for one in media}
    return route(images="image" in kinds, audio=speech or "audio" in kinds).mode


def builtin() -> Path:
    """phi4-nano, converted into the user's cache the first time."""
    from pocketphi.convert.builtin import builtin_bundle
    from pocketphi.runtime.progress import ProgressBar

    with ProgressBar() as progress:
        return builtin_bundle(progress=progress)


def media_of(
    images: list[Path] | None, audio: list[str] | None, video: Path | None, frames: int, camera: int | None,
    max_crops: int,
) -> list[Media]:  # fmt: skip
    """Pictures first, then clips: the order the model was trained with."""
    from pocketphi.runtime.parts import Media

    found = [Media("image", path) for path in images or ()]
    if video is not None:
        from pocketphi.runtime.video import as_media

        pictures, tokens = as_media(video, frames, max_crops)
        typer.echo(f"{video}: {len(pictures)} frames, {tokens} tokens", err=True)
        found += pictures
    if camera is not None:
        from pocketphi.runtime.video import camera as look

        found.append(Media("image", look(camera), f"camera {camera}"))
    return found + [Media("audio", _clip(name), name) for name in audio or ()]


def _clip(name: str) -> Path | Any:
    """A file's path, or the samples that stdin holds."""
    if name != "-":
        return Path(name)
    from pocketphi.runtime.audio import load

    clip = load(sys.stdin.buffer)
    return clip.samples, clip.sample_rate


def sampling_of(
    temp: float, top_k: int, top_p: float, min_p: float, repeat_penalty: float, frequency_penalty: float,
    presence_penalty: float, seed: int, json_schema: str | None, grammar: str | None, grammar_file: Path | None,
) -> Sampling:  # fmt: skip
    """How to choose tokens."""
    from pocketphi.runtime.files import read_text
    from pocketphi.runtime.sampler import Sampling

    if grammar_file is not None:
        if grammar is not None:
            raise InputError("--grammar and --grammar-file are both given, expected one")
        grammar = read_text(grammar_file, max_bytes=_GRAMMAR_MAX_BYTES)
    return Sampling(
        temp, top_k, top_p, min_p, repeat_penalty, None if seed < 0 else seed, grammar, json_schema,
        frequency_penalty, presence_penalty,
    )  # fmt: skip


def options_of(n: int, sampling: Sampling, adapter: Adapter) -> CompleteOptions:
    """What every generation takes."""
    if n == 0:
        raise InputError("-n is 0, expected a number of tokens, or -1 for no limit")
    options: CompleteOptions = {"sampling": sampling, "max_tokens": None if n < 0 else n}
    if adapter is not Adapter.none:
        options["adapter"] = adapter.value
    return options


def question(prompt: str | None, file: Path | None, *, optional: bool, stdin_taken: bool) -> str:
    """The text of the request. With a clip it is optional: the question may be spoken."""
    from pocketphi.runtime.files import decode_text, read_text

    if prompt is not None and file is not None:
        raise InputError("-p and -f are both given, expected one")
    from_stdin = prompt == "-" or (file is not None and str(file) == "-")
    if prompt is None and file is None:
        if optional:
            return ""
        if sys.stdin.isatty():
            raise InputError("no prompt: give -p TEXT, -f FILE, or pipe it in")
        from_stdin = True
    if from_stdin:
        if stdin_taken:
            raise InputError("standard input is asked for the prompt and for audio, expected one")
        raw = sys.stdin.buffer.read(_PROMPT_MAX_BYTES + 1)
        if len(raw) > _PROMPT_MAX_BYTES:
            raise InputError(f"standard input: more than {_PROMPT_MAX_BYTES} bytes")
        text = decode_text(raw, "standard input").rstrip("\n")
    else:
        text = str(prompt) if file is None else read_text(file, max_bytes=_PROMPT_MAX_BYTES).rstrip("\n")
    if not text.strip():
        raise InputError("the prompt is empty")
    return text


def to_json(value: Any) -> str:
    """One line of JSON."""
    import json

    return json.dumps(value, ensure_ascii=False)


def log_to_stderr(verbose: bool) -> None:
    """Warnings, or everything."""
    logging.basicConfig(
        stream=sys.stderr, format="%(message)s", level=logging.DEBUG if verbose else logging.WARNING
    )
