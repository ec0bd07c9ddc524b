# SPDX-License-Identifier: Apache-2.0
"""Many clients of one server at a time: is every answer the one that a lone client gets, and at what pace?

    python -m tests.tools.load_serve [--seconds 60] [--clients 64] [--parallel 4] [--peer PYTHON]

The server is a process of its own with phi4-nano at F32 and an f32 cache, where rounding decides no token.
A lone client first asks everything once. Then clients ask for text and about pictures, sound and both, whole
and streamed; some leave in the middle, some send what is none. The queue is shorter than the clients are
many, so some are told to come again, and do. The exit code is 1 if an answer or a status is not what it has
to be.

--peer: a Python with llama-cpp-python's own server. Both then answer the text items alone, one server after
the other.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pocketphi import convert as converter
from pocketphi.convert.builtin import builtin_checkpoint
from pocketphi.runtime import bundle as bundles

from ..scoring import EVAL, rows
from ..serve.served import ENDLESS, FRANCE, Server, image, sound, text

TIMEOUT_S = 300.0  # of a client: who waits so long has been forgotten
TOKENS = 48
PER_SET = {"text": 8, "vision": 4, "speech": 4, "vision_speech": 4}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
JSON = {"Content-Type": "application/json"}
SHARE_LEAVING, SHARE_MALFORMED = 0.1, 0.1  # of requests
_MARKUP = re.compile(r"<\|[^|]*\|>")


@dataclass(frozen=True)
class Item:
    """A question."""

    kind: str
    path: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Malformed:
    """A request that is none."""

    name: str
    body: bytes
    status: int
    path: str = CHAT
    headers: Mapping[str, str] = field(default_factory=lambda: JSON)


@dataclass(frozen=True)
class Heard:
    """What came back. Of an answer that is whole, its text, and its tokens if it says them."""

    status: int
    text: str | None = None
    tokens: int = 0
    first_s: float = 0.0
    retry_after: float = 0.0


class Tally:
    """What all clients saw."""

    def __init__(self) -> None:
        self.statuses: Counter[tuple[str, int]] = Counter()
        self.firsts: list[float] = []  # seconds, of streams
        self.tokens = self.n_equal = 0
        self.wrong: list[str] = []
        self.resident: list[float] = []  # bytes: after each quarter of the time
        self._lock = threading.Lock()

    def add(self, kind: str, heard: Heard, *, right: bool, tokens: int = 0, what: str = "") -> None:
        """One request is over."""
        with self._lock:
            self.statuses[kind, heard.status] += 1
            self.tokens += tokens
            if heard.first_s:
                self.firsts.append(heard.first_s)
            if not right:
                self.wrong.append(f"{kind} {heard.status}: {what}"[:300])
            elif heard.text is not None:
                self.n_equal += 1


def words_of(row: Mapping[str, str]) -> str:
    """A prompt without its markup."""
    return _MARKUP.sub("", row["prompt"])


def questions() -> list[Item]:
    """Of every kind some, from the evaluation set."""
    found = []
    for name, n in PER_SET.items():
        for row in rows(name)[:n]:
            parts: list[Any] = [image(EVAL / path) for path in row.get("images") or ()]
            parts += [sound(EVAL / row["audio"], "flac")] if row.get("audio") else []
            parts.append(text(words_of(row)))
            fields = {"messages": [{"role": "user", "content": parts}], "max_tokens": TOKENS}
            found.append(Item(name, CHAT, fields))
    return found


def prompts() -> list[Item]:
    """The text items alone, in a form that llama-cpp-python's server takes too."""
    some = rows("text")[: PER_SET["text"]]
    return [
        Item("text", COMPLETIONS, {"prompt": row["prompt"], "max_tokens": TOKENS, "temperature": 0})
        for row in some
    ]


def malformed() -> list[Malformed]:
    """With the status that docs/server.md announces."""

    def user(*parts: Any, **fields: Any) -> bytes:
        return json.dumps({"messages": [{"role": "user", "content": parts}], **fields}).encode()

    def picture(url: str) -> bytes:
        return user({"type": "image_url", "image_url": {"url": url}}, text("What is it?"))

    return [
        Malformed("no JSON", b"{", 400),
        Malformed("no UTF-8", b'{"messages": "\xff"}', 400),
        Malformed("deep JSON", b"[" * 5000, 400),
        Malformed("two answers", user(text("a"), n=2), 400),
        Malformed("no base64", picture("data:image/png;base64,????"), 400),
        Malformed("no picture", picture("data:image/png;base64,AAAA"), 422),
        Malformed("a form", b"a=b", 415, headers={"Content-Type": "application/x-www-form-urlencoded"}),
        Malformed("no such path", b"{}", 404, "/v1/nothing"),
        Malformed("too long", b"{", 413, headers=JSON | {"Content-Length": "999999999"}),
    ]


