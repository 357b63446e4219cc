"""``/openapi.json``: describes the requests and responses of each route in the route table. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import msgspec

from sollold import __version__
from sollold.api.http.errors import Dialect
from sollold.api.http.route import Route
from sollold.cluster.gossip.record import Backend

_PARAMETER = re.compile(r"\{(\w+)(?::[^}]*)?\}")

_STRING: dict[str, Any] = {"type": "string"}
_STRING_OR_NULL = {"type": ["string", "null"]}


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an object that has all of ``properties``."""
    return {"type": "object", "properties": properties, "required": [*properties]}


_OPENAI_ERROR = _object(message=_STRING, type=_STRING, param=_STRING_OR_NULL, code=_STRING_OR_NULL)
_ANTHROPIC_ERROR = _object(type=_STRING, message=_STRING)
_ERRORS = {
    Dialect.OLLAMA: _object(error=_STRING),
    Dialect.OPENAI: _object(error=_OPENAI_ERROR),
    Dialect.ANTHROPIC: {
        **_object(type={"const": "error"}, error=_ANTHROPIC_ERROR, request_id=_STRING_OR_NULL),
        "required": ["type", "error"],
    },
}

_COMMON = {
    400: "Invalid request; the message names the field",
    401: "An API key is needed, or the one sent is not valid",
    403: "The key's scope does not include this, or the host or the page's origin is not allowed",
    405: "Method not allowed; Allow lists those that are",
    500: "Internal error; see the node's log under the request's id",
}
_BODY_ERRORS = {408: "The body was not received in time", 413: "The body is too large"}
_ENGINE_ERRORS = {429: "The engine is overloaded"}
_MODEL_ERRORS = {
    404: "Model not found",
    501: "The model's engine does not support that",
    502: "The engine failed",
    503: "Temporarily unavailable; see Retry-After",
    504: "Time limit exceeded",
    507: "The model does not fit into memory; the message says by how much",
}


_STATUS_HEADERS = {
    405: {"Allow": "The allowed methods"},
    503: {"Retry-After": "Seconds to wait before a retry"},
}
REQUEST_HEADERS = {
    "X-Sollold-Priority": "1 (lowest) to 10 (highest), or a name; overrides the body's priority",
    "X-Sollold-Role": "The caller's role, which implies a priority",
    "X-Sollold-Deadline": "Seconds, or a duration such as 30s, within which the answer must be complete",
    "X-Sollold-Explain": "1: in Ollama's API, `_routing` lists the other endpoints and their scores",
    "X-Request-Id": "Used in the logs and returned in the answer",
}
RESPONSE_HEADERS = {
    "X-Sollold-Backend": f"How the model runs: {', '.join(Backend)}",
    "X-Sollold-Node": "The node that answered",
    "X-Sollold-Model": "The model's name in the cluster",
    "X-Sollold-Devices": "The devices that hold the model",
    "X-Sollold-Resumed": "Number of times the answer was resumed after a fault",
    "X-Sollold-Gap-Ms": "Milliseconds without a token while it was resumed",
    "X-Sollold-Warning": "What was changed in the request, or has no effect",
    "X-Sollold-Status": "What a stream that has not started is waiting for",
}


def describe(routes: Iterable[Route]) -> dict[str, Any]:
    """Return the OpenAPI 3.1 description."""
    rows = list(routes)
    bodies = [row.body for row in rows if row.body is not None]
    schemas, components = msgspec.json.schema_components(bodies, ref_template="#/components/schemas/{name}")
    body_schemas = dict(zip(bodies, schemas, strict=True))
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
                "content": {"application/json": {"schema": body_schemas[row.body]}},
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
    string = {"type": "string", "minLength": 1}
    number = {"type": "integer", "minimum": 0, "maximum": 999_999_999}
    return [
        *(
            {"name": match[1], "in": "path", "required": True, "schema": string}
            for match in _PARAMETER.finditer(row.path)
        ),
        *(
            {
                "name": name,
                "in": "query",
                "description": text,
                "schema": _STRING if name in row.string_query else number,
            }
            for name, text in row.query
        ),
        *(
            {"name": name, "in": "header", "description": text, "schema": _STRING}
            for name, text in (REQUEST_HEADERS.items() if row.inference else ())
        ),
    ]


def _headers(texts: dict[str, str]) -> dict[str, Any]:
    return {name: {"description": text, "schema": _STRING} for name, text in texts.items()}


def _responses(row: Route) -> dict[str, Any]:
    id_ = {"X-Request-Id": "The request's id"}
    headers = _headers({**id_, **RESPONSE_HEADERS} if row.inference else id_)
    schemas = {kind: {"schema": {} if kind == "application/json" else _STRING} for kind in row.produces}
    success = schemas if row.method != "HEAD" else {}
    responses: dict[str, Any] = {
        "200": {"description": "Done", "headers": headers, **({"content": success} if success else {})}
    }
    for status in row.statuses:
        responses[str(status)] = {"description": "Done", "headers": headers}
    errors = _COMMON | {status: text for status, text in _MODEL_ERRORS.items() if status in row.statuses}
    if row.body is not None:
        errors |= _BODY_ERRORS
    if row.method in ("POST", "DELETE") or "{" in row.path:
        errors |= _MODEL_ERRORS
    if row.inference:
        errors |= _ENGINE_ERRORS
    if row.path.startswith("/api/cluster/"):
        errors |= {501: "This node does not offer that"}
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/Error_{row.dialect}"}}}
    for status, text in errors.items():
        responses[str(status)] = {
            "description": text,
            **({"content": content} if row.method != "HEAD" else {}),
            "headers": _headers(id_ | _STATUS_HEADERS.get(status, {})),
        }
    return responses
