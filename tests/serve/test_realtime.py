# SPDX-License-Identifier: Apache-2.0
"""Live sessions over a WebSocket: what is heard is a file's transcript, in the reference's order."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from pocketphi.runtime import audio
from pocketphi.runtime.engine import Model
from pocketphi.runtime.reader import Reader
from pocketphi.runtime.segments import SegmentRules
from pocketphi.runtime.speech_task import Task
from pocketphi.runtime.transcribe import transcribe

from .conftest import Serve
from .served import LONG_S, Server
from .talk import (
    TAIL,
    TRANSCRIPTION,
    Event,
    Int16,
    Talk,
    as_protocol,
    check_order,
    clip,
    encoded,
    refused_handshake,
    silence,
)
from .test_clients import BASE, ROOT
from .test_stopping import endless

websockets = pytest.importorskip("websockets")


def texts(model: Model, sound: Int16, rate: int = 16000, words: str | None = None) -> list[str]:
    """What the Python API makes of the same samples, as a file."""
    whole = audio.from_blocks(iter([sound.reshape(-1, 1)]), rate, 1)
    found = transcribe(Reader(model, Task(words=words), {}), whole, SegmentRules())
    return [segment.text for segment in found]


def spoken(*numbers: int, rate: int = 16000) -> Int16:
    """Clips with pauses after them."""
    import soxr

    parts = []
    for number in numbers:
        found = clip(number)
        if rate != 16000:
            found = soxr.resample(found, 16000, rate, quality="VHQ").astype("<i2")
        parts += [found, silence(1.2, rate)]
    return np.concatenate(parts)


@pytest.mark.filterwarnings("ignore:connect\\(\\) must be used:DeprecationWarning")  # how the client calls
@pytest.mark.parametrize("rate", [16000, 24000])
def test_openais_client(server: Server, alone: Model, rate: int) -> None:
    """Utterances as they end; every event is one of the reference's."""
    openai = pytest.importorskip("openai")
    pydantic = pytest.importorskip("pydantic")
    from openai.types.realtime import RealtimeServerEvent

    reference = pydantic.TypeAdapter(RealtimeServerEvent)
    sound = spoken(1, 2, 3, rate=rate)
    heard: list[Event] = []
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused")
    with client.realtime.connect(
        model="phi4-nano", extra_query={"intent": "transcription"},
        websocket_connection_options={"proxy": None},
    ) as session:  # fmt: skip
        heard.append(json.loads(session.recv_bytes()))
        pcm: Any = {"type": "audio/pcm", "rate": rate}
        session.session.update(
            session={
                "type": "transcription",
                "audio": {"input": {"format": pcm, "transcription": {"model": "any", "language": "en"}}},
            }
        )
        for i in range(0, len(sound), rate):
            session.input_audio_buffer.append(audio=encoded(sound[i : i + rate]))
        session.input_audio_buffer.commit()
        while heard[-1]["type"] != "error":
            data = session.recv_bytes()
            heard.append(json.loads(data))
            assert session.parse_event(data).type == heard[-1]["type"]
    for event in heard:
        if rate == 24000 or "session" not in event:  # the reference has but one rate
            assert reference.validate_python(event).type == event["type"]
    assert heard[0]["type"] == "session.created" and heard[1]["type"] == "session.updated"
    given = heard[1]["session"]["audio"]["input"]
    assert given["format"]["rate"] == rate and given["transcription"]["language"] == "en"
    # All was said and told before the commit, which ends nothing.
    assert heard[-1]["error"]["code"] == "input_audio_buffer_commit_empty"
    check_order(heard[:-1])
    found = [one["transcript"] for one in heard if one["type"] == f"{TRANSCRIPTION}.completed"]
    assert found == texts(alone, sound, rate) and len(found) == 3


def test_words_that_are_settled(server: Server, alone: Model) -> None:
    """Deltas while it is spoken, what may still change only for who asks; times and backlog beside it."""
    sound = clip(1)
    with Talk(server) as talk:
        talk.update(include=[TAIL], audio={"input": {"format": {"type": "audio/pcm", "rate": 16000}}})
        talk.append(sound[:24000])
        tail = talk.until("tail")
        assert tail["tail"] and tail["content_index"] == 0
        assert tail["delay"] >= 0.0 and tail["backlog"] >= 0.0
        talk.append(np.concatenate([sound[24000:], silence(1.0)]))
        done = talk.until("completed")
        assert done["transcript"] == texts(alone, sound)[0]
        assert done["usage"]["type"] == "duration" and 1.5 < done["usage"]["seconds"] < 3.0
        check_order(talk.heard[2:])
        talk.update(include=[])
        talk.append(np.concatenate([clip(2)[:24000], silence(1.0)]))
        talk.until("completed")
        after = talk.heard[talk.heard.index(done) :]
        assert not any(one["type"] == f"{TRANSCRIPTION}.tail" for one in after)


