# SPDX-License-Identifier: Apache-2.0
"""Several models on one model directory, for several threads: weights, encoders and tokenizer are shared.

What they compute at the same time with the same adapter goes through the weights together: see `slot_worker`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from .backbone import BackboneOptions
from .decoder_slots import MAX_SLOTS
from .engine import Model
from .errors import InputError
from .hd import MAX_CROPS
from .model_parts import ModelParts
from .parts import Progress

DEFAULT_CONTEXT = 4096  # tokens of each conversation, if the model has so many


class ModelPool:
    """A model directory, loaded for so many conversations at a time. A context manager.

    Each of `models` is a `Model` for one thread at a time, with a conversation of its own.

    Example:
        >>> with ModelPool("phi-4-mini-Q4_K_M", 4) as pool, ThreadPoolExecutor(4) as threads:
        ...     replies = list(threads.map(lambda model: model.chat(QUESTION), pool.models))
    """

    def __init__(
        self, path: str | Path, n: int, *, n_ctx: int = DEFAULT_CONTEXT, max_crops: int = MAX_CROPS,
        progress: Progress | None = None, make: Callable[..., Model] = Model, **engine: Any,
    ) -> None:  # fmt: skip
        """
        Args:
            path: a directory made by `pocketphi convert`.
            n: models, 1 to 64.
            n_ctx: the most tokens each conversation may have, at most what the model was trained for.
                Memory for all conversations is taken with the first prompt, but there has to be enough now.
            max_crops: as for `Model`, and so is `progress`.
            make: `Model` or a class of its kind; called with the path and `parts`.
            **engine: the fields of `BackboneOptions`: n_threads, n_gpu_layers, kv_type, …

        Raises:
            BundleError, InputError, MemoryShortError: as for `Model`; InputError also for the ONNX backbone.
        """
        if not 1 <= n <= MAX_SLOTS:
            raise InputError(f"conversations at a time is {n}, expected 1 to {MAX_SLOTS}")
        self._parts = ModelParts(
            Path(path),
            BackboneOptions(**engine),
            n_ctx=n_ctx,
            max_crops=max_crops,
            progress=progress,
            n_slots=n,
        )
        try:
            self._parts.guard.cache(0, n * self._parts.limit, 0)  # taken with the first prompt
            self.models = tuple(make(path, parts=self._parts, slot=i) for i in range(n))
        except BaseException:
            self._parts.close()
            raise

    def __enter__(self) -> ModelPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        """How many models there are."""
        return len(self.models)

    def __iter__(self) -> Iterator[Model]:
        """The models. Use the first ones, where fewer are needed: neighbours share passes."""
        return iter(self.models)

    @property
    def passes(self) -> tuple[int, int]:
        """How many forward passes there have been, and of how many rows in all."""
        return self._parts.passes

    def close(self) -> None:
        """Give back memory; a model that reads or writes on another thread gets a KernelError.

        Wait for those threads before the program goes on: grammars read the vocabulary. Safe to call twice.
        """
        self._parts.close()
