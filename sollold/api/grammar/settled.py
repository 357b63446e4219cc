"""What becomes of a JSON schema while it is brought into llama.cpp's keywords. Pure."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from sollold.api.grammar.keywords import Schema
from sollold.facts import dataclass


@dataclass(slots=True)
class Settled:
    """A schema on its way.

    Attributes:
        schema: what is demanded.
        alternatives: of which one is to be met besides; None: there are none.
        problems: what has no such form, as its keyword and why.
        notes: what is enforced in part, likewise.
    """

    schema: Schema
    alternatives: list[Schema] | None = None
    problems: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)

    def set(self, **keywords: Any) -> None:
        """Set keywords; those that are None go."""
        merged = {**self.schema, **keywords}
        self.schema = {
            key: value for key, value in merged.items() if value is not None or key not in keywords
        }