def test_a_commit_ends_an_utterance(server: Server, alone: Model) -> None:
    """At once, without a pause; what follows has its times from the beginning of all audio."""
    first, second = clip(1), clip(2)
    with Talk(server) as talk:
        talk.input()
        talk.append(first)
        talk.commit()
        talk.append(second)
        talk.commit()
        talk.until("completed")
        talk.until("completed")
        assert talk.transcripts() == texts(alone, first) + texts(alone, second)
        check_order(talk.heard[2:])
        starts = [one["audio_start_ms"] for one in talk.heard if "audio_start_ms" in one]
        assert len(starts) == 2 and starts[1] >= len(first) // 16
        talk.say("input_audio_buffer.clear")
        talk.until("input_audio_buffer.cleared")
        assert not any(one["type"] == "error" for one in talk.heard)  # clips end with a little silence


def test_without_turn_detection(server: Server, alone: Model) -> None:
    """All that comes before a commit is one item; nothing is read before."""
    first, second = spoken(1, 2), clip(3)
    with Talk(server) as talk:
        assert talk.input(turn_detection=None)["session"]["audio"]["input"]["turn_detection"] is None
        talk.append(first)
        talk.commit()
        talk.append(second)
        talk.commit()
        one, two = talk.until("completed"), talk.until("completed")
        assert one["transcript"] == " ".join(texts(alone, first))
        assert two["transcript"] == texts(alone, second)[0]
        assert abs(one["usage"]["seconds"] - len(first) / 16000) < 0.001  # as it is rounded
        check_order(talk.heard[2:])
        assert not any("speech_st" in event["type"] for event in talk.heard)
        talk.append(silence(1.0))
        talk.commit()
        assert talk.until("completed")["transcript"] == ""


@pytest.mark.parametrize("turns", [None, {"type": "server_vad"}], ids=["none", "server_vad"])
def test_commits_of_nothing(server: Server, turns: Any) -> None:
    with Talk(server) as talk:
        talk.input(turn_detection=turns)
        talk.commit(event_id="a")
        found = talk.error()
        assert (found["code"], found["event_id"]) == ("input_audio_buffer_commit_empty", "a")
        talk.append(silence(0.09))
        talk.commit(event_id="b")
        assert talk.error()["event_id"] == "b"
        if turns is not None:
            talk.append(silence(1.0))
            talk.commit(event_id="c")
            found = talk.error()
            assert (found["code"], found["event_id"]) == ("input_audio_buffer_commit_empty", "c")
        assert not any("item_id" in event for event in talk.heard)


def test_clear(server: Server, alone: Model) -> None:
    """What was begun is never committed, and what comes afterwards is heard as ever."""
    with Talk(server) as talk:
        talk.input()
        talk.append(clip(1)[:24000])
        begun = talk.until("input_audio_buffer.speech_started")["item_id"]
        talk.say("input_audio_buffer.clear")
        talk.until("input_audio_buffer.cleared")
        n = len(talk.heard)
        talk.append(clip(2))
        talk.commit()
        assert talk.until("completed")["transcript"] == texts(alone, clip(2))[0]
        assert not any(one.get("item_id") == begun for one in talk.heard[n:])
        check_order(talk.heard[2:])
        talk.say("input_audio_buffer.clear")
        talk.until("input_audio_buffer.cleared")  # of nothing


def test_clear_without_turn_detection(server: Server, alone: Model) -> None:
    """What was committed is read; what was not, is not."""
    with Talk(server) as talk:
        talk.input(turn_detection=None)
        talk.append(clip(1))
        talk.commit()
        talk.append(clip(2))
        talk.say("input_audio_buffer.clear")
        talk.append(clip(3))
        talk.commit()
        talk.until("completed")
        talk.until("completed")
        assert talk.transcripts() == texts(alone, clip(1)) + texts(alone, clip(3))
        assert sum(one["type"] == "input_audio_buffer.cleared" for one in talk.heard) == 1


def test_words_to_expect(server: Server, alone: Model) -> None:
    """They are for the next item, whatever has come before."""
    words = "Grace, Victor"
    with Talk(server) as talk:
        talk.input()
        talk.append(spoken(1))
        talk.until("completed")
        asked = {"prompt": "Grace", "keywords": ["Victor"]}
        found = talk.input(transcription=asked, turn_detection={"type": "server_vad"})
        assert found["session"]["audio"]["input"]["transcription"]["keywords"] == ["Victor"]
        talk.append(spoken(3))
        talk.until("completed")
        assert talk.transcripts() == texts(alone, clip(1)) + texts(alone, clip(3), words=words)


def test_pauses(server: Server) -> None:
    """A pause that is too short for one setting ends an utterance with another."""
    sound = np.concatenate([clip(1), silence(0.1), clip(2), silence(3.0)])
    for ms, n in ((2000, 1), (200, 2)):
        with Talk(server) as talk:
            talk.input(turn_detection={"type": "server_vad", "silence_duration_ms": ms, "threshold": 0.4})
            talk.append(sound)
            talk.commit()
            talk.until("error")
            assert len(talk.transcripts()) >= n if n > 1 else len(talk.transcripts()) == 1


