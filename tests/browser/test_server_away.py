# SPDX-License-Identifier: Apache-2.0
"""A page whose server asks for a key, is busy, or goes away and comes back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from playwright.sync_api import Browser, expect

from ..scoring import EVAL
from ..serve.served import FRANCE, Server
from .fake_devices import spoken, write_sound
from .talk import CHAT, LONG_MS, endless

if TYPE_CHECKING:
    from .conftest import Launch, OpenPage

Serve = Callable[..., Server]
CAPITAL, PARIS = FRANCE[0]["content"], "The capital of France is Paris."
KEY = "a-key=with/characters+that~subprotocols,lack"


def test_a_wrong_key(open_page: OpenPage, browser: Browser, serve: Serve) -> None:
    server = serve("--api-key", KEY)
    server.until(lambda: server.get("/health").status == 200)
    talk = open_page(browser, server, wait=False)
    talk.expected += ["401"]
    wrong = "The API key is wrong or missing"
    talk.until_status(wrong)
    talk.set(API_key="not-it")
    talk.until_status(wrong)
    talk.send(CAPITAL)
    talk.answer(state="failed")
    talk.until_status(wrong)
    talk.set(API_key=KEY)
    talk.until_status("Ready")
    talk.answers.last.get_by_role("button", name="Try again").click()
    assert talk.answer() == PARIS
    talk.page.reload()  # the key is still there: the tab is the same
    talk.until_status("Ready")
    assert KEY not in json.dumps(talk.page.evaluate("() => ({ ...localStorage })"))


def test_a_server_that_comes_back(open_page: OpenPage, browser: Browser, serve: Serve) -> None:
    server = serve().ready()
    talk = open_page(browser, server)
    talk.expected += ["ERR_CONNECTION_REFUSED", "ERR_EMPTY_RESPONSE", "ERR_CONNECTION_RESET"]
    talk.send(CAPITAL)
    assert talk.answer() == PARIS
    port = server.port
    server.stop()
    talk.send(CAPITAL)
    talk.answer(1, "failed")
    talk.until_status("The server is away: trying again…")
    serve("--port", port).ready()
    talk.until_status("Ready")
    talk.answers.last.get_by_role("button", name="Try again").click()
    assert talk.answer(1) == PARIS
    assert talk.answers.count() == 2


def test_a_server_that_goes_in_the_middle_of_an_answer(
    open_page: OpenPage, browser: Browser, serve: Serve
) -> None:
    """What has come stays, with why there is no more; also after the page is loaded again."""
    server = serve("--grace", 1).ready()
    talk = open_page(browser, server)
    talk.expected += ["ERR_CONNECTION_REFUSED", "ERR_CONNECTION_RESET", "ERR_INCOMPLETE_CHUNKED_ENCODING"]
    talk.expected += ["503"]  # it says that it is stopping
    talk.page.route("**" + CHAT, endless, times=1)
    talk.send(CAPITAL)
    expect(talk.answers.first.locator(".text")).to_contain_text(re.compile("\\w{2}"), timeout=LONG_MS)
    port = server.port
    assert server.stop() == 0
    kept = talk.answer(state="failed")
    assert len(kept) > 2
    expect(talk.answers.first.locator(".error")).not_to_be_empty()
    talk.until_status("The server is away: trying again…")
    serve("--port", port).ready()
    talk.page.reload()
    talk.until_status("Ready")
    assert talk.answer(state="failed") == kept
    talk.answers.first.get_by_role("button", name="Try again").click()
    assert talk.answer() == PARIS


def test_captions_of_a_server_that_comes_back(
    open_page: OpenPage, start: Launch, serve: Serve, tmp_path: Path
) -> None:
    """They say that they were cut, and go on by themselves with what is said from then on."""
    clip = EVAL / "audio/asr-003.flac"
    server = serve("--grace", 0).ready()
    said = "Send a message to Grace."
    talk = open_page(start(sound=write_sound(tmp_path / "said.wav", spoken([clip] * 20))), server)
    talk.expected += ["ERR_CONNECTION_REFUSED", "ERR_CONNECTION_RESET", "503", "WebSocket"]
    talk.button("Captions").click()
    found = talk.page.locator("#captions .caption")
    expect(found.first).to_have_text(said, timeout=LONG_MS)
    port = server.port
    server.stop()
    cut = "#captions .cut:has-text('The connection was cut')"
    expect(talk.page.locator(cut)).to_be_visible(timeout=LONG_MS)
    serve("--port", port).ready()
    after = talk.page.locator(f"{cut} ~ .caption", has_text=said)
    expect(after.first).to_be_visible(timeout=LONG_MS)
    talk.button("Stop captions").click()


def test_a_busy_server(open_page: OpenPage, browser: Browser, server: Server) -> None:
    """The page waits as long as it is told to, and asks again."""
    talk = open_page(browser, server)
    talk.expected += ["429"]
    error = {"error": {"message": "busy", "type": "rate_limit_error", "param": None, "code": None}}
    talk.page.route(
        "**" + CHAT,
        lambda route: route.fulfill(status=429, headers={"Retry-After": "1"}, json=error),
        times=1,
    )
    talk.send(CAPITAL)
    expect(talk.answers.first).to_contain_text("The server is busy", timeout=LONG_MS)
    assert talk.answer() == PARIS
    assert len(talk.bodies()) == 2
