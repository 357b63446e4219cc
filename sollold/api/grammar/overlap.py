"""Tells whether a value may match two schemas of a ``oneOf``, which llama.cpp reads as ``anyOf``. Pure."""

from __future__ import annotations

from itertools import combinations

from sollold.api.grammar.keywords import Schema, is_among, kinds_of, values_of
from sollold.api.grammar.values import Resolve

_MOST_COMPARED = 32
_MOST_VALUES = 64


def may_overlap(choices: list[Schema], resolve: Resolve) -> bool:
    """Whether a value may match two of ``choices``, judging by types, values and required properties."""
    if len(choices) > _MOST_COMPARED:
        listed = [_listed(one, resolve) for one in choices]
        values = [value for one in listed for value in one or ()]
        return (
            None in listed or not all(isinstance(one, str) for one in values) or len({*values}) < len(values)
        )
    return any(_may_match_both(one, other, resolve) for one, other in combinations(choices, 2))


def _may_match_both(one: Schema, other: Schema, resolve: Resolve) -> bool:
    one, other = _target(one, resolve), _target(other, resolve)
    mine, theirs = _kinds(one), _kinds(other)
    if mine is not None and theirs is not None and not mine & theirs:
        return False
    values, others = values_of(one), values_of(other)
    if values is not None and others is not None and len(values) <= _MOST_VALUES:
        return any(is_among(value, others) for value in values)
    shared = {*one.get("required", ())} & {*other.get("required", ())}
    if any(_are_apart(name, one, other, resolve) for name in shared):
        return False
    return not (_lacks_required(one, other) or _lacks_required(other, one))


def _are_apart(name: str, one: Schema, other: Schema, resolve: Resolve) -> bool:
    """Whether the property ``name``, which both require, never has a value that both allow."""
    mine, theirs = (_target(side.get("properties", {}).get(name, {}), resolve) for side in (one, other))
    kinds, others = _kinds(mine), _kinds(theirs)
    if kinds is not None and others is not None and not kinds & others:
        return True
    listed, further = values_of(mine), values_of(theirs)
    return (
        listed is not None
        and further is not None
        and len(listed) <= _MOST_VALUES
        and not any(is_among(value, further) for value in listed)
    )


def _lacks_required(one: Schema, other: Schema) -> bool:
    """Whether ``one`` never has a property that ``other`` requires."""
    if one.get("type") != "object" or one.get("additionalProperties") is not False:
        return False
    return "patternProperties" not in one and any(
        name not in one.get("properties", {}) for name in other.get("required", ())
    )


def _target(schema: Schema, resolve: Resolve) -> Schema:
    for _ in range(8):
        if "$ref" not in schema:
            break
        schema = resolve(schema["$ref"]) or {}
    return schema


def _listed(schema: Schema, resolve: Resolve) -> list[object] | None:
    return values_of(_target(schema, resolve))


def _kinds(schema: Schema) -> set[str] | None:
    """Return the types that a schema allows; integer and number include each other."""
    kinds = kinds_of(schema)
    if kinds is None:
        return {"object"} if "properties" in schema else None
    return {*kinds, *(("number", "integer") if {"number", "integer"} & {*kinds} else ())}
