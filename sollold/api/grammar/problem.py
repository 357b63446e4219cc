"""What of a JSON schema can't be enforced, and where. Pure."""

from __future__ import annotations

from sollold.facts import dataclass


@dataclass(frozen=True, slots=True)
class SchemaProblem:
    """A keyword that can't be enforced. ``pointer``: a JSON pointer to its place, empty for the root."""

    pointer: str
    keyword: str
    reason: str

    def __str__(self) -> str:
        return f'"{self.keyword}" at {self.pointer or "/"}: {self.reason}'


def escaped(name: str) -> str:
    """A name as a part of a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")
