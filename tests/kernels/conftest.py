# SPDX-License-Identifier: Apache-2.0
"""The two devices that tests of the plug-in inside ggml compare."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .. import ggml_graph
from ..ggml_graph import Device


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    with ggml_graph.plugin() as found:
        yield found


@pytest.fixture(scope="module")
def peer() -> Iterator[Device]:
    with ggml_graph.cpu() as found:
        yield found
