# SPDX-License-Identifier: Apache-2.0
"""Many clients of one server at a time: is every answer the one that a lone client gets, and at what pace?

    python -m tests.tools.load_serve [--seconds 60] [--clients 64] [--parallel 4] [--peer PYTHON]

The server is a process of its own with phi4-nano at F32 and an f32 cache, where rounding decides no token.
A lone client first asks everything once. Then clients ask for text and about pictures, sound and both, whole
and streamed, have recordings written down, and talk in live sessions; some leave in the middle, some send
what is none. The queue is shorter than the clients are many, and the places of recordings and sessions may
be, so some are told to come again, and do. The exit code is 1 if an answer or a status is not what it has to
be, or if memory, threads or requests stay behind.

--peer: a Python with llama-cpp-python's own server. Both then answer the text items alone, one server after
the other.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from pocketphi import convert as converter
from pocketphi.convert.builtin import builtin_checkpoint
from pocketphi.runtime import bundle as bundles

from ..serve.served import Server
from . import load_audio, load_requests
from .load_requests import PER_SET, Heard, Leave, Malformed, Question, prompts

T = TypeVar("T")

SHARE_LEAVING, SHARE_MALFORMED = 0.1, 0.1  # of requests
LEAVING: Mapping[str, Leave] = {
    "leaves an answer": load_requests.leave_an_answer,
    "leaves a recording": load_audio.leave_a_recording,
    "leaves a session": load_audio.leave_a_session,
}
KINDS = (*PER_SET, "recording", "session")
GAUGES = (  # what the server has of clients
    "pocketphi_requests_running",
    "pocketphi_queue_length",
    "pocketphi_held_bytes",
    "pocketphi_listeners",
)
POOL_THREADS = 40  # that the server's framework keeps once it has needed them
WARM_S = 30.0  # in which every thread's heap and every worker's buffers reach their size
MAY_GROW = 0.05  # of memory, after that: half a minute's bodies, were they kept, are as much (600 of 68 kB)
SETTLED_S = 20.0  # after which nobody's request is anywhere, the longest utterance included


class Tally:
    """What all clients saw."""

    def __init__(self) -> None:
        self.statuses: Counter[tuple[str, int]] = Counter()
        self.firsts: defaultdict[str, list[float]] = defaultdict(list)  # seconds, of streams, by kind
        self.tokens = self.n_equal = 0
        self.sound_s = 0.0  # of recordings and sessions that have been heard to the end
        self.wrong: list[str] = []
        self.resident: list[float] = []  # bytes: after each quarter of the time
        self._lock = threading.Lock()

    def add(self, kind: str, heard: Heard, *, right: bool, what: str = "") -> None:
        """One request is over."""
        with self._lock:
            self.statuses[kind, heard.status] += 1
            if heard.first_s:
                self.firsts[kind].append(heard.first_s)
            if not right:
                self.wrong.append(f"{kind} {heard.status}: {what}"[:400])

    def add_whole(self, item: Question, heard: Heard, alone: Heard) -> None:
        """A whole answer, and what it has to be."""
        right = heard.text == alone.text
        self.add(item.kind, heard, right=right, what=f"{heard.text!r}, alone {alone.text!r}")
        with self._lock:
            self.tokens += alone.tokens
            self.sound_s += item.seconds
            self.n_equal += right


def questions() -> list[Question]:
    """Of every kind some."""
    return [*load_requests.questions(), *load_audio.questions()]


def lone(url: str, items: Sequence[Question]) -> list[Heard]:
    """What one client gets who is alone, by the item's place."""
    found = [item.ask(url, stream=False) for item in items]
    assert all(one.text is not None for one in found), found
    return found


