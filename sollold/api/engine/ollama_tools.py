"""Rewrites tool schemas so that an Ollama can read them: its Go types reject much of JSON Schema. Pure.

An Ollama only prints them into the prompt and enforces none of them, so rewriting loses nothing.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

_MAX_DEPTH = 32


def readable_tools(tools: Any) -> Any:
    """Return tools with such schemas. Invalid tools stay: not every route that accepts the field reads it."""
    return [_readable(tool) for tool in tools] if isinstance(tools, list) else tools


def _readable(tool: Any) -> Any:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict):
        return tool
    # An Ollama gives a tool without parameters properties of null, which llama.cpp rejects.
    schema = function.get("parameters") or {}
    if not isinstance(schema, dict):
        return tool
    kinds, required = schema.get("type"), schema.get("required")
    out = {key: value for key, value in schema.items() if key not in ("type", "required", "properties")}
    out["type"] = kinds if isinstance(kinds, str) else "object"
    if isinstance(required, list):
        out["required"] = [name for name in required if isinstance(name, str)]
    properties = schema.get("properties")
    out["properties"] = _properties(properties if isinstance(properties, dict) else {}, _MAX_DEPTH)
    return {**tool, "function": {**function, "parameters": out}}


def _properties(properties: Schema, depth: int) -> Schema:
    return {name: _property(child, depth) for name, child in properties.items()}


def _property(schema: Any, depth: int) -> Schema:
    """Rewrite a nested schema; ``true`` and anything invalid becomes an empty one."""
    if not isinstance(schema, dict) or depth <= 0:
        return {}
    out = dict(schema)
    kinds, enum = schema.get("type"), schema.get("enum")
    if "type" in schema and not isinstance(kinds, str):
        out["type"] = [kind for kind in kinds if isinstance(kind, str)] if isinstance(kinds, list) else []
    if not out.get("type"):
        out.pop("type", None)
    if "enum" in schema and not isinstance(enum, list):
        out["enum"] = [enum]
    if "description" in schema and not isinstance(schema["description"], str):
        out["description"] = str(schema["description"])
    if "anyOf" in schema:
        choices = schema["anyOf"]
        out["anyOf"] = [_property(part, depth - 1) for part in choices] if isinstance(choices, list) else []
    if "properties" in schema:
        properties = schema["properties"]
        out["properties"] = _properties(properties, depth - 1) if isinstance(properties, dict) else {}
    if "required" in schema:
        names = schema["required"]
        out["required"] = [n for n in names if isinstance(n, str)] if isinstance(names, list) else []
    return out
