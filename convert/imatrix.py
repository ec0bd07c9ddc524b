# SPDX-License-Identifier: Apache-2.0
"""An importance matrix of llama.cpp's `llama-imatrix`: how much each input column of a weight matters.

For a weight NAME the file holds `NAME.in_sum2` (sums of squared inputs, one per column) and
`NAME.counts` (tokens summed over). Source: tools/imatrix/imatrix.cpp and common/imatrix-loader.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..runtime.errors import CheckpointError
from .ggml_types import F16, F32, Q8_0
from .gguf_file import read_gguf
from .work_plan import Step

SUMS, COUNTS = ".in_sum2", ".counts"
_UNWEIGHTED = (F32, F16, Q8_0)  # types whose quantizer looks at no importance


def read_imatrix(
    path: Path, steps: Sequence[Step]
) -> tuple[dict[str, npt.NDArray[np.float32]], tuple[str, ...]]:
    """Importances for the tensors of a plan.

    Args:
        steps: the backbone's.

    Returns:
        GGUF tensor name -> float32 [row length], mean squared input of each column; and notes about
        tensors that the file does not cover: they are quantized without.

    Raises:
        CheckpointError: not an importance matrix, a wrong length, an impossible value, or nothing in
            it fits the model.
    """
    file = read_gguf(path)
    if file.keys.get("general.type") != "imatrix":
        raise CheckpointError(
            f"{path}: general.type is {str(file.keys.get('general.type'))[:40]!r}, expected 'imatrix'"
        )
    found: dict[str, npt.NDArray[np.float32]] = {}
    missing = []
    for step in steps:
        if step.type in _UNWEIGHTED:
            continue
        if step.tensor + SUMS not in file.tensors:
            missing.append(step.tensor)
            continue
        if step.tensor + COUNTS not in file.tensors:
            raise CheckpointError(f"{path}: tensor {step.tensor + COUNTS!r} is missing")
        sums, counts = (
            file.float32(step.tensor + SUMS).reshape(-1),
            file.float32(step.tensor + COUNTS).reshape(-1),
        )
        if len(sums) != step.row_length or len(counts) != 1:
            raise CheckpointError(
                f"{path}: {step.tensor + SUMS!r} has {len(sums)} values and {len(counts)} counts, "
                f"expected {step.row_length} and 1"
            )
        if not (np.isfinite(sums).all() and (sums >= 0).all() and np.isfinite(counts[0]) and counts[0] >= 0):
            raise CheckpointError(
                f"{path}: {step.tensor + SUMS!r} holds a value that is negative or not finite"
            )
        # A tensor that no token reached tells nothing: all columns alike, as llama.cpp does.
        mean = sums / counts[0] if counts[0] > 0 else np.ones_like(sums)
        found[step.tensor] = np.ascontiguousarray(mean, np.float32)
    if not found and missing:
        raise CheckpointError(f"{path}: covers none of this model's tensors, e.g. not {missing[0]!r}")
    if not missing:
        return found, ()
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return found, (f"{path.name} does not cover {missing[0]}{more}: quantized without importances",)
