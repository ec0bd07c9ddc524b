# SPDX-License-Identifier: Apache-2.0
"""The whole conversion in order: read and check everything, plan, then write. It alone knows every stage."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np

from ..runtime.bundle import MANIFEST, AdapterInfo, Bundle, BundleFile, EncoderInfo, OnnxInfo, Source, load
from ..runtime.errors import CheckpointError, InputError
from ..runtime.spec import ADAPTER_NAMES, CHAT_FORMATS, Backbone, ChatFormat
from . import chat_format as chat_formats
from . import output
from .checkpoint import Checkpoint
from .config import ModelConfig, read_config
from .decoder_quant import named_decoder_quant
from .encoder_quant import named_quant
from .gguf_header import Identity
from .imatrix import read_imatrix
from .licence import licence_of
from .mapping import TensorMap, map_tensors
from .options import Options
from .phone_readme import README, README_BYTES, write_readme
from .progress import Progress, Silent
from .quantize import Quantizer
from .recipe import named, named_lora
from .target import check_target
from .tensor_stream import Importances, Workshop
from .vocabulary import Vocabulary, read_vocabulary, stop_ids
from .work_plan import CHUNK_VALUES, Choices, Plan, adapter_file, make_plan, types_of
from .write_gguf import VOCABULARY, write_backbone, write_vocabulary
from .write_gguf_lora import write_adapter

TOKENIZER, TEMPLATE, LICENCE = "tokenizer.json", "chat_template.jinja", "LICENSE"
BACKBONES: Mapping[str, tuple[Backbone, ...]] = {
    "gguf": ("gguf",),
    "onnx": ("onnx",),
    "both": ("gguf", "onnx"),
}
MAX_THREADS = 1024
_MANIFEST_BYTES = 16 << 10  # what bundle.json takes at most in practice
_README_BYTES = 64 << 10  # front matter is at the start


@dataclass(frozen=True, slots=True)
class Work:
    """A checked checkpoint and what is to be made of it."""

    source: Checkpoint
    config: ModelConfig
    tensors: TensorMap
    plan: Plan
    identity: Identity
    vocabulary: Vocabulary
    chat_format: ChatFormat
    tool_result_token: str
    stop_ids: tuple[int, ...]
    importances: Importances
    other_files: dict[str, bytes]
    threads: int
    target: str | None


def converter_version() -> str:
    """This program and its version, "pocketphi 0.1.0"."""
    package = importlib.import_module(__name__.rpartition(".convert.")[0])
    return f"pocketphi {package.__version__}"


@contextmanager
def prepare(root: Path, options: Options) -> Iterator[Work]:
    """Open and check everything that a conversion reads; the checkpoint is closed when the block ends."""
    choices = _choices(options)
    with Checkpoint.open(root) as source:
        where = str(root / "config.json")
        config = read_config(source.config, where)
        tensors = map_tensors(config, source.tensors, source.adapters, root)
        _check_tied_head(source, tensors)
        tokenizer = str(root / TOKENIZER)
        vocabulary = read_vocabulary(
            source.tokenizer_json,
            config.text.vocab_size,
            tokenizer_config=source.tokenizer_config,
            config=source.config,
            generation_config=source.generation_config,
            chat_template=source.chat_template,
            where=tokenizer,
        )
        chat_format, tool_result = _chat_format(source, vocabulary, options, tokenizer)
        stops = stop_ids(
            vocabulary.added,
            config.text.vocab_size,
            config=source.config,
            generation_config=source.generation_config,
            where=str(root),
        )
        identity = _identity(source, options)
        files = _other_files(source)
        sizes = {name: len(data) for name, data in files.items()} | {MANIFEST: _MANIFEST_BYTES}
        if options.target is not None:
            sizes[README] = README_BYTES
        plan = make_plan(identity.name, config, tensors, choices, sizes, ())
        importances: Importances = {}
        if options.imatrix is not None:
            importances, notes = read_imatrix(options.imatrix, plan.steps)
            plan = replace(plan, notes=(*plan.notes, *notes))
        yield Work(
            source=source,
            config=config,
            tensors=tensors,
            plan=plan,
            identity=identity,
            vocabulary=vocabulary,
            chat_format=chat_format,
            tool_result_token=tool_result,
            stop_ids=stops,
            importances=importances,
            other_files=files,
            threads=choices.threads,
            target=options.target,
        )


def convert(root: Path, out: Path, options: Options, progress: Progress | None) -> Bundle:
    """See `convert.convert`."""
    output.check_free(output.absolute(out), overwrite=options.overwrite)
    with prepare(root, options) as work:
        quantizer = Quantizer() if "gguf" in work.plan.backbones else None
        told = progress or Silent()
        told.start(work.plan.source_bytes, work.identity.name)
        with output.new_directory(out, work.plan.total_bytes, overwrite=options.overwrite) as directory:
            _write(directory, work, quantizer, told)
    told.finish()
    return load(out)


def _write(directory: Path, work: Work, quantizer: Quantizer | None, progress: Progress) -> None:
    """Every file of a model directory, the manifest last."""
    files = [output.write_file(directory, name, data) for name, data in work.other_files.items()]
    if quantizer is not None:
        files += _write_gguf(directory, work, quantizer, progress)
    else:
        files.append(write_vocabulary(directory, work.config, work.vocabulary, work.identity))
    onnx = None
    if work.plan.onnx is not None:
        from .onnx_backbone import write_onnx  # onnx is loaded where graphs are written

        made, onnx = write_onnx(directory, work, progress, converter_version())
        files += made
    encoders = _write_encoders(directory, work, files, progress)
    if onnx is not None:
        files += _write_genai(directory, work)
    bundle = _bundle(directory, work, files, encoders, onnx)
    if work.target is not None:
        bundle = replace(bundle, files=(*bundle.files, write_readme(directory, bundle)))
    output.write_file(directory, MANIFEST, bundle.to_json().encode("utf-8"))


def _write_gguf(directory: Path, work: Work, quantizer: Quantizer, progress: Progress) -> list[BundleFile]:
    """The backbone and its adapters for llama.cpp."""
    plan, identity = work.plan, work.identity
    shop = Workshop(work.source, quantizer, work.importances, work.threads)
    files = [write_backbone(directory, plan, work.config, work.vocabulary, identity, shop, progress)]
    for adapter in plan.adapters:
        files.append(write_adapter(directory, plan, adapter, identity, shop, progress))
    return files


def _write_genai(directory: Path, work: Work) -> list[BundleFile]:
    """What onnxruntime-genai needs beside graphs, adapters and encoders."""
    from .write_genai import write_genai

    return write_genai(
        directory,
        work.source,
        work.config,
        vocabulary=work.vocabulary,
        stop_ids=work.stop_ids,
        adapters=work.plan.adapters,
        producer=converter_version(),
    )


def _write_encoders(
    directory: Path, work: Work, files: list[BundleFile], progress: Progress
) -> dict[str, EncoderInfo]:
    """The encoders that the checkpoint has, as ONNX graphs; their files are added to `files`."""
    quant, found = work.plan.encoders.quant, {}
    rest = (quant, progress, converter_version())
    if work.config.vision is not None:
        from . import write_onnx_vision as vision  # onnx is loaded for models that have encoders

        files += vision.write_vision(directory, work.source, work.config, *rest)
        found["vision"] = EncoderInfo(vision.GRAPHS, quant)
    if work.config.audio is not None:
        from . import write_onnx_speech as speech

        files += speech.write_speech(directory, work.source, work.config, *rest)
        found["speech"] = EncoderInfo(speech.GRAPHS, quant)
    return found


def _bundle(
    directory: Path,
    work: Work,
    files: list[BundleFile],
    encoders: dict[str, EncoderInfo],
    onnx: OnnxInfo | None,
) -> Bundle:
    plan, gguf = work.plan, "gguf" in work.plan.backbones
    adapters = {}
    for adapter in plan.adapters:
        file, quant = None, "" if onnx is None else onnx.lora_quant
        if gguf:
            file = adapter_file(adapter.name, plan.lora_quant)
            quant = types_of(plan.steps_of(file))
        adapters[adapter.name] = AdapterInfo(file, adapter.rank, adapter.alpha, quant)
    return Bundle(
        root=directory,
        name=plan.name,
        family=work.config.family,
        chat_format=work.chat_format,
        tool_result_token=work.tool_result_token,
        text=work.config.text,
        stop_ids=work.stop_ids,
        decoder=plan.backbone if gguf else None,
        recipe=plan.recipe_name,
        quant=plan.quant(),
        merged=plan.merged,
        adapters=cast("dict[str, AdapterInfo]", adapters),
        tokenizer=TOKENIZER,
        source=work.identity.source,
        converter=converter_version(),
        licence=work.identity.licence,
        files=tuple(files),
        encoders=encoders,
        onnx=onnx,
        vocabulary=None if gguf else VOCABULARY,
    )


def _choices(options: Options) -> Choices:
    """The options that can be checked without a checkpoint."""
    if options.merge is not None and options.merge not in ADAPTER_NAMES:
        raise InputError(f"--merge {options.merge[:40]!r}: expected one of {', '.join(ADAPTER_NAMES)}")
    check_target(options.target)
    threads = options.threads
    if threads is None:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    elif not 1 <= threads <= MAX_THREADS:
        raise InputError(f"threads: {threads} given, expected 1 to {MAX_THREADS}")
    threads = min(threads, MAX_THREADS)
    backbones = BACKBONES.get(options.backbone.lower())
    if backbones is None:
        raise InputError(f"--backbone {options.backbone[:40]!r}: expected one of {', '.join(BACKBONES)}")
    if options.imatrix is not None and "gguf" not in backbones:
        raise InputError("--imatrix is for the types of a GGUF backbone: --backbone onnx writes none")
    return Choices(
        named(options.recipe),
        named_lora(options.lora_quant),
        options.merge,
        threads,
        named_quant(options.encoders),
        backbones,
        named_decoder_quant(options.onnx_quant, options.onnx_lora),
    )


def _chat_format(
    source: Checkpoint, vocabulary: Vocabulary, options: Options, where: str
) -> tuple[ChatFormat, str]:
    if options.chat_format is None:
        return chat_formats.detect(source.chat_template, vocabulary.added, where)
    if options.chat_format not in CHAT_FORMATS:
        raise InputError(
            f"chat format {options.chat_format[:40]!r}: expected one of {', '.join(CHAT_FORMATS)}"
        )
    chat_formats.check_tokens(options.chat_format, vocabulary.added, where)
    return options.chat_format, chat_formats.tool_result_token(source.chat_template, vocabulary.added)


def _identity(source: Checkpoint, options: Options) -> Identity:
    source_name = _line(options.source_name or source.name, "source name")
    name = _line(options.name or source_name.rpartition("/")[2], "name")
    licence = options.licence or licence_of(_readme(source.root), source.licence_text)
    return Identity(
        name, _line(licence, "licence"), Source(source_name, options.revision, source.fingerprint)
    )


def _line(text: str, what: str) -> str:
    """One printable line for metadata."""
    if not text.isprintable() or not 0 < len(text) <= 200:
        raise InputError(f"{what} {text[:40]!r}: expected 1 to 200 printable characters")
    return text


def _readme(root: Path) -> str | None:
    """The start of the model card. Nothing depends on it but the licence's name, so a bad one is no card."""
    path = root / "README.md"
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            return file.read(_README_BYTES).decode("utf-8", "replace")
    except OSError:
        return None