def test_the_older_form(server: Server, alone: Model) -> None:
    with Talk(server) as talk:
        talk.say(
            "transcription_session.update",
            session={
                "input_audio_format": "pcm16",
                "input_audio_transcription": {"model": "any", "language": "en", "prompt": ""},
                "turn_detection": None,
            },
        )
        found = talk.until("transcription_session.updated")["session"]
        assert found["input_audio_format"] == "pcm16" and found["turn_detection"] is None
        sound = spoken(2, rate=24000)
        talk.append(sound)
        talk.commit()
        assert talk.until("completed")["transcript"] == texts(alone, sound, 24000)[0]


def test_settings_that_cannot_change(server: Server) -> None:
    with Talk(server) as talk:
        talk.input()
        talk.append(silence(0.5))
        found = talk.input(rate=24000)["error"]
        assert (found["code"], found["param"]) == ("session_in_use", "session.audio.input.format")
        found = talk.input(turn_detection=None)["error"]
        assert (found["code"], found["param"]) == ("session_in_use", "session.audio.input.turn_detection")
        talk.say("input_audio_buffer.clear")
        talk.until("input_audio_buffer.cleared")
        assert talk.input(turn_detection=None)["type"] == "session.updated"
        assert talk.input(rate=24000)["error"]["code"] == "session_in_use"


def test_who_leaves_is_forgotten(server: Server) -> None:
    """In the middle of an utterance, and while others are read."""
    for turns in ({"type": "server_vad"}, None):
        with Talk(server) as talk:
            talk.input(turn_detection=turns)
            talk.append(np.concatenate([spoken(1, 2, 3, 4), clip(5)]))
            if turns is None:
                talk.commit()
            assert server.metric("pocketphi_listeners") >= 1
        server.until(lambda: server.metric("pocketphi_listeners") == 0)
    assert server.metric("pocketphi_requests_running") == server.metric("pocketphi_queue_length") == 0
    assert server.answer() == "The capital of France is Paris."


def test_several_at_a_time(server: Server, alone: Model) -> None:
    """More sessions than may wait in the queue, each with its own words."""
    numbers = (1, 2, 3, 4, 5, 6)
    with ExitStack() as all_of_them:
        talks = [all_of_them.enter_context(Talk(server)) for _ in numbers]
        for talk, number in zip(talks, numbers, strict=True):
            talk.input()
            talk.append(clip(number))
            talk.commit()
        for talk, number in zip(talks, numbers, strict=True):
            talk.until("completed")
            assert talk.transcripts() == texts(alone, clip(number))


def test_a_server_with_a_key_is_told_to_stop(serve: Serve, alone: Model) -> None:
    """What is being said is read to its end, and the program ends within its time."""
    server = serve("--api-key", "one", "--grace", 30).ready()
    status, headers, error = refused_handshake(server)
    assert (status, error["code"], headers["WWW-Authenticate"]) == (401, "invalid_api_key", "Bearer")
    with (
        Talk(server, headers={"Authorization": "Bearer one"}) as first,
        Talk(server, protocols=["realtime", as_protocol("one")]) as second,
    ):
        assert not first.socket.protocol.extensions  # compression was offered
        assert first.socket.subprotocol is None and second.socket.subprotocol == "realtime"
        for talk in (first, second):
            talk.input()
            talk.append(clip(1))
        first.until("input_audio_buffer.speech_started")
        server.process.send_signal(signal.SIGTERM)
        for talk in (first, second):
            with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
                while True:
                    talk.hear()
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 1012
            assert talk.transcripts() == texts(alone, clip(1))
            assert talk.heard[-1]["error"]["code"] == "server_stopping"
    assert server.process.wait(LONG_S) == 0
    assert not any("Traceback" in line or "Error" in line or line == "one" for line in server.log)


def test_no_time_left(serve: Serve) -> None:
    """What could not be read within the grace is said to have failed."""
    server = serve("--grace", 1).ready()
    with endless(server), Talk(server) as talk:
        talk.input(turn_detection=None)
        talk.append(clip(1))
        talk.commit()
        talk.until("input_audio_buffer.committed")
        server.process.send_signal(signal.SIGTERM)
        assert talk.until("failed")["error"]["code"] == "server_stopping"
        with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
            while True:
                talk.hear()
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1012
    assert server.process.wait(LONG_S) == 0


def test_the_manuals_example(server: Server) -> None:
    pytest.importorskip("openai")
    section = (ROOT / "docs/server.md").read_text("utf-8").partition("\n## Realtime\n")[2]
    (example, *_) = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert BASE in example
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", example.replace(BASE, server.url)],
        cwd=ROOT, capture_output=True, text=True, timeout=LONG_S, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "Send a message to Grace.\n"), done.stderr
