# SPDX-License-Identifier: Apache-2.0
"""The handlers of text, pictures and sound in, text out; and of what is known about the server."""

from __future__ import annotations

import logging

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from . import chat, completions
from .answers import json_response
from .body import Lease, read_json
from .delivery import Delivery, deliver
from .errors import Refusal
from .metrics import CONTENT_TYPE
from .schema import ChatRequest, CompletionRequest, parse
from .services import Services

_AT_ONCE = 1 << 16  # bytes: a body of fewer is taken apart without a thread's help

_log = logging.getLogger("pocketphi.serve.requests")


async def chat_completions(request: Request) -> Response:
    """`POST /v1/chat/completions`."""
    services = _services(request)
    lease = Lease(services.budget)
    try:
        body = await _body(request, lease)

        def prepared() -> chat.Chat:
            return chat.prepare(parse(ChatRequest, body), services.limits, services.facts, services.fetch)

        # Addresses in a short body may be long in coming.
        at_once = len(body) <= _AT_ONCE and services.fetch is None
        found = prepared() if at_once else await run_in_threadpool(prepared)
        delivery = Delivery(request, lease, found.group, found.work)
    except BaseException:
        lease.release()
        raise
    return await deliver(delivery, found.form, stream=found.stream)


async def text_completions(request: Request) -> Response:
    """`POST /v1/completions`."""
    services = _services(request)
    lease = Lease(services.budget)
    try:
        body = await _body(request, lease)
        found = completions.prepare(parse(CompletionRequest, body), services.limits, services.facts)
        delivery = Delivery(request, lease, found.group, found.work)
    except BaseException:
        lease.release()
        raise
    return await deliver(delivery, found.form, stream=found.stream)


async def models(request: Request) -> Response:
    """`GET /v1/models`."""
    return json_response({"object": "list", "data": [_model(request)]})


async def model(request: Request) -> Response:
    """`GET /v1/models/NAME`."""
    if request.path_params["name"] != _services(request).facts.name:
        raise Refusal(404, "there is no such model here", code="model_not_found", param="model")
    return json_response(_model(request))


async def health(request: Request) -> Response:
    """`GET /health`: never waits for the model."""
    state = _services(request).workers.state
    if state == "ready":
        return json_response({"status": "ok"})
    return json_response({"status": "loading model" if state == "loading" else "stopping"}, 503)


async def metrics(request: Request) -> Response:
    """`GET /metrics`."""
    return Response(_services(request).metrics.text(), media_type=CONTENT_TYPE)


def _services(request: Request) -> Services:
    found: Services = request.app.state.services
    return found


async def _body(request: Request, lease: Lease) -> bytes:
    services = _services(request)
    body = await read_json(request, services.limits, lease)
    if services.log_requests:
        _log.info("%r", body.decode("utf-8", "replace"))
    return body


def _model(request: Request) -> dict[str, object]:
    facts = _services(request).facts
    return {
        "id": facts.name,
        "object": "model",
        "created": facts.created,
        "owned_by": "pocketphi",
        "meta": facts.meta,
    }
