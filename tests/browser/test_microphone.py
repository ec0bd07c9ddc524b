# SPDX-License-Identifier: Apache-2.0
"""Talking to the page: a spoken question about a picture, and live captions."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import soundfile
from playwright.sync_api import Browser, WebSocketRoute, expect

from pocketphi.runtime.audio import Sound
from pocketphi.runtime.engine import Model
from pocketphi.runtime.parts import Float32
from pocketphi.runtime.reader import Reader
from pocketphi.runtime.segments import SegmentRules
from pocketphi.runtime.speech_task import Task
from pocketphi.runtime.transcribe import transcribe

from ..scoring import EVAL
from ..serve.served import Server
from .fake_devices import RATE, spoken, write_sound
from .scripts import DURATION, OWN_RATE, WATCH_CAPTIONS
from .sent import pictures, reply_to, sounds
from .talk import LONG_MS, Talk

if TYPE_CHECKING:
    from .conftest import Launch, OpenPage

PICTURE, QUESTION = EVAL / "images/vs-005.png", EVAL / "audio/vs-005.flac"
CLIPS = [EVAL / f"audio/asr-{n}.flac" for n in ("001", "003")]
SAID = ["The small woman works in the garden.", "Send a message to Grace."]


def read_wav(data: bytes) -> Float32:
    samples, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    assert rate == RATE and samples.ndim == 1
    found: Float32 = samples
    return found


def transcript(model: Model, samples: Float32) -> list[str]:
    """What `pocketphi transcribe` writes down."""
    sound = Sound("heard", RATE, iter([samples]))
    return [one.text for one in transcribe(Reader(model, Task(), {}), sound, SegmentRules()) if one.text]


def likeness(heard: Float32, clip: Float32) -> float:
    """Correlation of a clip with the part of a recording that is most like it."""
    n = 1 << (len(heard) + len(clip)).bit_length()
    found = np.fft.irfft(np.fft.rfft(heard, n) * np.conj(np.fft.rfft(clip, n)), n)[: len(heard)]
    start = min(int(found.argmax()), len(heard) - len(clip))
    return float(np.corrcoef(heard[start : start + len(clip)], clip)[0, 1])


@pytest.mark.parametrize("clip", range(len(CLIPS)))
def test_words_that_do_not_depend_on_where_a_clip_begins(alone: Model, clip: int) -> None:
    """A device starts when it likes. The encoder sees a row each 80 ms: these are all there are, to 10 ms."""
    for shift_ms in range(0, 80, 10):
        assert transcript(alone, spoken([CLIPS[clip]], 0.6 + shift_ms / 1000)) == [SAID[clip]]


@pytest.fixture
def asking(open_page: OpenPage, start: Launch, server: Server, tmp_path: Path) -> Talk:
    """A page with a picture attached, whose microphone plays a question about it."""
    browser = start(sound=write_sound(tmp_path / "question.wav", spoken([QUESTION])))
    talk = open_page(browser, server)
    talk.attach(PICTURE)
    return talk


def listen(talk: Talk) -> None:
    """Until the whole of the question has been played."""
    expect(talk.page.locator("#talk")).to_have_attribute("aria-pressed", "true", timeout=LONG_MS)
    talk.page.wait_for_timeout(1000 * (len(spoken([QUESTION])) / RATE + 0.5))


def check_spoken(talk: Talk, model: Model) -> None:
    """It was the whole question, and the answer is what the Python API answers to it."""
    found = talk.answer()
    (body,) = talk.bodies()
    sent = body["messages"][0]
    (heard,) = sounds(sent)
    samples, _ = soundfile.read(QUESTION, dtype="float32")
    # Resampled twice, a clip is 0.98 like itself; another one is 0.3.
    assert likeness(read_wav(heard), samples) > 0.9
    assert pictures(sent) == [PICTURE.read_bytes()]
    assert found == reply_to(body, model).text != ""
    assert "vision_speech" in talk.timings()
    player = talk.asked.first.locator("audio")
    assert player.evaluate(DURATION) == pytest.approx(len(read_wav(heard)) / RATE, abs=0.01)


def test_a_spoken_question_about_a_picture(asking: Talk, alone: Model) -> None:
    button = asking.page.locator("#talk")
    button.hover()
    asking.page.mouse.down()
    listen(asking)
    asking.page.mouse.up()
    check_spoken(asking, alone)
    expect(button).to_have_attribute("aria-pressed", "false")


def test_asked_by_keyboard(asking: Talk, alone: Model) -> None:
    asking.page.locator("#talk").focus()
    asking.page.keyboard.down("Space")
    listen(asking)
    asking.page.keyboard.up("Space")
    check_spoken(asking, alone)
    assert asking.page.evaluate("() => document.activeElement !== document.body")


def test_thought_better_of(asking: Talk) -> None:
    """Escape while the button is held: nothing is sent, and the microphone is let go."""
    asking.page.locator("#talk").hover()
    asking.page.mouse.down()
    expect(asking.page.locator("#talk")).to_have_attribute("aria-pressed", "true")
    asking.page.wait_for_timeout(1000)  # more than a tap
    asking.page.keyboard.press("Escape")
    asking.page.mouse.up()
    expect(asking.page.locator("#talk")).to_have_attribute("aria-pressed", "false")
    expect(asking.asked).to_have_count(0)
    asking.attached(1)
    assert asking.bodies() == []


def test_a_device_with_a_rate_of_its_own(
    open_page: OpenPage, start: Launch, server: Server, alone: Model, tmp_path: Path
) -> None:
    browser = start(sound=write_sound(tmp_path / "question.wav", spoken([QUESTION])))
    talk = open_page(browser, server, script=OWN_RATE)
    talk.attach(PICTURE)
    talk.page.locator("#talk").hover()
    talk.page.mouse.down()
    listen(talk)
    talk.page.mouse.up()
    check_spoken(talk, alone)


def captions(talk: Talk) -> Any:
    return talk.page.get_by_role("region", name="Captions").locator(".caption:visible")


def heard(talk: Talk) -> Float32:
    """The samples that the page sent."""
    events = [json.loads(one) for one in talk.sent]
    pieces = [base64.b64decode(one["audio"]) for one in events if one["type"] == "input_audio_buffer.append"]
    return np.frombuffer(b"".join(pieces), "<i2").astype(np.float32) / 32768


@pytest.fixture
def listening(open_page: OpenPage, start: Launch, server: Server, tmp_path: Path) -> Talk:
    """A page whose microphone plays two sentences with a pause between."""
    return open_page(start(sound=write_sound(tmp_path / "said.wav", spoken(CLIPS))), server)


def test_live_captions(listening: Talk, alone: Model, tmp_path: Path) -> None:
    """Their last words are those of the file; words that are settled look so, and what may change is dim."""
    page = listening.page
    page.evaluate(WATCH_CAPTIONS)
    listening.button("Captions").click()
    expect(page.locator("#toggle-captions")).to_have_attribute("aria-pressed", "true")
    lines = captions(listening)
    expect(lines).to_have_count(len(SAID), timeout=LONG_MS)
    expect(lines.last).to_have_text(SAID[-1], timeout=LONG_MS)
    expect(lines.last).to_have_attribute("aria-busy", "false", timeout=LONG_MS)
    listening.button("Stop captions").click()
    expect(page.locator("#toggle-captions")).to_have_attribute("aria-pressed", "false")
    assert lines.all_inner_texts() == SAID == transcript(alone, heard(listening))
    check_shown(page.evaluate("() => window.shown"))
    for name, mark in (("SRT", ","), ("VTT", ".")):
        with page.expect_download(timeout=LONG_MS) as saved:
            listening.button(f"Save {name}").click()
        saved.value.save_as(tmp_path / name)
        assert cues((tmp_path / name).read_text("utf-8"), name, mark) == SAID
    listening.button("Copy to message").click()
    expect(listening.box).to_have_value(" ".join(SAID))


def check_shown(shown: list[list[str]]) -> None:
    """Something was dim before it was settled, and what was settled stayed."""
    dim = [one for one in shown if one[1].strip()]
    assert dim and all(committed != tail for _, _, committed, tail in dim)
    for said in SAID:
        assert said in [committed.strip() for committed, _, _, _ in shown]
    assert all(any(said.startswith(one[0].strip()) for said in SAID) for one in shown)


def cues(file: str, name: str, mark: str) -> list[str]:
    """The words of a caption file, whose times follow one another within the recording."""
    blocks = [one.splitlines() for one in file.strip().split("\n\n")]
    if name == "VTT":
        assert blocks.pop(0) == ["WEBVTT"]
    else:
        assert [one.pop(0) for one in blocks] == ["1", "2"]
    times = [seconds for one in blocks for seconds in span(one[0], mark)]
    assert times == sorted(times) and len(set(times)) == len(times)
    ends = len(spoken(CLIPS)) / RATE
    assert times[0] > 0 and times[-1] < ends
    return ["\n".join(one[1:]) for one in blocks]


def span(line: str, mark: str) -> tuple[float, float]:
    time = rf"(\d\d):(\d\d):(\d\d)\{mark}(\d\d\d)"
    found = re.fullmatch(f"{time} --> {time}", line)
    assert found is not None, line
    h, m, s, ms, *end = map(int, found.groups())
    return h * 3600 + m * 60 + s + ms / 1000, end[0] * 3600 + end[1] * 60 + end[2] + end[3] / 1000


def test_captions_that_are_stopped_while_somebody_speaks(listening: Talk) -> None:
    """What has been said until then is read to its end, and they can begin again at once."""
    listening.button("Captions").click()
    lines = captions(listening)
    expect(lines.first).to_have_attribute("aria-busy", "false", timeout=LONG_MS)  # the second comes soon
    listening.page.locator("#toggle-captions").click()
    listening.page.locator("#toggle-captions").click()
    expect(listening.page.locator("#toggle-captions")).to_have_attribute("aria-pressed", "true")
    expect(lines.last).to_have_text(SAID[1], timeout=LONG_MS)  # the device began anew
    listening.button("Stop captions").click()
    found = lines.all_inner_texts()
    assert (found[0], found[-2:]) == (SAID[0], SAID) and len(found) in (3, 4)


def test_captions_of_a_server_that_is_slow_to_begin(listening: Talk) -> None:
    """What was said until it had begun is not lost, though captions have been stopped since."""
    waiting: list[Callable[[], None]] = []
    slow = True

    def pass_on(page_side: WebSocketRoute) -> None:
        def answered(message: str | bytes) -> None:
            if slow:
                waiting.append(lambda: page_side.send(message))
            else:
                page_side.send(message)

        page_side.connect_to_server().on_message(answered)

    listening.page.route_web_socket(re.compile("/v1/realtime"), pass_on)
    listening.button("Captions").click()
    listening.page.wait_for_timeout(1000 * (len(spoken(CLIPS[:1])) / RATE + 0.5))
    listening.button("Stop captions").click()
    assert waiting
    slow = False
    for answer in waiting:
        answer()
    expect(captions(listening).first).to_have_text(SAID[0], timeout=LONG_MS)
    expect(captions(listening).first).to_have_attribute("aria-busy", "false", timeout=LONG_MS)


def test_captions_with_a_key(
    open_page: OpenPage, start: Launch, user: dict[str, str], serve: Any, tmp_path: Path
) -> None:
    """A browser cannot send the header: the key goes another way, and none of it into an address."""
    key = "a-key=with/characters+that~subprotocols,lack"
    server = serve("--api-key", key)
    server.until(lambda: server.get("/health").status == 200)
    browser: Browser = start(sound=write_sound(tmp_path / "said.wav", spoken(CLIPS[:1])))
    talk = open_page(browser, server, wait=False)
    talk.expected += ["401"]
    talk.until_status("The API key is wrong or missing")
    talk.set(API_key=key)
    talk.until_status("Ready")
    talk.button("Captions").click()
    expect(captions(talk).first).to_have_text(SAID[0], timeout=LONG_MS)
    talk.button("Stop captions").click()
    assert talk.sockets and all(key not in one.url for one in talk.sockets)
