"""Tools with schemas that an Ollama can read: Go's types refuse a request for what JSON Schema allows. Pure.

An Ollama only prints them into the prompt, so what is rewritten here is not enforced there either.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

_DEEPEST = 32


def readable_tools(tools: Any) -> Any:
    """Tools with such schemas. What is none stays as it is: not each route that takes the field reads it."""
    return [_readable(tool) for tool in tools] if isinstance(tools, list) else tools


def _readable(tool: Any) -> Any:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict):
        return tool
    # Of a tool without parameters an Ollama makes one whose properties are null, which llama.cpp refuses.
    schema = function.get("parameters") or {}
    if not isinstance(schema, dict):
        return tool
    kinds, required = schema.get("type"), schema.get("required")
    out = {key: value for key, value in schema.items() if key not in ("type", "required", "properties")}
    out["type"] = kinds if isinstance(kinds, str) else "object"
    if isinstance(required, list):
        out["required"] = [name for name in required if isinstance(name, str)]
    properties = schema.get("properties")
    out["properties"] = _all_of(properties if isinstance(properties, dict) else {}, _DEEPEST)
    return {**tool, "function": {**function, "parameters": out}}


def _all_of(properties: Schema, depth: int) -> Schema:
    return {name: _property(one, depth) for name, one in properties.items()}


def _property(given: Any, depth: int) -> Schema:
    """A schema within; ``true`` and other nonsense is one that says nothing."""
    if not isinstance(given, dict) or depth <= 0:
        return {}
    out = dict(given)
    kinds, enum = given.get("type"), given.get("enum")
    if "type" in given and not isinstance(kinds, str):
        out["type"] = [kind for kind in kinds if isinstance(kind, str)] if isinstance(kinds, list) else []
    if not out.get("type"):
        out.pop("type", None)
    if "enum" in given and not isinstance(enum, list):
        out["enum"] = [enum]
    if "description" in given and not isinstance(given["description"], str):
        out["description"] = str(given["description"])
    if "anyOf" in given:
        choices = given["anyOf"]
        out["anyOf"] = [_property(one, depth - 1) for one in choices] if isinstance(choices, list) else []
    if "properties" in given:
        inner = given["properties"]
        out["properties"] = _all_of(inner, depth - 1) if isinstance(inner, dict) else {}
    if "required" in given:
        named = given["required"]
        out["required"] = [one for one in named if isinstance(one, str)] if isinstance(named, list) else []
    return out
