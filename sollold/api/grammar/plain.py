"""Finds the parts of a JSON schema that llama.cpp reads as they are; most schemas have no others. Pure."""

from __future__ import annotations

from typing import Any

from sollold.api.grammar.keywords import CONSTRAINTS, DEFINITIONS, JOINS, Schema, kind_of_value

_SUPPORTED = frozenset(
    ("type", "properties", "required", "additionalProperties", "items", "enum", "$ref", "anyOf")
)
_UNSUPPORTED = (CONSTRAINTS | JOINS | {*DEFINITIONS}) - _SUPPORTED
_KEYWORDS = CONSTRAINTS | JOINS
_KINDS = frozenset(("string", "integer", "number", "boolean", "null", "object", "array"))
_MAX_VALUES = 100


def plain_parts(document: Schema) -> set[int]:
    """Return the identities of the schemas in a converted one that llama.cpp reads as they are."""
    found: set[int] = set()
    _is_plain(document, found)
    return found


def _is_plain(schema: Any, found: set[int]) -> bool:
    keys = schema.keys()
    plain = _is_supported(schema) if keys.isdisjoint(_UNSUPPORTED) else False
    for keyword in ("properties", *DEFINITIONS):
        if keyword in keys:
            for child in schema[keyword].values():
                plain = _is_plain(child, found) and plain
    for keyword in ("anyOf", "oneOf", "allOf", "prefixItems", "items"):
        if keyword in keys and isinstance(schema[keyword], list):
            for child in schema[keyword]:
                plain = _is_plain(child, found) and plain
    for keyword in ("items", "additionalProperties"):
        if keyword in keys and isinstance(schema[keyword], dict):
            plain = _is_plain(schema[keyword], found) and plain
    if plain:
        found.add(id(schema))
    return plain


def _is_supported(schema: Schema) -> bool:
    """Whether llama.cpp reads all keywords of a schema that has only keywords it may read."""
    keys = schema.keys()
    if "$ref" in keys or "anyOf" in keys:
        return len(keys & _KEYWORDS) == 1
    kind = schema.get("type")
    if kind.__class__ is not str:
        return not keys & CONSTRAINTS
    if "enum" in keys:
        values = schema["enum"]
        listed = len(values) <= _MAX_VALUES and all(kind_of_value(value) == kind for value in values)
        return listed and len(keys & CONSTRAINTS) == 2
    if kind == "array":
        return not isinstance(schema.get("items"), list)
    if "required" in keys and kind == "object":
        properties = schema.get("properties", ())
        return all(name in properties for name in schema["required"])
    return kind in _KINDS
