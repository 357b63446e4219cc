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
    405: "This method is not allowed here; Allow says which are",
    500: "The node failed in a way it did not expect; its log says more, under the request's id",
}
_WITH_BODY = {408: "The body came too slowly", 413: "The body is too long"}
_OF_ENGINES = {401: "The engine wants to know who asks", 429: "The engine has too much to do"}
_OF_MODELS = {
    404: "There is no such model",
    501: "The engine of this model can't do that",
    502: "The engine failed",
    503: "Not now; Retry-After says when to ask again",
    504: "It took longer than the limit",
    507: "The model does not fit; the message has the arithmetic",
}


_OF_STATUS = {
    405: {"Allow": "The methods that are"},
    503: {"Retry-After": "Seconds after which to ask again"},
}
_STRING: dict[str, Any] = {"type": "string"}
_ASKED = {
    "X-Sollold-Priority": "1 (may wait) to 10 (now), or its name; goes before the body's priority",
    "X-Sollold-Role": "What the caller does, which has a priority of its own",
    "X-Sollold-Deadline": "Seconds, or a duration such as 30s, in which the answer must be whole",
    "X-Sollold-Explain": "1: the answer says what else could have given it",
    "X-Request-Id": "Stands in the logs and in the answer",
}
_SAID = {
    "X-Sollold-Backend": "How the model runs: sharded, local or ollama",
    "X-Sollold-Node": "The node that answered",
    "X-Sollold-Model": "The model's name in the cluster",
    "X-Sollold-Devices": "The devices that hold it",
    "X-Sollold-Resumed": "Times that the answer went on after a fault",
    "X-Sollold-Status": "What a stream that has not begun yet waits for",
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
        parameters = _parameters(row)
        if parameters:
            operation["parameters"] = parameters
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


def _parameters(row: Route) -> list[dict[str, Any]]:
    named = {"type": "string", "minLength": 1}
    number = {"type": "integer", "minimum": 0, "maximum": 999_999_999}
    return [
        *(
            {"name": match[1], "in": "path", "required": True, "schema": named}
            for match in _PARAMETER.finditer(row.path)
        ),
        *({"name": name, "in": "query", "description": text, "schema": number} for name, text in row.query),
        *(
            {"name": name, "in": "header", "description": text, "schema": _STRING}
            for name, text in (_ASKED.items() if row.turn else ())
        ),
    ]


def _headers(texts: dict[str, str]) -> dict[str, Any]:
    return {name: {"description": text, "schema": _STRING} for name, text in texts.items()}


def _responses(row: Route) -> dict[str, Any]:
    id_ = {"X-Request-Id": "The request's id"}
    headers = _headers({**id_, **_SAID} if row.turn else id_)
    good = {kind: _good(kind) for kind in row.produces} if row.method != "HEAD" else {}
    answers: dict[str, Any] = {
        "200": {"description": "Done", "headers": headers, **({"content": good} if good else {})}
    }
    for status in row.statuses:
        answers[str(status)] = {"description": "Done", "headers": headers}
    errors = dict(_ALWAYS)
    if row.body is not None:
        errors |= _WITH_BODY
    if row.method in ("POST", "DELETE") or "{" in row.path:
        errors |= _OF_MODELS
    if row.turn:
        errors |= _OF_ENGINES
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/Error_{row.dialect}"}}}
    for status, text in errors.items():
        answers[str(status)] = {
            "description": text,
            **({"content": content} if row.method != "HEAD" else {}),
            "headers": _headers(id_ | _OF_STATUS.get(status, {})),
        }
    return answers


def _good(kind: str) -> dict[str, Any]:
    return {"schema": {}} if kind == "application/json" else {"schema": {"type": "string"}}
