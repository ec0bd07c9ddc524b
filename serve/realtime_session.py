# SPDX-License-Identifier: Apache-2.0
"""A transcription session: the client's events to audio, and what is heard in it to the server's events.

It knows neither sockets nor tasks. `take` and `told` are for one thread, the event loop's.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..runtime.clock import RealClock
from ..runtime.errors import PocketPhiError
from ..runtime.segments import SegmentRules
from ..runtime.speech_task import Task
from .errors import Refusal, refusal_of
from .pushed_audio import AudioBuffer
from .queued_reader import QueuedReader
from .realtime_listening import (
    Cleared,
    Heard,
    Listening,
    Lost,
    SessionReader,
    Silent,
    Started,
    Unspoken,
    Whole,
    Words,
    new_id,
)
from .realtime_schema import (
    TAIL,
    Append,
    BadEvent,
    Clear,
    ClientEvent,
    Commit,
    OldSessionUpdate,
    SessionSettings,
    SessionUpdate,
    TurnDetection,
    parse_event,
)
from .services import Services

_LEAST_S = 0.1  # of a commit, as in the reference
_TRANSCRIPTION = "conversation.item.input_audio_transcription"

ServerEvent = dict[str, Any]


class SessionEnd(Exception):
    """The session is over: the client is told why, and the connection is closed with this code."""

    def __init__(self, close_code: int, refusal: Refusal, event_id: str | None = None) -> None:
        super().__init__(refusal.message)
        self.close_code, self.refusal, self.event_id = close_code, refusal, event_id


class Session:
    """One session."""

    def __init__(self, services: Services) -> None:
        """
        Raises:
            Refusal: 503, the model is loading.
            InputError: it cannot listen, or its context is too small.
        """
        self._services, self._settings, self._id = services, SessionSettings(), new_id("sess")
        clock = RealClock()
        self._audio = AudioBuffer(clock, services.limits.unheard_s)
        self._reader = SessionReader(lambda task: QueuedReader(services, task, {}), Task())
        self._reader.check(SegmentRules().max_s)
        self.listening = Listening(self._audio, self._reader, clock)
        self._latest: str | None = None  # item that was committed
        self._begun: str | None = None  # item that is not committed yet

    def opening(self) -> ServerEvent:
        """What the client hears first."""
        return _event("session.created", session=self._settings.to_object(self._id))

    def end(self) -> None:
        """No more is taken; what is being said is read to its end."""
        self._audio.end()

    def take(self, text: str) -> list[ServerEvent]:
        """The answers to an event of the client: one that is at fault gets an error, and is as if not sent.

        Raises:
            SessionEnd: more audio waits than may.
        """
        try:
            event = parse_event(text)
        except BadEvent as exc:
            return [error_event(exc.refusal, exc.event_id)]
        try:
            return list(self._taken(event))
        except (Refusal, PocketPhiError) as exc:
            refusal = refusal_of(exc)
            if refusal.code == "input_audio_buffer_full":
                raise SessionEnd(1008, refusal, event.event_id) from None
            return [error_event(refusal, event.event_id)]

    def told(self, heard: Heard) -> Iterator[ServerEvent]:
        """What the client is told of something that was heard."""
        if isinstance(heard, Started):
            self._begun = heard.item_id
            start_ms = round(1000 * heard.start_s)
            yield _event("input_audio_buffer.speech_started", audio_start_ms=start_ms, item_id=heard.item_id)
        elif isinstance(heard, Words):
            yield from self._words(heard)
        elif isinstance(heard, Silent):
            yield from self._stopped(heard.item_id, heard.stop_s)
        elif isinstance(heard, Whole):
            usage = {"type": "duration", "seconds": round(heard.seconds, 3)}
            yield _transcription("completed", heard.item_id, transcript=heard.text, usage=usage)
        elif isinstance(heard, Lost):
            yield from self._lost(heard)
        elif isinstance(heard, Unspoken):
            yield error_event(_unspoken("nobody is speaking"), heard.commit_id)
        elif isinstance(heard, Cleared):
            self._begun = None
            yield _event("input_audio_buffer.cleared")

    def _words(self, heard: Words) -> Iterator[ServerEvent]:
        if heard.text:
            yield _transcription("delta", heard.item_id, delta=heard.text)
        if heard.is_partial and TAIL in self._settings.include:
            figures = {"delay": round(heard.delay, 3), "backlog": round(heard.backlog, 3)}
            yield _transcription("tail", heard.item_id, tail=heard.tail, **figures)

    def _stopped(self, item_id: str, stop_s: float) -> Iterator[ServerEvent]:
        end_ms = round(1000 * stop_s)
        yield _event("input_audio_buffer.speech_stopped", audio_end_ms=end_ms, item_id=item_id)
        yield from self._committed(item_id)
        self._begun = None

    def _committed(self, item_id: str) -> Iterator[ServerEvent]:
        before, self._latest = self._latest, item_id
        content = {"type": "input_audio", "transcript": None}
        item = {
            "id": item_id,
            "object": "realtime.item",
            "type": "message",
            "status": "completed",
            "role": "user",
            "content": [content],
        }
        yield _event("input_audio_buffer.committed", item_id=item_id, previous_item_id=before)
        yield _event("conversation.item.added", previous_item_id=before, item=item)
        yield _event("conversation.item.done", previous_item_id=before, item=item)

    def _lost(self, heard: Lost) -> Iterator[ServerEvent]:
        """An item that nobody has been told of is not mentioned."""
        if heard.item_id is None:
            yield error_event(heard.refusal, None)
            return
        if heard.item_id == self._begun:
            yield from self._stopped(heard.item_id, heard.stop_s)
        yield _transcription("failed", heard.item_id, error=heard.refusal.body["error"])

    def _taken(self, event: ClientEvent) -> Iterator[ServerEvent]:
        if isinstance(event, Append):
            self._append(event)
        elif isinstance(event, (SessionUpdate, OldSessionUpdate)):
            yield self._update(event)
        elif isinstance(event, Commit):
            yield from self._commit(event)
        elif isinstance(event, Clear):
            if self._audio.open is None:
                yield _event("input_audio_buffer.cleared")
            else:
                self.listening.drop(self._audio.clear())

    def _append(self, event: Append) -> None:
        try:
            raw = base64.b64decode(event.audio, validate=True)
        except (binascii.Error, ValueError):  # ValueError: not ASCII
            raise Refusal(400, "audio: is not base64", code="invalid_base64", param="audio") from None
        if len(raw) % 2:
            what = f"audio: has {len(raw):,} bytes, expected samples of two bytes"
            raise Refusal(400, what, code="invalid_value", param="audio")
        if not raw:
            raise Refusal(400, "audio: is empty", code="invalid_value", param="audio")
        self._audio.append(raw, self._settings.rate, _rules(self._settings.turn_detection))

    def _commit(self, event: Commit) -> Iterator[ServerEvent]:
        stretch = self._audio.open
        seconds = 0.0 if stretch is None else stretch.seconds
        if stretch is None or seconds < _LEAST_S:
            found = f"{1000 * seconds:.0f} ms of audio"
            raise _unspoken(f"there are {found}, expected at least {1000 * _LEAST_S:.0f}")
        item_id = "" if stretch.rules is not None else new_id("item")
        self._audio.commit(item_id, event.event_id)
        if item_id:
            yield from self._committed(item_id)

    def _update(self, event: SessionUpdate | OldSessionUpdate) -> ServerEvent:
        """Words to expect are for the next item; the rest is for audio that has not begun to come."""
        new, now = self._settings.updated(event), self._settings
        if self._audio.rate and new.rate != now.rate:
            what = f"the rate cannot change: audio has come at {now.rate} Hz"
            raise Refusal(400, what, code="session_in_use", param="session.audio.input.format")
        if self._audio.open is not None and new.turn_detection != now.turn_detection:
            what = "turn detection cannot change while audio is in the buffer: commit or clear it first"
            raise Refusal(400, what, code="session_in_use", param="session.audio.input.turn_detection")
        task = Task(words=new.transcription.words)
        if task.words != now.transcription.words:
            QueuedReader(self._services, task, {}).check(SegmentRules().max_s)
            self._reader.set_task(task)
        self._settings = new
        if isinstance(event, OldSessionUpdate):
            return _event("transcription_session.updated", session=new.to_old_object(self._id))
        return _event("session.updated", session=new.to_object(self._id))


def error_event(refusal: Refusal, event_id: str | None) -> ServerEvent:
    """An error; `event_id` is the client's own, of the event that is at fault."""
    return _event("error", error=refusal.body["error"] | {"event_id": event_id})


def _event(kind: str, **fields: Any) -> ServerEvent:
    return {"type": kind, "event_id": new_id("event"), **fields}


def _transcription(kind: str, item_id: str, **fields: Any) -> ServerEvent:
    return _event(f"{_TRANSCRIPTION}.{kind}", item_id=item_id, content_index=0, **fields)


def _unspoken(what: str) -> Refusal:
    return Refusal(400, f"there is nothing to commit: {what}", code="input_audio_buffer_commit_empty")


def _rules(turns: TurnDetection | None) -> SegmentRules | None:
    if turns is None:
        return None
    return replace(
        SegmentRules(),
        pause_s=turns.silence_duration_ms / 1000,
        pre_roll_s=turns.prefix_padding_ms / 1000,
    )
