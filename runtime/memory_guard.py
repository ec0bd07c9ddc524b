# SPDX-License-Identifier: Apache-2.0
"""Refuses what would run out of memory, before it is tried: a model, encoders with a medium, a KV cache."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np

from . import memory, ram_encoders, ram_model
from .bundle import Bundle
from .errors import InputError
from .hd import MAX_CROPS, MAX_PIXELS, layout
from .image_header import HeaderError, read_header
from .parts import Media, Mode
from .ram_model import BATCH, CELLS, Estimate, Use
from .spec import Backbone
from .threads import default_threads

_CERTAIN = 1 - ram_model.MARGIN  # so much of a prediction is refused where it is not there
_NOTHING = "no setting of this model fits, see `pocketphi plan SRC --ram SIZE` for smaller recipes"
_NO_MEDIUM = "no smaller setting of it fits, see `pocketphi plan`"
_SAID = {"vision": "looking at a picture", "speech": "listening", "vision_speech": "looking and listening"}
_MAX_FILE_BYTES = 512 << 20  # of a picture, as in `image`
_SMALLEST = (448, 448), 1.0  # a picture and a clip of which nothing is known

# What limits on virtual memory count beside what is resident, in bytes. Measured with phi4-nano.
_FLAT = 32_000_000  # what llama.cpp, and what ONNX Runtime, map and do not touch at first: graphs, arenas
_ARENA = 67_000_000  # addresses that malloc reserves for a thread
_BLAS_THREAD = 137_000_000  # a buffer and a stack that OpenBLAS maps for each thread but the first
_SESSIONS = {"vision": 2, "speech": 3}  # ONNX Runtime's, each with threads of its own


@dataclass(frozen=True, slots=True)
class _Library:
    """A library that the first medium loads."""

    resident: int
    data: int  # private and writable
    addresses: int


_LIBRARIES = {
    "cv2": _Library(16_000_000, 14_000_000, 180_000_000),  # and its OpenBLAS
    "onnxruntime": _Library(18_000_000, 9_000_000, 46_000_000),
}


@dataclass(slots=True)
class _Need:
    """Bytes, as `memory.require` takes them."""

    resident: int = 0
    idle: int = 0
    mapped: int = 0


class Guard:
    """MemoryShortError for what cannot be had. Never for what is uncertain."""

    def __init__(
        self, bundle: Bundle, kv_type: str, *, packed: bool, on_cpu: bool, n_threads: int | None = None,
        max_crops: int = MAX_CROPS, backbone: Backbone | None = None,
    ) -> None:  # fmt: skip
        """`packed`: as in `Use`; `on_cpu`: no other device computes; the others as for `Model`."""
        self._name, self._sizes, self._on_cpu = bundle.name, ram_model.sizes_of(bundle, backbone), on_cpu
        kv_type = self._sizes.kv_type or kv_type
        self._use = Use(kv_type=kv_type, n_ctx=CELLS, max_crops=max_crops, packed=packed)
        self._n_threads = n_threads or default_threads()
        self.rows = 0  # tokens of the next prompt, if they are known: a pass of fewer touches less

    def load(self, mode: Mode = "language", media: Sequence[Media] = ()) -> None:
        """Before anything is loaded: is there room for all that an answer in this mode takes?

        Args:
            media: that will be asked about, as far as they are known.
        """
        if mode not in ram_model.modes_of(self._sizes):
            return  # which is another error, and not of memory
        use = replace(self._use, mode=mode, image=_SMALLEST[0], seconds=_SMALLEST[1])
        pictures = self._pictures(media) if "vision" in mode else []
        if pictures:
            use = replace(use, image=max(pictures, key=lambda one: one[0] * one[1]))
        found = self._estimate(use)
        need = self._libraries(name for name in ("vision", "speech") if name in mode)
        need.resident += found.certain - ram_model.PROGRAM  # which is there
        if mode != "language":
            need.resident -= sum(one.resident for one in _LIBRARIES.values())  # counted already
        need.idle += ram_model.logits_bytes(self._sizes, use.context) + self._started()
        need.mapped += found.loading + _ARENA
        what = self._name if mode == "language" else f"{self._name}, {_SAID[mode]},"
        self._require(what, need, use, found)

    def media(self, media: Sequence[Media], adapter: str | None, resident: Collection[str]) -> None:
        """Before media are decoded and encoded, and an adapter loads; `resident` is `Model.resident`.

        Raises:
            InputError: a clip's file cannot be read.
        """
        kinds = {"vision": "image", "speech": "audio"}
        wanted = [name for name, kind in kinds.items() if any(one.kind == kind for one in media)]
        wanted = [name for name in wanted if name in self._sizes.encoders]
        if f"{adapter} adapter" in resident:
            adapter = None
        if not wanted and adapter is None:
            return
        new = [name for name in wanted if f"{name} encoder" not in resident]
        self._check_media(wanted, new, adapter, self._pictures(media), None)
        clips = [one for one in media if one.kind == "audio"]
        if clips and "speech" in wanted:  # now that there is room for the library that reads them
            self._check_media(wanted, new, adapter, self._pictures(media), sum(map(_seconds, clips)))

    def cache(self, before: int, after: int, copied: int) -> None:
        """Before a KV cache of `after` tokens takes the place of one of `before`; `copied` go over."""
        kv_type = self._use.kv_type
        state = ram_model.copy_bytes(self._sizes, copied, kv_type)
        need = _Need(self._cache(after, kv_type, copied) - self._cache(before, kv_type, copied))
        need.resident = max(need.resident, 0) + state if state else need.resident
        if need.resident <= 0:
            return
        whole = self._whole(after, kv_type) - self._whole(before, kv_type)
        need.idle = max(whole + state - need.resident, 0) + (0 if before else self._started())
        use = replace(self._use, n_ctx=after)
        self._require(f"a context of {after} tokens", need, use, self._estimate(use))

    def _cache(self, n: int, kv_type: str, copied: int) -> int:
        """What is touched: a cache into which another is copied has had no pass yet."""
        text = self._sizes.text
        if not n or copied:
            return ram_model.kv_bytes(text, n, kv_type)
        rows = min(self.rows or BATCH, BATCH)
        return ram_model.kv_bytes(text, n, kv_type) + ram_model.compute_bytes(
            self._sizes, n, kv_type, lora=False, rows=rows
        )

    def _whole(self, n: int, kv_type: str) -> int:
        """What llama.cpp asks for."""
        if not n:
            return 0
        sizes = self._sizes
        buffers = ram_model.compute_bytes(sizes, n, kv_type, lora=False) + ram_model.logits_bytes(sizes, n)
        return ram_model.kv_bytes(sizes.text, n, kv_type) + buffers

    def _check_media(
        self, wanted: list[str], new: list[str], adapter: str | None,
        pictures: list[tuple[int, int]], seconds: float | None,
    ) -> None:  # fmt: skip
        need, at_once = self._libraries(new), [ram_model.adapter_bytes(self._sizes, adapter)]
        use = replace(self._use, mode=cast(Mode, "_".join(wanted) or "language"))
        use = replace(use, seconds=_SMALLEST[1] if seconds is None else seconds)
        sizes, width = self._sizes, self._sizes.text.d_model * 4
        if "vision" in wanted:
            use = replace(use, image=max(pictures or [_SMALLEST[0]], key=lambda one: one[0] * one[1]))
            kept, work = ram_encoders.vision_bytes(
                sizes.encoders["vision"], sizes.text.d_model, use.image, use.max_crops
            )
            if "vision" in new:
                rows = [layout(*one, use.max_crops).n_tokens * width for one in pictures]
                need.resident += kept + max(sum(rows) - max(rows, default=0), 0)
            else:  # it may be one that has been encoded already
                work = ram_encoders.picture_bytes(*use.image, layout(*use.image, use.max_crops))
            at_once.append(work)
        if "speech" in new:
            kept, work = ram_encoders.speech_bytes(sizes.encoders["speech"], sizes.text.d_model, use.seconds)
            need.resident += kept
            at_once.append(work)
        need.resident += max(at_once)
        if new:  # what reading the vocabulary has left is used again
            need.resident = max(need.resident - ram_model.spare_bytes(sizes), 0)
        names = [f"{adapter} adapter"] if adapter is not None else []
        names += [f"{name} encoder" for name in new] or (["the picture"] if "vision" in wanted else [])
        if need.resident > 0 and names:
            self._require(f"{self._name}: {' and '.join(names)}", need, use, self._estimate(use))

    def _libraries(self, encoders: Iterable[str]) -> _Need:
        """What loading and starting takes before the first weight."""
        need, wanted = _Need(), list(encoders)
        if not wanted:
            return need
        for name, one in _LIBRARIES.items():
            if name not in sys.modules:
                need.resident += one.resident
                need.mapped += one.addresses - one.data
                need.idle += _BLAS_THREAD * (_blas_threads() - 1) if name == "cv2" else 0
        threads = sum(_SESSIONS[name] for name in wanted) * (self._n_threads - 1)
        need.idle += threads * memory.stack_bytes() + _FLAT
        need.mapped += len(wanted) * _ARENA
        return need

    def _started(self) -> int:
        """What llama.cpp maps with its first context: stacks of its threads, and a flat rest."""
        return memory.stack_bytes() * self._n_threads + _FLAT

    def _pictures(self, media: Sequence[Media]) -> list[tuple[int, int]]:
        found = [_pixels(one) for one in media if one.kind == "image"]
        return [one for one in found if one is not None and self._fits_layout(one)]

    def _fits_layout(self, pixels: tuple[int, int]) -> bool:
        try:
            layout(*pixels, self._use.max_crops)
        except InputError:  # `image` says it with the file's name
            return False
        return True

    def _estimate(self, use: Use) -> Estimate:
        return ram_model.estimate(self._sizes, use)

    def _require(self, what: str, need: _Need, use: Use, found: Estimate) -> None:
        if self._on_cpu:
            memory.require(
                what, int(_CERTAIN * need.resident), lambda gap: self._advice(use, found, gap),
                idle=need.idle, mapped=need.mapped,
            )  # fmt: skip

    def _advice(self, use: Use, found: Estimate, gap: int) -> str:
        """What of the same model takes at least so many bytes less."""

        def fits(other: Estimate) -> bool:
            return _CERTAIN * (found.certain - other.certain) >= gap

        flags = ram_model.smaller(self._sizes, use, fits)
        if flags:
            return f"{' '.join(flags)} would fit"
        if use.mode != "language" and fits(self._estimate(replace(use, mode="language", n_ctx=CELLS))):
            return "text alone would fit"
        return _NOTHING if use.mode == "language" else _NO_MEDIUM


def _blas_threads() -> int:
    """How many OpenCV's OpenBLAS starts."""
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        if os.environ.get(name, "").isdecimal():
            return max(int(os.environ[name]), 1)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _pixels(media: Media) -> tuple[int, int] | None:
    """A picture's width and height, by its header; None where `image` will refuse it."""
    if isinstance(media.source, np.ndarray):
        return media.source.shape[1], media.source.shape[0]
    header = None
    with suppress(OSError, ValueError, HeaderError):  # ValueError: an empty file, a name with a NUL
        if isinstance(media.source, bytes):
            header = read_header(media.source)
        elif isinstance(media.source, Path) and media.source.is_file():
            if media.source.stat().st_size > _MAX_FILE_BYTES:
                return None
            with (
                media.source.open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
            ):
                header = read_header(cast(bytes, data))
    if header is None or header.width * header.height > MAX_PIXELS:
        return None
    return header.width, header.height


def _seconds(media: Media) -> float:
    """How long a clip is, as far as that is known."""
    from . import audio  # and libsndfile: only for a clip

    if isinstance(media.source, (Path, bytes)):
        with audio.stream(media.source) as sound:
            return sound.seconds or 0.0
    if isinstance(media.source, tuple):
        samples, rate = media.source
        return len(samples) / max(rate, 1)
    return 0.0  # an utterance that grows
