# SPDX-License-Identifier: Apache-2.0
"""A model directory that has been checked, and what models on it can share: weights, encoders, tokenizer."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from . import bundle as bundles
from . import verify
from .backbone import BackboneOptions, OpenBackbone
from .decoder_ggml import GgmlDecoder
from .decoder_onnx import OnnxDecoder
from .decoder_slots import Slot, SlotPool
from .errors import InputError
from .hd import MAX_CROPS
from .parts import AudioProjector, EmbedSpan, Media, Progress
from .threads import default_threads
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .media import MediaEncoder


class ModelParts:
    """Everything of a model but a conversation and its decoder. Several threads may use it."""

    def __init__(
        self, path: Path, options: BackboneOptions, *, n_ctx: int = 0, max_crops: int = MAX_CROPS,
        progress: Progress | None = None, n_slots: int = 0,
    ) -> None:  # fmt: skip
        """
        Args:
            path: a directory made by `pocketphi convert`.
            options: which engine, and how it runs.
            n_ctx: the most tokens a conversation may have; 0: what the model was trained for.
            max_crops: as for `Model`, and so is `progress`.
            n_slots: decoders that share the weights and their passes; 0: one, with weights of its own.

        Raises:
            BundleError, InputError, MemoryShortError: as for `Model`.
        """
        started = time.perf_counter()
        bundle = self.bundle = bundles.load(path)
        text = bundle.text
        if n_ctx < 0 or n_ctx > text.context_length:
            raise InputError(
                f"context is {n_ctx} tokens, this model takes 1 to {text.context_length} (0: all)"
            )
        self.limit = n_ctx or text.context_length
        self.backbone = OpenBackbone(bundle, options, max_crops)
        if not 1 <= max_crops <= MAX_CROPS:
            raise InputError(f"max crops is {max_crops}, expected 1 to {MAX_CROPS}")
        self.guard = self.backbone.guard
        self.guard.load()
        verify.check(bundle, progress)
        self.tokenizer = Tokenizer(bundle.path(bundle.tokenizer), text.vocab_size)
        self._slots: SlotPool | None = self.backbone.open_slots(n_slots, self.limit) if n_slots else None
        self._n_threads, self._max_crops = options.n_threads or default_threads(), max_crops
        self._lock = threading.Lock()  # one encoder at a time: it has threads for all cores
        self.media: MediaEncoder | None = None  # OpenCV and the audio readers load with the first medium
        self.load_s = time.perf_counter() - started

    @property
    def shared(self) -> bool:
        """Whether several models stand on it, and none of them closes it."""
        return self._slots is not None

    def open(self, slot: int = 0) -> GgmlDecoder | OnnxDecoder | Slot:
        """A decoder for one model. Errors are those of `OpenBackbone.open`."""
        return self.backbone.open() if self._slots is None else self._slots.slot(slot)

    @property
    def encoders(self) -> tuple[str, ...]:
        """Which are in memory."""
        return self.media.loaded if self.media is not None else ()

    def embed(self, media: Media, projector: AudioProjector | None) -> EmbedSpan:
        """See `MediaEncoder.embed`."""
        with self._lock:
            if self.media is None:
                from .media import MediaEncoder

                self.media = MediaEncoder(self.bundle, n_threads=self._n_threads, max_crops=self._max_crops)
            return self.media.embed(media, projector)

    def forget_media(self) -> None:
        """Drop the encodings that were kept."""
        with self._lock:
            if self.media is not None:
                self.media.forget()

    @property
    def passes(self) -> tuple[int, int]:
        """Forward passes of the slots, and rows in them."""
        return (0, 0) if self._slots is None else self._slots.passes

    def close(self) -> None:
        """Give back memory. Safe to call twice."""
        if self._slots is not None:
            self._slots.close()
        self.backbone.close()
