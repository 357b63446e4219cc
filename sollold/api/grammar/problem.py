"""Describes a part of a JSON schema that can't be enforced. Pure."""

from __future__ import annotations

from sollold.facts import dataclass

_MAX_CHARACTERS = 100
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
        location = self.pointer or "/"
        if len(location) > _MAX_CHARACTERS:
            location = f"...{location[-_MAX_CHARACTERS:]}"
        reason = f": {self.reason}" if self.reason else ""
        return f'"{self.keyword}" at {location}{reason}'


def escaped(name: str) -> str:
    """Escape a name for use in a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")
