# SPDX-License-Identifier: Apache-2.0
"""The bytes in front of a GGUF file's tensor data: metadata and tensor table, made by the gguf package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..runtime.bundle import Source
from ..runtime.errors import CheckpointError, OutputError
from .output import HashedFile
from .work_plan import ALIGNMENT, Step

if TYPE_CHECKING:
    import gguf


@dataclass(frozen=True, slots=True)
class Identity:
    """What the files of a model say about themselves."""

    name: str
    licence: str
    source: Source


def add_identity(writer: gguf.GGUFWriter, identity: Identity) -> None:
    """Add what backbone and adapters have in common: by the fingerprint they are known to belong together."""
    writer.add_license(identity.licence)
    writer.add_string("pocketphi.source.fingerprint", identity.source.fingerprint)


def write_header(file: HashedFile, writer: gguf.GGUFWriter, steps: Sequence[Step]) -> None:
    """Append a writer's metadata and the table of `steps` to an empty file, padded to the alignment.

    Args:
        writer: holds all metadata and no tensors; it is used up.

    Raises:
        CheckpointError: a text that UTF-8 cannot hold.
        OutputError: the file cannot be written.
    """
    import gguf

    for step in steps:
        kind = gguf.GGMLQuantizationType(step.type.id)
        writer.add_tensor_info(step.tensor, step.shape, np.dtype(np.float32), step.nbytes, raw_dtype=kind)
    scratch = file.path.with_name(file.path.name + ".header")  # the writer knows only files
    try:
        writer.write_header_to_file(path=scratch)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        data = Path(scratch).read_bytes()
        scratch.unlink()
    except UnicodeEncodeError as exc:
        raise CheckpointError(
            f"{file.path.name}: metadata holds {exc.object[exc.start]!r}, which is not text"
        ) from None
    except OSError as exc:
        raise OutputError(f"{scratch}: cannot be written: {exc.strerror or type(exc).__name__}") from None
    file.write(data)
    file.pad(ALIGNMENT)
