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
from .options import (
    Adapter,
    AnyKvType,
    BackboneOption,
    CtxSize,
    GpuLayers,
    Json,
    ModelDir,
    Provider,
    ProviderOption,
    Threads,
    Verbose,
)
from .values import log_to_stderr, open_model, options_of, to_json

if TYPE_CHECKING:
    from pocketphi.evaluate.divergence import DivergenceResult
    from pocketphi.evaluate.items import ItemFile
    from pocketphi.evaluate.likelihood_judge import LikelihoodJudge, LikelihoodName
    from pocketphi.evaluate.metrics import MetricName
    from pocketphi.evaluate.perplexity import PerplexityResult
    from pocketphi.evaluate.runner import Judge
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
    metric: Annotated[MetricChoice | None, typer.Option("--metric", help="Error rates of words or characters, BLEU, chrF, equal texts, equal calls; perplexity and KL divergence.")] = None,
    data: Annotated[Path | None, typer.Option("--data", parser=a_path, metavar="<path>", help="Items as JSON lines, .jsonl; for ppl also a text file.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--output", parser=a_path, metavar="<path>", help="Folder for items.jsonl, which grows as items.jsonl.part, eval.json and eval.md.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="With -o: go on where an interrupted run stopped; what is finished is left as it is.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="With -o: begin anew, whatever an earlier run left.")] = False,
    normalizer: Annotated[NormalizerChoice | None, typer.Option("--normalizer", help="Whisper's rules for both texts. [default: english for wer and cer, else none]")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="The first so many items.")] = None,
    base: Annotated[Path | None, typer.Option("--base", parser=a_path, metavar="<path>", help="With kld over items: the model directory to compare with, an F16 or F32 conversion of the same checkpoint.")] = None,
    save_logits: Annotated[Path | None, typer.Option("--save-logits", parser=a_path, metavar="<path>", help="With ppl of a text: keep the logits, for kld to compare with.")] = None,
    logits: Annotated[Path | None, typer.Option("--logits", parser=a_path, metavar="<path>", help="With kld of a text: what --save-logits wrote; the text is in it.")] = None,
    chunks: Annotated[int, typer.Option("--chunks", min=-1, help="With ppl and kld of a text: the first so many chunks; -1: all.")] = -1,
    n: Annotated[int | None, typer.Option("-n", "--predict", min=-1, help="Most tokens to write; -1: until it stops. [default: 256]")] = None,
    ctx_size: CtxSize = 0, threads: Threads = None, gpu_layers: GpuLayers = 0,
    max_crops: Annotated[int | None, typer.Option("--max-crops", help="448-pixel squares of one picture, 1 to 36; fewer are faster. [default: 36]")] = None,
    cache_type: AnyKvType = None, backbone: BackboneOption = None, provider: ProviderOption = Provider.cpu, as_json: Json = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Measure a model: its answers to items, or how well it foresees items' references or a text, on stdout.

    An item is {"id", "prompt" or "messages", "images", "audio", "reference", "task"}; media are files beside the
    data. One that is damaged ends the run with its name; with -o, what was done stays and --resume goes on. Of
    items, ppl and kld score the tokens of each reference and the end of the turn. Of a text, -c is the length of a
    chunk, 512 by default.
    """
    log_to_stderr(verbose)
    if metric is None:
        raise InputError(
            f"--metric is missing, expected one of {', '.join(one.value for one in MetricChoice)}"
        )
    of_logits = metric in _OF_LOGITS
    of_items = not of_logits or (data is not None and data.suffix.lower() == ".jsonl")
    of_items = of_items or (metric is MetricChoice.kld and base is not None)
    of_text = not of_items
    what = f"--metric {metric.value}" + (f" of {'items' if of_items else 'a text'}" if of_logits else "")
    _check_flags(what, {
        "--data": (data, of_items or metric is MetricChoice.ppl), "-o": (out, of_items), "--resume": (resume, of_items),
        "--restart": (restart, of_items), "--limit": (limit, of_items), "--max-crops": (max_crops is not None, of_items),
        "--normalizer": (normalizer, not of_logits), "-n": (n is not None, not of_logits),
        "--save-logits": (save_logits, of_text and metric is MetricChoice.ppl),
        "--logits": (logits, of_text and metric is MetricChoice.kld), "--chunks": (chunks != -1, of_text),
        "--base": (base, metric is MetricChoice.kld), "-c": (ctx_size, of_items or metric is MetricChoice.ppl),
    })  # fmt: skip
    _check_needs(metric, of_items, data, base, logits)

    most, crops = 256 if n is None else n, 36 if max_crops is None else max_crops

    def opened(directory: Path | None = None) -> Model:
        context = ctx_size if of_items else 0
        if directory is not None:  # what is compared with runs on whatever it has
            return open_model(directory, context, threads, gpu_layers, cache_type, crops)
        return open_model(
            model, context, threads, gpu_layers, cache_type, crops, backbone=backbone, provider=provider
        )

    if of_text and data is not None:
        _of_text(opened, _Text(data, ctx_size or _PPL_CONTEXT, chunks, save_logits), as_json)
    elif of_text and logits is not None:
        _of_logits(opened, logits, chunks, as_json)
    elif data is not None:
        from pocketphi.evaluate.items import read_items

        begin, options = _begin(out, resume, restart), options_of(most, _greedy(), Adapter.none)
        items = read_items(data, limit=limit)
        settings = {
            "ctx_size": ctx_size, "gpu_layers": gpu_layers, "max_crops": crops, "limit": limit,
        }  # fmt: skip
        if not of_logits:
            settings["max_tokens"] = most
        judge = _judge(metric, normalizer, items)
        measure_items(opened, Work(items, judge, options, settings, begin, base), out, as_json)


def _judge(
    metric: MetricChoice, normalizer: NormalizerChoice | None, items: ItemFile
) -> Judge | LikelihoodJudge:
    if metric in _OF_LOGITS:
        from pocketphi.evaluate.likelihood_judge import LikelihoodJudge

        return LikelihoodJudge(cast("LikelihoodName", metric.value))
    from pocketphi.evaluate.runner import Judge

    judge = Judge(cast("MetricName", metric.value), None if normalizer is None else normalizer.value)
    judge.check(items.items)
    return judge


def _greedy() -> Sampling:
    from pocketphi.runtime.sampler import Sampling

    return Sampling(0.0)


def _check_flags(what: str, flags: Mapping[str, tuple[object, bool]]) -> None:
    """Each flag's value, and whether what is asked for has it."""
    for flag, (value, belongs) in flags.items():
        if value and not belongs:
            raise InputError(f"{flag} does not go with {what}")


def _check_needs(
    metric: MetricChoice, of_items: bool, data: Path | None, base: Path | None, logits: Path | None
) -> None:
    """What is read has to be named."""
    if metric is MetricChoice.kld and of_items and base is None:
        raise InputError("--metric kld of items compares with another model directory: name it with --base")
    if metric is MetricChoice.kld and not of_items and logits is None:
        raise InputError(
            "--metric kld compares with what --save-logits wrote: name it with --logits "
            "(items, --data FILE.jsonl, with --base)"
        )
    if data is None and (of_items or metric is MetricChoice.ppl):
        raise InputError(f"--metric {metric.value} reads a file: name it with --data")
    if base is not None and data is not None and data.suffix.lower() != ".jsonl":
        raise InputError(f"{data}: is a text, --base compares items: expected a .jsonl file, or --logits")


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
    from pocketphi.runtime.files import check_not_model, check_not_read, read_text
    from pocketphi.runtime.progress import CountBar

    if text.save_logits is not None:
        check_not_read(text.save_logits, text.path)
        check_not_model(text.save_logits.parent)
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
