# SPDX-License-Identifier: Apache-2.0
"""Log-mel features to rows for the decoder: the Conformer and its projectors on ONNX Runtime, block by block.

`convert/write_onnx_speech.py` describes the four graphs. Blocks of 500 tokens are independent of each other,
so memory does not grow with the clip's length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import BundleError, KernelError
from .onnx_session import OnnxSession
from .parts import AudioProjector, Float32

BLOCK_TOKENS = 500  # 40 s; `max_seq_len` in the reference
TOKEN_FRAMES = 8  # 80 ms
_MEL_BANDS = 80
_PIECE_TOKENS = 32  # of the front: 43 MB of intermediate values at full size; measured fastest of 4 to 375
_HALO = 8  # frames before a piece: the convolutions look back 7, and pieces stay aligned


@dataclass(frozen=True, slots=True)
class SpeechFiles:
    """Where the four graphs are."""

    front: Path
    trunk: Path
    projectors: Mapping[AudioProjector, Path]


class SpeechEncoder:
    """The speech encoder of one model directory. Each projector is loaded when first asked for."""

    def __init__(self, files: SpeechFiles, *, n_threads: int) -> None:
        """Load everything but the projectors.

        Args:
            files: as the converter wrote them.
            n_threads: they sleep between runs: the decoder needs the cores.

        Raises:
            BundleError: a graph is missing, damaged, or not the one that the converter writes.
        """
        self._files, self._n_threads = files, n_threads
        self._front = OnnxSession(files.front, n_threads, {"features": 3}, "tokens")
        self._trunk = OnnxSession(files.trunk, n_threads, {"tokens": 2}, "hidden")
        self._heads: dict[AudioProjector, OnnxSession] = {}

    @property
    def loaded(self) -> tuple[AudioProjector, ...]:
        """The projectors that are in memory."""
        return tuple(self._heads)

    def encode(self, features: Float32, projector: AudioProjector) -> Float32:
        """Rows for the audio placeholders of one clip.

        Args:
            features: float32 [t, 80], log-mel, t at least 1.
            projector: "speech", or "vision" when the request has pictures.

        Returns:
            float32 [ceil(t / 8), d_model].

        Raises:
            BundleError: as in the constructor, for the projector; or the result is not finite.
            KernelError: the features are of another kind, or ONNX Runtime failed.
        """
        return self.project(self.hidden(features), projector)

    def hidden(self, features: Float32) -> Float32:
        """What both projectors start from, block by block: float32 [ceil(t / 8), d]."""
        _check(features)
        n_tokens = count_tokens(len(features))
        found: Float32 | None = None
        for start in range(0, n_tokens, BLOCK_TOKENS):
            stop = min(start + BLOCK_TOKENS, n_tokens)
            tokens = self._subsample(features, start, stop)
            if n_tokens > BLOCK_TOKENS:
                # The reference fills a long clip's last block up with zeros and lets attention see them.
                tokens = np.pad(tokens, [(0, BLOCK_TOKENS - len(tokens)), (0, 0)])
            block = self._trunk.run(tokens=tokens)[: stop - start]
            if found is None:
                found = np.empty((n_tokens, block.shape[1]), np.float32)
            found[start:stop] = block
        assert found is not None, "there is at least one block"
        return found

    def continue_hidden(self, features: Float32, front: Float32) -> tuple[Float32, Float32]:
        """`hidden` of a clip that has grown since, or was cut shorter: the same bits for less work.

        Args:
            features: float32 [t, 80] of the whole clip, t from 1 to 4000: one block.
            front: float32 [n, d], tokens that this gave before for frames that are in `features` too;
                n is 0 where there are none.

        Returns:
            `hidden`, and the tokens of the front's whole pieces: what comes later does not change them.

        Raises:
            KernelError: the features are of another kind or too many, or ONNX Runtime failed.
        """
        _check(features)
        n_tokens = count_tokens(len(features))
        if n_tokens > BLOCK_TOKENS:
            most = BLOCK_TOKENS * TOKEN_FRAMES
            raise KernelError(
                f"speech encoder: features have {len(features)} frames, expected at most {most}"
            )
        n_whole = len(features) // TOKEN_FRAMES // _PIECE_TOKENS * _PIECE_TOKENS
        n_known = min(len(front) // _PIECE_TOKENS * _PIECE_TOKENS, n_whole)
        parts = [front[:n_known]] if n_known else []
        if n_known < n_tokens:
            parts.append(self._subsample(features, n_known, n_tokens))
        tokens = np.concatenate(parts)
        return self._trunk.run(tokens=tokens), tokens[:n_whole]

    def project(self, hidden: Float32, projector: AudioProjector) -> Float32:
        """Rows for the decoder from `hidden`: float32 [n, d_model]."""
        if projector not in self._heads:
            path = self._files.projectors[projector]
            self._heads[projector] = OnnxSession(path, self._n_threads, {"hidden": 2}, "rows")
        pieces = range(0, len(hidden), BLOCK_TOKENS)
        head = self._heads[projector]
        rows = np.concatenate([head.run(hidden=hidden[at : at + BLOCK_TOKENS]) for at in pieces])
        if not np.isfinite(rows).all():
            where = self._files.trunk.parent
            raise BundleError(f"{where}: the speech encoder gives numbers that are not finite: it is damaged")
        return rows

    def _subsample(self, features: Float32, start: int, stop: int) -> Float32:
        """Tokens `start` to `stop` as float32 [stop - start, d], in pieces that fit the cache."""
        found = []
        for first in range(start, stop, _PIECE_TOKENS):
            last = min(first + _PIECE_TOKENS, stop)
            halo = _HALO if first else 0
            piece = features[None, first * TOKEN_FRAMES - halo : last * TOKEN_FRAMES]
            found.append(self._front.run(features=piece)[halo // TOKEN_FRAMES :])
        return np.concatenate(found)


def count_tokens(n_frames: int) -> int:
    """How many tokens, 80 ms each, a clip of `n_frames` log-mel frames becomes."""
    return -(-n_frames // TOKEN_FRAMES)


def _check(features: Float32) -> None:
    if (
        features.dtype != np.float32
        or features.ndim != 2
        or features.shape[1] != _MEL_BANDS
        or not len(features)
    ):
        raise KernelError(
            f"speech encoder: features are {features.dtype} {list(features.shape)}, "
            f"expected float32 [frames, {_MEL_BANDS}]"
        )
