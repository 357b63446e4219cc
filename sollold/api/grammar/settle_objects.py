"""Converts objects of a JSON schema to the keywords that llama.cpp reads. Pure.

For an object with ``properties`` and without ``additionalProperties``, llama.cpp generates no others, so the
absence of a property can be expressed.
"""

from __future__ import annotations

import math

from sollold.api.grammar.join import Unsatisfiable
from sollold.api.grammar.keywords import JOINS, constraints_of
from sollold.api.grammar.object_properties import MOST_CHOICES, forbid_properties, is_closed, properties_of
from sollold.api.grammar.settle_dependents import (
    declare_dependent_names,
    settle_conditions,
    settle_dependents,
)
from sollold.api.grammar.settle_names import settle_names
from sollold.api.grammar.settled import Settled
from sollold.api.grammar.values import ValueCheck


def settle_object(settled: Settled, check: ValueCheck) -> None:
    """Convert names, numbers of properties, and what depends on a property.

    Raises:
        Unsatisfiable: no object satisfies the schema.
    """
    forbid_properties(settled, [name for name, v in properties_of(settled.schema).items() if v is False])
    settle_names(settled, check)
    declare_dependent_names(settled, check.resolve)
    for step in (_settle_required, _settle_forbidden, _settle_counts, settle_dependents):
        step(settled)
        if settled.alternatives is not None:
            return
    settle_conditions(settled, check.resolve)


def _settle_required(settled: Settled) -> None:
    """Give required properties a schema of their own."""
    schema = settled.schema
    properties, rest = properties_of(schema), schema.get("additionalProperties", True)
    missing = [name for name in schema.get("required", ()) if name not in properties]
    if not missing:
        return
    if rest is False:
        if "patternProperties" not in schema:
            raise Unsatisfiable("required", f"{missing[0][:40]!r} is not allowed")
        return
    further = rest if isinstance(rest, dict) else {}
    if "properties" not in schema:
        # Without "properties", any names were allowed.
        settled.set(additionalProperties=rest)
    settled.set(properties={**properties, **dict.fromkeys(missing, further)})


def _settle_forbidden(settled: Settled) -> None:
    """Convert a ``not`` of required properties, which must be absent."""
    denied = settled.schema.get("not")
    choices = denied.get("anyOf", [denied]) if isinstance(denied, dict) else []
    if not choices or not all(
        isinstance(choice, dict)
        and constraints_of(choice).keys() <= {"required", "type"}
        and not choice.keys() & JOINS
        for choice in choices
    ):
        return
    groups = [choice.get("required", ()) for choice in choices]
    closed = is_closed(settled.schema)
    if any(len(g) != 1 for g in groups) or any(c.get("type", "object") != "object" for c in choices):
        return
    if settled.schema.get("type") != "object" or not closed:
        return
    forbid_properties(settled, [group[0] for group in groups])
    settled.set(**{"not": None})


def _settle_counts(settled: Settled) -> None:
    """Convert numbers of properties, if few are optional."""
    schema = settled.schema
    if not is_closed(schema):
        if schema.get("minProperties", 0) <= len(schema.get("required", ())):
            settled.set(minProperties=None)
        return
    properties = properties_of(schema)
    required = dict.fromkeys(name for name in schema.get("required", ()) if name in properties)
    optional = [name for name in properties if name not in required]
    low, high = schema.get("minProperties", 0), schema.get("maxProperties", math.inf)
    if low > min(high, len(properties)) or high < len(required):
        raise Unsatisfiable(
            "minProperties" if low else "maxProperties", "no such number of properties is possible"
        )
    if high >= len(properties):
        settled.set(maxProperties=None)
    elif high == len(required):
        forbid_properties(settled, optional)
        settled.set(maxProperties=None)
    if low <= len(required):
        settled.set(minProperties=None)
    elif low == len(properties):
        settled.set(minProperties=None, required=[*required, *optional])
    elif low == len(required) + 1 and len(optional) <= MOST_CHOICES and schema.get("type") == "object":
        settled.set(minProperties=None)
        settled.alternatives = [{"required": [name]} for name in optional]
