# SPDX-License-Identifier: Apache-2.0
"""The command line. Parses, calls the library, prints; it holds no model logic.

Heavy modules are imported inside the command that needs them, so that `--help` answers at once.
Exit codes: 0 done, 1 failed while running, 2 usage or unusable input, 3 model directory,
4 native library, 5 checkpoint, 6 output, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from pocketphi.runtime.errors import InputError, PocketPhiError

if TYPE_CHECKING:
    from pocketphi.convert.progress import Progress
    from pocketphi.runtime.engine import CompleteOptions, Model
    from pocketphi.runtime.parts import Media

app = typer.Typer(
    no_args_is_help=True, add_completion=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Microsoft's Phi-4 family on this device: convert a checkpoint, then talk to it, offline.",
)  # fmt: skip

_PROMPT_MAX_BYTES = 64 << 20
_TOOLS_MAX_BYTES = 4 << 20


class Adapter(str, Enum):
    """Adapters by name; none is the base model."""

    none = "none"
    vision = "vision"
    speech = "speech"


class Peer(str, Enum):
    """What `bench` can measure beside ours."""

    stock = "stock"


class Reasoning(str, Enum):
    """What to do with what a reasoning model thinks aloud."""

    show = "show"
    hide = "hide"


# ------------------------------------------------------------------ options that several commands take
ModelDir = Annotated[
    Path | None,
    typer.Option(
        "-m", "--model", envvar="POCKETPHI_MODEL", help="Model directory [default: the built-in phi4-nano]."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
System = Annotated[str | None, typer.Option("-sys", "--system", help="System prompt.")]
Predict = Annotated[
    int, typer.Option("-n", "--predict", min=-1, help="Most tokens to write; -1: until it stops.")
]
Temp = Annotated[float, typer.Option("--temp", help="Temperature; 0: greedy.")]
TopK = Annotated[int, typer.Option("--top-k", help="Keep the k most probable tokens; 0: all.")]
TopP = Annotated[float, typer.Option("--top-p", help="Keep the most probable tokens that sum to p.")]
MinP = Annotated[float, typer.Option("--min-p", help="Drop tokens below p times the most probable one.")]
RepeatPenalty = Annotated[float, typer.Option("--repeat-penalty", help="Over the last 64 tokens; 1: off.")]
Seed = Annotated[int, typer.Option("-s", "--seed", min=-1, help="-1: a new one each time.")]
CtxSize = Annotated[
    int, typer.Option("-c", "--ctx-size", help="Most tokens of a conversation; 0: the model's own.")
]
Threads = Annotated[int | None, typer.Option("-t", "--threads", help="[default: the physical cores]")]
GpuLayers = Annotated[int, typer.Option("-ngl", "--gpu-layers", help="Layers for the GPU; -1: all.")]
KvType = Annotated[str, typer.Option("--cache-type", help="KV cache: f32, f16, q8_0 or q4_0.")]
AdapterOption = Annotated[Adapter, typer.Option("--adapter", help="Read the text through this LoRA.")]
Schema = Annotated[str | None, typer.Option("-j", "--json-schema", help="JSON schema the answer must match.")]
Grammar = Annotated[str | None, typer.Option("--grammar", help="GBNF grammar the answer must match.")]
GrammarFile = Annotated[Path | None, typer.Option("--grammar-file", help="The same, from a file.")]
Tools = Annotated[Path | None, typer.Option("--tools", help="JSON list of tools the model may call.")]
Think = Annotated[Reasoning, typer.Option("--reasoning", help="Show or hide <think>…</think>.")]
Images = Annotated[list[Path] | None, typer.Option("--image", help="A picture; again for more.")]
Audio = Annotated[
    list[str] | None, typer.Option("--audio", help="A clip; - reads WAV or raw s16le at 16 kHz from stdin.")
]
Video = Annotated[Path | None, typer.Option("--video", help="A video, as evenly spaced frames.")]
Frames = Annotated[int, typer.Option("--frames", help="Of the video, 1 to 64.")]
Camera = Annotated[int | None, typer.Option("--camera", help="One frame of this camera, from 0.")]
MaxCrops = Annotated[
    int, typer.Option("--max-crops", help="448-pixel squares of one picture, 1 to 36; fewer are faster.")
]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="llama.cpp's log on stderr.")]


# ------------------------------------------------------------------ commands
@app.command()
def run(
    model: ModelDir = None,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="The question; - reads stdin.")] = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", help="Read the question from a file; - is stdin.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="The prompt is written in the model's markup.")] = False,
    image: Images = None, audio: Audio = None, video: Video = None, frames: Frames = 8, camera: Camera = None,
    max_crops: MaxCrops = 36,
    system: System = None, n: Predict = -1, temp: Temp = 0.0, top_k: TopK = 40, top_p: TopP = 0.95,
    min_p: MinP = 0.05, repeat_penalty: RepeatPenalty = 1.0, seed: Seed = -1, ctx_size: CtxSize = 0,
    threads: Threads = None, gpu_layers: GpuLayers = 0, cache_type: KvType = "f16",
    adapter: AdapterOption = Adapter.none, json_schema: Schema = None, grammar: Grammar = None,
    grammar_file: GrammarFile = None, tools: Tools = None, reasoning: Think = Reasoning.show,
    as_json: Json = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Answer one question and leave, about pictures or clips if there are any. The answer goes to stdout."""
    from pocketphi.runtime import ggml_plugin, report
    from pocketphi.runtime.parts import Message

    _log_to_stderr(verbose)
    media = _media(image, audio, video, frames, camera, max_crops)
    text = _question(prompt, file, optional=bool(audio), stdin_taken=audio is not None and "-" in audio)
    if raw and (system is not None or tools is not None):
        raise InputError("--raw takes the whole prompt: --system and --tools cannot be given too")
    options = _options(
        n,
        _sampling(temp, top_k, top_p, min_p, repeat_penalty, seed, json_schema, grammar, grammar_file),
        adapter,
    )
    with _open(model, ctx_size, threads, gpu_layers, cache_type, max_crops) as loaded:
        if raw:
            options["media"] = media
            answer = loaded.complete(text, stream=True, **options)
        else:
            offered = None if tools is None else _read(tools, _TOOLS_MAX_BYTES)
            head = [] if system is None else [Message("system", system)]
            turns = [*head, Message("user", text, media=tuple(media))]
            answer = loaded.chat(turns, stream=True, tools=offered, **options)
        console = _console()
        for event in answer:
            if not as_json and (event.kind == "answer" or reasoning is Reasoning.show):
                console.write(event.text, event.kind)
        reply = answer.reply
    if as_json:
        kernels = ggml_plugin.load()
        used = report.kernels_object(kernels, ggml_plugin.counts(kernels))
        typer.echo(_json(report.reply_object(reply) | {"kernels": used}))
        return
    if reply.tool_calls:
        typer.echo(_json([asdict(call) for call in reply.tool_calls]))
    else:
        typer.echo()
    if sys.stderr.isatty() or verbose:
        typer.echo(report.reply_line(reply), err=True)