class Clients:
    """Threads that ask until they may not, or have asked so often."""

    def __init__(
        self, url: str, items: Sequence[Question], answers: Sequence[Heard], *, n: int, hostile: bool = True,
        all_streamed: bool = False, most: int = 1 << 30,
    ) -> None:  # fmt: skip
        """
        Args:
            url: of the server.
            items, answers: and what is right.
            n: clients.
            hostile: some leave, and some send what is none.
            all_streamed: or every other one.
            most: requests of each client.
        """
        self._url, self._items, self._answers = url, items, answers
        self._hostile, self._all_streamed, self._most = hostile, all_streamed, most
        self._none = [*load_requests.malformed(), *load_audio.malformed()]
        self._ends = float("inf")
        self.tally = Tally()
        self._threads = [threading.Thread(target=self._run, args=(seed,), daemon=True) for seed in range(n)]

    def run(self, seconds: float = float("inf"), resident: Callable[[], float] | None = None) -> float:
        """Let them; how many seconds it took until the last had its answer."""
        started = time.perf_counter()
        self._ends = started + seconds
        for thread in self._threads:
            thread.start()
        if resident is not None:
            for _ in range(3):
                time.sleep(seconds / 4)
                self.tally.resident.append(resident())
        for thread in self._threads:
            thread.join()
        if resident is not None:
            self.tally.resident.append(resident())
        return time.perf_counter() - started

    def _run(self, seed: int) -> None:
        chance = random.Random(seed)
        leaving, none = _in_turn([*LEAVING], seed), _in_turn(self._none, seed)
        for _ in range(self._most):
            if time.perf_counter() >= self._ends:
                return
            request = self._request(chance, leaving, none)
            try:
                while retry_s := request():
                    time.sleep(max(min(retry_s, self._ends - time.perf_counter()), 0.0))
                    if time.perf_counter() >= self._ends:
                        return
            except Exception as exc:
                self.tally.add("broken", Heard(0), right=False, what=repr(exc))

    def _request(
        self, chance: random.Random, leaving: Iterator[str], none: Iterator[Malformed]
    ) -> Callable[[], float]:
        """Something to ask, and to ask again after the seconds that the call gives; 0: it is over."""
        dice = chance.random() if self._hostile else 1.0
        if dice < SHARE_MALFORMED:
            return partial(self._malformed, next(none))
        if dice < SHARE_MALFORMED + SHARE_LEAVING:
            return partial(self._leaving, next(leaving), chance.random())
        stream = self._all_streamed or chance.random() < 0.5
        return partial(self._item, chance.randrange(len(self._items)), stream)

    def _malformed(self, one: Malformed) -> float:
        heard = one.send(self._url)
        kind = f"malformed: {one.name}"
        if heard.status == 429 in one.statuses:
            return self._again(kind, heard)
        self.tally.add(kind, heard, right=heard.status in one.statuses)
        return 0.0

    def _leaving(self, kind: str, seed: float) -> float:
        heard = LEAVING[kind](self._url, random.Random(seed))
        if heard.status == 429:
            return self._again(kind, heard)
        self.tally.add(kind, heard, right=heard.status in (0, 200) and heard.text is None)
        return 0.0

    def _item(self, i: int, stream: bool) -> float:
        item = self._items[i]
        heard = item.ask(self._url, stream=stream)
        if heard.status == 429:
            return self._again(item.kind, heard)
        if heard.status == 200:
            self.tally.add_whole(item, heard, self._answers[i])
        else:
            self.tally.add(item.kind, heard, right=False)
        return 0.0

    def _again(self, kind: str, heard: Heard) -> float:
        """There is no room now."""
        said_when = heard.retry_after >= 1
        self.tally.add(kind, heard, right=said_when, what="without Retry-After")
        return max(heard.retry_after, 1.0)


def grown(resident: Sequence[float], seconds: float) -> list[str]:
    """What memory has to answer for, by what it was after each quarter of so many seconds."""
    warm, last = resident[1], resident[-1]
    if seconds / 2 < WARM_S or last <= (1 + MAY_GROW) * warm:
        return []
    return [f"memory grows: {warm / 2**20:.0f} MiB after half of the time, {last / 2**20:.0f} at the end"]


def _in_turn(some: Sequence[T], first: int) -> Iterator[T]:
    """Round and round; another client begins with another."""
    return itertools.cycle([*some[first % len(some) :], *some[: first % len(some)]])


def n_threads(server: Server) -> int:
    """Of its process; 0 where the system does not say."""
    try:
        status = Path(f"/proc/{server.process.pid}/status").read_text()
    except OSError:
        return 0
    return int(re.findall(r"^Threads:\s*(\d+)$", status, re.MULTILINE)[0])


def left_behind(server: Server, threads_before: int) -> list[str]:
    """What the server still has of clients who have all gone, though it has had time to notice."""
    ends = time.monotonic() + SETTLED_S
    while True:
        found = [f"{name} is {value:g}" for name in GAUGES if (value := server.metric(name))]
        threads = n_threads(server)
        if threads > threads_before + POOL_THREADS:
            found.append(f"{threads} threads, {threads_before} before")
        if not found or time.monotonic() > ends:
            return found
        time.sleep(0.1)


