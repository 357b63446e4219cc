"""Converts the schema of a tool's arguments to one object. Pure.

Some templates write each argument in a form of its own, and llama.cpp lets a model write no argument of a
tool whose schema is a choice or a reference.
"""

from __future__ import annotations

from typing import Any

from sollold.api.grammar.keywords import CHOICES, CONSTRAINTS, DEFINITIONS, JOINS, Schema
from sollold.api.grammar.pointer import at_pointer
from sollold.api.grammar.problem import SchemaProblem


def as_one_object(given: Any, schema: Schema) -> tuple[Schema, list[SchemaProblem]]:
    """Return a tool's converted schema as one object, if ``given`` was one or a reference to one, and what is
    not enforced in that form.
    """
    reference = schema.get("$ref")
    if isinstance(reference, str) and isinstance(target := at_pointer(schema, reference), dict):
        if "properties" not in target or target.keys() & JOINS:
            return schema, []
        return {**target, **{key: value for key, value in schema.items() if key != "$ref"}}, []
    keyword = next((key for key in CHOICES if key in schema), None)
    if keyword is None or not isinstance(given, dict) or not isinstance(given.get("properties"), dict):
        return schema, []
    choices = [one for one in schema[keyword] if "properties" in one]
    if len(choices) < len(schema[keyword]):
        return schema, []
    names = list(dict.fromkeys(name for one in choices for name in one["properties"]))
    properties = {
        name: _of_any([one["properties"][name] for one in choices if name in one["properties"]])
        for name in names
    }
    required = [name for name in names if all(name in one.get("required", ()) for one in choices)]
    merged = {
        **{
            key: value
            for key, value in schema.items()
            if key not in CONSTRAINTS | JOINS or key in DEFINITIONS
        },
        "type": "object",
        "properties": properties,
    }
    additional = [one["additionalProperties"] for one in choices if "additionalProperties" in one]
    if len(additional) == len(choices) and all(rest == additional[0] for rest in additional):
        merged["additionalProperties"] = additional[0]
    if required:
        merged["required"] = required
    return merged, [SchemaProblem("", keyword, "which arguments go together")]


def _of_any(schemas: list[Schema]) -> Schema:
    different = [one for place, one in enumerate(schemas) if one not in schemas[:place]]
    return different[0] if len(different) == 1 else {"anyOf": different}