@app.command()
def chat(
    model: ModelDir = None, system: System = None, n: Predict = -1, temp: Temp = 0.0, top_k: TopK = 40,
    top_p: TopP = 0.95, min_p: MinP = 0.05, repeat_penalty: RepeatPenalty = 1.0, seed: Seed = -1,
    ctx_size: CtxSize = 0, threads: Threads = None, gpu_layers: GpuLayers = 0, cache_type: KvType = "f16",
    adapter: AdapterOption = Adapter.none, json_schema: Schema = None, grammar: Grammar = None,
    grammar_file: GrammarFile = None, tools: Tools = None, reasoning: Think = Reasoning.show,
    image: Images = None, audio: Audio = None, video: Video = None, frames: Frames = 8, camera: Camera = None,
    max_crops: MaxCrops = 36, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Talk. /help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves. Media go with the first message."""
    from pocketphi.runtime.repl import ChatSettings, Repl

    _log_to_stderr(verbose)
    options = _options(
        n,
        _sampling(temp, top_k, top_p, min_p, repeat_penalty, seed, json_schema, grammar, grammar_file),
        adapter,
    )
    offered = None if tools is None else _read(tools, _TOOLS_MAX_BYTES)
    media = _media(image, audio, video, frames, camera, max_crops)
    with _open(model, ctx_size, threads, gpu_layers, cache_type, max_crops) as loaded:
        console = _console()
        if sys.stdin.isatty():
            console.say(f"{loaded.bundle.name}, {loaded.bundle.recipe}. /help lists commands, Ctrl-D leaves.")
        try:
            settings = ChatSettings({**options, "tools": offered}, reasoning is Reasoning.show)
            Repl(loaded, settings, console, system=system, media=media).run()
        finally:
            console.close()


@app.command()
def transcribe(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Audio files; - reads WAV or raw s16le from stdin.")],
    model: ModelDir = None,
    file_format: Annotated[str, typer.Option("--format", help="txt, srt, vtt or json; several with commas, then with -o.")] = "txt",
    out: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for FILE.txt, FILE.srt, …; default stdout.")] = None,
    translate: Annotated[str | None, typer.Option("-tr", "--translate", help="A language to translate to.")] = None,
    both: Annotated[bool, typer.Option("--both", help="Transcript and translation in one pass.")] = False,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Instead of the model card's own.")] = None,
    n: Predict = -1, temp: Temp = 0.0, seed: Seed = -1, ctx_size: CtxSize = 0, threads: Threads = None,
    gpu_layers: GpuLayers = 0, cache_type: KvType = "f16", verbose: Verbose = False,
) -> None:  # fmt: skip
    """Write down what is said in audio files. Longer ones are cut in pauses; times are those of the passes."""
    from pocketphi.runtime import audio as audio_files
    from pocketphi.runtime import transcript
    from pocketphi.runtime.files import make_folder, write_text
    from pocketphi.runtime.sampler import Sampling
    from pocketphi.runtime.transcribe import Task
    from pocketphi.runtime.transcribe import transcribe as listen

    _log_to_stderr(verbose)
    formats = transcript.parse_formats(file_format, to_files=out is not None)
    task = Task(translate, both, prompt)
    stems = ["stdin" if name == "-" else Path(name).name for name in files]
    if out is not None and len(set(stems)) < len(stems):
        raise InputError("two of the files have the same name: their transcripts would be one")
    if out is None and len(files) > 1 and formats[0] in ("srt", "vtt"):
        raise InputError(f"{len(files)} files make {len(files)} {formats[0]} files: name a folder with -o")
    if out is not None:
        make_folder(out)
    options = _options(n, Sampling(temp, seed=None if seed < 0 else seed), Adapter.none)
    with _open(model, ctx_size, threads, gpu_layers, cache_type, max_crops=36) as loaded:
        for name, stem in zip(files, stems, strict=True):
            clip = audio_files.load(sys.stdin.buffer if name == "-" else Path(name))
            segments = []
            for segment in listen(loaded, clip, task, options):
                segments.append(segment)
                if out is None and formats == ("txt",):
                    typer.echo(transcript.write([segment], "txt"), nl=False)
            for one in formats:
                if out is not None:
                    write_text(out / f"{stem}.{one}", transcript.write(segments, one))
                elif one != "txt":
                    typer.echo(transcript.write(segments, one), nl=False)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Checkpoint directory, or a hub id with --from-hub.")],
    out: Annotated[Path | None, typer.Option("-o", "--output", help="Model directory to write.")] = None,
    quant: Annotated[str, typer.Option("--quant", "-q", help="Q4_0, Q4_K_M, Q5_K_M, Q6_K, Q8_0, F16 or F32.")] = "Q4_K_M",
    lora_quant: Annotated[str, typer.Option("--lora-quant", help="Adapters: Q8_0, F16 or Q4_0.")] = "Q8_0",
    encoders: Annotated[str, typer.Option("--encoders", help="ONNX encoders: int8, int4, fp16 or fp32.")] = "int8",
    merge: Annotated[str | None, typer.Option("--merge", help="Merge vision or speech into the backbone.")] = None,
    imatrix: Annotated[Path | None, typer.Option("--imatrix", help="Importance matrix, llama.cpp's GGUF form.")] = None,
    from_hub: Annotated[bool, typer.Option("--from-hub", help="SRC is a hub id: local cache, then the network.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit, with --from-hub.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="With --from-hub: the local cache only.")] = False,
    name: Annotated[str | None, typer.Option("--name", help="The model's name [default: from SRC].")] = None,
    chat_format: Annotated[str | None, typer.Option("--chat-format", help="When the template is not recognised.")] = None,
    threads: Threads = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:  # fmt: skip
    """Turn a Hugging Face checkpoint into a quantized model directory."""
    from pocketphi import convert as converter
    from pocketphi.convert import hub
    from pocketphi.runtime import report

    _log_to_stderr(verbose)
    if out is None and not dry_run:
        raise InputError("convert needs -o DIR (or --dry-run)")
    directory, source_name, commit = hub.resolve(
        source, from_hub=from_hub, revision=revision, offline=offline
    )
    options = converter.Options(
        recipe=quant, lora_quant=lora_quant, encoders=encoders, merge=merge, imatrix=imatrix, threads=threads,
        chat_format=chat_format, name=name, revision=commit, source_name=source_name, overwrite=overwrite,
    )  # fmt: skip
    if dry_run or out is None:
        plan = converter.plan(directory, options)
        typer.echo(plan.to_json() if as_json else plan.format())
        return
    with _progress() as progress:
        bundle = converter.convert(directory, out, options, progress)
    if as_json:
        typer.echo(_json(report.bundle_object(bundle)))
    else:
        size = sum(f.size for f in bundle.files)
        typer.echo(
            f"{out}: {bundle.name}, {bundle.recipe}, {len(bundle.files)} files, {report.human_bytes(size)}",
            err=True,
        )


@app.command()
def info(
    directory: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DIR]",
            envvar="POCKETPHI_MODEL",
            help="Model directory [default: the built-in phi4-nano].",
        ),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Read every file and compare its SHA-256.")] = False,
    as_json: Json = False,
) -> None:
    """What a model directory holds: sizes, types, hashes, source; and which kernels would run it here."""
    from pocketphi.runtime import bundle as bundles
    from pocketphi.runtime import ggml_plugin, report

    _log_to_stderr(verbose=False)

    bundle = bundles.load(directory or _builtin())
    if check:
        for entry in bundle.check_hashes():
            typer.echo(f"ok  {entry.path}", err=True)
    kernels = ggml_plugin.load()
    if as_json:
        typer.echo(_json(report.bundle_object(bundle) | {"kernels": report.kernels_object(kernels)}))
        return
    for line in report.bundle_lines(bundle):
        typer.echo(line)
    typer.echo(f"{'kernels':<16}{report.kernels_line(kernels)}")


@app.command()
def bench(
    model: Annotated[Path | None, typer.Option("-m", "--model", envvar="POCKETPHI_MODEL", help="Model directory, or a GGUF file [default: the built-in phi4-nano].")] = None,
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", min=1, max=100, help="The median counts.")] = 3,
    n: Annotated[int | None, typer.Option("-n", "--predict", min=1, max=65536, help="Tokens to write [default: 16 after each case, 64 alone].")] = None,
    only: Annotated[str | None, typer.Option("--only", help="Cases whose name holds this: text, image, speech.")] = None,
    n_prompt: Annotated[int | None, typer.Option("-p", "--prompt-tokens", min=1, help="The decoder alone: random tokens to read [default: 512].")] = None,
    depth: Annotated[int | None, typer.Option("--depth", min=0, help="The same: tokens in the cache before it writes [default: 0].")] = None,
    ctx_size: Annotated[int | None, typer.Option("-c", "--ctx-size", min=1, help="The same: room to make [default: as needed].")] = None,
    lora: Annotated[Path | None, typer.Option("--lora", help="The same, through this LoRA GGUF.")] = None,
    compare: Annotated[Peer | None, typer.Option("--compare", help="The same, in turns with stock ggml.")] = None,
    threads: Threads = None, gpu_layers: GpuLayers = 0, cache_type: KvType = "f16", as_json: Json = False,
) -> None:  # fmt: skip
    """How fast a model is here. A directory: text, pictures and speech of fixed sizes. A GGUF file, or with one of
    -p, --depth, -c, --lora, --compare: the decoder alone, beside what the machine can do. Medians.
    """
    _log_to_stderr(verbose=False)
    alone = (n_prompt, depth, ctx_size, lora, compare) != (None,) * 5
    if not alone and (model is None or not model.is_file()):
        _bench_cases(model or _builtin(), repetitions, n, only, threads, gpu_layers, cache_type, as_json)
        return
    if only is not None:
        raise InputError("--only chooses cases of a model directory, here the decoder is measured alone")
    from pocketphi.runtime import bench_gguf
    from pocketphi.runtime import bundle as bundles
    from pocketphi.runtime.bench_decoder import SpeedPlan
    from pocketphi.runtime.threads import default_threads

    path = model or _builtin()
    if not path.is_file():
        bundle = bundles.load(path)
        path = bundle.path(bundle.decoder)
    plan = SpeedPlan(
        str(path), None if lora is None else str(lora), n_prompt or 512, n or 64, depth or 0, ctx_size or 0,
        default_threads() if threads is None else threads, gpu_layers, cache_type,
    )  # fmt: skip
    result = bench_gguf.run(
        plan,
        repetitions=repetitions,
        compare=compare is not None,
        note=lambda line: typer.echo(line, err=True),
    )
    typer.echo(_json(result.to_object()) if as_json else "\n".join(bench_gguf.table(result)))


def _bench_cases(
    path: Path, repetitions: int, n: int | None, only: str | None, threads: int | None, gpu_layers: int,
    cache_type: str, as_json: bool,
) -> None:  # fmt: skip
    from pocketphi.runtime import bench as benchmark
    from pocketphi.runtime import report
    from pocketphi.runtime.engine import Model

    if n is not None and n < 2:
        raise InputError(f"-n is {n}, expected at least 2 after a case")
    rows = benchmark.run(
        lambda: Model(path, n_threads=threads, n_gpu_layers=gpu_layers, kv_type=cache_type),
        repetitions=repetitions, predict=n or 16, only=only,
    )  # fmt: skip
    if as_json:
        typer.echo(_json([asdict(row) for row in rows]))
        return
    for i, row in enumerate(rows):
        typer.echo(report.bench_line(row) if i else f"{report.bench_head()}\n{report.bench_line(row)}")


# ------------------------------------------------------------------ between the flags and the library
@contextmanager
def _open(
    directory: Path | None,
    ctx_size: int,
    threads: int | None,
    gpu_layers: int,
    cache_type: str,
    max_crops: int,
) -> Iterator[Model]:
    path = directory or _builtin()
    from pocketphi.runtime.engine import Model

    with Model(
        path,
        n_ctx=ctx_size,
        n_threads=threads,
        n_gpu_layers=gpu_layers,
        kv_type=cache_type,
        max_crops=max_crops,
    ) as model:
        yield model


def _media(
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


def _builtin() -> Path:
    """phi4-nano, converted into the user's cache the first time."""
    from pocketphi.convert.builtin import builtin_bundle

    with _progress() as progress:
        return builtin_bundle(progress=progress)


def _sampling(
    temp: float, top_k: int, top_p: float, min_p: float, repeat_penalty: float, seed: int,
    json_schema: str | None, grammar: str | None, grammar_file: Path | None,
) -> Any:  # fmt: skip
    from pocketphi.runtime.sampler import Sampling

    if grammar_file is not None:
        if grammar is not None:
            raise InputError("--grammar and --grammar-file are both given, expected one")
        grammar = _read(grammar_file, _TOOLS_MAX_BYTES)
    return Sampling(
        temp, top_k, top_p, min_p, repeat_penalty, None if seed < 0 else seed, grammar, json_schema
    )


def _options(n: int, sampling: Any, adapter: Adapter) -> CompleteOptions:
    if n == 0:
        raise InputError("-n is 0, expected a number of tokens, or -1 for no limit")
    options: CompleteOptions = {"sampling": sampling, "max_tokens": None if n < 0 else n}
    if adapter is not Adapter.none:
        options["adapter"] = adapter.value
    return options


def _question(prompt: str | None, file: Path | None, *, optional: bool, stdin_taken: bool) -> str:
    """The text of the request. With a clip it is optional: the question may be spoken."""
    from pocketphi.runtime.files import decode_text

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
        text = _read(file, _PROMPT_MAX_BYTES).rstrip("\n") if file is not None else str(prompt)
    if not text.strip():
        raise InputError("the prompt is empty")
    return text


def _read(path: Path, max_bytes: int) -> str:
    from pocketphi.runtime.files import read_text

    return read_text(path, max_bytes=max_bytes)


def _console() -> Any:
    from pocketphi.runtime.terminal import Console

    return Console()


def _json(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False)


@contextmanager
def _progress() -> Iterator[Progress]:
    from pocketphi.runtime.progress import ProgressBar

    bar = ProgressBar()
    try:
        yield bar
    finally:
        bar.finish()


def _log_to_stderr(verbose: bool) -> None:
    logging.basicConfig(
        stream=sys.stderr, format="%(message)s", level=logging.DEBUG if verbose else logging.WARNING
    )


def _on_sigterm(_signal: int, _frame: object) -> None:
    raise SystemExit(143)


def main() -> None:
    """A PocketPhiError becomes one line on stderr and its exit code. A traceback means a bug."""
    _repair_streams()
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except PocketPhiError as exc:
        _fail(str(exc), exc.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        raise SystemExit(130) from None
    except BrokenPipeError:  # whoever read our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter flushes again and complains
        raise SystemExit(1) from None
    except OSError as exc:  # ours are PocketPhiErrors: this one is a standard stream's
        if exc.errno not in (errno.ENOSPC, errno.EIO, errno.EFBIG):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        _fail(f"standard output: cannot be written: {exc.strerror}", 6)
    except Exception as exc:
        # Usage errors: Typer keeps its exception classes private, but not their method.
        if not hasattr(exc, "format_message"):
            raise
        _fail(f"{exc.format_message()} (see --help)", 2)
    raise SystemExit(code if isinstance(code, int) else 0)


def _repair_streams() -> None:
    """A closed standard stream becomes /dev/null; a character the terminal lacks becomes a question mark."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115  kept for life
        elif mode == "w" and isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def _fail(message: str, exit_code: int) -> NoReturn:
    typer.echo("error: " + " ".join(message.split()), err=True)
    raise SystemExit(exit_code) from None
