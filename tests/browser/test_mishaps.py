# SPDX-License-Identifier: Apache-2.0
"""A browser without room, one that cannot read what it kept, and a user who is quicker than the devices."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from playwright.sync_api import Browser, expect

from ..serve.served import Server
from .talk import LONG_MS, Talk

if TYPE_CHECKING:
    from .conftest import OpenPage

NO_READING = """
  IDBObjectStore.prototype.getAll = () => { throw new DOMException("broken", "UnknownError"); };
"""

# A device opens when `open()` is called; `live()` counts those that record, and sockets that are open.
SLOW_DEVICE = """
  const tracks = [], sockets = [], waiting = [];
  const real = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
  navigator.mediaDevices.getUserMedia = async (wanted) => {
    await new Promise((later) => waiting.push(later));
    const stream = await real(wanted);
    tracks.push(...stream.getTracks());
    return stream;
  };
  const Real = WebSocket;
  window.WebSocket = class extends Real {
    constructor(...given) {
      super(...given);
      sockets.push(this);
    }
  };
  window.cut = () => sockets.at(-1).close();
  window.open = () => { for (const later of waiting.splice(0)) later(); };
  window.live = () => [
    tracks.filter((one) => one.readyState === "live").length,
    sockets.filter((one) => one.readyState < 2).length,
  ];
"""


def live(talk: Talk) -> list[int]:
    found: list[int] = talk.page.evaluate("live()")
    return found


def until_live(talk: Talk, wanted: list[int]) -> None:
    for _ in range(int(LONG_MS / 50)):
        if live(talk) == wanted:
            return
        talk.page.wait_for_timeout(50)
    raise AssertionError(live(talk))


def test_no_room(talk: Talk, server: Server) -> None:
    """Told, though a browser finds it out only after it has taken a message."""
    quota = talk.page.context.new_cdp_session(talk.page)
    quota.send("Storage.overrideQuotaForOrigin", {"origin": server.url, "quotaSize": 100_000})
    talk.expected.append("422")  # it is no picture
    picture = {"name": "a.png", "mimeType": "image/png", "buffer": random.Random(1).randbytes(1 << 20)}
    talk.page.locator("#file").set_input_files(picture)  # type: ignore[arg-type]
    talk.page.locator("li.attachment").wait_for()
    talk.box.fill("What is it?")
    talk.button("Send").click()
    expect(talk.page.locator("#notice")).to_contain_text("no room", timeout=LONG_MS)


def test_what_was_kept_cannot_be_read(open_page: OpenPage, browser: Browser, server: Server) -> None:
    """The page works all the same, and says so."""
    talk = open_page(browser, server, script=NO_READING)
    expect(talk.page.locator("#notice")).to_contain_text("keeps no data")
    talk.box.fill("What is the capital of France?")
    talk.button("Send").click()
    expect(talk.page.locator("li.message[data-state=done] .text").last).to_have_text(
        "The capital of France is Paris.", timeout=LONG_MS
    )


def test_captions_that_are_stopped_before_they_begin(
    open_page: OpenPage, browser: Browser, server: Server
) -> None:
    """Then begun again: one microphone and one session, whatever still came of the first; then none."""
    talk = open_page(browser, server, script=SLOW_DEVICE, permissions=["microphone"])
    captions = talk.button("Captions")
    for _ in range(3):
        captions.click()
    talk.page.evaluate("open()")
    until_live(talk, [1, 1])
    talk.page.wait_for_timeout(500)
    assert live(talk) == [1, 1]
    talk.page.locator("#captions-stop").dblclick()
    until_live(talk, [0, 0])


def test_captions_that_are_begun_while_they_reconnect(
    open_page: OpenPage, browser: Browser, server: Server
) -> None:
    """What was to reconnect does not: there would be two sessions, and one for ever."""
    talk = open_page(browser, server, script=SLOW_DEVICE, permissions=["microphone"])
    captions = talk.button("Captions")
    captions.click()
    talk.page.evaluate("open()")
    until_live(talk, [1, 1])
    expect(talk.page.locator("#captions")).to_be_visible()
    talk.page.wait_for_timeout(500)  # the session is ready
    talk.page.evaluate("cut()")
    expect(talk.page.locator("#captions .cut")).to_be_visible()
    captions.click()
    captions.click()
    talk.page.wait_for_timeout(1000)  # it would have tried after half of that
    talk.page.evaluate("open()")
    until_live(talk, [1, 1])
    captions.click()
    until_live(talk, [0, 0])


def test_a_camera_that_is_closed_before_it_opens(
    open_page: OpenPage, browser: Browser, server: Server
) -> None:
    """Then opened again: one camera, whatever still came of the first; then none."""
    talk = open_page(browser, server, script=SLOW_DEVICE, permissions=["camera"])
    dialog = talk.page.locator("#camera")
    talk.button("Camera").click()
    dialog.get_by_role("button", name="Close").click()
    talk.button("Camera").click()
    talk.page.evaluate("open()")
    expect(dialog.get_by_role("button", name="Take picture")).to_be_enabled(timeout=LONG_MS)
    assert live(talk) == [1, 0] and not dialog.locator(".error").text_content()
    dialog.get_by_role("button", name="Close").click()
    until_live(talk, [0, 0])
