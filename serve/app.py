# SPDX-License-Identifier: Apache-2.0
"""The application: which path is whose, and the layers before them. It holds no logic of its own."""

from __future__ import annotations

from collections.abc import Collection
from http import HTTPStatus

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute

from ..runtime.errors import PocketPhiError
from . import endpoints, transcriptions
from .answers import error_response
from .auth import Boundary, KeyCheck, Keys
from .errors import Refusal, refusal_of
from .observer import Observer
from .page import page_routes, read_assets
from .realtime import realtime, unknown
from .services import Services

ROUTES: tuple[BaseRoute, ...] = (
    Route("/v1/chat/completions", endpoints.chat_completions, methods=["POST"]),
    Route("/v1/completions", endpoints.text_completions, methods=["POST"]),
    Route("/v1/audio/transcriptions", transcriptions.transcriptions, methods=["POST"]),
    Route("/v1/audio/translations", transcriptions.translations, methods=["POST"]),
    Route("/v1/models", endpoints.models, methods=["GET"]),
    Route("/v1/models/{name:path}", endpoints.model, methods=["GET"]),
    Route("/health", endpoints.health, methods=["GET"]),
    Route("/metrics", endpoints.metrics, methods=["GET"]),
    WebSocketRoute("/v1/realtime", realtime),
    WebSocketRoute("/{rest:path}", unknown),
)

OPEN_PATHS = ("/health",)  # without a key, as is the page


def make_app(
    services: Services, keys: Keys, *, hosts: Collection[str] = (), origins: Collection[str] = ()
) -> Starlette:
    """The application.

    Args:
        services: that the handlers use.
        keys: of clients; none: everybody may ask.
        hosts: names in a Host header beside localhost and addresses.
        origins: sites whose pages may ask.
    """
    assets = read_assets()
    routes = [*ROUTES, *page_routes(assets)]
    named = [route.path for route in routes if isinstance(route, (Route, WebSocketRoute))]
    paths = [path for path in named if "{" not in path]
    layers = [
        Middleware(Observer, services.metrics, paths, services.limits.header_bytes),
        Middleware(Boundary, hosts, origins),
        Middleware(KeyCheck, keys, [*OPEN_PATHS, *assets]),
    ]
    if origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=[origin.rstrip("/") for origin in origins],
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
        layers.insert(2, cors)
    handlers = {Refusal: _refused, PocketPhiError: _refused, HTTPException: _not_routed}
    app = Starlette(routes=routes, middleware=layers, exception_handlers=handlers)
    app.router.redirect_slashes = False
    app.state.services = services
    return app


async def _refused(_: Request, exc: Exception) -> Response:
    return error_response(refusal_of(exc))


async def _not_routed(_: Request, exc: Exception) -> Response:
    """404 and 405, which the router raises."""
    status = exc.status_code if isinstance(exc, HTTPException) else 500
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(status)
    found = error_response(Refusal(status, HTTPStatus(status).phrase.lower(), code=code))
    found.headers.update(getattr(exc, "headers", None) or {})  # 405 comes with Allow
    return found
