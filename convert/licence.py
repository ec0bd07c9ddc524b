# SPDX-License-Identifier: Apache-2.0
"""What licence a checkpoint says it has, as an SPDX identifier where that can be told."""

from __future__ import annotations

import re

UNKNOWN = "unknown"

# Hub tags are SPDX identifiers in lower case.
_TAGS = {"mit": "MIT", "apache-2.0": "Apache-2.0"}
_TITLES = (
    (re.compile(r"\s*(?:\S+\s+){0,8}?MIT License\b", re.IGNORECASE), "MIT"),
    (re.compile(r"\s*Apache License\s+Version 2\.0\b", re.IGNORECASE), "Apache-2.0"),
)
# The `license:` line of the YAML between the first two lines of dashes.
_FRONT_MATTER = re.compile(r"---\r?\n(.*?)\r?\n---", re.DOTALL)
_FIELD = re.compile(r"^license:\s*['\"]?([A-Za-z0-9.+-]{1,64})['\"]?\s*$", re.MULTILINE)


def licence_of(readme: str | None, licence_text: str | None) -> str:
    """The licence named in a model card's front matter, else the one whose text this is, else "unknown"."""
    front = _FRONT_MATTER.match(readme or "")
    field = _FIELD.search(front[1]) if front else None
    if field is not None:
        return _TAGS.get(field[1].lower(), field[1])
    for title, name in _TITLES:
        if licence_text is not None and title.match(licence_text[:2000]):
            return name
    return UNKNOWN
