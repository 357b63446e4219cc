"""Converts the schema of a tool's arguments to one object. Pure.

Some templates write each argument in a form of its own, and llama.cpp lets a model write no argument of a
tool whose schema is a choice or a reference.
"""

from __future__ import annotations

from typing import Any

from sollold.api.grammar.keywords import CHOICES, CONSTRAINTS, DEFINITIONS, JOINS, Schema
from sollold.api.grammar.pointer import at_pointer
from sollold.api.grammar.problem import SchemaProblem


def as_one_object(original: Any, schema: Schema) -> tuple[Schema, list[SchemaProblem]]:
    """Return a tool's converted schema as one object, if ``original`` was one or a reference to one, and what
    is not enforced in that form.
    """
    reference = schema.get("$ref")
    if isinstance(reference, str) and isinstance(target := at_pointer(schema, reference), dict):
        if "properties" not in target or target.keys() & JOINS:
            return schema, []
        return {**target, **{key: value for key, value in schema.items() if key != "$ref"}}, []
    keyword = next((key for key in CHOICES if key in schema), None)
    if keyword is None or not isinstance(original, dict) or not isinstance(original.get("properties"), dict):
        return schema, []
    choices = [choice for choice in schema[keyword] if "properties" in choice]
    if len(choices) < len(schema[keyword]):
        return schema, []
    names = list(dict.fromkeys(name for choice in choices for name in choice["properties"]))
    properties = {
        name: _any_of([choice["properties"][name] for choice in choices if name in choice["properties"]])
        for name in names
    }
    required = [name for name in names if all(name in choice.get("required", ()) for choice in choices)]
    merged = {
        **{
            key: value
            for key, value in schema.items()
            if key not in CONSTRAINTS | JOINS or key in DEFINITIONS
        },
        "type": "object",
        "properties": properties,
    }
    additional = [choice["additionalProperties"] for choice in choices if "additionalProperties" in choice]
    if len(additional) == len(choices) and all(rest == additional[0] for rest in additional):
        merged["additionalProperties"] = additional[0]
    if required:
        merged["required"] = required
    return merged, [SchemaProblem("", keyword, "which arguments go together")]


def _any_of(schemas: list[Schema]) -> Schema:
    different = [schema for index, schema in enumerate(schemas) if schema not in schemas[:index]]
    return different[0] if len(different) == 1 else {"anyOf": different}
