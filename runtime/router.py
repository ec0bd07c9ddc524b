# SPDX-License-Identifier: Apache-2.0
"""Which LoRA and which audio projector a request needs, from the media in it."""

from __future__ import annotations

from dataclasses import dataclass

from .parts import AudioProjector, Mode


@dataclass(frozen=True, slots=True)
class Route:
    """What one request runs with. The adapter acts on every token of the sequence, text included."""

    mode: Mode
    adapter: str | None
    audio_projector: AudioProjector | None


def route(*, images: bool, audio: bool) -> Route:
    """The route of a request that holds images, audio, both or neither, in any of its turns.

    A picture decides: together with audio it is the vision adapter alone, and the audio goes through
    the projector that was trained beside it.

    Source: `Phi4MMForCausalLM.forward` in microsoft/Phi-4-multimodal-instruct.
    """
    if images and audio:
        return Route("vision_speech", "vision", "vision")
    if images:
        return Route("vision", "vision", None)
    if audio:
        return Route("speech", "speech", "speech")
    return Route("language", None, None)
