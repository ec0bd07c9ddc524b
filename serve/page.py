# SPDX-License-Identifier: Apache-2.0
"""The page at `/`: files of the folder `page`, read once and served as they are.

Each has a route of its own, so no text of a request is ever a path. Everybody may have them: they hold no
secret, and a page that needs a key to be seen could not ask for one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).with_name("page")
_INDEX = "index.html"
_TYPES: Mapping[str, str] = MappingProxyType(
    {
        ".css": "text/css; charset=utf-8",
        ".html": "text/html; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".svg": "image/svg+xml",
    }
)

# Nothing from elsewhere, nothing inline, and no text ever becomes markup or a script (the last two lines).
_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "media-src 'self' blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)
HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "Content-Security-Policy": _POLICY,
        "Permissions-Policy": "camera=(self), microphone=(self), geolocation=(), display-capture=(), usb=()",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-cache",  # asked for each time: a new release is seen, the ETag makes it cheap
    }
)


@dataclass(frozen=True, slots=True)
class Asset:
    """One file of the page."""

    data: bytes
    media_type: str
    etag: str  # with its quotes

    async def get(self, request: Request) -> Response:
        """The file, or 304 for who has it."""
        headers = {**HEADERS, "ETag": self.etag}
        if _has(request.headers.get("if-none-match", ""), self.etag):
            return Response(status_code=304, headers=headers)
        return Response(self.data, headers=headers, media_type=self.media_type)


def read_assets(folder: Path = FOLDER) -> dict[str, Asset]:
    """Every file of the page by its path in an address: "/" and "/page/NAME".

    Raises:
        OSError: the installation is incomplete.
    """
    found: dict[str, Asset] = {}
    for file in sorted(folder.iterdir()):
        if (media_type := _TYPES.get(file.suffix)) is not None:
            data = file.read_bytes()
            etag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
            path = "/" if file.name == _INDEX else f"/page/{file.name}"
            found[path] = Asset(data, media_type, etag)
    return found


def page_routes(assets: Mapping[str, Asset]) -> list[Route]:
    """One route for each."""
    return [Route(path, asset.get, methods=["GET"]) for path, asset in assets.items()]


def _has(tags: str, etag: str) -> bool:
    """Whether If-None-Match names it; "W/" makes no difference here."""
    return any(tag.strip().removeprefix("W/") in (etag, "*") for tag in tags.split(","))
