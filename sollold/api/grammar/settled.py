"""The state of a JSON schema while it is converted to llama.cpp's keywords. Pure."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from sollold.api.grammar.keywords import Schema
from sollold.facts import dataclass


@dataclass(slots=True)
class Settled:
    """A schema being converted.

    Attributes:
        schema: the schema so far.
        alternatives: schemas of which one must be satisfied as well; None if there are none.
        problems: keywords that can't be enforced, as (keyword, reason).
        notes: keywords that are only partly enforced, in the same form.
    """

    schema: Schema
    alternatives: list[Schema] | None = None
    problems: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)

    def set(self, **keywords: Any) -> None:
        """Set keywords; those that are None are removed."""
        merged = {**self.schema, **keywords}
        self.schema = {
            key: value for key, value in merged.items() if value is not None or key not in keywords
        }
