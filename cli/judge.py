# SPDX-License-Identifier: Apache-2.0
"""`eval`: how good a model's answers are, and how sure that is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from pocketphi.runtime.errors import InputError

from .checks import a_path
from .judge_items import Begin, Work, measure_items
from .options import Adapter, CtxSize, GpuLayers, Json, KvType, MaxCrops, ModelDir, Predict, Threads, Verbose
from .values import log_to_stderr, open_model, options_of, to_json

if TYPE_CHECKING:
    from pocketphi.evaluate.divergence import DivergenceResult
    from pocketphi.evaluate.metrics import MetricName
    from pocketphi.evaluate.perplexity import PerplexityResult
    from pocketphi.runtime.engine import Model
    from pocketphi.runtime.sampler import Sampling

_TEXT_MAX_BYTES = 256 << 20
_PPL_CONTEXT = 512  # as llama.cpp's perplexity tool


class MetricChoice(str, Enum):
    """What `eval` measures."""

    wer = "wer"
    cer = "cer"
    bleu = "bleu"
    chrf = "chrf"
    exact = "exact"
    tool_call = "tool-call"
    ppl = "ppl"
    kld = "kld"


class NormalizerChoice(str, Enum):
    """What texts are made equal in."""

    english = "english"
    basic = "basic"
    none = "none"


_OF_LOGITS = (MetricChoice.ppl, MetricChoice.kld)


def evaluate(
    model: ModelDir = None,
    metric: Annotated[MetricChoice | None, typer.Option("--metric", help="Error rates of words or characters, BLEU, chrF, equal texts, equal calls; of a text file perplexity; KL divergence.")] = None,
    data: Annotated[Path | None, typer.Option("--data", parser=a_path, metavar="<path>", help="Items as JSON lines; for ppl a text file.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--output", parser=a_path, metavar="<path>", help="Folder for items.jsonl, which grows as items.jsonl.part, eval.json and eval.md.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="With -o: go on where an interrupted run stopped; what is finished is left as it is.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="With -o: begin anew, whatever an earlier run left.")] = False,
    normalizer: Annotated[NormalizerChoice | None, typer.Option("--normalizer", help="Whisper's rules for both texts. [default: english for wer and cer, else none]")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="The first so many items.")] = None,
    save_logits: Annotated[Path | None, typer.Option("--save-logits", parser=a_path, metavar="<path>", help="With ppl: keep the logits, for kld to compare with.")] = None,
    logits: Annotated[Path | None, typer.Option("--logits", parser=a_path, metavar="<path>", help="With kld: what --save-logits wrote; the text is in it.")] = None,
    chunks: Annotated[int, typer.Option("--chunks", min=-1, help="With ppl and kld: the first so many chunks; -1: all.")] = -1,
    n: Predict = 256, ctx_size: CtxSize = 0, threads: Threads = None, gpu_layers: GpuLayers = 0,
    cache_type: KvType = "f16", max_crops: MaxCrops = 36, as_json: Json = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Measure a model: its answers to items, or how well it foresees a text. The scores go to stdout.

    An item is {"id", "prompt" or "messages", "images", "audio", "reference", "task"}; media are files beside the
    data. One that is damaged ends the run with its name; with -o, what was done stays and --resume goes on. With ppl,
    -c is the length of a chunk, 512 by default.
    """
    log_to_stderr(verbose)
    if metric is None:
        raise InputError(
            f"--metric is missing, expected one of {', '.join(one.value for one in MetricChoice)}"
        )
    _check_flags(metric, {
        "--data": (data, metric is not MetricChoice.kld), "-o": (out, metric not in _OF_LOGITS),
        "--resume": (resume, metric not in _OF_LOGITS), "--restart": (restart, metric not in _OF_LOGITS),
        "--normalizer": (normalizer, metric not in _OF_LOGITS), "--limit": (limit, metric not in _OF_LOGITS),
        "-n": (n != 256, metric not in _OF_LOGITS), "--max-crops": (max_crops != 36, metric not in _OF_LOGITS),
        "--save-logits": (save_logits, metric is MetricChoice.ppl), "--logits": (logits, metric is MetricChoice.kld),
        "--chunks": (chunks != -1, metric in _OF_LOGITS), "-c": (ctx_size, metric is not MetricChoice.kld),
    })  # fmt: skip
    if data is None and metric is not MetricChoice.kld:
        raise InputError(f"--metric {metric.value} reads a file: name it with --data")
    if logits is None and metric is MetricChoice.kld:
        raise InputError("--metric kld compares with what --save-logits wrote: name it with --logits")
    begin = _begin(out, resume, restart)
    options = options_of(n, _greedy(), Adapter.none)

    def opened() -> Model:
        context = 0 if metric in _OF_LOGITS else ctx_size
        return open_model(model, context, threads, gpu_layers, cache_type, max_crops)

    if metric is MetricChoice.ppl and data is not None:
        _of_text(opened, _Text(data, ctx_size or _PPL_CONTEXT, chunks, save_logits), as_json)
    elif metric is MetricChoice.kld and logits is not None:
        _of_logits(opened, logits, chunks, as_json)
    elif data is not None:
        from pocketphi.evaluate.items import read_items
        from pocketphi.evaluate.runner import Judge

        items = read_items(data, limit=limit)
        name = cast("MetricName", metric.value)
        judge = Judge(name, None if normalizer is None else normalizer.value)
        judge.check(items.items)
        settings = {"max_tokens": n, "ctx_size": ctx_size, "cache_type": cache_type, "max_crops": max_crops}
        work = Work(items, judge, options, settings | {"limit": limit}, begin)
        measure_items(opened, work, out, as_json)


