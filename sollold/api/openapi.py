"""``/openapi.json``: what every route takes and may answer, made from the table of routes. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import msgspec

from sollold import __version__
from sollold.api.fault_shape import Dialect
from sollold.api.route import Route

_PARAMETER = re.compile(r"\{(\w+)(?::[^}]*)?\}")

_ERRORS: dict[Dialect, dict[str, Any]] = {
    Dialect.OLLAMA: {
        "type": "object",
        "properties": {"error": {"type": "string"}},
        "required": ["error"],
    },
    Dialect.OPENAI: {
        "type": "object",
        "properties": {
            "error": {
                "type": "object",
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
                "required": ["message", "type", "param", "code"],
            }
        },
        "required": ["error"],
    },
    Dialect.ANTHROPIC: {
        "type": "object",
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
                "required": ["type", "message"],
            },
        },
        "required": ["type", "error"],
    },
}

_ALWAYS = {
    400: "The request is not right; the message says where",
    403: "A web page of a foreign origin asked",
}
_WITH_BODY = {413: "The body is too long"}
_OF_MODELS = {
    404: "There is no such model",
    501: "The engine of this model can't do that",
    502: "The engine failed",
    503: "Not now; Retry-After says when to ask again",
    504: "It took longer than the limit",
    507: "The model does not fit; the message has the arithmetic",
}


def describe(routes: Iterable[Route]) -> dict[str, Any]:
    """The OpenAPI 3.1 description."""
    rows = list(routes)
    bodies = [row.body for row in rows if row.body is not None]
    schemas, components = msgspec.json.schema_components(bodies, ref_template="#/components/schemas/{name}")
    of_body = dict(zip(bodies, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for row in rows:
        path = _PARAMETER.sub(lambda match: f"{{{match[1]}}}", row.path)
        operation: dict[str, Any] = {
            "summary": row.summary,
            "tags": [str(row.dialect)],
            "responses": _responses(row),
        }
        names = [match[1] for match in _PARAMETER.finditer(row.path)]
        if names:
            operation["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
                for name in names
            ]
        if row.body is not None:
            operation["requestBody"] = {
                "required": True,
                "content": {"application/json": {"schema": of_body[row.body]}},
            }
        paths.setdefault(path, {})[row.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "sollold",
            "version": __version__,
            "description": "Ollama's, OpenAI's and Anthropic's dialects, and the cluster's own routes.",
        },
        "paths": paths,
        "components": {
            "schemas": {**components, **{f"Error_{dialect}": shape for dialect, shape in _ERRORS.items()}}
        },
    }


def _responses(row: Route) -> dict[str, Any]:
    good = {kind: _good(kind) for kind in row.produces} if row.method != "HEAD" else {}
    answers: dict[str, Any] = {"200": {"description": "Done", **({"content": good} if good else {})}}
    for status in row.statuses:
        answers[str(status)] = {"description": "Done"}
    errors = dict(_ALWAYS)
    if row.body is not None:
        errors |= _WITH_BODY
    if row.method in ("POST", "DELETE") or "{" in row.path:
        errors |= _OF_MODELS
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/Error_{row.dialect}"}}}
    for status, text in errors.items():
        answers[str(status)] = {
            "description": text,
            **({"content": content} if row.method != "HEAD" else {}),
            **({"headers": {"Retry-After": {"schema": {"type": "string"}}}} if status == 503 else {}),
        }
    return answers


def _good(kind: str) -> dict[str, Any]:
    return {"schema": {}} if kind == "application/json" else {"schema": {"type": "string"}}
