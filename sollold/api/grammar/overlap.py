"""Finds whether a value may match two schemas of a ``oneOf``, which llama.cpp reads as ``anyOf``. Pure."""

from __future__ import annotations

from itertools import combinations

from sollold.api.grammar.keywords import Schema, is_among, kinds_of, values_of
from sollold.api.grammar.values import Resolve

_MAX_COMPARED = 32
_MAX_VALUES = 64


def may_overlap(choices: list[Schema], resolve: Resolve) -> bool:
    """Whether a value may match two of ``choices``, judging by types, values and required properties."""
    if len(choices) > _MAX_COMPARED:
        listed = [_values(choice, resolve) for choice in choices]
        values = [value for group in listed for value in group or ()]
        return None in listed or not all(isinstance(v, str) for v in values) or len({*values}) < len(values)
    return any(_may_match_both(first, second, resolve) for first, second in combinations(choices, 2))


def _may_match_both(first: Schema, second: Schema, resolve: Resolve) -> bool:
    first, second = _target(first, resolve), _target(second, resolve)
    left, right = _kinds(first), _kinds(second)
    if left is not None and right is not None and not left & right:
        return False
    values, other_values = values_of(first), values_of(second)
    if values is not None and other_values is not None and len(values) <= _MAX_VALUES:
        return any(is_among(value, other_values) for value in values)
    shared = {*first.get("required", ())} & {*second.get("required", ())}
    if any(_are_disjoint(name, first, second, resolve) for name in shared):
        return False
    return not (_lacks_required(first, second) or _lacks_required(second, first))


def _are_disjoint(name: str, first: Schema, second: Schema, resolve: Resolve) -> bool:
    """Whether the property ``name``, which both require, never has a value that both allow."""
    left, right = (_target(schema.get("properties", {}).get(name, {}), resolve) for schema in (first, second))
    kinds, other_kinds = _kinds(left), _kinds(right)
    if kinds is not None and other_kinds is not None and not kinds & other_kinds:
        return True
    values, other_values = values_of(left), values_of(right)
    return (
        values is not None
        and other_values is not None
        and len(values) <= _MAX_VALUES
        and not any(is_among(value, other_values) for value in values)
    )


def _lacks_required(schema: Schema, other: Schema) -> bool:
    """Whether objects of ``schema`` never have a property that ``other`` requires."""
    if schema.get("type") != "object" or schema.get("additionalProperties") is not False:
        return False
    return "patternProperties" not in schema and any(
        name not in schema.get("properties", {}) for name in other.get("required", ())
    )


def _target(schema: Schema, resolve: Resolve) -> Schema:
    for _ in range(8):
        if "$ref" not in schema:
            break
        schema = resolve(schema["$ref"]) or {}
    return schema


def _values(schema: Schema, resolve: Resolve) -> list[object] | None:
    return values_of(_target(schema, resolve))


def _kinds(schema: Schema) -> set[str] | None:
    """Return the types that a schema allows; integer and number include each other."""
    kinds = kinds_of(schema)
    if kinds is None:
        return {"object"} if "properties" in schema else None
    return {*kinds, *(("number", "integer") if {"number", "integer"} & {*kinds} else ())}
