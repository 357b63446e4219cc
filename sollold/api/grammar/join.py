"""Joins two JSON schemas to one that requires what both do. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from sollold.api.grammar.keywords import CONDITIONS, CONSTRAINTS, JOINS, Schema, is_among, same

_LARGER = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties", "minContains")
_SMALLER = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties", "maxContains")
_MOST_NAMES = 64
"""Maximum values of the shorter of two ``enum`` lists, since each is compared with each."""


class Unjoinable(Exception):
    """Two values of a keyword can't be expressed as one; the message names the keyword."""


class Unsatisfiable(Exception):
    """No value satisfies a schema.

    Attributes:
        keyword: the keyword that can't be satisfied.
        reason: why not.
    """

    def __init__(self, keyword: str, reason: str) -> None:
        super().__init__(keyword, reason)
        self.keyword, self.reason = keyword, reason


def joined(one: Schema, other: Schema) -> Schema:
    """Join two schemas without `JOINS`; their nested schemas are combined by an ``allOf``.

    Raises:
        Unjoinable: a keyword of both can't be joined.
        Unsatisfiable: no value satisfies both.
    """
    out = dict(one)
    if one.keys() & _OF_OBJECTS and other.keys() & _OF_OBJECTS:
        _join_properties(out, one, other)
    if one.keys() & _OF_ITEMS and other.keys() & _OF_ITEMS:
        _join_items(out, one, other)
    for key, value in other.items():
        if key in _APART and one.keys() & (_OF_OBJECTS if key in _OF_OBJECTS else _OF_ITEMS):
            continue
        if key not in out or same(out[key], value):
            out[key] = value
        elif key in CONSTRAINTS:
            if (join := _JOINS.get(key)) is None:
                raise Unjoinable(key)
            out[key] = join(out[key], value)
    return out


def with_rest(schema: Schema) -> Schema:
    """Replace ``unevaluatedProperties`` and ``unevaluatedItems`` by what they mean once all is joined."""
    for unevaluated, further in _RESTS:
        rest = schema.get(unevaluated)
        if isinstance(rest, dict | bool):
            schema = {key: value for key, value in schema.items() if key != unevaluated}
            if further not in schema and rest is not True:
                schema[further] = rest
    return schema


_RESTS = (("unevaluatedProperties", "additionalProperties"), ("unevaluatedItems", "items"))


def all_of(one: Any, other: Any) -> Any:
    """Return a schema that requires what both do, as an ``allOf`` that is yet to be joined."""
    if one is False or other is False:
        return False
    parts: list[Any] = []
    for schema in (one, other):
        if not isinstance(schema, dict) or not schema.keys() & (CONSTRAINTS | JOINS):
            continue
        members = schema["allOf"] if schema.keys() == {"allOf"} else [schema]
        parts += [member for member in members if member not in parts]
    if len(parts) > 1:
        return {"allOf": parts}
    return parts[0] if parts else one if isinstance(one, dict) else other


_OF_OBJECTS = frozenset(("properties", "additionalProperties", "patternProperties"))
_OF_ITEMS = frozenset(("items", "prefixItems", "additionalItems"))
_APART = _OF_OBJECTS | _OF_ITEMS


def _join_properties(out: Schema, one: Schema, other: Schema) -> None:
    """Join the properties of both; false for one that must be absent."""
    found: dict[str, Any] = {}
    for mine, theirs in ((one, other), (other, one)):
        for name, schema in mine.get("properties", {}).items():
            if name not in found:
                rest = True if "patternProperties" in theirs else theirs.get("additionalProperties", True)
                found[name] = all_of(schema, theirs.get("properties", {}).get(name, rest))
    if "properties" in one or "properties" in other:
        out["properties"] = found
    if "additionalProperties" in one or "additionalProperties" in other:
        out["additionalProperties"] = all_of(
            one.get("additionalProperties", True), other.get("additionalProperties", True)
        )
    patterns, further = one.get("patternProperties", {}), other.get("patternProperties", {})
    if patterns or further:
        shared = {name: all_of(patterns[name], further[name]) for name in patterns.keys() & further.keys()}
        out["patternProperties"] = {**patterns, **further, **shared}


def _join_items(out: Schema, one: Schema, other: Schema) -> None:
    first, second = tuple_of(one), tuple_of(other)
    longest = max(len(first[0]), len(second[0]))
    prefix = [all_of(*(_item(place, side) for side in (first, second))) for place in range(longest)]
    rest = all_of(first[1], second[1])
    if False in prefix:
        prefix, rest = prefix[: prefix.index(False)], False
    for key in _OF_ITEMS:
        out.pop(key, None)
    if prefix:
        out["prefixItems"] = prefix
    if rest is not True:
        out["items"] = rest


def tuple_of(schema: Schema) -> tuple[list[Any], Any]:
    """Return the schemas of an array's first items, and of all further ones (or whether there may be any)."""
    items = schema.get("items", True)
    if isinstance(items, list):
        return items, schema.get("additionalItems", True)
    return schema.get("prefixItems", []), items


def _item(place: int, side: tuple[list[Any], Any]) -> Any:
    prefix, rest = side
    return prefix[place] if place < len(prefix) else rest


def _types(one: Any, other: Any) -> Any:
    mine, theirs = ([kinds] if isinstance(kinds, str) else kinds for kinds in (one, other))
    found = [kind for kind in mine if kind in theirs or (kind == "integer" and "number" in theirs)]
    found += [kind for kind in theirs if kind == "integer" and "number" in mine and kind not in found]
    if not found:
        raise Unsatisfiable("type", "no type is allowed by all")
    return found[0] if len(found) == 1 else found


def _listed(one: Any, other: Any) -> Any:
    if len(one) > _MOST_NAMES and len(other) > _MOST_NAMES:
        raise Unjoinable("enum")
    if found := [value for value in one if is_among(value, other)]:
        return found
    raise Unsatisfiable("enum", "no value is in all of them")


def _consts(one: Any, other: Any) -> Any:
    if is_among(one, [other]):
        return one
    raise Unsatisfiable("const", "the values differ")


def _multiples(one: Any, other: Any) -> Any:
    if isinstance(one, int) and isinstance(other, int) and one and other:
        return math.lcm(one, other)
    raise Unjoinable("multipleOf")


def _dependents(one: Any, other: Any) -> Any:
    shared: dict[str, Any] = {}
    for name in one.keys() & other.keys():
        mine, theirs = one[name], other[name]
        if isinstance(mine, list) and isinstance(theirs, list):
            shared[name] = list(dict.fromkeys([*mine, *theirs]))
        elif isinstance(mine, list) or isinstance(theirs, list):
            raise Unjoinable("dependencies")
        else:
            shared[name] = all_of(mine, theirs)
    return {**one, **other, **shared}


_JOINS: dict[str, Callable[[Any, Any], Any]] = {
    "required": lambda one, other: list(dict.fromkeys([*one, *other])),
    "type": _types,
    "enum": _listed,
    "const": _consts,
    "multipleOf": _multiples,
    "uniqueItems": lambda one, other: bool(one or other),
    "not": lambda one, other: {"anyOf": [one, other]},
    CONDITIONS: lambda one, other: [*one, *(each for each in other if each not in one)],
    **dict.fromkeys(("propertyNames", "unevaluatedProperties", "unevaluatedItems"), all_of),
    **dict.fromkeys(("dependencies", "dependentRequired", "dependentSchemas"), _dependents),
    **dict.fromkeys(_LARGER, max),
    **dict.fromkeys(_SMALLER, min),
}
