# SPDX-License-Identifier: Apache-2.0
"""`batch`: files of many items, answered by several processes, or by machines that Ray has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketphi.runtime.errors import InputError

from .checks import a_path
from .options import (
    AnyKvType,
    BackboneOption,
    CtxSize,
    GpuLayers,
    Json,
    MaxCrops,
    ModelDir,
    Predict,
    Provider,
    ProviderOption,
    Threads,
    Verbose,
)
from .values import builtin, log_to_stderr, to_json

if TYPE_CHECKING:
    from pocketphi.bulk.lines import Entry, LineFile
    from pocketphi.bulk.performer import ItemSettings, ModelSettings
    from pocketphi.bulk.plan import Plan
    from pocketphi.bulk.run import Summary
    from pocketphi.runtime.bundle import Bundle


def batch(
    items: Annotated[Path, typer.Argument(parser=a_path, metavar="IN.jsonl", help="Items, one JSON object a line (see docs/batch.md); a file, no pipe.")],
    address: Annotated[str | None, typer.Argument(metavar="[ADDRESS]", help="With --ray: HOST:PORT of a cluster's head; auto: of one that runs here. [default: a cluster of this machine alone, for this run]")] = None,
    model: ModelDir = None,
    out: Annotated[Path | None, typer.Option("-o", "--output", parser=a_path, metavar="OUT.jsonl", help="Outcomes, a line each as they are done. A file that an earlier run left is gone on with.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, max=1024, help="Processes, each with the model. [default: as cores and memory allow]")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew, whatever an earlier run left.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Do again what failed in an earlier run.")] = False,
    keep_order: Annotated[bool, typer.Option("--keep-order", help="Write in the order of the input; slower where kinds of items take turns.")] = False,
    ray: Annotated[bool, typer.Option("--ray", help="Run on a Ray cluster (pocketphi[ray]).")] = False,
    n: Predict = -1, ctx_size: CtxSize = 0, threads: Threads = None, max_crops: MaxCrops = 36, gpu_layers: GpuLayers = 0,
    cache_type: AnyKvType = None, backbone: BackboneOption = None, provider: ProviderOption = Provider.cpu,
    as_json: Json = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Answer and transcribe the items of a file, each once; an interrupted run goes on when it is started again.

    An item that cannot be done is a line with its reason, and the others are done; the exit code is then 1. -t is
    for each worker; -n holds where an item has no max_tokens. --json prints a summary.
    """
    from pocketphi.bulk.lines import LineFile
    from pocketphi.runtime.progress import ProgressBar

    log_to_stderr(verbose)
    if out is None:
        raise InputError("-o is missing, expected a file to write")
    if address is not None and not ray:
        raise InputError(f"{address[:60]!r} is a second argument: an address goes with --ray")
    if n == 0:
        raise InputError("-n is 0, expected a number of tokens, or -1 for no limit")
    if restart and retry_failed:
        raise InputError("--restart and --retry-failed are both given, expected one")
    _check_output(items, out)
    with ProgressBar() as bar:
        bar.start(items.stat().st_size, items.name)
        file = LineFile(items, lambda n_bytes: bar.advance(n_bytes, items.name))
    with file:
        opened = _Opened(model or builtin(), ctx_size, gpu_layers, cache_type, max_crops, backbone, provider)
        begin = _Begin(out, restart, retry_failed, keep_order)
        summary = _run(file, opened, begin, None if n < 0 else n, workers, threads, (ray, address))
    if as_json:
        typer.echo(to_json(summary.to_object()))
    else:
        typer.echo(_line(summary, out), err=True)
    if summary.failed or summary.failed_before:
        raise typer.Exit(1)


class _Begin:
    """Where outcomes go, and what to do about an earlier run."""

    def __init__(self, out: Path, restart: bool, retry_failed: bool, keep_order: bool) -> None:
        self.out, self.restart, self.retry_failed, self.keep_order = out, restart, retry_failed, keep_order


class _Opened:
    """The model directory, checked: what workers will open."""

    def __init__(
        self, directory: Path, ctx_size: int, gpu_layers: int, cache_type: str | None, max_crops: int,
        backbone: Any, provider: Provider,
    ) -> None:  # fmt: skip
        from pocketphi.bulk.performer import ModelSettings, manifest_sha256
        from pocketphi.runtime import bundle, verify
        from pocketphi.runtime.backbone import BackboneOptions, OpenBackbone
        from pocketphi.runtime.progress import ProgressBar

        self.bundle: Bundle = bundle.load(directory)
        kind = None if backbone is None else backbone.value
        options = BackboneOptions(kind, provider.value, None, gpu_layers, cache_type)
        self.chosen = OpenBackbone(self.bundle, options, max_crops)
        with ProgressBar() as progress:
            verify.check(self.bundle, progress)  # once here, not in every worker at the same time
        self.settings: ModelSettings = ModelSettings(
            str(directory.resolve()),
            manifest_sha256(self.bundle),
            n_ctx=ctx_size,
            n_gpu_layers=gpu_layers,
            kv_type=cache_type,
            max_crops=max_crops,
            backbone=kind,
            provider=provider.value,
        )

    def job(self, max_tokens: int | None) -> dict[str, Any]:
        """All that outcomes depend on, but the items: to go on, each must be what it was."""
        one = self.settings
        return {
            "model": self.bundle.name,
            "recipe": self.bundle.recipe,
            "model_sha256": one.manifest_sha256,
            "backbone": self.chosen.kind,
            "provider": self.chosen.provider,
            "cache_type": self.chosen.kv_type,
            "ctx_size": one.n_ctx,
            "gpu_layers": one.n_gpu_layers,
            "max_crops": one.max_crops,
            "max_tokens": max_tokens,
        }


