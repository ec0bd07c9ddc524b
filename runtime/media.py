# SPDX-License-Identifier: Apache-2.0
"""Pictures and clips to embedded rows: encoders load on first use, each medium is encoded once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from . import audio, image
from .audio import Clip
from .bundle import Bundle
from .growing_speech import GrowingSpeech
from .hd import MAX_CROPS
from .logmel import log_mel
from .parts import RGB, AudioProjector, EmbedSpan, Float32, Media, Waveform

if TYPE_CHECKING:
    from .speech_encoder import SpeechEncoder
    from .vision_encoder import VisionEncoder

_CACHE_BYTES = 512 << 20  # a picture of the largest size is 123 MB at full width


class MediaEncoder:
    """The encoders of one model directory, and what they made lately."""

    def __init__(self, bundle: Bundle, *, n_threads: int, max_crops: int = MAX_CROPS) -> None:
        """
        Args:
            bundle: which encoders there are.
            n_threads: for ONNX Runtime; it waits while the decoder works, and the other way round.
            max_crops: of one picture; fewer mean fewer tokens. The reference has 36.
        """
        self._bundle, self._n_threads, self._max_crops = bundle, n_threads, max_crops
        self._vision: VisionEncoder | None = None
        self._speech: SpeechEncoder | None = None
        self._cache: OrderedDict[str, Float32] = OrderedDict()

    @property
    def loaded(self) -> tuple[str, ...]:
        """The encoders that are in memory."""
        both = (("vision", self._vision), ("speech", self._speech))
        return tuple(name for name, encoder in both if encoder is not None)

    def embed(self, media: Media, projector: AudioProjector | None) -> EmbedSpan:
        """The rows of one picture or clip.

        Args:
            media: what to encode.
            projector: for clips: "speech", or "vision" when the request has pictures too.

        Raises:
            InputError: it cannot be read or used, or the model has no encoder for it.
            BundleError: the encoder's files are damaged.
        """
        if media.kind == "image":
            return self._embed_image(media)
        assert projector is not None, "the router gives every request with audio one"
        return self._embed_clip(media, projector)

    def forget(self) -> None:
        """Drop the encodings that were kept."""
        self._cache.clear()

    def _embed_image(self, media: Media) -> EmbedSpan:
        encoder = self._vision_encoder()
        where = media.name or None
        max_crops = min(self._max_crops, media.max_crops or self._max_crops)
        if isinstance(media.source, (Path, bytes)):
            rgb = image.load(media.source, max_crops=max_crops, where=where)
        else:
            rgb = cast(RGB, media.source)
        prepared = image.prepare(rgb, max_crops, where=where or _name(media))
        return self._cached(prepared.key, lambda: encoder.encode(prepared))

    def _embed_clip(self, media: Media, projector: AudioProjector) -> EmbedSpan:
        encoder = self._speech_encoder()
        if isinstance(media.source, GrowingSpeech):  # keeps its own rows: old windows are never asked for
            growing = media.source
            return EmbedSpan(growing.rows(encoder, projector), f"{growing.key}/{projector}")
        clip = clip_of(media)
        digest = hashlib.sha256(f"audio {clip.sample_rate}\n".encode())
        digest.update(np.ascontiguousarray(clip.samples).data)
        name = digest.hexdigest()

        def hidden() -> Float32:
            return encoder.hidden(log_mel(clip.samples, clip.sample_rate))

        def rows() -> Float32:  # another projector, when a picture joins the conversation, keeps the rest
            return encoder.project(self._cached(f"{name}/hidden", hidden).rows, projector)

        return self._cached(f"{name}/{projector}", rows)

    def _cached(self, key: str, make: Callable[[], Float32]) -> EmbedSpan:
        rows = self._cache.pop(key, None)
        if rows is None:
            rows = make()
        self._cache[key] = rows
        while len(self._cache) > 1 and sum(r.nbytes for r in self._cache.values()) > _CACHE_BYTES:
            self._cache.popitem(last=False)
        return EmbedSpan(rows, key)

    def _vision_encoder(self) -> VisionEncoder:
        if self._vision is None:
            from .vision_encoder import VisionEncoder, VisionFiles

            graphs = self._graphs("vision", "look at pictures")
            files = VisionFiles(graphs["tower"], graphs["projector"])
            self._vision = VisionEncoder(files, n_threads=self._n_threads)
        return self._vision

    def _speech_encoder(self) -> SpeechEncoder:
        if self._speech is None:
            from .speech_encoder import SpeechEncoder, SpeechFiles

            graphs = self._graphs("speech", "listen")
            heads: dict[AudioProjector, Path] = {
                "speech": graphs["speech-projector"],
                "vision": graphs["vision-projector"],
            }
            files = SpeechFiles(graphs["front"], graphs["trunk"], heads)
            self._speech = SpeechEncoder(files, n_threads=self._n_threads)
        return self._speech

    def _graphs(self, name: str, ability: str) -> dict[str, Path]:
        graphs = self._bundle.encoder(name, ability).graphs
        return {graph: self._bundle.path(file) for graph, file in graphs.items()}


def clip_of(media: Media) -> Clip:
    """The samples of an audio medium, at 8 or 16 kHz."""
    if isinstance(media.source, (Path, bytes)):
        return audio.load(media.source)
    return audio.from_samples(*cast(Waveform, media.source), where=_name(media))


def _name(media: Media) -> str:
    return media.name or (str(media.source) if isinstance(media.source, Path) else media.kind)