def _greedy() -> Sampling:
    from pocketphi.runtime.sampler import Sampling

    return Sampling(0.0)


def _check_flags(metric: MetricChoice, flags: Mapping[str, tuple[object, bool]]) -> None:
    """Each flag's value, and whether this metric has it."""
    for flag, (value, belongs) in flags.items():
        if value and not belongs:
            raise InputError(f"{flag} does not go with --metric {metric.value}")


def _begin(out: Path | None, resume: bool, restart: bool) -> Begin:
    """What to do about an earlier run."""
    if resume and restart:
        raise InputError("--resume and --restart are both given, expected one")
    flag = "--resume" if resume else "--restart"
    if (resume or restart) and out is None:
        raise InputError(f"{flag} is about the files of an earlier run: name their folder with -o")
    return "resume" if resume else "restart" if restart else "new"


@dataclass(frozen=True, slots=True)
class _Text:
    """What perplexity is measured over, and how."""

    path: Path
    n_ctx: int
    chunks: int
    save_logits: Path | None


def _of_text(opened: Callable[[], Model], text: _Text, as_json: bool) -> None:
    from pocketphi.evaluate.perplexity import measure
    from pocketphi.runtime.files import read_text
    from pocketphi.runtime.progress import CountBar

    words = read_text(text.path, max_bytes=_TEXT_MAX_BYTES)
    with opened() as model, CountBar() as bar:
        found = measure(
            model,
            words,
            n_ctx=text.n_ctx,
            chunks=text.chunks,
            save_logits=text.save_logits,
            progress=bar,
        )
    _print(found, as_json)


def _of_logits(opened: Callable[[], Model], logits: Path, chunks: int, as_json: bool) -> None:
    from pocketphi.evaluate.divergence import compare
    from pocketphi.runtime.progress import CountBar

    with opened() as model, CountBar() as bar:
        found = compare(model, logits, chunks=chunks, progress=bar)
    _print(found, as_json)


def _print(found: PerplexityResult | DivergenceResult, as_json: bool) -> None:
    """The result of a text."""
    if as_json:
        head = {"metric": found.metric, "score": found.score, "ci95": list(found.ci95), "items": found.items}
        typer.echo(to_json({**head, found.metric: found.score, **found.details()}))
    else:
        typer.echo("\n".join(found.lines()))
