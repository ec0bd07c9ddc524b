# SPDX-License-Identifier: Apache-2.0
"""What the server counts, as Prometheus reads it (text format 0.0.4)."""

from __future__ import annotations

import os
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from ..runtime.reader import Reading
from ..runtime.router import route
from .jobs import Done

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_SPEEDS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0)  # tokens/s
_SPEECH = route(images=False, audio=True).mode
_STATM = Path("/proc/self/statm")


class Histogram:
    """How often a value was at most each of some bounds."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str) -> list[str]:
        """Its samples."""
        found, total = [], 0
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            found.append(f'{name}_bucket{{le="{"+Inf" if bound == float("inf") else f"{bound:g}"}"}} {total}')
        return [*found, f"{name}_sum {self._sum:.6f}", f"{name}_count {total}"]


class Metrics:
    """The counts of one server. For one thread, the event loop's, but for `heard`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # around what `heard` counts too
        self.requests: Counter[tuple[str, int]] = Counter()  # by route and status
        self.first_token_s = Histogram(_SECONDS)  # from the request's last byte
        self.tokens_per_s = Histogram(_SPEEDS)  # of answers, after their first token
        self._tokens: Counter[str] = Counter()
        self._modes: Counter[str] = Counter()
        self._audio_s = self._audio_busy_s = 0.0
        self._gauges: list[tuple[str, str, Callable[[], float]]] = []

    def gauge(self, name: str, meaning: str, value: Callable[[], float]) -> None:
        """Something that is asked for its value when the metrics are read; a counter, if named `_total`."""
        self._gauges.append((name, meaning, value))

    def answered(self, done: Done) -> None:
        """An answer is complete."""
        usage, timings = done.reply.usage, done.reply.timings
        with self._lock:
            self._modes[done.reply.mode] += 1
            self._tokens["prompt"] += usage.prompt_tokens
            self._tokens["cached"] += usage.cached_tokens
            self._tokens["completion"] += usage.completion_tokens
            if done.audio_s:
                self._audio_s += done.audio_s
                self._audio_busy_s += done.busy_s
        if timings.predicted_n:
            self.tokens_per_s.add(timings.predicted_per_second)

    def heard(self, reading: Reading, *, audio_s: float, busy_s: float) -> None:
        """A reading of a recording or a live session is complete. From any thread.

        Args:
            reading: it counts as an answer.
            audio_s: of its utterance, what no earlier reading has had.
            busy_s: that the worker had with it.
        """
        with self._lock:
            self._modes[_SPEECH] += 1
            self._tokens["prompt"] += reading.prompt_tokens
            self._tokens["cached"] += reading.cached_tokens
            self._tokens["completion"] += len(reading.token_ids)
            self._audio_s += audio_s
            self._audio_busy_s += busy_s

    def text(self) -> str:
        """All of it."""
        lines: list[str] = []

        def family(name: str, kind: str, meaning: str, samples: Iterable[str]) -> None:
            lines.extend([f"# HELP {name} {meaning}", f"# TYPE {name} {kind}", *samples])

        by = sorted(self.requests.items())
        name = "pocketphi_requests_total"
        rows = [f'{name}{{route="{route}",status="{status}"}} {n}' for (route, status), n in by]
        family(name, "counter", "Answered requests.", rows)
        with self._lock:
            modes, tokens = sorted(self._modes.items()), self._tokens.copy()
            audio_s, audio_busy_s = self._audio_s, self._audio_busy_s
        name = "pocketphi_answers_total"
        rows = [f'{name}{{mode="{mode}"}} {n}' for mode, n in modes]
        family(name, "counter", "Complete answers by mode.", rows)
        for kind, meaning in (
            ("prompt", "Tokens of prompts, those from the cache included."),
            ("cached", "Tokens of prompts that were in the cache."),
            ("completion", "Tokens written."),
        ):
            name = f"pocketphi_{kind}_tokens_total"
            family(name, "counter", meaning, [f"{name} {tokens[kind]}"])
        name = "pocketphi_time_to_first_token_seconds"
        family(name, "histogram", "From a request to its answer's first.", self.first_token_s.lines(name))
        name = "pocketphi_tokens_per_second"
        family(name, "histogram", "Of answers, after the first token.", self.tokens_per_s.lines(name))
        name = "pocketphi_audio_seconds_total"
        family(name, "counter", "Sound in requests.", [f"{name} {audio_s:.3f}"])
        name = "pocketphi_audio_busy_seconds_total"
        family(name, "counter", "Time for requests with sound.", [f"{name} {audio_busy_s:.3f}"])
        name = "pocketphi_real_time_factor"
        factor = audio_busy_s / audio_s if audio_s else 0.0
        family(name, "gauge", "Time for requests with sound, by its length.", [f"{name} {factor:.4f}"])
        for name, meaning, value in self._gauges:
            kind = "counter" if name.endswith("_total") else "gauge"
            family(name, kind, meaning, [f"{name} {value():g}"])
        memory = resident_bytes()
        if memory is not None:
            name = "pocketphi_resident_memory_bytes"
            family(name, "gauge", "Of this process.", [f"{name} {memory}"])
        return "\n".join(lines) + "\n"


def resident_bytes() -> int | None:
    """Memory of this process; None where the system does not say."""
    try:
        return int(_STATM.read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None
