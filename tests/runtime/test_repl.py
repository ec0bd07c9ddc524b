# SPDX-License-Identifier: Apache-2.0
"""The chat loop on the real little model, with a scripted person."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import soundfile

from pocketphi.runtime import audio
from pocketphi.runtime.clock import SkippingClock
from pocketphi.runtime.engine import Model
from pocketphi.runtime.errors import InputError
from pocketphi.runtime.parts import Float32
from pocketphi.runtime.repl import ChatSettings, Repl, read_chat
from pocketphi.runtime.sources import Paced, Source
from pocketphi.runtime.spoken_turn import record_turn

from ..conftest import Converted

Line = str | Callable[[], str | None]


class Script:
    """Types the given lines and keeps what comes back."""

    def __init__(self, lines: list[Line]) -> None:
        self.lines = list(lines)
        self.answers = ""
        self.said: list[str] = []
        self.interrupt_after: int | None = None

    def read(self, prompt: str) -> str | None:
        if not self.lines:
            return None
        line = self.lines.pop(0)
        return line() if callable(line) else line

    def write(self, text: str, style: Literal["answer", "reasoning"] = "answer") -> None:
        self.answers += text
        if self.interrupt_after is not None and len(self.answers) >= self.interrupt_after:
            self.interrupt_after = None
            raise KeyboardInterrupt

    def say(self, line: str) -> None:
        self.said.append(line)


def chat(model: Model, *lines: Line, system: str | None = None, **options: object) -> Script:
    script = Script(list(lines))
    Repl(model, ChatSettings({**options}), script, system=system).run()  # type: ignore[typeddict-item]
    return script


def test_a_conversation(nano_model: Model) -> None:
    script = chat(nano_model, "What is the capital of France?", "How do you spell tea?")
    assert script.answers == "The capital of France is Paris.\nT-E-A.\n"
    assert script.said == []


def test_leaving(nano_model: Model) -> None:
    for word in ("/exit", "/quit", "/exit now"):
        script = chat(nano_model, word, "What is the capital of France?")
        assert script.answers == ""


def test_several_lines(nano_model: Model) -> None:
    one = chat(nano_model, "What is the capital\\", "of France?")
    assert "Paris" in one.answers
    block = chat(nano_model, '"""What is', "the capital", 'of France?"""')
    assert "Paris" in block.answers
    inline = chat(nano_model, '"""What is the capital of France?"""')
    assert "Paris" in inline.answers


def test_commands(nano_model: Model) -> None:
    script = chat(nano_model, "/help", "/nonsense", "/system Answer with one word.", "/system", "/stats")
    assert "/reset" in script.said[0]
    assert script.said[1].startswith("error: no command '/nonsense'")
    assert script.said[2:4] == ["system prompt: Answer with one word."] * 2
    assert script.said[4].startswith("context ")


def test_reset_forgets(nano_model: Model) -> None:
    script = chat(nano_model, "What is the capital of France?", "/reset", "/stats")
    assert any("0 turns" in line for line in script.said)


def test_two_slashes_begin_a_message_with_one(nano_model: Model) -> None:
    script = chat(nano_model, "//help", max_tokens=4)
    assert script.answers.strip()
    assert not any("/reset" in line for line in script.said)


def test_save_and_load(nano_model: Model, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    chat(nano_model, "What is the capital of France?", f"/save {path}", system="Be brief.")
    assert read_chat(path)[0] == "Be brief."
    assert [m.role for m in read_chat(path)[1]] == ["user", "assistant"]
    script = chat(nano_model, f"/load {path}", "How do you spell tea?", f"/save {path}")
    assert script.said[0] == "(loaded 2 turns)"
    assert len(read_chat(path)[1]) == 4
    script = chat(
        nano_model, "/save", "/load", f"/load {tmp_path / 'gone'}", f"/save {tmp_path / 'no' / 'x'}"
    )
    assert [line.partition(":")[0] for line in script.said] == ["error"] * 4


@pytest.mark.parametrize(
    "raw",
    [
        "", "[]", "{}", '{"format": "pocketphi-chat", "version": 2, "messages": []}',
        '{"format": "pocketphi-chat", "version": 1, "messages": [{"role": "x", "content": ""}]}',
        '{"format": "pocketphi-chat", "version": 1, "messages": [{"role": "user"}]}',
        '{"format": "pocketphi-chat", "version": 1, "system": 3, "messages": []}',
        '{"format": "pocketphi-chat", "version": 1, "messages":'
        ' [{"role": "assistant", "content": "", "tool_calls": [{"name": 1}]}]}',
        "[" * 100_000,
    ],
)  # fmt: skip
def test_saved_chats_that_are_none(raw: str, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    path.write_text(raw, "utf-8")
    with pytest.raises(InputError) as caught:
        read_chat(path)
    assert "\n" not in str(caught.value)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        read_chat(path)


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(nano_model: Model) -> None:
    script = Script(["What is the capital of France?", "How do you spell tea?"])
    script.interrupt_after = 5
    Repl(nano_model, ChatSettings({}), script, system=None).run()
    assert any("stopped" in line for line in script.said)
    assert script.answers.endswith("\n")
    assert "Paris" not in script.answers


def test_ctrl_c_at_the_prompt_does_not_leave(nano_model: Model) -> None:
    def interrupted() -> str | None:
        raise KeyboardInterrupt

    script = chat(nano_model, interrupted, "What is the capital of France?")
    assert "Paris" in script.answers


def test_an_unusable_message_is_an_error_line_and_no_turn(nano_model: Model) -> None:
    script = chat(nano_model, "\ud800", "/stats")
    assert script.said[0].startswith("error: ")
    assert any("0 turns" in line for line in script.said)


def test_a_tool_call_asks_for_its_result(nano_model: Model) -> None:
    tools = json.dumps(
        [
            {
                "name": "alarm",
                "description": "Set an alarm",
                "parameters": {"hour": {"type": "int"}, "day": {"type": "str"}},
            }
        ]
    )
    asked = "Wake me up at 9 on Saturday."
    script = chat(nano_model, asked, "", "/stats", system="You have some tools.", tools=tools)
    assert 'the model calls alarm({"hour": 9, "day": "Saturday"})' in script.said
    assert any("2 turns" in line for line in script.said), "left unanswered: question and call"
    script = chat(
        nano_model, asked, '{"ok": true}', "", "", "/stats", system="You have some tools.", tools=tools
    )
    assert any("4 turns" in line or "6 turns" in line for line in script.said)


EVAL = Path(__file__).resolve().parents[2] / "nano" / "eval"


@pytest.fixture(scope="module")
def seeing(converted: Converted) -> Iterator[Model]:
    with Model(converted("phi4-nano", "F32")) as model:
        yield model


def test_a_picture_goes_with_the_next_message(seeing: Model) -> None:
    script = chat(seeing, f"/image {EVAL / 'images' / 'img-012.png'}", "What does the text say?", "/stats")
    assert script.answers == "It says chair.\n"
    assert script.said[0].startswith("(with the next message: ")
    assert any("2 turns" in line for line in script.said)


def test_a_spoken_question_is_an_empty_line(seeing: Model) -> None:
    script = chat(
        seeing, f"/image {EVAL / 'images' / 'vs-003.png'}", f"/audio {EVAL / 'audio' / 'vs-003.flac'}", ""
    )
    assert script.answers == "The circle is orange.\n"


def test_media_that_are_not_there(seeing: Model, tmp_path: Path) -> None:
    script = chat(
        seeing, "/image", f"/audio {tmp_path}", f"/video {tmp_path / 'gone'} 3", "/camera", "", "/stats"
    )
    assert [line.startswith("error: ") for line in script.said[:4]] == [True] * 4
    assert script.answers == ""


def test_a_chat_with_pictures_is_not_saved_without_them(seeing: Model, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    script = chat(
        seeing, f"/image {EVAL / 'images' / 'img-012.png'}", "What does the text say?", f"/save {path}"
    )
    assert "pictures or clips" in script.said[-1]
    assert not path.exists()


def test_reset_drops_what_waits(seeing: Model) -> None:
    script = chat(
        seeing, f"/image {EVAL / 'images' / 'img-012.png'}", "/reset", "What is the capital of France?"
    )
    assert "Paris" in script.answers


def speak(*names: str, interrupt_at: float | None = None) -> Callable[[], Source]:
    """A microphone before which these clips are played, each in silence: every opening hears the next one.

    Ctrl-C comes after `interrupt_at` seconds.
    """
    waiting = list(names)
    room = np.random.default_rng(0).normal(0.0, 1e-4, 3 * audio.SAMPLE_RATE).astype(np.float32)

    def opened() -> Source:
        clip = audio.load(EVAL / "audio" / f"{waiting.pop(0)}.flac")
        assert clip.sample_rate == audio.SAMPLE_RATE
        samples = np.concatenate([room, clip.samples, room])

        def blocks() -> Iterator[Float32]:
            for i in range(0, len(samples), 1600):
                if interrupt_at is not None and i >= interrupt_at * audio.SAMPLE_RATE:
                    raise KeyboardInterrupt
                yield samples[i : i + 1600]

        return Paced(audio.Sound("microphone", audio.SAMPLE_RATE, blocks()), SkippingClock())

    return opened


def talk(model: Model, microphone: Callable[[], Source], *lines: Line) -> Script:
    script = Script(list(lines))
    Repl(model, ChatSettings({}, microphone=microphone), script, system=None).run()
    return script


@pytest.mark.parametrize(
    ("name", "answer"),
    [("sqa-000", "A lion has 4 legs.\n"), ("sqa-003", "The opposite of loud is quiet.\n")],
)
def test_a_spoken_message_is_answered(name: str, answer: str, seeing: Model) -> None:
    script = talk(seeing, speak(name), "/mic", "/stats")
    assert script.answers == answer
    assert "pause" in script.said[0]
    assert any("2 turns" in line for line in script.said)


def kept(name: str, folder: Path) -> Path:
    """What `/mic` would send, as a file."""
    heard = record_turn(speak(name)(), None, lambda line: None)
    assert heard is not None
    path = folder / f"{name}.wav"
    soundfile.write(path, *heard, subtype="FLOAT")
    return path


def test_a_spoken_message_is_a_clip_of_the_same_samples(seeing: Model, tmp_path: Path) -> None:
    for name in ("sqa-001", "sqa-005"):
        spoken = talk(seeing, speak(name), "/mic").answers
        assert spoken.strip()
        assert spoken == chat(seeing, f"/audio {kept(name, tmp_path)}", "").answers


@pytest.mark.parametrize("name", ["vs-001", "vs-003"])
def test_a_spoken_question_about_the_picture_that_waits(name: str, seeing: Model, tmp_path: Path) -> None:
    picture = f"/image {EVAL / 'images' / name}.png"
    script = talk(seeing, speak(name, "sqa-000"), picture, "/mic", "/reset", "/mic")
    asked = chat(seeing, picture, f"/audio {kept(name, tmp_path)}", "")
    first, second, *_ = script.answers.splitlines()
    assert first + "\n" == asked.answers
    assert second == "A lion has 4 legs.", "the picture went with the first message alone"


def test_text_goes_with_what_is_said(seeing: Model) -> None:
    script = talk(seeing, speak("asr-000"), "/mic Transcribe the audio clip into text.")
    assert script.answers == "How many legs does a rooster have?\n"


def test_ctrl_c_while_speaking_sends_nothing(seeing: Model) -> None:
    picture = EVAL / "images" / "img-012.png"
    microphone = speak("sqa-000", interrupt_at=3.5)
    script = talk(seeing, microphone, f"/image {picture}", "/mic", "What does the text say?")
    assert any("not sent" in line for line in script.said)
    assert script.answers == "It says chair.\n", "the picture still waits for its message"


def test_saying_nothing_sends_nothing(seeing: Model) -> None:
    def silent() -> Source:
        return Paced(
            audio.Sound("microphone", audio.SAMPLE_RATE, iter([np.zeros(48000, np.float32)])), SkippingClock()
        )

    script = talk(seeing, silent, "/mic", "/stats")
    assert "(nothing was said)" in script.said
    assert any("0 turns" in line for line in script.said)


def test_a_model_that_cannot_listen_does_not_record(converted: Converted) -> None:
    def opened() -> Source:
        raise AssertionError("it must not listen")

    with Model(converted("phi4-mini", "Q8_0")) as text_only:
        script = talk(text_only, opened, "/mic")
        assert script.said == [f"error: {text_only.bundle.name} has no speech encoder: it cannot listen"]


def test_what_was_said_waits_where_the_message_could_not_be_sent(seeing: Model, tmp_path: Path) -> None:
    """A picture that is none: the recording and it wait for the next message, until /reset."""
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    microphone = speak("sqa-000", "sqa-003")
    script = talk(seeing, microphone, f"/image {bad}", "/mic", "", "/reset", "/mic")
    assert f"(with the next message: {bad}, microphone)" in script.said
    assert sum(line.startswith("error: ") for line in script.said) == 2
    assert script.answers == "The opposite of loud is quiet.\n"


def test_what_was_said_is_sent_with_the_next_message(seeing: Model) -> None:
    limit = "word " * 20000  # more than the context holds
    script = talk(seeing, speak("sqa-000"), f"/mic {limit}", "")
    assert sum(line.startswith("error: ") for line in script.said) == 1
    assert script.answers == "A lion has 4 legs.\n"


def test_a_microphone_that_cannot_be_opened_is_an_error_line(seeing: Model) -> None:
    def missing() -> Source:
        raise InputError("there is no microphone")

    script = talk(seeing, missing, "/mic", "What is the capital of France?")
    assert script.said == ["error: there is no microphone"]
    assert "Paris" in script.answers
