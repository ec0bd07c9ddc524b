# SPDX-License-Identifier: Apache-2.0
"""The routing table, row by row as Microsoft's model code has it."""

from __future__ import annotations

import pytest

from pocketphi.runtime.router import Route, route


@pytest.mark.parametrize(
    ("images", "audio", "want"),
    [
        (False, False, Route("language", None, None)),
        (True, False, Route("vision", "vision", None)),
        (False, True, Route("speech", "speech", "speech")),
        (True, True, Route("vision_speech", "vision", "vision")),
    ],
)
def test_route(images: bool, audio: bool, want: Route) -> None:
    assert route(images=images, audio=audio) == want
