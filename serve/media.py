# SPDX-License-Identifier: Apache-2.0
"""Pictures and clips out of a request: base64 to bytes, and no more of them than the limits allow.

What a picture is going to cost is read from its header before anything is decoded; a clip is decoded only as
far as it may go. No text of a request is ever a path.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from ..runtime import audio
from ..runtime.errors import InputError
from ..runtime.hd import layout
from ..runtime.image_header import FORMATS, HeaderError, read_header
from ..runtime.parts import Float32, Media, Message
from .errors import MediaError, Refusal
from .limits import Limits
from .schema import AudioPart, ImagePart

Fetch = Callable[[str], bytes]
"""Gets a picture from another server. Raises Refusal."""

_DATA = "data:"
_BASE64 = ";base64"


class Attachments:
    """The media of one request, in the order in which they are met."""

    def __init__(self, limits: Limits, max_crops: int, fetch: Fetch | None) -> None:
        """
        Args:
            limits: of the server.
            max_crops: the model's setting.
            fetch: gets http and https addresses; None: they are refused.
        """
        self._limits, self._max_crops, self._fetch = limits, max_crops, fetch
        self._n = 0
        self.n_tokens = 0  # that the pictures take in the prompt

    def image(self, part: ImagePart, where: str) -> Media:
        """A picture; `where` names it in errors.

        Raises:
            Refusal: 400, its address; 422, too many, or its header.
            MediaError: its shape.
        """
        self._count()
        url = part.image_url.url
        if url[:5].lower() == _DATA:
            data = _from_data_uri(url, where)
        elif url[:8].lower().startswith(("http://", "https://")):
            if self._fetch is None:
                what = "addresses are not fetched: send a data URI (or start with --allow-remote-media)"
                raise Refusal(400, f"{where}: {what}", code="remote_media_not_allowed", param=where)
            data = self._fetch(url)
        else:
            what = "expected a data URI: data:image/png;base64,…"
            raise Refusal(400, f"{where}: {what}", code="invalid_url", param=where)
        max_crops = 1 if part.image_url.detail == "low" else None
        self.n_tokens += _tokens(data, max_crops or self._max_crops, self._limits.pixels, where)
        return Media("image", data, where, max_crops)

    def clip(self, part: AudioPart, where: str) -> Media:
        """A clip as it came, for `heard`. Raises as `image`."""
        self._count()
        return Media("audio", _bytes_of(part.input_audio.data, where), where)

    def _count(self) -> None:
        self._n += 1
        if self._n > self._limits.media:
            what = f"over {self._limits.media} pictures and clips in one request"
            raise Refusal(422, what, code="too_many_media", param="messages")


def heard(messages: Sequence[Message], most_s: float) -> tuple[list[Message], float]:
    """The conversation with its clips as samples, and how many seconds these last together.

    Raises:
        MediaError: a clip that cannot be read, or more seconds than `most_s` together.
    """
    total = 0.0
    found: list[Message] = []
    for message in messages:
        media: list[Media] = []
        for one in message.media:
            if one.kind == "audio" and isinstance(one.source, bytes):
                clip = _decoded(one.source, one.name, most_s - total)
                total += clip.seconds
                one = replace(one, source=(clip.samples, clip.sample_rate))
            media.append(one)
        found.append(replace(message, media=tuple(media)) if media else message)
    return found, total


def _decoded(data: bytes, name: str, most_s: float) -> audio.Clip:
    with _bounded(data, name, most_s) as sound:
        blocks = list(sound.blocks)
        samples = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
        return audio.from_samples(samples, sound.sample_rate, where=name)


def seconds_of(data: bytes, name: str, most_s: float, check: Callable[[], None]) -> float:
    """How long a sound file lasts, by all of it; nothing is kept.

    Args:
        data: the file.
        name: in errors.
        most_s: it may last.
        check: called block by block, raises what ends it.

    Raises:
        MediaError: it cannot be read to its end, or lasts longer.
    """
    with _bounded(data, name, most_s) as sound:
        n = 0
        for block in sound.blocks:
            check()
            n += len(block)
        return n / sound.sample_rate


@contextmanager
def _bounded(data: bytes, name: str, most_s: float) -> Iterator[audio.Sound]:
    """A sound file; a bomb is refused when its header says so, or where it is found out."""
    try:
        with audio.stream(data, name=name) as sound:
            if (sound.seconds or 0.0) > most_s:
                raise _too_much_sound(name)
            yield replace(sound, blocks=_at_most(sound, name, most_s))
    except MediaError:
        raise
    except InputError as exc:
        raise MediaError(str(exc)) from None


def _at_most(sound: audio.Sound, name: str, most_s: float) -> Iterator[Float32]:
    n = 0
    for block in sound.blocks:
        n += len(block)
        if n > most_s * sound.sample_rate:
            raise _too_much_sound(name)
        yield block


def _too_much_sound(name: str) -> MediaError:
    return MediaError(f"{name}: the clips of the request last longer than the server takes")


def _tokens(data: bytes, max_crops: int, most_pixels: int, where: str) -> int:
    """What a picture takes in the prompt, by its header."""
    try:
        header = read_header(data)
    except HeaderError as exc:
        raise MediaError(f"{where}: {exc}") from None
    if header is None:
        raise MediaError(
            f"{where}: {'is not an image of a known format' if data else 'is empty'}, expected {FORMATS}"
        )
    if header.width * header.height > most_pixels:
        size = f"{header.width} × {header.height} pixels"
        raise MediaError(f"{where}: {size} are too many, expected at most {most_pixels:,}")
    try:
        return layout(header.width, header.height, max_crops, where=where).n_tokens
    except InputError as exc:
        raise MediaError(str(exc)) from None


def _from_data_uri(url: str, where: str) -> bytes:
    comma = url.find(",", 0, 256)
    if comma < 0 or not url[:comma].lower().endswith(_BASE64):
        what = "a data URI has to be data:TYPE;base64,DATA"
        raise Refusal(400, f"{where}: {what}", code="invalid_url", param=where)
    return _bytes_of(url[comma + 1 :], where)


def _bytes_of(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):  # ValueError: outside ASCII
        raise Refusal(400, f"{where}: is not base64", code="invalid_base64", param=where) from None
