# SPDX-License-Identifier: Apache-2.0
"""A page in the browser: what a person does there, what it showed and what it asked for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from playwright.sync_api import (
    BrowserContext,
    ConsoleMessage,
    Locator,
    Page,
    Request,
    Route,
    WebSocket,
    expect,
)

from ..serve.served import ENDLESS, LONG_S

LONG_MS = 1000 * LONG_S
CHAT = "/v1/chat/completions"


class Talk:
    """One page of one browser context, which nobody shares."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.url = url
        self.errors: list[str] = []  # of the console, the page's scripts and its policy
        self.expected: list[str] = []  # patterns of errors that belong to the test
        self.requests: list[Request] = []
        self.sockets: list[WebSocket] = []
        self.sent: list[str] = []  # over sockets
        context.set_default_timeout(LONG_MS)
        context.on("request", lambda request: self.requests.append(request))
        context.on("console", self._console)
        context.on("weberror", lambda error: self.errors.append(f"uncaught: {error.error}"))
        self.page: Page = context.new_page()
        self.page.on("websocket", self._socket)

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(f"{message.type}: {message.text} ({message.location.get('url')})")

    def _socket(self, socket: WebSocket) -> None:
        self.sockets.append(socket)
        socket.on("framesent", lambda frame: self.sent.append(str(frame)))

    def open(self) -> Talk:
        """Go there, and wait until it can be used."""
        self.page.goto(self.url)
        self.until_status("Ready")
        expect(self.box).to_be_focused(timeout=LONG_MS)
        return self

    def until_status(self, words: str) -> None:
        expect(self.page.locator("#status")).to_contain_text(words, timeout=LONG_MS)

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    @property
    def box(self) -> Locator:
        return self.page.get_by_role("textbox", name="Message", exact=True)

    @property
    def answers(self) -> Locator:
        return self.page.locator("li.message[data-role=assistant]")

    @property
    def asked(self) -> Locator:
        return self.page.locator("li.message[data-role=user]")

    def attach(self, *files: Path) -> None:
        self.page.locator("#file").set_input_files(files)
        self.attached(len(files))

    def attached(self, count: int) -> None:
        expect(self.page.locator("#attachments li.attachment")).to_have_count(count, timeout=LONG_MS)

    def send(self, words: str = "") -> None:
        if words:
            self.box.fill(words)
        self.button("Send").click()

    def answer(self, number: int = 0, state: str = "done") -> str:
        """The text of an answer, the first one being 0, once it is there."""
        found = self.answers.nth(number)
        expect(found).to_have_attribute("data-state", state, timeout=LONG_MS)
        return (found.locator(".text").text_content() or "").strip()

    def timings(self, number: int = 0) -> str:
        """What stands under an answer."""
        found = self.answers.nth(number).locator(".timings")
        expect(found).not_to_be_empty(timeout=LONG_MS)
        return found.inner_text()

    def bodies(self) -> list[dict[str, Any]]:
        """What was sent to be answered."""
        return [json.loads(one.post_data or "") for one in self.requests if one.url == self.url + CHAT]

    def set(self, **values: str) -> None:
        """Change settings, by their names with _ for a space."""
        self.button("Settings").click()
        dialog = self.page.locator("#settings")
        for name, value in values.items():
            dialog.get_by_label(name.replace("_", " "), exact=True).fill(value)
        dialog.get_by_role("button", name="Save").click()
        expect(dialog).to_be_hidden()

    def check(self) -> None:
        """Nothing went wrong that the test does not know of, and nobody else was asked for anything."""
        unknown = [e for e in self.errors if not any(re.search(one, e) for one in self.expected)]
        assert unknown == []
        own = (self.url + "/", f"blob:{self.url}/", "data:")
        assert [one.url for one in self.requests if not one.url.startswith(own)] == []
        assert [one.url for one in self.sockets if not one.url.startswith("ws" + self.url[4:] + "/")] == []


def endless(route: Route) -> None:
    """The page's own request, but for an answer that does not end by itself."""
    asked = json.loads(route.request.post_data or "")
    route.continue_(post_data=json.dumps({**asked, "response_format": ENDLESS, "temperature": 1, "seed": 1}))
