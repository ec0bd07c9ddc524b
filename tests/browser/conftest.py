# SPDX-License-Identifier: Apache-2.0
"""A browser, a server for it, and pages whose every request and error is looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from .chromium import REQUIRED, launch, missing, required

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Playwright

    from .talk import Talk

if not missing():
    from ..serve.conftest import alone, serve, user
    from ..serve.served import Server

    __all__ = ["alone", "serve", "user"]  # fixtures

OpenPage = Callable[..., "Talk"]
Launch = Callable[..., "Browser"]


class Absent(pytest.Module):
    """A module that is not even imported: there is no browser."""

    def collect(self) -> Any:
        if required():
            pytest.fail(f"{REQUIRED} is set: {missing()}", pytrace=False)
        pytest.skip(missing(), allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Skip, or fail, all of them where they cannot be run."""
    return Absent.from_parent(parent, path=module_path) if missing() else None


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    """The driver. Not for the whole run: while it is there, this thread has a running event loop."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as found:
        yield found


@pytest.fixture(scope="module")
def browser(playwright: Playwright, user: dict[str, str]) -> Iterator[Browser]:
    """Shared by tests for which the devices do not matter."""
    found = launch(playwright, user)
    yield found
    found.close()


@pytest.fixture
def start(playwright: Playwright, user: dict[str, str]) -> Iterator[Launch]:
    """`start(sound=…, picture=…)`: a browser of one's own; see `launch`."""
    started: list[Browser] = []

    def launched(**devices: Path) -> Browser:
        started.append(launch(playwright, user, **devices))
        return started[-1]

    yield launched
    for one in started:
        one.close()


@pytest.fixture(scope="session")
def server(user: dict[str, str], nano: Path) -> Iterator[Server]:
    """Shared by tests that do not stop it."""
    found = Server(user, "-m", nano, "--cache-type", "f32")
    try:
        yield found.ready()
    finally:
        found.stop()


@pytest.fixture
def open_page(start: Launch) -> Iterator[OpenPage]:
    """`open_page(browser, server, …)`: the page, ready, in a context of its own.

    `wait=False`: as it comes; `script`: what runs before the page's own.
    """
    from .talk import Talk

    opened: list[Talk] = []

    def opened_page(
        browser: Browser, server: Server, *, wait: bool = True, script: str | None = None, **context: Any
    ) -> Talk:
        found = Talk(browser.new_context(**context), server.url)
        opened.append(found)
        if script is not None:
            found.page.add_init_script(script)
        if wait:
            found.open()
        else:
            found.page.goto(found.url)
        return found

    yield opened_page
    for one in opened:
        one.page.context.close()
    for one in opened:
        one.check()


@pytest.fixture
def talk(open_page: OpenPage, browser: Browser, server: Server) -> Talk:
    """The page in the shared browser."""
    return open_page(browser, server)
