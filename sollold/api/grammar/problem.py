"""Describes a part of a JSON schema that can't be enforced. Pure."""

from __future__ import annotations

from sollold.facts import dataclass

_LONGEST = 100
"""Maximum characters shown of a location: names may be as long as a request."""


@dataclass(frozen=True, slots=True)
class SchemaProblem:
    """A keyword that can't be enforced.

    Attributes:
        pointer: JSON pointer to the schema that has it, empty for the root.
        keyword: the keyword.
        reason: why, or in which case; may be empty.
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
    """Escape a name for use in a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")
