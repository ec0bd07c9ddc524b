# SPDX-License-Identifier: Apache-2.0
"""Tensors from the checkpoint through the quantizer into a file: chunk by chunk, on all cores, in order.

A chunk is a few rows: read, widened to float32, merged, checked and quantized by one thread. Finished
chunks are written in order by the calling thread, so memory is a few chunks and the bytes do not depend
on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .checkpoint import Checkpoint
from .in_order import in_order
from .output import HashedFile
from .progress import Progress
from .quantize import Bytes, Float32, Quantizer, check_values
from .work_plan import ALIGNMENT, CHUNK_VALUES, Step

Importances = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Workshop:
    """What every chunk needs."""

    source: Checkpoint
    quantizer: Quantizer
    importances: Importances  # `Step.imatrix_name` -> float32 [row length]
    threads: int


def write_tensors(file: HashedFile, steps: Sequence[Step], shop: Workshop, progress: Progress) -> None:
    """Append the data of `steps`, each padded to the alignment, to a file that stands at an aligned place.

    Raises:
        CheckpointError: a tensor cannot be read, or holds a value that its type cannot.
        OutputError: the file cannot be written.
    """
    jobs = (((step, last), job) for step in steps for job, last in _jobs(step, shop))
    with closing(in_order(jobs, shop.threads)) as done:
        for (step, last), data in done:
            file.write(data.reshape(-1).data)
            progress.advance(data.nbytes, step.tensor)
            if last:
                file.pad(ALIGNMENT)


def _jobs(step: Step, shop: Workshop) -> Iterator[tuple[Callable[[], Bytes], bool]]:
    """The work of one tensor, in order; the flag marks its last piece."""
    n_rows = step.shape[0] if len(step.shape) > 1 else 1
    piece = max(1, CHUNK_VALUES // step.row_length)
    a = shop.source.read(step.merge.a) if step.merge else None
    for start in range(0, n_rows, piece):
        stop = min(start + piece, n_rows)

        def job(start: int = start, stop: int = stop) -> Bytes:
            rows = _read(step, shop.source, start, stop)
            if step.merge is not None and a is not None:
                b = shop.source.rows(step.merge.b, start, stop)
                rows += np.float32(step.merge.scale) * (b @ a)
            file = shop.source.root / "config.json" if step.source is None else step.source.file
            check_values(rows, step.type, step.sources[0], file)
            return shop.quantizer.quantize(rows, step.type, shop.importances.get(step.imatrix_name))

        yield job, stop == n_rows


def _read(step: Step, source: Checkpoint, start: int, stop: int) -> Float32:
    """Rows as float32 [n, row length]; a vector is one row."""
    if step.source is None:
        return np.array([step.values], np.float32)
    if len(step.shape) == 1:
        return source.read(step.source).reshape(1, -1)
    return source.rows(step.source, start, stop)
