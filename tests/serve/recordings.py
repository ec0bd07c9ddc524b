# SPDX-License-Identifier: Apache-2.0
"""Recordings of several sentences, and forms that carry them."""

from __future__ import annotations

import io
import json
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from pocketphi.runtime import audio
from pocketphi.runtime.engine import Model
from pocketphi.runtime.reader import Reader, Reading
from pocketphi.runtime.segments import SegmentRules
from pocketphi.runtime.speech_task import Task
from pocketphi.runtime.transcribe import read_utterances
from pocketphi.runtime.transcript import Segment

from ..scoring import EVAL
from . import served
from .served import Reply, Server

RATE = 16000
TRANSCRIPTIONS, TRANSLATIONS = "/v1/audio/transcriptions", "/v1/audio/translations"
CLIP = EVAL / "audio/asr-003.flac"
BOUNDARY = "----a-boundary"


def spoken(n: int, pause_s: float = 1.0) -> np.ndarray[Any, Any]:
    """The first n sentences of the evaluation set, with pauses: float32 [samples] at 16 kHz."""
    silence = np.zeros(int(pause_s * RATE), np.float32)
    clips = [audio.load(EVAL / f"audio/asr-{i % 40:03}.flac") for i in range(n)]
    assert all(clip.sample_rate == RATE for clip in clips)
    return np.concatenate([piece for clip in clips for piece in (silence, clip.samples)])


def encoded(
    samples: np.ndarray[Any, Any], rate: int = RATE, kind: str = "WAV", subtype: str = "PCM_16"
) -> bytes:
    """A sound file."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


def directly(
    model: Model, data: bytes, task: Task | None = None, rules: SegmentRules | None = None
) -> list[tuple[Segment, Reading]]:
    """What the Python API makes of a file."""
    with audio.stream(data) as sound:
        return list(read_utterances(Reader(model, task or Task(), {}), sound, rules or SegmentRules()))


Field = tuple[str, str | bytes]


def body_of(fields: Sequence[Field], file: bytes | None, file_name: str = "clip.wav") -> bytes:
    """A form."""
    found = b""
    start = f"--{BOUNDARY}\r\nContent-Disposition: form-data; name="
    for name, value in fields:
        raw = value if isinstance(value, bytes) else value.encode()
        found += f'{start}"{name}"\r\n\r\n'.encode() + raw + b"\r\n"
    if file is not None:
        found += f'{start}"file"; filename="{file_name}"\r\n'.encode()
        found += b"Content-Type: application/octet-stream\r\n\r\n" + file + b"\r\n"
    return found + f"--{BOUNDARY}--\r\n".encode()


KIND = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


def post(
    server: Server,
    file: bytes | None,
    *fields: Field,
    path: str = TRANSCRIPTIONS,
    file_name: str = "clip.wav",
) -> Reply:
    """Send a form."""
    return server.post(path, body_of(fields, file, file_name), KIND)


class Events:
    """The events of a streamed answer, one by one."""

    def __init__(self, server: Server, file: bytes, *fields: Field, path: str = TRANSCRIPTIONS) -> None:
        body = body_of([*fields, ("stream", "true")], file)
        request = urllib.request.Request(server.url + path, body, KIND)
        self.answer = urllib.request.urlopen(request, timeout=served.LONG_S)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for line in self.answer:
            if line.strip():
                assert line.startswith(b"data: ")
                yield json.loads(line[6:])

    def close(self) -> None:
        self.answer.close()

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


START = """
import sys
from pathlib import Path
from pocketphi.serve.limits import Limits
from pocketphi.serve.run import Settings, run
import logging; logging.basicConfig(stream=sys.stderr, format="%(message)s")
limits = Limits(LIMITS)
run(Settings(Path(sys.argv[-1]), port=0, limits=limits, options={"n_threads": 1, "kv_type": "f32"}))
"""


def server_with(user: Mapping[str, str], nano: Path, limits: str) -> Server:
    """A server with limits that the command line does not have."""
    call = served.CALL
    try:
        served.CALL = [sys.executable, "-c", START.replace("LIMITS", limits)]
        return Server(user, nano)
    finally:
        served.CALL = call
