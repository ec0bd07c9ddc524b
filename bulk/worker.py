# SPDX-License-Identifier: Apache-2.0
"""A process with a model: items come in on its standard input, outcomes go out, each a line of JSON.

    in   {"model": {…}, "items": {…}}                        first: settings
    in   {"id", "number", "text"}                            an item
    out  {"ready": true}                                     the model is loaded
    out  {"record", "ok", "tokens", "audio_s"}               what came of an item
    out  {"error": {"class", "message"}}                     nothing more will come

When the input ends, whoever asked is gone: the process ends at once, in the middle of an item too.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from typing import Any, BinaryIO

from ..runtime.errors import PocketPhiError
from .lines import Task
from .performer import ItemSettings, ModelSettings, Performer, to_object


def main() -> None:
    """The process, to its end."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what native libraries print is not ours to send
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(sys.stdin.buffer, lines), daemon=True).start()
    settings = json.loads(lines.get())
    try:
        with Performer(ModelSettings(**settings["model"]), ItemSettings(**settings["items"])) as performer:
            _write(out, {"ready": True})
            while True:
                task = Task(**json.loads(lines.get()))
                _write(out, to_object(performer.perform(task)))
    except PocketPhiError as exc:
        _write(out, {"error": {"class": type(exc).__name__, "message": str(exc)}})


def _read(source: BinaryIO, lines: queue.SimpleQueue[bytes]) -> None:
    while line := source.readline():
        lines.put(line)
    os._exit(0)  # no clean-up: nobody waits for what this process does


def _write(out: BinaryIO, value: dict[str, Any]) -> None:
    out.write(json.dumps(value).encode("ascii") + b"\n")
    out.flush()
