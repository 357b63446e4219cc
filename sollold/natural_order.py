"""The order in which people expect names: pc2 before pc10."""

from __future__ import annotations

import re

_DIGITS = re.compile(r"([0-9]+)")


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """What to sort names by: numbers in them count as numbers, and case does not."""
    # Every second part is a number; a text before it, which may be empty, keeps the kinds apart.
    parts = _DIGITS.split(name.casefold())
    return tuple(
        (len(digits := part.lstrip("0")), digits) if place % 2 else (0, part)
        for place, part in enumerate(parts)
    )
