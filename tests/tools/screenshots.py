# SPDX-License-Identifier: Apache-2.0
"""Makes docs/page-*.png: the server's page in Chromium, with phi4-nano and a microphone of software.

python -m tests.tools.screenshots
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, expect, sync_playwright

from ..browser.chromium import launch
from ..browser.fake_devices import spoken, write_sound
from ..browser.talk import LONG_MS, Talk
from ..scoring import EVAL
from ..serve.served import Server

DOCS = Path(__file__).resolve().parents[2] / "docs"
_HIGH, _WIDE, _PHONE = ({"width": w, "height": h} for w, h in ((960, 800), (960, 640), (360, 640)))
_PICTURE = EVAL / "images/img-001.png"
_CLIPS = [EVAL / f"audio/asr-{n}.flac" for n in ("001", "003", "011")]
_SENTENCES = ["The small woman works in the garden.", "Send a message to Grace."]


def main() -> None:
    """Write them."""
    with (
        tempfile.TemporaryDirectory() as folder,
        _server(Path(folder)) as server,
        sync_playwright() as driver,
    ):
        sound = write_sound(Path(folder) / "said.wav", spoken(_CLIPS))
        browser = launch(driver, dict(os.environ), sound=sound)
        _picture(browser, server)
        _captions(browser, server)
        _phone(browser, server)
        browser.close()


@contextmanager
def _server(home: Path) -> Iterator[Server]:
    server = Server({**os.environ, "XDG_CACHE_HOME": str(home / "cache")}, "--cache-type", "f32")
    try:
        yield server.ready()
    finally:
        server.stop()


def _picture(browser: Browser, server: Server) -> None:
    """A conversation about a picture, by day."""
    talk = _open(browser, server, viewport=_HIGH, color_scheme="light")
    talk.attach(_PICTURE)
    talk.send("Describe the image.")
    talk.answer()
    talk.send("Where is the diamond?")
    talk.answer(1)
    _save(talk, "page-picture.png")


def _captions(browser: Browser, server: Server) -> None:
    """Live captions while the third sentence is spoken, by night."""
    talk = _open(browser, server, viewport=_WIDE, color_scheme="dark")
    talk.send("What is the capital of France?")
    talk.answer()
    talk.button("Captions").click()
    lines = talk.page.locator(".caption:visible")
    for number, words in enumerate(_SENTENCES):
        expect(lines.nth(number)).to_have_text(words, timeout=LONG_MS)
    expect(lines.nth(len(_SENTENCES)).locator(".tail")).to_contain_text("Set a timer", timeout=LONG_MS)
    _save(talk, "page-captions.png")


def _phone(browser: Browser, server: Server) -> None:
    """At a phone's width."""
    talk = _open(
        browser, server, viewport=_PHONE, color_scheme="light", is_mobile=True, has_touch=True,
        device_scale_factor=2,
    )  # fmt: skip
    talk.attach(EVAL / "images/img-012.png")
    talk.send("What does the text say?")
    talk.answer()
    _save(talk, "page-phone.png")


def _open(browser: Browser, server: Server, **context: Any) -> Talk:
    return Talk(browser.new_context(**context), server.url).open()


def _save(talk: Talk, name: str) -> None:
    talk.page.screenshot(path=DOCS / name, animations="disabled", caret="hide")
    talk.page.context.close()
    talk.check()


if __name__ == "__main__":
    main()