def _run(
    file: LineFile, opened: _Opened, begin: _Begin, max_tokens: int | None, workers: int | None,
    threads: int | None, ray: tuple[bool, str | None],
) -> Summary:  # fmt: skip
    from pocketphi.bulk.output import Output
    from pocketphi.bulk.performer import ItemSettings
    from pocketphi.bulk.run import begun, left_to_do

    settings = ItemSettings(str(file.folder), max_tokens)
    with Output(
        begin.out, opened.job(max_tokens), restart=begin.restart, retry_failed=begin.retry_failed
    ) as output:
        todo = left_to_do(file, output, settings)
        if output.n_before:
            typer.echo(f"{begin.out}: goes on after {output.n_before} of {len(file.entries)} items", err=True)
        if not todo:
            return begun(file, output)
        try:
            return _answer(file, opened, begin, settings, output, todo, (workers, threads), ray)
        except (KeyboardInterrupt, SystemExit):  # SystemExit: SIGTERM
            done = f"{len(output.done)} of {len(file.entries)} items, kept in {begin.out}"
            typer.echo(
                f"{file.path.name}: interrupted after {done}; the same command goes on from there", err=True
            )
            raise


def _answer(
    file: LineFile, opened: _Opened, begin: _Begin, items: ItemSettings, output: Any, todo: list[Entry],
    wanted: tuple[int | None, int | None], ray: tuple[bool, str | None],
) -> Summary:  # fmt: skip
    from dataclasses import replace

    from pocketphi.bulk.pool import Pool
    from pocketphi.bulk.run import work
    from pocketphi.runtime.progress import CountBar

    on_ray, address = ray
    plan = _plan(opened, todo, wanted)
    settings = replace(opened.settings, n_threads=plan.n_threads)
    if on_ray:
        from pocketphi.bulk.ray_pool import RayOptions, RayPool

        if address is None:
            options = RayOptions(n_workers=plan.n_workers)
        else:  # its machines are others: threads and memory are asked of each
            settings = replace(settings, n_threads=wanted[1] or 1)
            options = RayOptions(address, wanted[0], wanted[1] or 1, plan.n_bytes)
        pool: Any = RayPool(file, settings, items, options)
    else:
        pool = Pool(file, settings, items, plan.n_workers)
    with pool, CountBar() as bar:
        bar.start(len(file.entries), file.path.name, done=output.n_before)
        return work(
            file, output, pool, todo,
            model_name=opened.bundle.name, keep_order=begin.keep_order, progress=bar,
        )  # fmt: skip


def _plan(opened: _Opened, todo: list[Entry], wanted: tuple[int | None, int | None]) -> Plan:
    from pocketphi.bulk.plan import plan

    return plan(
        opened.bundle,
        {entry.mode for entry in todo},
        len(todo),
        backbone=opened.chosen.kind,
        kv_type=opened.chosen.kv_type,
        max_crops=opened.settings.max_crops,
        n_workers=wanted[0],
        n_threads=wanted[1],
    )


def _check_output(items: Path, out: Path) -> None:
    """No output replaces its input, or a model's file."""
    from pocketphi.runtime.files import check_file, check_not_model, check_not_read, check_writable

    check_file(items)
    check_writable(out)
    check_not_read(out, items)
    check_not_model(out.parent)


def _line(summary: Summary, out: Path) -> str:
    """For people, on stderr."""
    parts = [f"{summary.ok} done", f"{summary.failed} failed"]
    if summary.before:
        failed = f" ({summary.failed_before} failed)" if summary.failed_before else ""
        parts.append(f"{summary.before} done before{failed}")
    parts += [f"{summary.seconds:.1f} s"]
    if summary.tokens and summary.seconds > 0:
        parts.append(f"{summary.tokens / summary.seconds:.1f} tokens/s")
    if summary.audio_seconds:
        parts.append(f"{summary.audio_seconds:.1f} s of audio")
    return f"{out}: {', '.join(parts)}"
