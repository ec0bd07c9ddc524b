# SPDX-License-Identifier: Apache-2.0
"""What the library answers, found out once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .batch_items import alone


@pytest.fixture(scope="session")
def expected(nano: Path) -> dict[str, dict[str, Any]]:
    """What phi4-nano at F32 says to each of `batch_items.mixed`, but for timings."""
    return alone(nano)
