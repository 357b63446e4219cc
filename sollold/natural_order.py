"""Natural sort order of names: pc2 before pc10."""

from __future__ import annotations

import re

_DIGITS = re.compile(r"([0-9]+)")


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """Return a sort key in which numbers within the name compare as numbers and case is ignored."""
    # Every second part is a number; the string before it, possibly empty, keeps types aligned.
    parts = _DIGITS.split(name.casefold())
    return tuple(
        (len(digits := part.lstrip("0")), digits) if index % 2 else (0, part)
        for index, part in enumerate(parts)
    )