def ask(url: str, path: str, body: bytes, headers: Mapping[str, str] = JSON, leave_after: int = 0) -> Heard:
    """One request on a connection of its own; the client leaves after so many events of a stream."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT_S)
    try:
        started = time.perf_counter()
        connection.request("POST", path, body, dict(headers))
        answer = connection.getresponse()
        if answer.status != 200:
            retry = float(answer.headers.get("Retry-After", 0))
            answer.read()
            return Heard(answer.status, retry_after=retry)
        if not answer.headers["Content-Type"].startswith("text/event-stream"):
            return _whole(json.loads(answer.read()))
        return _streamed(answer, started, leave_after)
    finally:
        connection.close()


def _whole(value: Any) -> Heard:
    choice = value["choices"][0]
    words = choice["message"]["content"] if "message" in choice else choice["text"]
    return Heard(200, f"{words}|{choice['finish_reason']}", value["usage"]["completion_tokens"])


def _streamed(answer: http.client.HTTPResponse, started: float, leave_after: int) -> Heard:
    words, reason, first_s, n, ended = "", "", 0.0, 0, False
    for line in answer:
        if not line.startswith(b"data: "):
            continue
        ended = line.startswith(b"data: [DONE]")
        if ended:
            continue
        event = json.loads(line[6:])
        for choice in event.get("choices", ()):
            piece = choice["delta"].get("content") if "delta" in choice else choice["text"]
            first_s = first_s or (time.perf_counter() - started if piece else 0.0)
            words, reason, n = words + (piece or ""), choice.get("finish_reason") or reason, n + bool(piece)
        if leave_after and n >= leave_after:
            return Heard(200, first_s=first_s)
    return Heard(200, f"{words}|{reason}" if ended else f"no end: {words}", first_s=first_s)


def body_of(item: Item, *, stream: bool) -> bytes:
    return json.dumps({**item.fields, "stream": stream}).encode()


def lone(url: str, items: Sequence[Item]) -> list[Heard]:
    """What one client gets who is alone, by the item's place."""
    found = [ask(url, item.path, body_of(item, stream=False)) for item in items]
    assert all(one.text is not None for one in found), found
    return found


class Clients:
    """Threads that ask until they may not, or have asked so often."""

    def __init__(
        self, url: str, items: Sequence[Item], answers: Sequence[Heard], *, n: int, hostile: bool = True,
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
        self._none = malformed()
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
        for _ in range(self._most):
            if time.perf_counter() >= self._ends:
                return
            try:
                retry_s = self._once(chance)
            except Exception as exc:
                self.tally.add("broken", Heard(0), right=False, what=repr(exc))
                continue
            if retry_s:
                time.sleep(max(min(retry_s, self._ends - time.perf_counter()), 0.0))

    def _once(self, chance: random.Random) -> float:
        """One request; seconds after which it may be tried again."""
        dice = chance.random() if self._hostile else 1.0
        if dice < SHARE_MALFORMED:
            one = chance.choice(self._none)
            heard = ask(self._url, one.path, one.body, one.headers)
            allowed = (one.status, 429) if one.status == 422 else (one.status,)  # which has to wait its turn
            self.tally.add(f"malformed: {one.name}", heard, right=heard.status in allowed, what=one.name)
        elif dice < SHARE_MALFORMED + SHARE_LEAVING:
            fields = {"messages": FRANCE, "response_format": ENDLESS, "temperature": 1, "stream": True}
            body = json.dumps(fields).encode()
            heard = ask(self._url, CHAT, body, leave_after=chance.randint(1, 4))
            self.tally.add("leaves", heard, right=heard.status in (200, 429) and heard.text is None)
        else:
            i = chance.randrange(len(self._items))
            item = self._items[i]
            stream = self._all_streamed or chance.random() < 0.5
            heard = ask(self._url, item.path, body_of(item, stream=stream))
            wanted = self._answers[i]
            if heard.text is None:
                right = heard.status == 429 and heard.retry_after >= 1
                self.tally.add(item.kind, heard, right=right)
            else:
                what = f"{heard.text!r}, alone {wanted.text!r}"
                right = heard.text == wanted.text
                self.tally.add(item.kind, heard, right=right, tokens=wanted.tokens, what=what)
        return heard.retry_after


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
    firsts = sorted(tally.firsts)
    if firsts:
        middle, late = firsts[len(firsts) // 2], firsts[int(0.95 * (len(firsts) - 1))]
        print(f"  first token of {len(firsts)} streams: p50 {1e3 * middle:.0f} ms, p95 {1e3 * late:.0f} ms")
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
            took_s = clients.run(given.seconds, lambda: server.metric("pocketphi_resident_memory_bytes"))
            said("mixed", clients.tally, took_s)
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
