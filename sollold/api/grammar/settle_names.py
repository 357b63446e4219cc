"""Converts what a JSON schema requires of the names of an object's properties. Pure."""

from __future__ import annotations

from typing import Any

from sollold.api.grammar.join import all_of
from sollold.api.grammar.keywords import JOINS, constraints_of, values_of
from sollold.api.grammar.object_properties import MOST_CHOICES, MOST_NAMES, is_closed, properties_of
from sollold.api.grammar.settled import Settled
from sollold.api.grammar.values import ValueCheck

_ANY_NAME = frozenset(("", ".*", "^.*", ".*$", "^.*$", "^", "$"))


def settle_names(settled: Settled, check: ValueCheck) -> None:
    """Convert the names that patterns and ``propertyNames`` allow."""
    _apply_to_all(settled)
    _settle_patterns(settled)
    _settle_listed(settled, check)


def _apply_to_all(settled: Settled) -> None:
    """Apply patterns that match any name to all properties."""
    patterns = settled.schema.get("patternProperties")
    if not isinstance(patterns, dict):
        return
    rest: Any = True
    for name in _ANY_NAME & patterns.keys():
        rest = all_of(rest, patterns[name])
    specific = {name: schema for name, schema in patterns.items() if name not in _ANY_NAME}
    if len(specific) == len(patterns):
        return
    properties = {name: all_of(schema, rest) for name, schema in properties_of(settled.schema).items()}
    settled.set(properties=properties or None, patternProperties=specific or None, additionalProperties=rest)


def _settle_patterns(settled: Settled) -> None:
    """If only patterns allow names, allow any name, with a value that one of the patterns requires. The
    grammar would allow none otherwise, and the object would always be empty.
    """
    schema = settled.schema
    patterns = schema.get("patternProperties")
    if not patterns or properties_of(schema) or schema.get("additionalProperties") is not False:
        return
    values = [*patterns.values()]
    found = [value for index, value in enumerate(values[:MOST_CHOICES]) if value not in values[:index]]
    if len(values) > MOST_CHOICES:
        found = [{}]
    settled.set(additionalProperties=found[0] if len(found) == 1 else {"anyOf": found})


def _settle_listed(settled: Settled, check: ValueCheck) -> None:
    """Keep the names that ``propertyNames`` lists or allows."""
    schema = settled.schema
    if not isinstance(names := schema.get("propertyNames"), dict):
        return
    target = (check.resolve(names["$ref"]) or {}) if "$ref" in names and not constraints_of(names) else names
    properties, rest = properties_of(schema), schema.get("additionalProperties", True)
    listed = values_of(target) if target.keys() & {"enum", "const"} and not target.keys() & JOINS else None
    if listed is not None and len(listed) <= MOST_NAMES and "patternProperties" not in schema:
        allowed = [
            name for name in listed if isinstance(name, str) and check.admits(target, name) is not False
        ]
        chosen = {name: child for name, child in properties.items() if name in allowed}
        if not is_closed(schema):
            further = rest if isinstance(rest, dict) else {}
            chosen |= {name: further for name in allowed if name not in chosen}
        settled.set(properties=chosen, additionalProperties=False, propertyNames=None)
        return
    if is_closed(schema):
        verdicts = {name: check.admits(target, name) for name in properties}
        if None not in verdicts.values():
            kept = {name: child for name, child in properties.items() if verdicts[name]}
            settled.set(properties=kept, propertyNames=None)
