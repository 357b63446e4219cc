"""What of a JSON schema can't be enforced, and where. Pure."""

from __future__ import annotations

from sollold.facts import dataclass

_LONGEST = 100
"""Characters of a place that are shown: names may be as long as a request."""


@dataclass(frozen=True, slots=True)
class SchemaProblem:
    """A keyword that can't be enforced.

    Attributes:
        pointer: a JSON pointer to its place, empty for the root.
        keyword: which.
        reason: why, or in which case; empty where there is nothing to say.
    """

    pointer: str
    keyword: str
    reason: str

    def __str__(self) -> str:
        place = self.pointer or "/"
        if len(place) > _LONGEST:
            place = f"...{place[-_LONGEST:]}"
        reason = f": {self.reason}" if self.reason else ""
        return f'"{self.keyword}" at {place}{reason}'


def escaped(name: str) -> str:
    """A name as a part of a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")
