# SPDX-License-Identifier: Apache-2.0
"""The thread of a live session: stretches of audio in, what is heard in them out, item by item.

With turn detection a stretch is listened to as `pocketphi live` does, an item for each utterance. Without, a
stretch is one item, and is transcribed as a recording is.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..runtime.clock import Clock
from ..runtime.errors import PocketPhiError
from ..runtime.growing_speech import GrowingSpeech
from ..runtime.live import Listener, LiveOptions
from ..runtime.live_events import LiveEvent
from ..runtime.reader import Reading
from ..runtime.segments import SegmentRules
from ..runtime.speech_task import Task
from ..runtime.transcribe import transcribe
from .errors import Refusal, refusal_of
from .pushed_audio import AudioBuffer, Dropped, Stretch
from .queued_reader import QueuedReader


@dataclass(frozen=True, slots=True)
class Started:
    """Somebody speaks: a new item."""

    item_id: str
    start_s: float  # from the beginning of the session's audio


@dataclass(frozen=True, slots=True)
class Words:
    """More of an item's transcript is settled."""

    item_id: str
    text: str  # what is new; "": nothing
    tail: str  # that follows it, and may still change
    delay: float  # seconds, as `LiveEvent` has them
    backlog: float
    is_partial: bool


@dataclass(frozen=True, slots=True)
class Silent:
    """The item's utterance is over."""

    item_id: str
    stop_s: float


@dataclass(frozen=True, slots=True)
class Whole:
    """All of an item's words have come."""

    item_id: str
    text: str
    seconds: float  # of its audio


@dataclass(frozen=True, slots=True)
class Lost:
    """An item has no words, or no more."""

    item_id: str | None  # None: before it had begun
    stop_s: float
    refusal: Refusal


@dataclass(frozen=True, slots=True)
class Unspoken:
    """A commit found nobody speaking: all before it has been told."""

    commit_id: str | None


@dataclass(frozen=True, slots=True)
class Cleared:
    """A stretch has been dropped, and what was begun in it."""


Heard = Started | Words | Silent | Whole | Lost | Unspoken | Cleared


class SessionReader:
    """`QueuedReader`s one after the other: with an utterance ends what was cancelled, or asked of it.

    See `reader.ReadsSpeech`. One thread reads, others may set the task and cancel.
    """

    def __init__(self, make: Callable[[Task], QueuedReader], task: Task) -> None:
        """`make`: called in the thread that reads, and once now."""
        self._make, self._task, self._made_for = make, task, task
        self._reader = make(task)
        self._lock = threading.Lock()
        self._speech: GrowingSpeech | None = None
        self._closed = False

    def set_task(self, task: Task) -> None:
        """From the next utterance on."""
        with self._lock:
            self._task = task

    def cancel(self) -> None:
        """End the readings of this utterance."""
        with self._lock:
            self._reader.cancel()

    def close(self) -> None:
        """End this reading and all others."""
        with self._lock:
            self._closed = True
            self._reader.cancel()

    def check(self, longest_s: float) -> None:
        """See `Reader.check`."""
        self._reader.check(longest_s)

    def text_of(self, token_ids: Sequence[int]) -> str:
        """See `Reader.text_of`."""
        return self._reader.text_of(token_ids)

    def starts_word(self, token_id: int) -> bool:
        """See `Reader.starts_word`."""
        return self._reader.starts_word(token_id)

    def read(
        self, speech: GrowingSpeech, *, draft: Sequence[int] = (), n_forced: int = 0, final: bool = True
    ) -> Reading:
        """See `QueuedReader.read`."""
        with self._lock:
            fresh = self._speech is not speech and (
                self._task != self._made_for or (self._reader.cancelled and not self._closed)
            )
            if fresh:
                self._reader, self._made_for = self._make(self._task), self._task
                if self._closed:
                    self._reader.cancel()
            self._speech, reader = speech, self._reader
        return reader.read(speech, draft=draft, n_forced=n_forced, final=final)


class Listening:
    """Iterate, in a thread, for what is heard; the other methods are for other threads."""

    def __init__(self, audio: AudioBuffer, reader: SessionReader, clock: Clock) -> None:
        self._audio, self._reader, self._clock = audio, reader, clock
        self._at: Stretch | None = None
        self._item: str | None = None  # that has begun
        self._told = ""  # its words

    def drop(self, stretch: Stretch) -> None:
        """It has been cleared: what is read of it is not wanted."""
        if self._at is stretch:
            self._reader.cancel()

    def close(self) -> None:
        """Nothing is wanted: the iteration ends soon."""
        self._audio.close()
        self._reader.close()

    def __iter__(self) -> Iterator[Heard]:
        for stretch in self._audio.stretches():
            self._at, self._item, self._told = stretch, None, ""
            try:
                if stretch.cleared:
                    raise Dropped
                if stretch.rules is None:
                    yield from self._one_item(stretch)
                else:
                    yield from self._utterances(stretch, stretch.rules)
            except Dropped:
                yield Cleared()

    def _utterances(self, stretch: Stretch, rules: SegmentRules) -> Iterator[Heard]:
        """What `pocketphi live` hears. A failure costs an utterance: the next is heard by a new listener."""
        spoken = False  # when the stretch came to its end
        while not stretch.exhausted:
            given_s = stretch.given_s
            start_s = stretch.start_s + given_s
            try:
                listener = Listener(self._reader, stretch, LiveOptions(rules=rules), self._clock)
                for event in listener:
                    if event.type == "final":  # silence may follow it
                        spoken = stretch.exhausted
                    yield from self._told_of(event, start_s)
            except (PocketPhiError, Refusal) as exc:
                if stretch.given_s == given_s:  # it would fail for ever
                    raise
                spoken = stretch.exhausted
                yield from self._lost(stretch, exc)
        if stretch.committed and not spoken:
            yield Unspoken(stretch.commit_id)

    def _told_of(self, event: LiveEvent, start_s: float) -> Iterator[Heard]:
        """Of an utterance: its beginning, more of its words, and its end."""
        if event.type == "silence":
            return
        if self._item is None:
            self._item = new_id("item")
            yield Started(self._item, start_s + event.t0)
        item, final = self._item, event.type == "final"
        settled = event.text if final else event.committed
        new, self._told = settled[len(self._told) :], settled
        if final:
            yield Silent(item, start_s + event.t1)
        if new or not final:
            tail = event.text[len(settled) :]
            yield Words(item, new, tail, event.delay, event.backlog, is_partial=not final)
        if final:
            yield Whole(item, settled, event.t1 - event.t0)
            self._item, self._told = None, ""

    def _one_item(self, stretch: Stretch) -> Iterator[Heard]:
        self._item = stretch.item_id
        told = ""
        try:
            for segment in transcribe(self._reader, stretch.sound, SegmentRules()):
                if segment.text:
                    new = f" {segment.text}" if told else segment.text
                    told += new
                    yield Words(stretch.item_id, new, "", 0.0, stretch.backlog_s(), is_partial=False)
            yield Whole(stretch.item_id, told, stretch.seconds)
        except (PocketPhiError, Refusal) as exc:
            yield from self._lost(stretch, exc)

    def _lost(self, stretch: Stretch, error: PocketPhiError | Refusal) -> Iterator[Heard]:
        """Of a stretch that has been cleared, it is not worth a word."""
        if stretch.cleared:
            raise Dropped
        yield Lost(self._item, stretch.start_s + stretch.given_s, refusal_of(error))
        self._item, self._told = None, ""


def new_id(kind: str) -> str:
    """An id that nobody can guess, and no other has."""
    return f"{kind}_{secrets.token_hex(12)}"
