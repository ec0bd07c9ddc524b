# SPDX-License-Identifier: Apache-2.0
"""The models of a server: one, or as many as it has workers, over weights that are loaded once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..runtime.bundle import Bundle
from ..runtime.errors import InputError
from ..runtime.model_pool import DEFAULT_CONTEXT, ModelPool
from .served_model import ServedModel

MAX_PARALLEL = 16

_log = logging.getLogger("pocketphi.serve")


def context_of(bundle: Bundle, n_ctx: int, parallel: int) -> int:
    """Tokens that each conversation may have; 0: what the model was trained for.

    With several, memory is taken for all of them at once, so there are fewer where nobody says how many.
    """
    return n_ctx if parallel == 1 or n_ctx else min(DEFAULT_CONTEXT, bundle.text.context_length)


def check_parallel(parallel: int, bundle: Bundle, options: Mapping[str, Any]) -> None:
    """Raises:
    InputError: so many conversations at a time cannot be.
    """
    if not 1 <= parallel <= MAX_PARALLEL:
        raise InputError(f"parallel is {parallel}, expected 1 to {MAX_PARALLEL}")
    if parallel > 1 and (options.get("backbone") or bundle.backbones[0]) != "gguf":
        what = "several requests at a time need the GGUF backbone, not the ONNX one"
        raise InputError(f"parallel is {parallel}: {what}")


class Models:
    """What workers open, each in its own thread: the first one loads, the others wait for it."""

    def __init__(self, path: Path, n: int, *, n_ctx: int, max_crops: int, options: Mapping[str, Any]) -> None:
        """
        Args:
            path: the model directory.
            n: models.
            n_ctx: tokens of each conversation.
            max_crops: as for `Model`, and so are `options`.
        """
        self._path, self._n = path, n
        self._options = {"n_ctx": n_ctx, "max_crops": max_crops, **options}
        self._lock = threading.Lock()
        self._pool: ModelPool | None = None
        self._failure: BaseException | None = None

    @property
    def passes(self) -> tuple[int, int]:
        """Forward passes of a pool, and rows in them."""
        return (0, 0) if self._pool is None else self._pool.passes

    def open(self, number: int) -> ServedModel:
        """The model of a worker. Errors are those of `Model`, for every worker the same."""
        if self._n == 1:
            model = ServedModel(self._path, **self._options)
        else:
            found = self._loaded().models[number]
            assert isinstance(found, ServedModel)
            model = found
        if number == 0:
            _log.warning("%s is ready", model.bundle.name)
        return model

    def close(self) -> None:
        """Give back what the models share, after they have been closed. Safe to call twice."""
        if self._pool is not None:
            self._pool.close()

    def _loaded(self) -> ModelPool:
        with self._lock:
            if self._failure is not None:
                raise self._failure
            if self._pool is None:
                try:
                    self._pool = ModelPool(self._path, self._n, make=ServedModel, **self._options)
                except BaseException as exc:
                    self._failure = exc
                    raise
            return self._pool
