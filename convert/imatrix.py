# SPDX-License-Identifier: Apache-2.0
"""An importance matrix, ours or llama.cpp's `llama-imatrix`: how much each input column of a weight matters.

For a weight NAME the file holds `NAME.in_sum2` (sums of squared inputs, one per column) and
`NAME.counts` (tokens summed over). Source: tools/imatrix/imatrix.cpp and common/imatrix-loader.cpp.
Ours also has the adapters' matrices, as `speech.blk.0.ffn_up.weight.lora_a`, and the head, which
llama-imatrix leaves out unless it is untied and asked for (`--process-output`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..runtime.errors import CheckpointError
from ..runtime.gguf_header import GgufHeader, read_header
from ..runtime.spec import IMATRIX_COUNTS, IMATRIX_SUMS
from .ggml_types import F16, F32, Q8_0
from .work_plan import Step

_UNWEIGHTED = (F32, F16, Q8_0)  # types whose quantizer looks at no importance


def read_imatrix(
    path: Path, steps: Sequence[Step]
) -> tuple[dict[str, npt.NDArray[np.float32]], tuple[str, ...]]:
    """Importances for the tensors of a plan.

    Args:
        steps: the backbone's and the adapters'.

    Returns:
        `Step.imatrix_name` -> float32 [row length], mean squared input of each column; and notes about
        tensors that the file does not cover: they are quantized without.

    Raises:
        CheckpointError: not an importance matrix, a wrong length, an impossible value, or nothing in
            it fits the model.
    """
    file = read_header(path, CheckpointError)
    if file.keys.get("general.type") != "imatrix":
        raise CheckpointError(
            f"{path}: general.type is {str(file.keys.get('general.type'))[:40]!r}, expected 'imatrix'"
        )
    # Beside a head of its own the embedding is looked up and multiplied by nothing: no file can cover it.
    is_looked_up = any(step.group == "output" for step in steps)
    found: dict[str, npt.NDArray[np.float32]] = {}
    missing = []
    for step in steps:
        if step.type in _UNWEIGHTED:
            continue
        if step.imatrix_name + IMATRIX_SUMS in file.tensors:
            found[step.imatrix_name] = _importance(file, path, step)
        elif not (is_looked_up and step.group == "token_embd"):
            missing.append(step.imatrix_name)
    if not found and missing:
        raise CheckpointError(f"{path}: covers none of this model's tensors, e.g. not {missing[0]!r}")
    if not missing:
        return found, ()
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return found, (f"{path.name} does not cover {missing[0]}{more}: quantized without importances",)


def _importance(file: GgufHeader, path: Path, step: Step) -> npt.NDArray[np.float32]:
    """One tensor's, float32 [row length]."""
    name = step.imatrix_name
    if name + IMATRIX_COUNTS not in file.tensors:
        raise CheckpointError(f"{path}: tensor {name + IMATRIX_COUNTS!r} is missing")
    sums, counts = (file.float32(name + suffix).reshape(-1) for suffix in (IMATRIX_SUMS, IMATRIX_COUNTS))
    if len(sums) != step.row_length or len(counts) != 1:
        raise CheckpointError(
            f"{path}: {name + IMATRIX_SUMS!r} has {len(sums)} values and {len(counts)} counts, "
            f"expected {step.row_length} and 1"
        )
    if not (np.isfinite(sums).all() and (sums >= 0).all() and np.isfinite(counts[0]) and counts[0] >= 0):
        raise CheckpointError(f"{path}: {name + IMATRIX_SUMS!r} holds a value that is negative or not finite")
    # A tensor that no token reached tells nothing: all columns alike, as llama.cpp does.
    mean = sums / counts[0] if counts[0] > 0 else np.ones_like(sums)
    return np.ascontiguousarray(mean, np.float32)
