# SPDX-License-Identifier: Apache-2.0
"""The built-in phi4-nano as a model directory: converted once, then kept in the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from ..runtime.bundle import load
from ..runtime.cache import CACHE_VARIABLE, cache_directory
from ..runtime.errors import BundleError, OutputError
from .options import Options
from .output import one_at_a_time
from .progress import Progress

RECIPE = "Q8_0"  # 6 MB in all: size is no matter here, and Q8_0 answers as the original does


def builtin_checkpoint() -> Path:
    """phi4-nano's checkpoint, which ships inside the package."""
    return Path(__file__).parent.parent / "nano" / "checkpoint"


def builtin_bundle(cache: Path | None = None, progress: Progress | None = None) -> Path:
    """The built-in model's directory, made on the first call.

    Its name holds what it was made from (checkpoint, converter version, recipe), so another version
    makes its own. Of several processes that find none, one makes it and the others wait.

    Args:
        cache: where to keep it; None is `cache_directory()`.

    Raises:
        OutputError: the cache cannot be written. There is no fallback to a temporary directory: it
            would be made anew each time, or be shared with strangers.
        CheckpointError, KernelError: as `convert`.
    """
    from .checkpoint import Checkpoint
    from .conversion import convert, converter_version

    source = builtin_checkpoint()
    with Checkpoint.open(source) as checkpoint:
        parts = (checkpoint.fingerprint, converter_version(), RECIPE)
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    out = (cache or cache_directory()) / f"phi4-nano-{RECIPE}-{key}"
    if _is_whole(out):
        return out
    options = Options(
        recipe=RECIPE, name="phi4-nano", source_name="phi4-nano", licence="Apache-2.0", overwrite=True
    )
    # Whoever finds no whole model looks again once it has the lock: a whole one is never replaced,
    # so nobody reads a directory that is being put in place.
    with one_at_a_time(out.parent):
        if _is_whole(out):
            return out
        try:
            convert(source, out, options, progress)
        except OutputError as exc:
            raise OutputError(f"{exc} (set {CACHE_VARIABLE} to a directory that can be written)") from None
    return out


def _is_whole(directory: Path) -> bool:
    with contextlib.suppress(BundleError):
        load(directory)
        return True
    return False
