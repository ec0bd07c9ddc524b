# SPDX-License-Identifier: Apache-2.0
"""The ONNX backbone's stages in order: the decoder's graphs, then an adapter file for each LoRA."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..runtime.bundle import BundleFile, OnnxInfo
from .progress import Progress
from .work_plan import merges_of
from .write_onnx_adapter import adapter_name, write_onnx_adapter
from .write_onnx_decoder import DECODER, EMBEDDING, MODEL, write_decoder

if TYPE_CHECKING:
    from .conversion import Work


def write_onnx(
    directory: Path, work: Work, progress: Progress, producer: str
) -> tuple[list[BundleFile], OnnxInfo]:
    """Write `work.plan.onnx` into a directory: the files, and what bundle.json says of them.

    Raises:
        CheckpointError: a tensor cannot be read, or holds what its type cannot.
        OutputError: a file cannot be written.
    """
    plan, tensors = work.plan, work.tensors
    assert plan.onnx is not None, "the caller has seen that there is an ONNX backbone"
    quant, merged = plan.onnx.quant, None
    if plan.merged is not None:  # as in the GGUF: one purpose, no adapters
        merged = tensors.adapters[plan.merged]
        tensors = replace(tensors, adapters={})
    files = write_decoder(
        directory,
        work.source,
        work.config,
        tensors,
        quant,
        progress,
        producer,
        merges=merges_of(merged),
        threads=work.threads,
    )
    for adapter in plan.adapters:
        files.append(write_onnx_adapter(directory, work.source, adapter, quant.lora, progress))
    info = OnnxInfo(
        model=f"{MODEL}.onnx",
        decoder=f"{DECODER}.onnx",
        embedding=f"{EMBEDDING}.onnx",
        quant=quant.kinds(),
        lora_quant=quant.lora,
        adapters={adapter.name: adapter_name(adapter) for adapter in plan.adapters},
    )
    return files, info
