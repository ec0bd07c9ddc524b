# SPDX-License-Identifier: Apache-2.0
"""The page without a mouse, without eyes, on a phone, in the dark."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import Browser, Page, expect

from ..scoring import EVAL
from ..serve.served import FRANCE, Server
from .scripts import BRIGHTNESS, CONTRAST, FOCUSED, TOO_WIDE
from .talk import LONG_MS, Talk

if TYPE_CHECKING:
    from .conftest import OpenPage

CAPITAL, PARIS = FRANCE[0]["content"], "The capital of France is Paris."
SHOWN = ["New conversation", "Export Markdown", "Export JSON", "Settings"]
SHOWN += ["Attach", "Camera", "Hold to talk", "Captions", "Send"]
ROLES = {"button", "textbox", "combobox", "checkbox", "spinbutton", "image", "dialog", "log", "meter"}
FIELDS = ["API key", "Remember", "System prompt", "Temperature", "Longest answer", "Tools", "Theme"]


def test_names(talk: Talk) -> None:
    """Everything that can be used has a role and a name."""
    page = talk.page
    for name in SHOWN:
        expect(talk.button(name)).to_be_visible()
    expect(talk.box).to_be_visible()
    expect(page.get_by_role("status").first).to_contain_text("Ready")
    expect(page.get_by_role("log", name="Conversation")).to_have_count(1)
    assert nameless(page) == []
    talk.button("Settings").click()
    dialog = page.get_by_role("dialog", name="Settings")
    for name in FIELDS:
        expect(dialog.get_by_label(name, exact=True)).to_be_visible()
    assert nameless(page) == []
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()


def nameless(page: Page) -> list[str]:
    """What the browser tells a screen reader of that has no name."""
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    return [str(one["role"]) for one in tree if role(one) in ROLES and not one.get("name", {}).get("value")]


def role(node: dict[str, Any]) -> str:
    return "" if node.get("ignored") else str(node.get("role", {}).get("value"))


def test_by_keyboard(talk: Talk) -> None:
    """Tab reaches everything, Enter sends, Shift and Enter begin a line, Escape closes."""
    page, reached = talk.page, list[str]()
    for _ in range(40):
        page.keyboard.press("Tab")
        if (name := page.evaluate(FOCUSED)) in reached:
            break
        reached.append(name)
    assert {*SHOWN, "Message", "Conversation"} <= {*reached}
    talk.box.focus()
    page.keyboard.type("What is the capital")
    page.keyboard.press("Shift+Enter")
    expect(talk.box).to_have_value("What is the capital\n")
    page.keyboard.press("Backspace")
    page.keyboard.type(" of France?")
    page.keyboard.press("Enter")
    assert talk.answer() == PARIS
    assert talk.bodies()[0]["messages"] == [{"role": "user", "content": CAPITAL}]
    expect(talk.box).to_be_focused()
    talk.button("Settings").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#settings")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    expect(talk.button("Settings")).to_be_focused()


@pytest.mark.parametrize("mark", [{"isComposing": True}, {"keyCode": 229}], ids=["standard", "Safari"])
def test_enter_of_an_input_method_does_not_send(talk: Talk, mark: dict[str, Any]) -> None:
    """It takes the word that is being written."""
    talk.box.fill("ni hao")
    taken = {"key": "Enter", "bubbles": True, "cancelable": True, **mark}
    talk.box.dispatch_event("keydown", taken)
    expect(talk.asked).to_have_count(0)
    talk.box.press("Enter")
    talk.answer()
    expect(talk.asked).to_have_count(1)


def test_what_a_screen_reader_hears(talk: Talk) -> None:
    """An answer when it is whole, not letter by letter."""
    log = talk.page.get_by_role("log", name="Conversation")
    talk.send(CAPITAL)
    talk.answer()
    expect(talk.answers.first).to_have_attribute("aria-busy", "false")
    for name, words in (("You", CAPITAL), ("Answer", PARIS)):
        expect(log.get_by_role("article", name=name)).to_contain_text(words)


@pytest.mark.parametrize("width", [360, 320])
def test_at_phone_width(open_page: OpenPage, browser: Browser, server: Server, width: int) -> None:
    size = {"width": width, "height": 640}
    talk = open_page(browser, server, viewport=size, has_touch=True, is_mobile=True)
    assert talk.page.evaluate(TOO_WIDE) == []
    talk.attach(EVAL / "images/img-012.png", EVAL / "audio/asr-003.flac")
    assert talk.page.evaluate(TOO_WIDE) == []
    talk.send("Supercalifragilistic" * 8)
    talk.answer()
    assert talk.page.evaluate(TOO_WIDE) == []
    for name in (*SHOWN, "Message"):
        place = talk.page.get_by_label(name, exact=True) if name == "Message" else talk.button(name)
        box = place.bounding_box()
        assert box is not None and box["y"] + box["height"] <= 640, name
    talk.button("Settings").click()
    assert talk.page.evaluate(TOO_WIDE) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours(open_page: OpenPage, browser: Browser, server: Server, scheme: str) -> None:
    """As the system has them, or as the user says; text stands out by WCAG's 4.5 to 1."""
    talk = open_page(browser, server, color_scheme=scheme)
    talk.send(CAPITAL)
    talk.answer()
    lightness = {scheme: talk.page.evaluate(BRIGHTNESS)}
    for place in ("#status", "h1", "#message", "#send", "#attach"):
        assert talk.page.locator(place).evaluate(CONTRAST) >= 4.5, place
    for place in (".text", ".timings"):
        assert talk.answers.first.locator(place).evaluate(CONTRAST) >= 4.5, place
    assert talk.asked.first.locator(".text").evaluate(CONTRAST) >= 4.5
    other = {"light": "dark", "dark": "light"}[scheme]
    talk.button("Settings").click()
    talk.page.get_by_label("Theme", exact=True).select_option(label=other.capitalize())
    talk.page.locator("#settings").get_by_role("button", name="Save").click()
    lightness[other] = talk.page.evaluate(BRIGHTNESS)
    assert lightness["light"] > 0.8 and lightness["dark"] < 0.2
    talk.page.reload()
    talk.until_status("Ready")
    assert talk.page.evaluate(BRIGHTNESS) == lightness[other]


def test_forced_colours_and_little_motion(open_page: OpenPage, browser: Browser, server: Server) -> None:
    talk = open_page(browser, server, forced_colors="active", reduced_motion="reduce")
    expect(talk.button("Send")).to_be_visible(timeout=LONG_MS)
    moving = "() => document.getAnimations().filter((one) => one.playState === 'running').length"
    assert talk.page.evaluate(moving) == 0
