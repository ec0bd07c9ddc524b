# SPDX-License-Identifier: Apache-2.0
"""Live transcription: what is said, as it is said.

    source ─▶ segmenter ─▶ the utterance being spoken ─▶ a reading every step ─▶ agreement ─▶ partial
                       └▶ silence, or an utterance that ended ─▶ its last reading ─▶ final

One thread does all of it, one thing after the other; the source collects audio meanwhile and drops none. When
readings take longer than the step, the step grows; when even the last readings fall behind, the backlog is
reported and partials wait until it is gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from .agreement import Agreement
from .clock import Clock
from .errors import InputError, PocketPhiError
from .growing_speech import GrowingSpeech
from .live_events import LiveEvent
from .live_summary import Summary
from .parts import Float32
from .reader import Reading, ReadsSpeech
from .segments import Growing, Segmenter, SegmentRules, Silence, Speech
from .sources import Source

_LEAST_STEP_S, _MOST_STEP_S = 0.2, 30.0
_SLACK = (
    1.25  # of a reading's time until the next one begins: a fifth of the time is left for finals to catch up
)
_CAUGHT_UP_S = 0.25  # audio that may wait when a partial reading begins: two blocks and a bit


@dataclass(frozen=True, slots=True)
class LiveOptions:
    """How to listen."""

    step_s: float = 1.0  # new audio from one reading to the next; it grows where the machine needs longer
    rules: SegmentRules = field(default_factory=SegmentRules)
    drafts: bool = True  # earlier readings are drafts for the next: the same text for less

    def __post_init__(self) -> None:
        if not _LEAST_STEP_S <= self.step_s <= _MOST_STEP_S:  # false for NaN too
            raise InputError(f"step is {self.step_s:g} s, expected {_LEAST_STEP_S:g} to {_MOST_STEP_S:g}")


class _Utterance:
    """One utterance while it is spoken: its readings, and when each of its tokens was first read."""

    def __init__(self, number: int, start: int, sample_rate: int, agreement: Agreement) -> None:
        self.number, self.start = number, start
        self.speech = GrowingSpeech(sample_rate)
        self.agreement = agreement
        self.last: Reading | None = None
        self.seen_s: list[
            float
        ] = []  # of each token of the last reading: how much audio the first one with it had
        self.shown = ""  # the committed text
        self.has_text = False  # whether any reading had some

    def take(self, reading: Reading, stop_s: float) -> None:
        before = self.last.token_ids if self.last is not None else ()
        same = next(
            (i for i, (a, b) in enumerate(zip(before, reading.token_ids, strict=False)) if a != b),
            min(len(before), len(reading.token_ids)),
        )
        self.seen_s = self.seen_s[:same] + [stop_s] * (len(reading.token_ids) - same)
        self.last = reading


class Listener:
    """Iterate for events until the source ends. `summary` is true at any time."""

    def __init__(self, reader: ReadsSpeech, source: Source, options: LiveOptions, clock: Clock) -> None:
        """
        Args:
            reader: reads utterances.
            source: where audio comes from; the caller closes it.
            options: step, pauses.
            clock: the one that the source goes by.

        Raises:
            InputError: the model cannot listen, or not to utterances of that length.
        """
        reader.check(options.rules.max_s)
        self._reader, self._source, self._options, self._clock = reader, source, options, clock
        self._segmenter = Segmenter(source.sample_rate, options.rules)
        self._open: _Utterance | None = None
        self._n_utterances = 0
        self._reading_s = 0.0  # what the last reading took
        self.summary = Summary(source.sample_rate)
        # For whoever shows them, from another thread too.
        self.speaking = False  # whether somebody is being heard
        self.last_delay = 0.0  # of the last event

    @property
    def backlog_s(self) -> float:
        """Seconds of audio that wait."""
        return self._source.backlog_s()

    @property
    def step_s(self) -> float:
        """New audio until the next reading, in seconds."""
        return max(self._options.step_s, _SLACK * self._reading_s)

    def stop(self) -> None:
        """Take no more audio: what has come is read to its end. For signal handlers too."""
        self._source.stop()

    def __iter__(self) -> Iterator[LiveEvent]:
        failure: PocketPhiError | None = None
        blocks = iter(self._source.blocks)
        while True:
            try:
                block = next(blocks, None)
            except PocketPhiError as exc:  # what was heard before is still read to its end
                failure, block = exc, None
            if block is None:
                break
            self.summary.take_block(len(block), self._source)
            for piece in self._segmenter.push(block):
                yield self._closed(piece)
            growing = self._segmenter.open
            self.speaking = growing is not None
            if growing is not None and self._due(growing):
                yield self._partial(growing)
        for piece in self._segmenter.finish():
            yield self._closed(piece)
        if failure is not None:
            raise failure

    def _due(self, growing: Growing) -> bool:
        """Whether to read the utterance now: never while audio waits that has not been looked at."""
        if self._source.backlog_s() > _CAUGHT_UP_S:
            return False
        before = self._open.last if self._open is not None and self._open.start == growing.start else None
        n_before = before.n_samples if before is not None else 0
        if growing.pausing:  # if nothing more comes, this is the last reading, done while the pause goes on
            return len(growing.window) != n_before
        return len(growing.window) - n_before >= self.step_s * self._source.sample_rate

    def _partial(self, growing: Growing) -> LiveEvent:
        utterance = self._utterance(growing.start)
        reading = self._read(utterance, growing.window, final=False)
        rate, summary = self._source.sample_rate, self.summary
        before = len(utterance.agreement.committed)
        window_s = len(growing.window) / rate
        if window_s <= self._options.rules.earliest_cut_s:  # what is committed must lie before any forced cut
            utterance.agreement.add(reading.token_ids, reading.logprobs, window_s)
        committed = utterance.agreement.committed
        now = self._clock.now() - self._source.started
        summary.n_partials += 1
        self._first_text(utterance, reading, now)
        summary.take_delays("commit", (now - s for s in utterance.seen_s[before : len(committed)]))
        return self._event(utterance, reading, self._reader.text_of(committed), is_final=False)

    def _closed(self, piece: Speech | Silence) -> LiveEvent:
        rate, summary = self._source.sample_rate, self.summary
        summary.n_covered += piece.stop - piece.start
        if isinstance(piece, Silence):
            return LiveEvent("silence", None, "", piece.start / rate, piece.stop / rate)
        utterance = self._utterance(piece.start)
        reading = utterance.last
        if reading is None or not reading.is_final or reading.n_samples != len(piece.samples):
            reading = self._read(utterance, piece.samples, final=True)
        now = self._clock.now() - self._source.started
        self._first_text(utterance, reading, now)
        summary.take_delays(
            "commit", (now - s for s in utterance.seen_s[len(utterance.agreement.committed) :])
        )
        summary.take_delays("final", [now - piece.stop / rate])
        summary.take_final(piece.stop - piece.start, reading.text, reading.n_overruled)
        self._open = None
        return self._event(utterance, reading, reading.text, is_final=True)

    def _first_text(self, utterance: _Utterance, reading: Reading, now: float) -> None:
        if reading.text and not utterance.has_text:
            utterance.has_text = True
            onset_s = utterance.start / self._source.sample_rate + self._options.rules.pre_roll_s
            self.summary.take_delays("first_partial", [now - onset_s])

    def _utterance(self, start: int) -> _Utterance:
        """The one that begins there."""
        if self._open is None or self._open.start != start:
            self._n_utterances += 1
            agreement = Agreement(self._reader.starts_word)
            self._open = _Utterance(self._n_utterances, start, self._source.sample_rate, agreement)
        return self._open

    def _read(self, utterance: _Utterance, window: Float32, *, final: bool) -> Reading:
        utterance.speech.set_window(window)
        last = utterance.last
        committed = utterance.agreement.committed
        draft = committed if last is None or not self._options.drafts else last.token_ids
        began = self._clock.now()
        reading = self._reader.read(utterance.speech, draft=draft, n_forced=len(committed), final=final)
        self._reading_s = self._clock.now() - began
        self.summary.take_reading(reading, self._reading_s)
        utterance.take(reading, (utterance.start + len(window)) / self._source.sample_rate)
        return reading

    def _event(self, utterance: _Utterance, reading: Reading, committed: str, *, is_final: bool) -> LiveEvent:
        if not (committed.startswith(utterance.shown) and reading.text.startswith(utterance.shown)):
            self.summary.n_committed_changes += 1
        utterance.shown = committed
        rate = self._source.sample_rate
        stop_s = (utterance.start + reading.n_samples) / rate
        self.last_delay = max(0.0, self._clock.now() - self._source.started - stop_s)
        return LiveEvent(
            "final" if is_final else "partial",
            utterance.number,
            reading.text,
            utterance.start / rate,
            stop_s,
            committed=committed,
            translation=reading.translation if is_final else None,
            delay=self.last_delay,
            backlog=self._source.backlog_s(),
        )
