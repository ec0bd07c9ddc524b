# SPDX-License-Identifier: Apache-2.0
"""One server for all tests that do not stop it: phi4-nano at F32 with an exact cache,."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pocketphi.runtime.engine import Model

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("pydantic")
pytest.importorskip("python_multipart")

from .served import Server

Serve = Callable[..., Server]


@pytest.fixture(scope="session")
def user(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a user with a cache and a home of their own, who has set no key and no proxy."""
    home = tmp_path_factory.mktemp("server-home")
    left_out = ("POCKETPHI_", "XDG_", "HF_", "OPENAI_")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(left_out) and "proxy" not in k.lower()}
    return clean | {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "NO_COLOR": "1"}


@pytest.fixture(scope="session")
def server(user: dict[str, str], nano: Path) -> Iterator[Server]:
    """Shared, with small limits where tests reach them."""
    found = Server(user, "-m", nano, "--cache-type", "f32", "--max-body", 8, "--max-audio", 60, "--queue", 4)
    try:
        yield found.ready()
    finally:
        found.stop()


@pytest.fixture(scope="session")
def alone(nano: Path) -> Iterator[Model]:
    """The same model without a server, on as many threads."""
    with Model(nano, kv_type="f32", n_threads=1) as found:
        yield found


@pytest.fixture
def serve(user: dict[str, str], nano: Path) -> Iterator[Serve]:
    """`serve(arguments)`: a server of one's own."""
    started: list[Server] = []

    def start(*arguments: object) -> Server:
        started.append(Server(user, "-m", nano, "--cache-type", "f32", *arguments))
        return started[-1]

    yield start
    for one in started:
        one.stop()
