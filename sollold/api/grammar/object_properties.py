"""The properties of an object in a JSON schema, as llama.cpp reads them. Pure."""

from __future__ import annotations

from typing import Any

from sollold.api.grammar.join import Unsatisfiable
from sollold.api.grammar.keywords import Schema
from sollold.api.grammar.settled import Settled

MOST_CHOICES = 16
MOST_NAMES = 256


def properties_of(schema: Schema) -> dict[str, Any]:
    """Return the properties that have a schema, by name."""
    found: dict[str, Any] = schema.get("properties", {})
    return found


def is_closed(schema: Schema) -> bool:
    """Whether llama.cpp generates only properties that have a schema."""
    rest = schema.get("additionalProperties")
    return rest is False or (rest is None and "properties" in schema)


def forbid_properties(settled: Settled, names: list[str]) -> None:
    """Remove the properties of these names, which must be absent.

    Raises:
        Unsatisfiable: one of them is required.
    """
    schema = settled.schema
    if not names:
        return
    denied = {*names}
    for name in schema.get("required", ()):
        if name in denied:
            raise Unsatisfiable("required", f"{name[:40]!r} is not allowed")
    settled.set(properties={key: child for key, child in properties_of(schema).items() if key not in denied})
    if "additionalProperties" not in schema:
        # So that later joins do not bring them back.
        settled.set(additionalProperties=False)
