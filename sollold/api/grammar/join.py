"""Joins two JSON schemas to one that requires what both do. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from sollold.api.grammar.keywords import CONDITIONS, CONSTRAINTS, JOINS, Schema, is_among, same, type_of

_LOWER_BOUNDS = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties", "minContains")
_UPPER_BOUNDS = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties", "maxContains")
_MAX_VALUES = 64
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


def joined(first: Schema, second: Schema) -> Schema:
    """Join two schemas without `JOINS`; their nested schemas are combined by an ``allOf``.

    Raises:
        Unjoinable: a keyword of both can't be joined.
        Unsatisfiable: no value satisfies both.
    """
    out = dict(first)
    if first.keys() & _OBJECT and second.keys() & _OBJECT:
        _join_properties(out, first, second)
    if first.keys() & _ITEMS and second.keys() & _ITEMS:
        _join_items(out, first, second)
    for key, value in second.items():
        if key in _STRUCTURAL and first.keys() & (_OBJECT if key in _OBJECT else _ITEMS):
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
    for unevaluated, further in _UNEVALUATED:
        rest = schema.get(unevaluated)
        if isinstance(rest, dict | bool):
            schema = {key: value for key, value in schema.items() if key != unevaluated}
            if further not in schema and rest is not True:
                schema[further] = rest
    return schema


_UNEVALUATED = (("unevaluatedProperties", "additionalProperties"), ("unevaluatedItems", "items"))


def all_of(first: Any, second: Any) -> Any:
    """Return a schema that requires what both do, as an ``allOf`` that is joined later."""
    if first is False or second is False:
        return False
    parts: list[Any] = []
    for schema in (first, second):
        if not isinstance(schema, dict) or not schema.keys() & (CONSTRAINTS | JOINS):
            continue
        members = schema["allOf"] if schema.keys() == {"allOf"} else [schema]
        parts += [member for member in members if member not in parts]
    if len(parts) > 1:
        return {"allOf": parts}
    return parts[0] if parts else first if isinstance(first, dict) else second


_OBJECT = frozenset(("properties", "additionalProperties", "patternProperties"))
_ITEMS = frozenset(("items", "prefixItems", "additionalItems"))
_STRUCTURAL = _OBJECT | _ITEMS


def _join_properties(out: Schema, first: Schema, second: Schema) -> None:
    """Join the properties of both schemas; the schema of a property that must be absent is false."""
    properties: dict[str, Any] = {}
    for left, right in ((first, second), (second, first)):
        for name, schema in left.get("properties", {}).items():
            if name not in properties:
                rest = True if "patternProperties" in right else right.get("additionalProperties", True)
                properties[name] = all_of(schema, right.get("properties", {}).get(name, rest))
    if "properties" in first or "properties" in second:
        out["properties"] = properties
    if "additionalProperties" in first or "additionalProperties" in second:
        out["additionalProperties"] = all_of(
            first.get("additionalProperties", True), second.get("additionalProperties", True)
        )
    patterns, further = first.get("patternProperties", {}), second.get("patternProperties", {})
    if patterns or further:
        shared = {name: all_of(patterns[name], further[name]) for name in patterns.keys() & further.keys()}
        out["patternProperties"] = {**patterns, **further, **shared}


def _join_items(out: Schema, first: Schema, second: Schema) -> None:
    left, right = tuple_of(first), tuple_of(second)
    longest = max(len(left[0]), len(right[0]))
    prefix = [all_of(*(_item(index, side) for side in (left, right))) for index in range(longest)]
    rest = all_of(left[1], right[1])
    if False in prefix:
        prefix, rest = prefix[: prefix.index(False)], False
    for key in _ITEMS:
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


def _item(index: int, side: tuple[list[Any], Any]) -> Any:
    prefix, rest = side
    return prefix[index] if index < len(prefix) else rest


def _join_types(first: Any, second: Any) -> Any:
    left, right = ([kinds] if isinstance(kinds, str) else kinds for kinds in (first, second))
    found = [kind for kind in left if kind in right or (kind == "integer" and "number" in right)]
    found += [kind for kind in right if kind == "integer" and "number" in left and kind not in found]
    if not found:
        raise Unsatisfiable("type", "no type is allowed by all")
    return type_of(found)


def _join_enums(first: Any, second: Any) -> Any:
    if len(first) > _MAX_VALUES and len(second) > _MAX_VALUES:
        raise Unjoinable("enum")
    if found := [value for value in first if is_among(value, second)]:
        return found
    raise Unsatisfiable("enum", "no value is in all of them")


def _join_consts(first: Any, second: Any) -> Any:
    if is_among(first, [second]):
        return first
    raise Unsatisfiable("const", "the values differ")


def _join_multiples(first: Any, second: Any) -> Any:
    if isinstance(first, int) and isinstance(second, int) and first and second:
        return math.lcm(first, second)
    raise Unjoinable("multipleOf")


def _join_dependents(first: Any, second: Any) -> Any:
    shared: dict[str, Any] = {}
    for name in first.keys() & second.keys():
        left, right = first[name], second[name]
        if isinstance(left, list) and isinstance(right, list):
            shared[name] = list(dict.fromkeys([*left, *right]))
        elif isinstance(left, list) or isinstance(right, list):
            raise Unjoinable("dependencies")
        else:
            shared[name] = all_of(left, right)
    return {**first, **second, **shared}


_JOINS: dict[str, Callable[[Any, Any], Any]] = {
    "required": lambda first, second: list(dict.fromkeys([*first, *second])),
    "type": _join_types,
    "enum": _join_enums,
    "const": _join_consts,
    "multipleOf": _join_multiples,
    "uniqueItems": lambda first, second: bool(first or second),
    "not": lambda first, second: {"anyOf": [first, second]},
    CONDITIONS: lambda first, second: [*first, *(part for part in second if part not in first)],
    **dict.fromkeys(("propertyNames", "unevaluatedProperties", "unevaluatedItems"), all_of),
    **dict.fromkeys(("dependencies", "dependentRequired", "dependentSchemas"), _join_dependents),
    **dict.fromkeys(_LOWER_BOUNDS, max),
    **dict.fromkeys(_UPPER_BOUNDS, min),
}
