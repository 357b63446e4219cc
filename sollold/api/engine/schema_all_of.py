"""``allOf`` without it: llama.cpp joins objects and enums alone, and makes an object of all else. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

_SAID = ("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment")
"""Keywords that constrain nothing."""
_LARGER = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
_SMALLER = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")


def without_all_of(schema: Schema) -> Schema | None:
    """A converted schema with the members of its ``allOf`` in it; None: they have no such form."""
    members = [member for member in schema["allOf"] if any(key not in _SAID for key in member)]
    rest = {key: value for key, value in schema.items() if key != "allOf"}
    if len(members) == 1 and "$ref" in members[0] and all(key in _SAID for key in rest):
        return {**members[0], **rest}
    merged = rest
    for member in members:
        joined = None if "$ref" in member else _joined(merged, member)
        if joined is None:
            return None
        merged = joined
    return merged


def _joined(one: Schema, other: Schema) -> Schema | None:
    """What meets both; None where that can't be said with one schema's keywords."""
    out = dict(one)
    for key, value in other.items():
        if key not in out or out[key] == value:
            out[key] = value
        elif key in _SAID:
            continue
        elif (join := _JOINS.get(key)) is None or (both := join(out[key], value)) is None:
            return None
        else:
            out[key] = both
    return out


def _properties(one: Any, other: Any) -> Any:
    shared = {name: _joined(one[name], other[name]) for name in one.keys() & other.keys()}
    return None if None in shared.values() else {**one, **other, **shared}


def _types(one: Any, other: Any) -> Any:
    mine, theirs = ([kinds] if isinstance(kinds, str) else kinds for kinds in (one, other))
    both = [kind for kind in mine if kind in theirs]
    return both[0] if len(both) == 1 else both or None


_JOINS: dict[str, Callable[[Any, Any], Any]] = {
    "properties": _properties,
    "$defs": lambda one, other: {**other, **one},
    "required": lambda one, other: list(dict.fromkeys([*one, *other])),
    "type": _types,
    "enum": lambda one, other: [value for value in one if value in other] or None,
    **dict.fromkeys(_LARGER, max),
    **dict.fromkeys(_SMALLER, min),
}
