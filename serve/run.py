# SPDX-License-Identifier: Apache-2.0
"""A server from its settings: model, queue, application and socket put together, and run to the end."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..runtime import bundle as bundles
from ..runtime.errors import InputError
from ..runtime.hd import MAX_CROPS
from .app import make_app
from .auth import Keys
from .facts import facts_of
from .heaps import bound_heaps
from .jobs import Job
from .limits import Budget, Limits, Places
from .metrics import Metrics
from .models import Models, check_parallel, context_of
from .remote import Fetcher
from .scheduler import Scheduler
from .server import Server, is_loopback, listen
from .services import Services
from .worker import Workers

_PARTING_S = 2.0  # for a worker that has been told to end
_log = logging.getLogger("pocketphi.serve")


@dataclass(frozen=True, slots=True)
class Settings:
    """What the operator decides."""

    model: Path
    host: str = "127.0.0.1"
    port: int = 8080  # 0: a free one
    keys: Sequence[str] = ()
    no_auth: bool = False
    hosts: Sequence[str] = ()  # names in a Host header beside localhost and addresses
    origins: Sequence[str] = ()
    remote_media: bool = False
    log_requests: bool = False
    parallel: int = 1  # requests that are answered at a time
    n_ctx: int = 0  # tokens of each conversation; 0: what `context_of` says
    max_crops: int = MAX_CROPS
    options: Mapping[str, Any] = field(default_factory=dict)  # more that `Model` takes
    limits: Limits = field(default_factory=Limits)


def run(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        InputError: settings that cannot be, or a port that is taken.
        BundleError: the model directory.
        PocketPhiError: the model cannot be loaded.
    """
    _check(settings)
    bound_heaps()
    bundle, limits = bundles.load(settings.model), settings.limits
    check_parallel(settings.parallel, bundle, settings.options)
    n_ctx = context_of(bundle, settings.n_ctx, settings.parallel)
    facts = facts_of(bundle, n_ctx=n_ctx, max_crops=settings.max_crops)
    models = Models(
        settings.model, settings.parallel, n_ctx=n_ctx, max_crops=settings.max_crops, options=settings.options
    )
    scheduler: Scheduler[Job] = Scheduler(limits.queue, workers=settings.parallel)
    listeners = Places(limits.listeners)
    workers = Workers(
        models.open,
        scheduler,
        n=settings.parallel,
        failed=lambda: _give_up(server),
        expecting=lambda: listeners.taken > 0,
    )
    metrics = Metrics()
    fetch = Fetcher(limits) if settings.remote_media else None
    services = Services(
        facts=facts,
        limits=limits,
        budget=Budget(limits.held_bytes),
        scheduler=scheduler,
        workers=workers,
        metrics=metrics,
        listeners=listeners,
        fetch=fetch,
        log_requests=settings.log_requests,
    )
    _gauges(services)
    if settings.parallel > 1:
        _pass_gauges(metrics, models)
    app = make_app(services, Keys(settings.keys), hosts=settings.hosts, origins=settings.origins)
    server = Server(app, workers, limits)
    with listen(settings.host, settings.port, limits.unread_bytes) as listening:
        _log.warning("listening on %s", _address(listening))
        try:
            server.run([listening])
        finally:
            workers.abandon()
            ended = workers.join(_PARTING_S)
            if ended:  # nobody uses what the models share
                models.close()
    if workers.failure is not None:
        raise workers.failure
    if not ended:  # in a native call that has no end yet: the interpreter would wait for it
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)


def _check(settings: Settings) -> None:
    if not settings.keys and not settings.no_auth and not is_loopback(settings.host):
        what = "can be reached from other machines: expected an API key, or --no-auth"
        raise InputError(f"host {settings.host[:100]} {what}")


def _give_up(server: Server) -> None:
    server.should_exit = True


def _gauges(services: Services) -> None:
    workers, gauge = services.workers, services.metrics.gauge
    cancelled = workers.n_cancelled
    gauge("pocketphi_queue_length", "Requests that wait.", lambda: workers.n_waiting)
    gauge("pocketphi_requests_running", "Requests that a model works on.", lambda: workers.n_running)
    gauge("pocketphi_ready", "1 when the model is loaded.", lambda: workers.state == "ready")
    gauge(
        "pocketphi_listeners",
        "Recordings and live sessions that are listened to.",
        lambda: services.listeners.taken,
    )
    gauge("pocketphi_held_bytes", "Of bodies of requests.", lambda: services.budget.held)
    gauge(
        "pocketphi_cancelled_waiting_total",
        "Left the queue unanswered.",
        lambda: cancelled["waiting"],
    )
    gauge(
        "pocketphi_cancelled_running_total",
        "Ended in the middle of an answer.",
        lambda: cancelled["running"],
    )
    gauge(
        "pocketphi_adapter_changes_total",
        "From one group to another.",
        lambda: workers.n_switches,
    )


def _pass_gauges(metrics: Metrics, models: Models) -> None:
    """How well requests that are answered at the same time share passes: rows by passes."""
    metrics.gauge("pocketphi_passes_total", "Through the weights.", lambda: models.passes[0])
    metrics.gauge("pocketphi_pass_rows_total", "Tokens in those passes.", lambda: models.passes[1])


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
