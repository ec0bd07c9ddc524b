# SPDX-License-Identifier: Apache-2.0
"""A model that answers items, each as if it were the only one."""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime import bundle as bundles
from ..runtime.bundle import Bundle
from ..runtime.engine import Model
from ..runtime.errors import BundleError, InputError, MemoryShortError, PocketPhiError, one_line
from ..runtime.reader import Reader
from ..runtime.spec import Backbone
from ..runtime.transcribe import transcribe
from .lines import Task
from .records import ErrorKind, Outcome, answered, digest_of, failed, written_down
from .request import Chat, Transcription, request_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Which model, and how it is opened; the same for every worker. Arguments are those of `Model`."""

    directory: str  # absolute
    manifest_sha256: str  # of its manifest, hex: another machine may have another model there
    n_ctx: int = 0
    n_threads: int | None = None
    n_gpu_layers: int = 0
    kv_type: str | None = None
    max_crops: int = 36
    backbone: Backbone | None = None
    provider: str = "cpu"


@dataclass(frozen=True, slots=True)
class ItemSettings:
    """How items are read."""

    folder: str  # absolute: what their paths are relative to
    max_tokens: int | None = None  # where they do not say


def manifest_sha256(bundle: Bundle) -> str:
    """What a model directory is known by: its manifest lists the SHA-256 of every file."""
    return hashlib.sha256(bundle.to_json().encode("utf-8")).hexdigest()


class Performer:
    """An open model; a context."""

    def __init__(self, model: ModelSettings, items: ItemSettings) -> None:
        """
        Raises:
            BundleError: the directory is not there, damaged, or not the one that the settings mean.
            InputError: a setting that this model or machine cannot have.
            MemoryShortError: the weights need more than this process may take.
        """
        bundle = bundles.load(Path(model.directory))
        if manifest_sha256(bundle) != model.manifest_sha256:
            raise BundleError(f"{model.directory}: is another model than where the run was started")
        self._settings, self._items = model, items
        self._model: Model | None = self._opened()

    def __enter__(self) -> Performer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back memory. Safe to call twice."""
        if self._model is not None:
            self._model.close()
            self._model = None

    def perform(self, task: Task) -> Outcome:
        """Answer one item. What is wrong with it, or happens with it, is in the outcome.

        Raises:
            BundleError: a file of the model is damaged: no other item would fare better.
        """
        alone, started = digest_of(task.sha256, ()), time.perf_counter()
        try:
            request = request_of(task, Path(self._items.folder), self._items.max_tokens)
            digest = digest_of(task.sha256, request.files)
            model = self._model = self._model or self._opened()
            model.forget()
            if isinstance(request, Chat):
                reply = model.chat(request.messages, **request.options)
                return answered(task.id, reply, digest, time.perf_counter() - started)
            return _write_down(model, task, request, digest, started)
        except BundleError:
            raise
        except (InputError, MemoryShortError) as exc:
            kind: ErrorKind = "input" if isinstance(exc, InputError) else "memory"
            return failed(task.id, kind, str(exc), alone)
        except (PocketPhiError, MemoryError) as exc:
            self.close()  # what state it left the engine in nobody knows: the next item gets a new one
            kind = "memory" if isinstance(exc, MemoryError) else "engine"
            return failed(task.id, kind, str(exc) or "there is not enough memory", alone)
        except Exception as exc:
            _log.exception("%s: a bug", task.where)
            self.close()
            return failed(task.id, "bug", f"{type(exc).__name__}: {one_line(exc)}", alone)

    def _opened(self) -> Model:
        one = self._settings
        return Model(
            one.directory,
            n_ctx=one.n_ctx,
            n_threads=one.n_threads,
            n_gpu_layers=one.n_gpu_layers,
            kv_type=one.kv_type,
            max_crops=one.max_crops,
            backbone=one.backbone,
            provider=one.provider,
        )


def _write_down(model: Model, task: Task, request: Transcription, digest: str, started: float) -> Outcome:
    from ..runtime import audio  # and libsndfile: only for a recording

    reader = Reader(model, request.speech, request.options)
    done_s: list[float] = [0.0]
    with audio.stream(request.audio, name="audio" if isinstance(request.audio, bytes) else None) as sound:
        segments = list(transcribe(reader, sound, request.rules, progress=done_s.append))
    return written_down(task.id, segments, done_s[-1], digest, time.perf_counter() - started)


def to_object(outcome: Outcome) -> dict[str, Any]:
    """An outcome on its way from a worker."""
    return {
        "record": outcome.record,
        "ok": outcome.ok,
        "tokens": outcome.tokens,
        "audio_s": outcome.audio_s,
    }
