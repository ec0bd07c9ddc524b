# SPDX-License-Identifier: Apache-2.0
"""What the server adds to the Python API: time to the first token, and over a long answer, in turns.

    python -m tests.tools.bench_serve [MODEL] [--repetitions 30] [--threads 1] [--json]

MODEL is a model directory; without it the built-in phi4-nano, whose tokens take so little time that nothing
hides. The server is a process of its own, asked over one connection that stays open. Medians of interleaved
repetitions, and the median of what each one of the server's took beyond the one of the API before it.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from pocketphi.convert.builtin import builtin_bundle
from pocketphi.runtime.engine import Model

CALL = [sys.executable, "-c", "import sys; sys.argv[0] = 'pocketphi'; from pocketphi.cli import main; main()"]
LONG = "0"  # phi4-nano goes on with zeros, and never stops
TOKENS = 960  # within the short RoPE table
WARM_UP = 3


@contextmanager
def serving(model: Path, threads: int) -> Iterator[http.client.HTTPConnection]:
    """A connection to a server of one's own."""
    call = [*CALL, "serve", "-m", str(model), "--port", "0", "-t", str(threads)]
    with subprocess.Popen(call, stderr=subprocess.PIPE, text=True, env=dict(os.environ)) as process:
        assert process.stderr is not None
        port = 0
        for line in process.stderr:
            if line.startswith("listening on "):
                port = int(line.rpartition(":")[2])
            if line.rstrip().endswith(" is ready"):
                break
        connection = http.client.HTTPConnection("127.0.0.1", port)
        try:
            yield connection
        finally:
            connection.close()
            process.terminate()
            process.stderr.close()


def asked(connection: http.client.HTTPConnection, path: str, fields: Any) -> tuple[float, float]:
    """Seconds to the first event of a stream (or the end), and to the end."""
    body = json.dumps(fields)
    started = time.perf_counter()
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    answer.readline() if fields.get("stream") else answer.read()
    first = time.perf_counter()
    answer.read()
    return first - started, time.perf_counter() - started


def first_of_api(model: Model, question: str) -> float:
    started = time.perf_counter()
    answer = model.chat([{"role": "user", "content": question}], stream=True)
    next(answer)
    found = time.perf_counter() - started
    for _ in answer:
        pass
    return found


def whole_of_api(model: Model) -> float:
    started = time.perf_counter()
    model.complete(LONG, max_tokens=TOKENS)
    return time.perf_counter() - started


def rest_of_api(model: Model) -> float:
    answer = model.complete(LONG, max_tokens=TOKENS, stream=True)
    next(answer)
    started = time.perf_counter()
    for _ in answer:
        pass
    return time.perf_counter() - started


def compare(one: Callable[[int], float], other: Callable[[int], float], n: int) -> dict[str, float]:
    """Medians in milliseconds of two things done in turns, and of how much longer the second took."""
    found = [(one(i), other(i)) for i in range(n + WARM_UP)][WARM_UP:]
    api, served = median(a for a, _ in found), median(b for _, b in found)
    extra = median(b - a for a, b in found)
    return {"api_ms": 1e3 * api, "server_ms": 1e3 * served, "extra_ms": 1e3 * extra}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    directory, n = given.model or builtin_bundle(), given.repetitions

    def question(i: int) -> str:
        return f"What is {i % 9} plus {i % 7}?"

    with Model(directory, n_threads=given.threads) as model, serving(directory, given.threads) as connection:

        def chat(i: int) -> float:
            turns = [{"role": "user", "content": question(i)}]
            return asked(connection, "/v1/chat/completions", {"messages": turns, "stream": True})[0]

        def long(stream: bool) -> tuple[float, float]:
            fields = {"prompt": LONG, "max_tokens": TOKENS, "stream": stream}
            return asked(connection, "/v1/completions", fields)

        def streamed(_: int) -> float:
            first, end = long(True)
            return end - first

        found = {
            "first token": compare(lambda i: first_of_api(model, question(i)), chat, n),
            f"{TOKENS} tokens in one": compare(lambda _: whole_of_api(model), lambda _: long(False)[1], n),
            f"{TOKENS} tokens streamed, after the first": compare(lambda _: rest_of_api(model), streamed, n),
        }
    if given.json:
        print(json.dumps(found))
        return
    print("| | Python API, ms | server, ms | more, ms | more, % |\n|---|---|---|---|---|")
    for name, row in found.items():
        share = 100 * row["extra_ms"] / row["api_ms"]
        print(
            f"| {name} | {row['api_ms']:.2f} | {row['server_ms']:.2f} | {row['extra_ms']:.2f} | {share:.1f} |"
        )


if __name__ == "__main__":
    main()