@contextlib.contextmanager
def peer(python: str, model: Path) -> Iterator[str]:
    """llama-cpp-python's own server."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    call = [python, "-m", "llama_cpp.server", "--model", str(model), "--port", str(port)]
    call += ["--n_ctx", "1024", "--n_threads", "1", "--interrupt_requests", "false", "--type_k", "0"]
    call += ["--type_v", "0", "--verbose", "false"]
    with subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/") as process:
        try:
            ends = time.monotonic() + 60
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    if process.poll() is not None or time.monotonic() > ends:
                        raise SystemExit("llama-cpp-python's server does not start") from None
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def said(name: str, tally: Tally, seconds: float) -> None:
    """The figures."""
    n = sum(tally.statuses.values())
    print(f"{name}: {n} requests in {seconds:.1f} s, {tally.n_equal} whole answers as alone", end="")
    print(f", {len(tally.wrong)} wrong, {tally.tokens / seconds:.0f} tokens/s, {n / seconds:.1f} requests/s")
    if tally.sound_s:
        print(f"  recordings and sessions: {tally.sound_s / seconds:.1f} s of sound a second")
    for what, kinds in (("answers", PER_SET), ("recordings", ["recording"]), ("sessions", ["session"])):
        firsts = sorted(one for kind in kinds for one in tally.firsts[kind])
        if firsts:
            middle, late = firsts[len(firsts) // 2], firsts[int(0.95 * (len(firsts) - 1))]
            print(f"  first words of {len(firsts)} streamed {what}: ", end="")
            print(f"p50 {1e3 * middle:.0f} ms, p95 {1e3 * late:.0f} ms")
    if tally.resident:
        quarters = ", ".join(f"{one / 2**20:.0f}" for one in tally.resident)
        print(f"  memory after each quarter of the time: {quarters} MiB")
    counted = sorted(tally.statuses.items())
    print("  " + ", ".join(f"{kind} {status}: {n}" for (kind, status), n in counted))
    for line in tally.wrong[:10]:
        print(f"  WRONG {line}")


def text_part(name: str, url: str, n: int, seconds: float) -> Tally:
    """The text items alone, all streamed."""
    items = prompts()
    clients = Clients(url, items, lone(url, items), n=n, hostile=False, all_streamed=True)
    said(name, clients.tally, clients.run(seconds))
    return clients.tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--queue", type=int, default=48)
    parser.add_argument("--peer", metavar="PYTHON", help="that has llama-cpp-python[server]")
    given = parser.parse_args()
    tallies = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "phi4-nano"
        converter.convert(builtin_checkpoint(), model, converter.Options(recipe="F32", name="phi4-nano"))
        options = ("-m", model, "--cache-type", "f32", "--ctx-size", 1024, "--queue", given.queue)
        server = Server(os.environ, *options, "--parallel", given.parallel).ready()
        try:
            items = questions()
            clients = Clients(server.url, items, lone(server.url, items), n=given.clients)
            threads = n_threads(server)
            took_s = clients.run(given.seconds, lambda: server.metric("pocketphi_resident_memory_bytes"))
            clients.tally.wrong += left_behind(server, threads)
            clients.tally.wrong += grown(clients.tally.resident, given.seconds)
            said("mixed", clients.tally, took_s)
            print(f"  threads: {threads} before, {n_threads(server)} after")
            tallies.append(clients.tally)
            if given.parallel > 1:
                passes, read = map(server.metric, ("pocketphi_passes_total", "pocketphi_pass_rows_total"))
                print(f"  rows of a pass: {read / passes:.2f}; changes of adapter: ", end="")
                print(f"{server.metric('pocketphi_adapter_changes_total'):.0f}")
            if given.peer:
                tallies.append(text_part("text, pocketphi", server.url, given.clients, given.seconds / 3))
                with peer(given.peer, bundles.load(model).gguf) as url:
                    tallies.append(text_part("text, its peer", url, given.clients, given.seconds / 3))
        finally:
            code = server.stop()
    sys.exit(1 if code or any(tally.wrong for tally in tallies) else 0)


if __name__ == "__main__":
    main()