def _other_files(source: Checkpoint) -> dict[str, bytes]:
    files = {TOKENIZER: source.tokenizer_json}
    for name, text in ((TEMPLATE, source.chat_template), (LICENCE, source.licence_text)):
        if text is not None:
            try:
                files[name] = text.encode("utf-8")
            except UnicodeEncodeError:  # JSON may escape half of a surrogate pair
                raise CheckpointError(f"{source.root}: {name} holds what is not text") from None
    return files


def _check_tied_head(source: Checkpoint, tensors: TensorMap) -> None:
    """A head stored beside a tied embedding must repeat it: the reference would use the embedding.

    transformers ties the weights after loading and so ignores what `lm_head.weight` holds; a file in
    which they differ contradicts its own configuration, and either choice could be the wrong one.
    """
    head = tensors.tied_head
    if head is None:
        return
    embedding = next(info for target, info in tensors.text if target.group == "token_embd")
    assert embedding is not None
    piece = max(1, CHUNK_VALUES // head.cols)
    for start in range(0, head.rows, piece):
        stop = min(start + piece, head.rows)
        ours, theirs = (source.rows(t, start, stop).view(np.uint32) for t in (embedding, head))
        if not np.array_equal(ours, theirs):
            raise CheckpointError(
                f"{head.file}: tensor 'lm_head.weight' differs from the embedding, "
                "but config.json has tie_word_embeddings true"
            )
