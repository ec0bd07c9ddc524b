# SPDX-License-Identifier: Apache-2.0
"""Turns a Hugging Face checkpoint into a model directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .options import Options
from .progress import Progress
from .target import with_target

if TYPE_CHECKING:
    from ..runtime.bundle import Bundle
    from .work_plan import Plan

__all__ = ["Options", "Progress", "convert", "plan", "with_target"]


def plan(source: Path, options: Options) -> Plan:
    """Check a checkpoint whole and say what converting it would write; nothing is written.

    Args:
        source: a checkpoint directory.

    Raises:
        CheckpointError: the checkpoint or the importance matrix is damaged, incomplete or unknown.
        InputError: an option is not possible.
    """
    from .conversion import prepare

    with prepare(source, options) as work:
        return work.plan


def convert(source: Path, out: Path, options: Options, progress: Progress | None = None) -> Bundle:
    """Convert a checkpoint into a model directory, which appears whole or not at all.

    Same checkpoint and options, same bytes.

    Args:
        source: a checkpoint directory.
        out: the directory to make; its parents are made too.
        progress: told what is written; an exception it raises stops the work.

    Returns:
        The finished model directory, read back.

    Raises:
        CheckpointError, InputError: as `plan`.
        OutputError: the output exists, the disk is full or cannot be written.
        KernelError: a GGUF is to be written, and llama-cpp-python's ggml library is missing or not the one
            expected.
    """
    from .conversion import convert as run

    return run(source, out, options, progress)
