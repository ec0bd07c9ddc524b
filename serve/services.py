# SPDX-License-Identifier: Apache-2.0
"""What handlers share: one of each for a server."""

from __future__ import annotations

from dataclasses import dataclass

from .facts import Facts
from .jobs import Job
from .limits import Budget, Limits, Places
from .media import Fetch
from .metrics import Metrics
from .scheduler import Scheduler
from .worker import Workers


@dataclass(frozen=True, slots=True)
class Services:
    """The parts of a server."""

    facts: Facts
    limits: Limits
    budget: Budget
    scheduler: Scheduler[Job]
    workers: Workers
    metrics: Metrics
    listeners: Places
    fetch: Fetch | None = None  # of pictures from other servers; None: they are refused
    log_requests: bool = False
