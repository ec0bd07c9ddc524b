# SPDX-License-Identifier: Apache-2.0
"""The page's files as they are served: types, headers, caching; and nothing inline or from elsewhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pocketphi.serve.page import FOLDER, read_assets

from .conftest import Serve
from .served import Server

ASSETS = read_assets()
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Namespaces are names; nobody fetches them.
NAMES = ("http://www.w3.org/2000/svg",)


def path_of(file: Path) -> str:
    return "/" if file.name == "index.html" else f"/page/{file.name}"


FILES = sorted(FOLDER.iterdir())


class Tags(HTMLParser):
    """Every tag of a document with its attributes, and the text inside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self._tag = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._tag = tag

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""

    def handle_data(self, data: str) -> None:
        if self._tag in ("script", "style"):
            self.inside.append(data)


@pytest.fixture(scope="module")
def index() -> Tags:
    return Tags((FOLDER / "index.html").read_text("utf-8"))


def test_every_file_is_an_asset() -> None:
    assert sorted(ASSETS) == sorted(path_of(file) for file in FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_is_served(server: Server, file: Path) -> None:
    found = server.get(path_of(file))
    assert (found.status, found.body) == (200, file.read_bytes())
    assert found.headers["content-type"] == TYPES[file.suffix]
    assert found.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/", "/page/app.js"])
def test_the_headers(server: Server, path: str) -> None:
    headers = server.get(path).headers
    rules = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
    assert rules == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self' blob: data:",
        "media-src": "'self' blob: data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert headers["permissions-policy"].startswith("camera=(self), microphone=(self), ")
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-opener-policy"] == headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["cache-control"] == "no-cache"


def test_a_file_that_the_browser_has(server: Server) -> None:
    etag = server.get("/page/app.js").headers["etag"]
    for tags in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        found = server.get("/page/app.js", {"If-None-Match": tags})
        assert (found.status, found.body, found.headers["etag"]) == (304, b"", etag)
        assert "content-security-policy" in found.headers
    for tags in ('"other"', etag.strip('"'), ""):
        assert server.get("/page/app.js", {"If-None-Match": tags}).status == 200
    assert server.get("/page/api.js").headers["etag"] != etag


@pytest.mark.parametrize(
    "path",
    [
        "/page",
        "/page/",
        "/page/none.js",
        "/page/index.html",
        "/page/APP.JS",
        "/page/app.js/",
        "/page/../page.py",
        "/page/..%2fpage.py",
        "/page/%2e%2e/page.py",
        "/page//etc/passwd",
        "/index.html",
        "/app.js",
        "//page/app.js",
    ],
)
def test_names_that_are_none(server: Server, path: str) -> None:
    found = server.raw(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert found.startswith(b"HTTP/1.1 404 ") and b'"unknown_url"' in found


def test_methods(server: Server) -> None:
    for path in ("/", "/page/app.js"):
        assert server.post(path, {}).code == "method_not_allowed"
        head = server.raw(f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert head.startswith(b"HTTP/1.1 200 ") and head.endswith(b"\r\n\r\n")


def test_it_is_open_without_a_key(serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("a-key\n", "ascii")
    server = serve("--api-key-file", file)
    for path in ASSETS:
        assert server.get(path).status == 200
    for path in ("/v1/models", "/page/none.js", "/page/", "//"):
        assert server.get(path).code == "invalid_api_key"
    assert server.get("/", {"Host": "evil.org"}).code == "host_not_allowed"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_nothing_comes_from_elsewhere(file: Path) -> None:
    text = file.read_text("utf-8")
    for name in NAMES:
        text = text.replace(name, "")
    assert not re.search(r"""\b(https?|wss?|ftp):|["'`(=]//|@import|url\(""", text)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_is_short_and_says_whose_it_is(file: Path) -> None:
    text = file.read_text("utf-8")
    assert len(text.splitlines()) <= 400
    assert file.suffix == ".svg" or "SPDX-License-Identifier: Apache-2.0" in "\n".join(text.splitlines()[:2])


def test_nothing_is_inline(index: Tags) -> None:
    assert "".join(index.inside).strip() == ""
    for tag, attributes in index.found:
        assert tag not in ("style", "base", "iframe", "object", "embed"), tag
        assert not [name for name in attributes if name == "style" or name.startswith("on")], attributes
        if tag == "script":
            assert attributes["src"] in ASSETS


def test_what_the_files_name_is_there(index: Tags) -> None:
    named = {str(given[key]) for tag, given in index.found for key in ("src", "href") if given.get(key)}
    icons = {f"#{given['id']}" for tag, given in index.found if tag == "symbol"}
    assert named <= set(ASSETS) | icons
    for file in FOLDER.glob("*.js"):
        text = file.read_text("utf-8")
        for name in re.findall(r'^(?:import|export) .* from "\./([^"]+)";$', text, re.M):
            assert (FOLDER / name).is_file(), (file.name, name)
        for path in re.findall(r'"(/page/[^"]+)"', text):
            assert path in ASSETS


def test_text_never_becomes_markup_or_script() -> None:
    """Beside the policy, which would stop it, too."""
    sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\(|new Function|srcdoc"
    for file in FOLDER.glob("*.js"):
        assert not re.search(sinks, file.read_text("utf-8")), file.name


def test_each_control_has_a_name_and_ids_are_used_once(index: Tags) -> None:
    ids = [given["id"] for _, given in index.found if "id" in given]
    assert len(ids) == len(set(ids))
    labelled = {given["for"] for tag, given in index.found if tag == "label" and "for" in given}
    for tag, given in index.found:
        if tag in ("input", "textarea", "select"):
            assert given.get("aria-label") or given["id"] in labelled, given
    for _, given in index.found:
        for key in ("aria-labelledby", "aria-describedby", "aria-controls", "for"):
            assert given.get(key, ids[0]) in ids


def test_every_id_that_a_module_asks_for_is_there(index: Tags) -> None:
    ids = {given["id"] for _, given in index.found if "id" in given}
    for file in FOLDER.glob("*.js"):
        asked = set(re.findall(r'\b(?:byId|numberIn)\("([^"]+)"\)', file.read_text("utf-8")))
        assert asked <= ids, file.name
