# SPDX-License-Identifier: Apache-2.0
"""`bench`: how fast a model is here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pocketphi.runtime.errors import InputError

from .options import AnyKvType, BackboneOption, Engine, GpuLayers, Json, Provider, ProviderOption, Threads
from .values import builtin, log_to_stderr, open_model, to_json

if TYPE_CHECKING:
    from pocketphi.runtime.engine import Model


class Peer(str, Enum):
    """What `bench` can measure beside ours."""

    stock = "stock"


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
    threads: Threads = None, gpu_layers: GpuLayers = 0, cache_type: AnyKvType = None,
    backbone: BackboneOption = None, provider: ProviderOption = Provider.cpu, as_json: Json = False,
) -> None:  # fmt: skip
    """How fast a model is here. A directory: text, pictures and speech of fixed sizes. A GGUF file, or with one of
    -p, --depth, -c, --lora, --compare: the decoder alone, beside what the machine can do. Medians.
    """
    log_to_stderr(verbose=False)
    alone = (n_prompt, depth, ctx_size, lora, compare) != (None,) * 5
    if not alone and (model is None or not model.is_file()):
        opened = partial(
            open_model,
            model or builtin(),
            0,
            threads,
            gpu_layers,
            cache_type,
            backbone=backbone,
            provider=provider,
        )
        _bench_cases(opened, repetitions, n, only, as_json)
        return
    if backbone is Engine.onnx or provider is not Provider.cpu:
        raise InputError(
            "the decoder alone is measured on the GGUF backbone: --backbone onnx is for all of a model"
        )
    if only is not None:
        raise InputError("--only chooses cases of a model directory, here the decoder is measured alone")
    from pocketphi.runtime import bench_gguf
    from pocketphi.runtime import bundle as bundles
    from pocketphi.runtime.bench_decoder import SpeedPlan
    from pocketphi.runtime.threads import default_threads

    path = model or builtin()
    if not path.is_file():
        bundle = bundles.load(path)
        path = bundle.gguf
    plan = SpeedPlan(
        str(path), None if lora is None else str(lora), n_prompt or 512, n or 64, depth or 0, ctx_size or 0,
        default_threads() if threads is None else threads, gpu_layers, "f16" if cache_type is None else cache_type,
    )  # fmt: skip
    result = bench_gguf.run(
        plan,
        repetitions=repetitions,
        compare=compare is not None,
        note=lambda line: typer.echo(line, err=True),
    )
    typer.echo(to_json(result.to_object()) if as_json else "\n".join(bench_gguf.table(result)))


def _bench_cases(
    opened: Callable[[], Model], repetitions: int, n: int | None, only: str | None, as_json: bool
) -> None:
    from pocketphi.runtime import bench as benchmark
    from pocketphi.runtime import report

    if n is not None and n < 2:
        raise InputError(f"-n is {n}, expected at least 2 after a case")
    rows = benchmark.run(opened, repetitions=repetitions, predict=n or 16, only=only)
    if as_json:
        typer.echo(to_json([asdict(row) for row in rows]))
        return
    for i, row in enumerate(rows):
        typer.echo(report.bench_line(row) if i else f"{report.bench_head()}\n{report.bench_line(row)}")
