"""The keywords of JSON Schema by the type that they constrain, and the equality of JSON values. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import Any

Schema = dict[str, Any]

KINDS = ("object", "array", "string", "integer", "number", "boolean", "null")
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
CHOICES = ("anyOf", "oneOf")
DEFINITIONS = ("$defs", "definitions")
CONDITIONS = "if/then/else"
"""Internal keyword of a schema being rewritten: its conditions and those of schemas joined with it."""
_CONSTRAINED_BY: dict[str, tuple[str, ...]] = {
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": (*BOUNDS, "multipleOf", "divisibleBy"),
    "array": (
        *("items", "prefixItems", "additionalItems", "unevaluatedItems", "minItems", "maxItems"),
        *("uniqueItems", "contains", "minContains", "maxContains"),
    ),
    "object": (
        *("properties", "required", "additionalProperties", "unevaluatedProperties", "patternProperties"),
        *("propertyNames", "minProperties", "maxProperties"),
        *("dependencies", "dependentRequired", "dependentSchemas"),
    ),
}
KIND_OF = {keyword: kind for kind, keywords in _CONSTRAINED_BY.items() for keyword in keywords}
CONSTRAINTS = frozenset((*KIND_OF, "type", "enum", "const", "not", "if", CONDITIONS, "disallow", "extends"))
"""Keywords that forbid something without leading to another schema of the same value."""
JOINS = frozenset(("$ref", "allOf", *CHOICES))
"""Keywords that lead to other schemas of the same value."""


def kinds_of(schema: Schema) -> list[str] | None:
    """Return the types that a converted schema names; None for any."""
    kinds = schema.get("type")
    return [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else None


def type_of(kinds: list[str]) -> str | list[str]:
    """Return the value of ``type`` that names ``kinds``, at least one."""
    return kinds[0] if len(kinds) == 1 else kinds


def constrains(keyword: str, kinds: Iterable[str] | None) -> bool:
    """Whether the keyword constrains values of these types; None for any."""
    if kinds is None or (kind := KIND_OF.get(keyword)) is None:
        return True
    return kind in kinds or (kind == "number" and "integer" in kinds)


def constraints_of(schema: Schema) -> Schema:
    """Return the keywords of a schema that constrain values of the types that it names."""
    kinds = kinds_of(schema)
    return {key: value for key, value in schema.items() if key in CONSTRAINTS and constrains(key, kinds)}


def kind_of_value(value: Any) -> str:
    """Return the type of a value; a number without a fraction is an integer."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return "integer"
    if isinstance(value, float):
        return "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


def exact(number: float) -> Fraction:
    """Return a number exactly as it is written: 0.1 is a tenth."""
    return Fraction(number) if isinstance(number, int) else Fraction(repr(number))


def same(first: Any, second: Any) -> bool:
    """Whether two JSON values are equal: true is not 1."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    return bool(first == second)


def is_among(value: Any, values: Iterable[Any]) -> bool:
    """Whether ``values`` contains an equal value."""
    return any(same(value, element) for element in values)


def values_of(schema: Schema) -> list[Any] | None:
    """Return the only values that are allowed; None if the schema does not list them."""
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    if isinstance(values, list):
        return values
    return (
        [True, False] if schema.get("type") == "boolean" else [None] if schema.get("type") == "null" else None
    )
