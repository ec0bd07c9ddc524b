# SPDX-License-Identifier: Apache-2.0
"""What a client of a live session says, as OpenAI's reference has it: transcription sessions only.

Unknown fields are ignored; what would change the transcript and cannot be done is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from .errors import Refusal
from .schema import fault

TAIL = "item.input_audio_transcription.tail"
Include = Literal["item.input_audio_transcription.tail"]
Rate = Literal[16000, 24000]

_MOST_EVENT_ID = 512  # characters of a client's own id that errors repeat
_LANGUAGE = r"^[A-Za-z]{2,3}$"  # of ISO 639
_MOST_PROMPT = 4096  # characters
_MOST_NAME = 256
_MOST_WORDS = 256  # keywords


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class Format(_Fields):
    """16-bit little-endian samples, mono."""

    type: Literal["audio/pcm"] = "audio/pcm"
    rate: Rate = 24000


class Transcription(_Fields):
    """The model, any name; the language, which this model hears by itself; words to expect."""

    model: str | None = Field(default=None, max_length=_MOST_NAME)
    language: str | None = Field(default=None, pattern=_LANGUAGE)
    prompt: str | None = Field(default=None, max_length=_MOST_PROMPT)

    keywords: list[Annotated[str, Field(max_length=_MOST_NAME)]] | None = Field(
        default=None, max_length=_MOST_WORDS
    )

    @property
    def words(self) -> str | None:
        """To expect; None: none."""
        return (
            ", ".join(text for text in (self.prompt, *(self.keywords or ())) if text and text.strip()) or None
        )


class TurnDetection(_Fields):
    """When an utterance begins and ends. The threshold is accepted, and is the detector's own."""

    type: Literal["server_vad"] = "server_vad"
    threshold: float = Field(default=0.5, ge=0.0, le=1.0)
    prefix_padding_ms: int = Field(default=300, ge=0, le=2000)
    silence_duration_ms: int = Field(default=700, ge=200, le=10_000)


class Input(_Fields):
    """`session.audio.input`."""

    format: Format | None = None
    transcription: Transcription | None = None
    turn_detection: TurnDetection | None = None


class Audio(_Fields):
    """`session.audio`."""

    input: Input | None = None


class SessionFields(_Fields):
    """`session` of `session.update`: the fields that are there are changed."""

    type: Literal["transcription"]
    audio: Audio | None = None
    include: list[Include] | None = None

    @property
    def changes(self) -> dict[str, Any]:
        """As fields of `SessionSettings`. What is null is the default; turn detection is then off."""
        heard = (self.audio or Audio()).input or Input()
        every = {
            "format": ("rate", (heard.format or Format()).rate),
            "transcription": ("transcription", heard.transcription or Transcription()),
            "turn_detection": ("turn_detection", heard.turn_detection),
        }
        found = dict(every[name] for name in heard.model_fields_set)
        return found | ({"include": tuple(self.include or ())} if "include" in self.model_fields_set else {})


class OldSessionFields(_Fields):
    """`session` of `transcription_session.update`, the reference's older form."""

    input_audio_format: Literal["pcm16"] | None = None
    input_audio_transcription: Transcription | None = None
    turn_detection: TurnDetection | None = None
    include: list[Include] | None = None

    @property
    def changes(self) -> dict[str, Any]:
        """As those of `SessionFields`."""
        every = {
            "input_audio_format": ("rate", 24000),
            "input_audio_transcription": (
                "transcription",
                self.input_audio_transcription or Transcription(),
            ),
            "turn_detection": ("turn_detection", self.turn_detection),
            "include": ("include", tuple(self.include or ())),
        }
        return dict(every[name] for name in self.model_fields_set)


class _ClientEvent(_Fields):
    event_id: str | None = None


class SessionUpdate(_ClientEvent):
    """Other settings."""

    type: Literal["session.update"]
    session: SessionFields


class OldSessionUpdate(_ClientEvent):
    """The same, older."""

    type: Literal["transcription_session.update"]
    session: OldSessionFields


class Append(_ClientEvent):
    """More audio, in base64."""

    type: Literal["input_audio_buffer.append"]
    audio: str


class Commit(_ClientEvent):
    """What has been appended is an item, or ends one."""

    type: Literal["input_audio_buffer.commit"]


class Clear(_ClientEvent):
    """What has been appended is not wanted."""

    type: Literal["input_audio_buffer.clear"]


ClientEvent = SessionUpdate | OldSessionUpdate | Append | Commit | Clear

_KINDS: Mapping[str, type[ClientEvent]] = MappingProxyType(
    {
        "session.update": SessionUpdate,
        "transcription_session.update": OldSessionUpdate,
        "input_audio_buffer.append": Append,
        "input_audio_buffer.commit": Commit,
        "input_audio_buffer.clear": Clear,
    }
)


class SessionSettings(_Fields):
    """All settings of a session; what it begins with are the defaults."""

    rate: Rate = 24000
    transcription: Transcription = Transcription()
    turn_detection: TurnDetection | None = TurnDetection()
    include: tuple[Include, ...] = ()

    def updated(self, update: SessionUpdate | OldSessionUpdate) -> SessionSettings:
        """With the settings that an update has."""
        return self.model_copy(update=update.session.changes)

    def to_object(self, session_id: str) -> dict[str, Any]:
        """The reference's `session`."""
        heard = {
            "format": {"type": "audio/pcm", "rate": self.rate},
            "noise_reduction": None,
            "transcription": self.transcription.model_dump(),
            "turn_detection": self._turns,
        }
        return {
            "type": "transcription",
            "id": session_id,
            "object": "realtime.transcription_session",
            "audio": {"input": heard},
            "include": list(self.include) or None,
            "expires_at": None,
        }

    def to_old_object(self, session_id: str) -> dict[str, Any]:
        """The same, older."""
        return {
            "id": session_id,
            "object": "realtime.transcription_session",
            "input_audio_format": "pcm16",
            "input_audio_transcription": self.transcription.model_dump(),
            "input_audio_noise_reduction": None,
            "turn_detection": self._turns,
            "include": list(self.include) or None,
        }

    @property
    def _turns(self) -> dict[str, Any] | None:
        return None if self.turn_detection is None else self.turn_detection.model_dump()


class BadEvent(Exception):
    """An event that cannot be taken: `refusal` says why, `event_id` which it was."""

    def __init__(self, refusal: Refusal, event_id: str | None) -> None:
        super().__init__(refusal.message)
        self.refusal, self.event_id = refusal, event_id


def parse_event(text: str) -> ClientEvent:
    """One event.

    Raises:
        BadEvent: it is no JSON object, is nested deeper than 200, or is no event that is known.
    """
    try:
        raw = from_json(text, allow_inf_nan=False)
    except ValueError as exc:
        raise BadEvent(_bad(f"the event is not JSON: {str(exc)[:200]}", "invalid_json"), None) from None
    if not isinstance(raw, Mapping):
        raise BadEvent(_bad("the event is not a JSON object", "invalid_json"), None)
    event_id, name = raw.get("event_id"), raw.get("type")
    own = event_id if isinstance(event_id, str) and len(event_id) <= _MOST_EVENT_ID else None
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        what = f"type: is no event of a transcription session, expected one of {', '.join(_KINDS)}"
        raise BadEvent(_bad(what, "invalid_value", "type"), own)
    try:
        return kind.model_validate(raw)
    except ValidationError as exc:
        raise BadEvent(fault(exc), own) from None


def _bad(what: str, code: str, param: str | None = None) -> Refusal:
    return Refusal(400, what, code=code, param=param)
