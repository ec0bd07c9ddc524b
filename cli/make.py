# SPDX-License-Identifier: Apache-2.0
"""`convert` and `info`: make a model directory, and say what one holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pocketphi.runtime.errors import InputError

from .options import Json, Threads, Verbose
from .values import builtin, log_to_stderr, to_json

if TYPE_CHECKING:
    from pocketphi.runtime.spec import Backbone

_TOKENIZER_MEMORY = 42  # bytes for each of tokenizer.json's, as Python objects and in its reader: measured
_TOKENIZER_LARGEST = 64 << 20  # bytes; what is larger will be refused for that


# What is for one of the backbones alone, and what to give instead where that one is not written.
_GGUF_ONLY = {
    "quant": "its type is --onnx-quant",
    "lora_quant": "its type is --onnx-lora",
    "imatrix": "leave it out",
}
_ONNX_ONLY = dict.fromkeys(("onnx_quant", "onnx_lora"), "add --backbone onnx or both")


def convert(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="SRC", help="Checkpoint directory, or a hub id with --from-hub.")],
    out: Annotated[Path | None, typer.Option("-o", "--output", help="Model directory to write.")] = None,
    quant: Annotated[str, typer.Option("--quant", "-q", help="GGUF backbone: Q4_0, Q4_K_M, Q5_K_M, Q6_K, Q8_0, F16 or F32.")] = "Q4_K_M",
    lora_quant: Annotated[str, typer.Option("--lora-quant", help="GGUF adapters: Q8_0, F16, Q4_0 or F32.")] = "Q8_0",
    backbone: Annotated[str, typer.Option("--backbone", help="Write it as gguf for llama.cpp, as onnx for ONNX Runtime, or both.")] = "gguf",
    onnx_quant: Annotated[str, typer.Option("--onnx-quant", help="ONNX backbone: int4 (8 bits where 4 cost much), int4-pure (4 bits everywhere), int8, fp16 or fp32.")] = "int4",
    onnx_lora: Annotated[str, typer.Option("--onnx-lora", help="ONNX adapters: fp16, int8 or fp32.")] = "fp16",
    target: Annotated[str | None, typer.Option("--target", help="phone: small types and both backbones where no flag says otherwise, and a README.md for apps.")] = None,
    encoders: Annotated[str, typer.Option("--encoders", help="ONNX encoders: int8, int4, fp16 or fp32.")] = "int8",
    merge: Annotated[str | None, typer.Option("--merge", help="Merge vision or speech into the backbone.")] = None,
    imatrix: Annotated[Path | None, typer.Option("--imatrix", help="Importance matrix, of the imatrix command or llama-imatrix.")] = None,
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
    from pocketphi.runtime.progress import ProgressBar

    log_to_stderr(verbose)
    given = _given(context)
    if out is None and not dry_run:
        raise InputError("convert needs -o DIR (or --dry-run)")
    directory, source_name, commit = hub.resolve(
        source, from_hub=from_hub, revision=revision, offline=offline
    )
    options = converter.Options(
        recipe=quant, lora_quant=lora_quant, encoders=encoders, merge=merge, imatrix=imatrix, threads=threads,
        chat_format=chat_format, name=name, revision=commit, source_name=source_name, overwrite=overwrite,
        backbone=backbone, onnx_quant=onnx_quant, onnx_lora=onnx_lora, target=target,
    )  # fmt: skip
    options = converter.with_target(options, given | ({"recipe"} if "quant" in given else set()))
    _check_backbone(options.backbone, given)
    _require_memory(directory / "tokenizer.json")
    if dry_run or out is None:
        plan = converter.plan(directory, options)
        typer.echo(plan.to_json() if as_json else plan.format())
        return
    with ProgressBar() as progress:
        bundle = converter.convert(directory, out, options, progress)
    if as_json:
        typer.echo(to_json(report.bundle_object(bundle)))
    else:
        size = sum(f.size for f in bundle.files)
        typer.echo(
            f"{out}: {bundle.name}, {bundle.recipe}, {len(bundle.files)} files, {report.human_bytes(size)}",
            err=True,
        )


def _given(context: typer.Context) -> set[str]:
    """The parameters that stand on the command line, as the function names them."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def _check_backbone(backbone: str, given: set[str]) -> None:
    """Refuse what was asked of a backbone that is not to be written."""
    for without, flags in (("onnx", _GGUF_ONLY), ("gguf", _ONNX_ONLY)):
        for name, advice in flags.items():
            if backbone.lower() == without and name in given:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{flag} has no meaning with --backbone {without}: {advice}")


def _require_memory(tokenizer: Path) -> None:
    """Refuse what its native reader, which ends the process when memory runs out, would not get through."""
    from pocketphi.runtime import memory

    if tokenizer.is_file() and tokenizer.stat().st_size <= _TOKENIZER_LARGEST:
        needed = _TOKENIZER_MEMORY * tokenizer.stat().st_size
        memory.require(f"{tokenizer}: to read it", needed, "free some, or raise the limit")


def info(
    directory: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DIR]",
            envvar="POCKETPHI_MODEL",
            help="Model directory [default: the built-in phi4-nano].",
        ),
    ] = None,
    model: Annotated[Path | None, typer.Option("-m", "--model", help="The same as [DIR].")] = None,
    check: Annotated[bool, typer.Option("--check", help="Read every file and compare its SHA-256.")] = False,
    as_json: Json = False,
) -> None:
    """What a model directory holds: backbones, types, sizes, hashes, source; what memory each mode needs, and which
    kernels would run it here.
    """
    from pocketphi.runtime import bundle as bundles
    from pocketphi.runtime import ggml_plugin, onnx_kernels, report

    log_to_stderr(verbose=False)

    bundle = bundles.load(model or directory or builtin())
    if check:
        for entry in bundle.check_hashes():
            typer.echo(f"ok  {entry.path}", err=True)
    kernels, onnx = ggml_plugin.load(), onnx_kernels.load()
    packed: dict[Backbone, bool] = {"gguf": kernels.active, "onnx": onnx.active}
    if as_json:
        found = report.bundle_object(bundle) | {"kernels": report.kernels_object(kernels)}
        if bundle.onnx is not None:
            found["onnx_kernels"] = report.kernels_object(onnx)
        typer.echo(to_json(found | {"memory": report.memory_object(bundle, packed)}))
        return
    for line in report.bundle_lines(bundle):
        typer.echo(line)
    typer.echo(f"{'kernels':<16}{report.kernels_line(kernels)}")
    if bundle.onnx is not None:
        typer.echo(f"{'ONNX kernels':<16}{report.onnx_kernels_line(onnx)}")
    for line in report.memory_lines(bundle, packed):
        typer.echo(line)
