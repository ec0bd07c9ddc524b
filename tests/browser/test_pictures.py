# SPDX-License-Identifier: Apache-2.0
"""Pictures: attached, dropped, pasted, taken. Each answer is the Python API's to what was sent."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import Browser, expect

from pocketphi.runtime.engine import Model

from ..scoring import EVAL
from ..serve.served import Server
from .fake_devices import write_picture
from .scripts import COPY_PICTURE, LIVE_TRACKS, NO_DEVICES, TRANSFER
from .sent import pictures, reply_to, sounds
from .talk import LONG_MS, Talk

if TYPE_CHECKING:
    from .conftest import Launch, OpenPage

PICTURE, OTHER, CLIP = EVAL / "images/img-012.png", EVAL / "images/vs-003.png", EVAL / "audio/asr-003.flac"
ASKED, CHAIR = "What does the text say?", "It says chair."


def base64_of(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def ask(talk: Talk, model: Model, words: str = ASKED) -> str:
    """The answer, which is what the Python API answers to the same."""
    talk.send(words)
    found = talk.answer()
    reply = reply_to(talk.bodies()[0], model)
    assert found == reply.text and reply.mode in talk.timings()
    talk.attached(0)
    return found


def test_attached(talk: Talk, alone: Model) -> None:
    with talk.page.expect_file_chooser() as chosen:
        talk.button("Attach").click()
    chosen.value.set_files([PICTURE])
    talk.attached(1)
    assert ask(talk, alone) == CHAIR
    assert pictures(talk.bodies()[0]["messages"][0]) == [PICTURE.read_bytes()]
    shown = talk.asked.first.locator("img")
    expect(shown).to_have_attribute("alt", PICTURE.name)


def test_several_and_one_removed(talk: Talk, alone: Model) -> None:
    talk.attach(PICTURE, OTHER, CLIP)
    talk.button(f"Remove {OTHER.name}").click()
    talk.attached(2)
    talk.send("Transcribe the audio clip into text.")
    talk.answer()
    (body,) = talk.bodies()
    sent = body["messages"][0]
    assert (pictures(sent), sounds(sent)) == ([PICTURE.read_bytes()], [CLIP.read_bytes()])
    assert talk.answer() == reply_to(body, alone).text
    assert "vision_speech" in talk.timings()


def test_a_file_that_is_neither(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "notes.pdf"
    file.write_bytes(b"%PDF-1.4")
    talk.page.locator("#file").set_input_files([file])
    expect(talk.page.locator("#notice")).to_contain_text("notes.pdf", timeout=LONG_MS)
    talk.attached(0)


@pytest.mark.parametrize("place", ["#conversation", "#message", "header"])
def test_dropped(talk: Talk, alone: Model, place: str) -> None:
    transfer = talk.page.evaluate_handle(TRANSFER, [base64_of(PICTURE), PICTURE.name, "image/png"])
    for kind in ("dragenter", "dragover", "drop"):
        talk.page.dispatch_event(place, kind, {"dataTransfer": transfer})
    talk.attached(1)
    assert ask(talk, alone) == CHAIR


def test_pasted(talk: Talk, alone: Model) -> None:
    """From the browser's own clipboard, which keeps the pixels and not the file."""
    talk.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    talk.page.evaluate(COPY_PICTURE, [base64_of(PICTURE), ""])
    talk.box.focus()
    talk.page.keyboard.press("Control+V")
    talk.attached(1)
    assert ask(talk, alone) == CHAIR


@pytest.mark.parametrize("picture", [False, True])
def test_text_is_pasted_as_text(talk: Talk, picture: bool) -> None:
    """Also where a picture of it comes with it."""
    talk.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    if picture:
        talk.page.evaluate(COPY_PICTURE, [base64_of(PICTURE), "a\nb"])
    else:
        talk.page.evaluate("(text) => navigator.clipboard.writeText(text)", "a\nb")
    talk.box.focus()
    talk.page.keyboard.press("Control+V")
    expect(talk.box).to_have_value("a\nb")
    talk.attached(0)


def test_taken(open_page: OpenPage, start: Launch, server: Server, alone: Model, tmp_path: Path) -> None:
    """The camera sees a picture with a word; the answer reads it."""
    browser = start(picture=write_picture(tmp_path / "camera.y4m", PICTURE))
    talk = open_page(browser, server)
    talk.button("Camera").click()
    dialog = talk.page.get_by_role("dialog", name="Camera")
    expect(dialog.locator("video")).to_have_js_property("videoWidth", 448, timeout=LONG_MS)
    dialog.get_by_role("button", name="Take picture").click()
    talk.attached(1)
    if dialog.is_visible():
        dialog.get_by_role("button", name="Close").click()
    assert talk.page.evaluate(LIVE_TRACKS) == 0
    assert ask(talk, alone) == CHAIR


def test_no_camera(open_page: OpenPage, browser: Browser, server: Server) -> None:
    """A user who does not let the page see is told so, and the rest of the page works."""
    talk = open_page(browser, server)
    talk.page.evaluate(NO_DEVICES)
    talk.button("Camera").click()
    dialog = talk.page.get_by_role("dialog", name="Camera")
    expect(dialog.get_by_role("alert")).not_to_be_empty(timeout=LONG_MS)
    dialog.get_by_role("button", name="Close").click()
    expect(dialog).to_be_hidden()
