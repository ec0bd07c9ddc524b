# SPDX-License-Identifier: Apache-2.0
"""`imatrix`: which columns of the weights matter, for `convert --imatrix`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pocketphi.runtime.errors import InputError

from .checks import a_path
from .options import Adapter, AdapterOption, Json, KvType, MaxCrops, ModelDir, Threads, Verbose
from .values import log_to_stderr, open_model, to_json

if TYPE_CHECKING:
    from pocketphi.runtime.engine import Model
    from pocketphi.runtime.ggml_observer import MatmulObserver


def imatrix(
    model: ModelDir = None,
    data: Annotated[Path | None, typer.Option("--data", parser=a_path, metavar="<path>", help="Plain text, or FILE.jsonl with items as `eval` takes them.")] = None,
    out: Annotated[Path, typer.Option("-o", "--output", parser=a_path, metavar="<path>", help="What to write, in llama.cpp's form.")] = Path("imatrix.gguf"),
    adapter: AdapterOption = Adapter.none,
    ctx_size: Annotated[int, typer.Option("-c", "--ctx-size", min=16, help="Tokens of a chunk of text.")] = 512,
    chunks: Annotated[int, typer.Option("--chunks", min=-1, help="The first so many chunks or items; -1: all.")] = -1,
    threads: Threads = None, cache_type: KvType = "f16", max_crops: MaxCrops = 36, as_json: Json = False,
    verbose: Verbose = False,
) -> None:  # fmt: skip
    """Read text or items with a model (best: --quant F16) and write how much each column of its weights is used.
    `convert --imatrix` then quantizes the columns that matter with more care.
    """
    log_to_stderr(verbose)
    if data is None:
        raise InputError("imatrix reads a file: name it with --data")
    from pocketphi.evaluate.imatrix import collect, table, write
    from pocketphi.runtime.files import check_not_model, check_not_read, check_writable
    from pocketphi.runtime.progress import CountBar

    check_writable(out)
    check_not_read(out, data)
    check_not_model(out.parent)

    def opened(observer: MatmulObserver) -> Model:
        return open_model(model, 0, threads, 0, cache_type, max_crops, observer)

    with CountBar() as bar:
        found = collect(
            opened, data, adapter=None if adapter is Adapter.none else adapter.value, n_ctx=ctx_size,
            chunks=chunks, progress=bar,
        )  # fmt: skip
    write(out, found)
    typer.echo(to_json({"file": str(out), **found.to_object()}) if as_json else "\n".join(table(found, out)))
