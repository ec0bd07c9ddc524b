# SPDX-License-Identifier: Apache-2.0
"""One adapter as a GGUF LoRA file, as `llama_adapter_lora_init` reads it (llama.cpp's llama-adapter.cpp)."""

from __future__ import annotations

from pathlib import Path

from ..runtime.bundle import BundleFile
from .gguf_header import Identity, add_identity, write_header
from .mapping import Adapter
from .output import HashedFile
from .progress import Progress
from .tensor_stream import Workshop, write_tensors
from .work_plan import Plan, adapter_file


def write_adapter(
    directory: Path, plan: Plan, adapter: Adapter, identity: Identity, shop: Workshop, progress: Progress
) -> BundleFile:
    """Write one adapter's file into a directory.

    llama.cpp scales by alpha / rank, the rank being B's row length; it reads alpha 0 as "no alpha",
    which the reader has refused. The file says which adapter of which checkpoint it is: the numbers of
    two adapters may well be the same.

    Raises:
        CheckpointError: a tensor cannot be read or quantized.
        OutputError: the file cannot be written.
    """
    import gguf

    name = adapter_file(adapter.name, plan.lora_quant)
    steps = plan.steps_of(name)
    writer = gguf.GGUFWriter(None, "phi3")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_name(f"{adapter.name} adapter")
    writer.add_string("pocketphi.adapter", adapter.name)
    add_identity(writer, identity)
    writer.add_float32("adapter.lora.alpha", adapter.alpha)
    with HashedFile(directory, name) as file:
        write_header(file, writer, steps)
        write_tensors(file, steps, shop, progress)
        return file.finish()
