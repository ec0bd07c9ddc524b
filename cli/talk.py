# SPDX-License-Identifier: Apache-2.0
"""`run` and `chat`: text, pictures and sound in, text out."""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pocketphi.runtime.errors import InputError

from .live import check_microphone
from .options import (
    Adapter,
    AdapterOption,
    AnyKvType,
    Audio,
    BackboneOption,
    Camera,
    CtxSize,
    Device,
    Frames,
    FrequencyPenalty,
    GpuLayers,
    Grammar,
    GrammarFile,
    Images,
    Json,
    MaxCrops,
    Mic,
    MinP,
    ModelDir,
    Predict,
    PresencePenalty,
    Provider,
    ProviderOption,
    Reasoning,
    RepeatPenalty,
    Schema,
    Seed,
    System,
    Temp,
    Think,
    Threads,
    Tools,
    TopK,
    TopP,
    Verbose,
    Video,
)
from .values import log_to_stderr, media_of, mode_of, open_model, options_of, question, sampling_of, to_json

if TYPE_CHECKING:
    from pocketphi.runtime.bundle import Bundle
    from pocketphi.runtime.parts import Media
    from pocketphi.runtime.sources import Source

_TOOLS_MAX_BYTES = 4 << 20


def run(
    model: ModelDir = None,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="The question; - reads stdin.")] = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", help="Read the question from a file; - is stdin.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="The prompt is written in the model's markup.")] = False,
    image: Images = None, audio: Audio = None, mic: Mic = False, device: Device = None, video: Video = None,
    frames: Frames = 8, camera: Camera = None, max_crops: MaxCrops = 36,
    system: System = None, n: Predict = -1, temp: Temp = 0.0, top_k: TopK = 40, top_p: TopP = 0.95,
    min_p: MinP = 0.05, repeat_penalty: RepeatPenalty = 1.0, frequency_penalty: FrequencyPenalty = 0.0,
    presence_penalty: PresencePenalty = 0.0, seed: Seed = -1, ctx_size: CtxSize = 0,
    threads: Threads = None, gpu_layers: GpuLayers = 0, cache_type: AnyKvType = None,
    backbone: BackboneOption = None, provider: ProviderOption = Provider.cpu,
    adapter: AdapterOption = Adapter.none, json_schema: Schema = None, grammar: Grammar = None,
    grammar_file: GrammarFile = None, tools: Tools = None, reasoning: Think = Reasoning.show,
    as_json: Json = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Answer one question and leave, about pictures or clips if there are any. The answer goes to stdout."""
    from pocketphi.runtime import ggml_plugin, onnx_kernels, report
    from pocketphi.runtime.files import read_text
    from pocketphi.runtime.parts import Message
    from pocketphi.runtime.terminal import Console

    log_to_stderr(verbose)
    if device is not None and not mic:
        raise InputError("--device is about --mic")
    media = media_of(image, audio, video, frames, camera, max_crops)
    text = question(prompt, file, optional=bool(audio) or mic, stdin_taken=audio is not None and "-" in audio)
    if raw and (system is not None or tools is not None):
        raise InputError("--raw takes the whole prompt: --system and --tools cannot be given too")
    options = options_of(
        n,
        sampling_of(
            temp, top_k, top_p, min_p, repeat_penalty, frequency_penalty, presence_penalty, seed, json_schema,
            grammar, grammar_file,
        ),
        adapter,
    )  # fmt: skip
    if mic:
        check_microphone(device)
    mode = mode_of(media, speech=mic)
    model_for = partial(open_model, mode=mode, media=media, backbone=backbone, provider=provider)
    with model_for(model, ctx_size, threads, gpu_layers, cache_type, max_crops) as loaded:
        if mic:
            media.append(_spoken(loaded.bundle, device))
        if raw:
            options["media"] = media
            answer = loaded.complete(text, stream=True, **options)
        else:
            offered = None if tools is None else read_text(tools, max_bytes=_TOOLS_MAX_BYTES)
            head = [] if system is None else [Message("system", system)]
            turns = [*head, Message("user", text, media=tuple(media))]
            answer = loaded.chat(turns, stream=True, tools=offered, **options)
        console = Console()
        for event in answer:
            if not as_json and (event.kind == "answer" or reasoning is Reasoning.show):
                console.write(event.text, event.kind)
        reply, engine = answer.reply, loaded.engine
    if as_json:
        if engine["backbone"] == "onnx":
            used = report.kernels_object(onnx_kernels.load(), onnx_kernels.counts())
        else:
            kernels = ggml_plugin.load()
            used = report.kernels_object(kernels, ggml_plugin.counts(kernels))
        typer.echo(to_json(report.reply_object(reply) | engine | {"kernels": used}))
        return
    if reply.tool_calls:
        typer.echo(to_json([asdict(call) for call in reply.tool_calls]))
    else:
        typer.echo()
    if sys.stderr.isatty() or verbose:
        typer.echo(report.reply_line(reply), err=True)


def chat(
    model: ModelDir = None, system: System = None, n: Predict = -1, temp: Temp = 0.0, top_k: TopK = 40,
    top_p: TopP = 0.95, min_p: MinP = 0.05, repeat_penalty: RepeatPenalty = 1.0,
    frequency_penalty: FrequencyPenalty = 0.0, presence_penalty: PresencePenalty = 0.0, seed: Seed = -1,
    ctx_size: CtxSize = 0, threads: Threads = None, gpu_layers: GpuLayers = 0, cache_type: AnyKvType = None,
    backbone: BackboneOption = None, provider: ProviderOption = Provider.cpu,
    adapter: AdapterOption = Adapter.none, json_schema: Schema = None, grammar: Grammar = None,
    grammar_file: GrammarFile = None, tools: Tools = None, reasoning: Think = Reasoning.show,
    image: Images = None, audio: Audio = None, device: Device = None, video: Video = None, frames: Frames = 8,
    camera: Camera = None, max_crops: MaxCrops = 36, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Talk. /help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves. Media go with the first message."""
    from pocketphi.runtime.files import read_text
    from pocketphi.runtime.repl import ChatSettings, Repl
    from pocketphi.runtime.terminal import Console

    log_to_stderr(verbose)
    options = options_of(
        n,
        sampling_of(
            temp, top_k, top_p, min_p, repeat_penalty, frequency_penalty, presence_penalty, seed, json_schema,
            grammar, grammar_file,
        ),
        adapter,
    )  # fmt: skip
    offered = None if tools is None else read_text(tools, max_bytes=_TOOLS_MAX_BYTES)
    media = media_of(image, audio, video, frames, camera, max_crops)
    mode = mode_of(media)
    model_for = partial(open_model, mode=mode, media=media, backbone=backbone, provider=provider)
    with model_for(model, ctx_size, threads, gpu_layers, cache_type, max_crops) as loaded:
        console = Console()
        if sys.stdin.isatty():
            console.say(f"{loaded.bundle.name}, {loaded.bundle.recipe}. /help lists commands, Ctrl-D leaves.")
        try:
            settings = ChatSettings(
                {**options, "tools": offered}, reasoning is Reasoning.show, lambda: _microphone(device)
            )
            Repl(loaded, settings, console, system=system, media=media).run()
        finally:
            console.close()


def _microphone(device: str | None) -> Source:
    from pocketphi.runtime.spoken_turn import open_microphone

    return open_microphone(device)


def _spoken(bundle: Bundle, device: str | None) -> Media:
    """What somebody says now."""
    from pocketphi.runtime.parts import Media
    from pocketphi.runtime.spoken_turn import record_turn

    bundle.encoder("speech", "listen")  # before somebody speaks to it
    heard = record_turn(_microphone(device), None, lambda line: typer.echo(line, err=True))
    if heard is None:
        raise InputError("microphone: nothing was said")
    return Media("audio", heard, "microphone")
