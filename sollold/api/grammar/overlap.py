"""Finds whether a value may match two schemas of a ``oneOf``, which llama.cpp reads as ``anyOf``. Pure."""

from __future__ import annotations

from itertools import combinations

from sollold.api.grammar.keywords import Schema, is_among, kinds_of, values_of
from sollold.api.grammar.values import Resolve, target_of

_MAX_COMPARED = 32
_MAX_VALUES = 64


def may_overlap(choices: list[Schema], resolve: Resolve) -> bool:
    """Whether a value may match two of ``choices``, judging by types, values and required properties."""
    if len(choices) > _MAX_COMPARED:
        listed = [values_of(_target(choice, resolve)) for choice in choices]
        values = [value for group in listed for value in group or ()]
        return None in listed or not all(isinstance(v, str) for v in values) or len({*values}) < len(values)
    return any(_may_match_both(first, second, resolve) for first, second in combinations(choices, 2))


def _may_match_both(first: Schema, second: Schema, resolve: Resolve) -> bool:
    first, second = _target(first, resolve), _target(second, resolve)
    disjoint = _are_disjoint(first, second)
    if disjoint is not None:
        return not disjoint
    for name in {*first.get("required", ())} & {*second.get("required", ())}:
        left, right = (schema.get("properties", {}).get(name, {}) for schema in (first, second))
        if _are_disjoint(_target(left, resolve), _target(right, resolve)):
            return False
    return not (_lacks_required(first, second) or _lacks_required(second, first))


def _are_disjoint(first: Schema, second: Schema) -> bool | None:
    """Whether no value has the type, and is in the list, of both; None if that does not decide it."""
    kinds, other_kinds = _kinds(first), _kinds(second)
    if kinds is not None and other_kinds is not None and not kinds & other_kinds:
        return True
    values, other_values = values_of(first), values_of(second)
    if values is None or other_values is None or len(values) > _MAX_VALUES:
        return None
    return not any(is_among(value, other_values) for value in values)


def _lacks_required(schema: Schema, other: Schema) -> bool:
    """Whether objects of ``schema`` never have a property that ``other`` requires."""
    if schema.get("type") != "object" or schema.get("additionalProperties") is not False:
        return False
    return "patternProperties" not in schema and any(
        name not in schema.get("properties", {}) for name in other.get("required", ())
    )


def _target(schema: Schema, resolve: Resolve) -> Schema:
    return target_of(schema, resolve) or {}


def _kinds(schema: Schema) -> set[str] | None:
    """Return the types that a schema allows; integer and number include each other."""
    kinds = kinds_of(schema)
    if kinds is None:
        return {"object"} if "properties" in schema else None
    return {*kinds, *(("number", "integer") if {"number", "integer"} & {*kinds} else ())}
