"""Converts a refusal to HTTP: its status, and its body in each dialect."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Any

import msgspec

from sollold.errors import IMAGE_FIELD, INVALID_VALUE, Fault, Refusal
from sollold.serving.request import longest_input


class Dialect(StrEnum):
    """The API whose formats a route uses."""

    OLLAMA = "ollama"
    OPENAI = "openai"
    ANTHROPIC = "anthropic"


_STATUS = {
    Fault.BAD_REQUEST: 400,
    Fault.NOT_FOUND: 404,
    Fault.AMBIGUOUS: 400,
    Fault.TOO_BIG: 507,
    Fault.UNAVAILABLE: 503,
    Fault.TIMEOUT: 504,
    Fault.INTERRUPTED: 502,
}

_ENGINE_STATUSES = (400, 401, 403, 404, 413, 429, 501, 503)
"""Engines' statuses that are passed on."""

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
"""Types of errors by status. All others below 500 are an ``invalid_request_error``."""
_ANTHROPIC_TYPES = {**_TYPES, 413: "request_too_large", 503: "overloaded_error", 504: "timeout_error"}

_LLAMA_TOO_LONG = re.compile(
    r"request \((\d+) tokens\) exceeds the available context size \((\d+) tokens\)(, try increasing it)?"
)
_LLAMA_BAD_IMAGE = "Failed to load image"
_ANTHROPIC_TOO_LONG = r"\1 tokens > \2 maximum"
"""Claude Code reads from these numbers how much it must remove."""

_ANTHROPIC_DETAILS = {"thread": {"error_code": "thread_unsupported_request"}}
"""Invalid field → details of the error, by which Anthropic's clients recognize what to do without it."""

_CODES = {
    Fault.NOT_FOUND: "model_not_found",
    Fault.TOO_BIG: "insufficient_memory",
    Fault.UNAVAILABLE: "unavailable",
    Fault.TIMEOUT: "timeout",
    Fault.INTERRUPTED: "interrupted",
}


def status_of(refusal: Refusal) -> int:
    """Return the HTTP status. An engine's own is kept if clients know it; an engine's failure is 502."""
    if refusal.fault is Fault.ENGINE:
        if refusal.status in _ENGINE_STATUSES:
            return refusal.status
        return 400 if 400 <= refusal.status < 500 else 502
    if refusal.fault is Fault.BAD_REQUEST and 400 <= refusal.status < 600:
        return refusal.status
    return _STATUS[refusal.fault]


def error_object(
    dialect: Dialect,
    status: int,
    message: str,
    code: str | None = None,
    field: str = "",
    request: str = "",
) -> dict[str, Any]:
    """Return the body of an error in ``dialect``. ``field``: the request's invalid field; ``request``: the
    request's id, which Anthropic's errors contain.
    """
    # A path or a header in the message may have bytes that are not UTF-8.
    message = message.encode("utf-8", "replace").decode()
    if dialect is Dialect.OLLAMA:
        return {"error": message}
    if dialect is Dialect.ANTHROPIC:
        kind = _ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
        error: dict[str, Any] = {"type": kind, "message": message}
        if details := _ANTHROPIC_DETAILS.get(field):
            error["details"] = details
        return {"type": "error", "error": error, "request_id": request or None}
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": field or None, "code": code}}


def is_too_long(refusal: Refusal) -> bool:
    """Whether an engine refused a prompt that is longer than its context."""
    return refusal.fault is Fault.ENGINE and longest_input(refusal.message) is not None


def refusal_object(dialect: Dialect, refusal: Refusal, request: str = "") -> dict[str, Any]:
    """Return the body of a refusal in ``dialect``. ``request``: as for `error_object`.

    A prompt that is too long, or an image that can't be used, gets the code or message by which agents
    recognize what they must shorten or leave out.
    """
    message, code = refusal.message, refusal.code or _CODES.get(refusal.fault)
    if is_too_long(refusal):
        code = "context_length_exceeded"
        if dialect is Dialect.ANTHROPIC:
            message = f"prompt is too long: {_LLAMA_TOO_LONG.sub(_ANTHROPIC_TOO_LONG, message)}"
    field = refusal.field
    if refusal.fault is Fault.ENGINE and _LLAMA_BAD_IMAGE in message:
        field, code = IMAGE_FIELD, INVALID_VALUE
    if field == IMAGE_FIELD and dialect is Dialect.ANTHROPIC:
        # By these words of Anthropic's, Claude Code recognizes an image that it must leave out.
        message = f"Could not process image: {message}"
    return error_object(dialect, status_of(refusal), message, code, field, request)


def refusal_bytes(dialect: Dialect, refusal: Refusal, request: str = "") -> bytes:
    """Return `refusal_object` as JSON."""
    return msgspec.json.encode(refusal_object(dialect, refusal, request))


def retry_after(refusal: Refusal) -> str | None:
    """Return the value of ``Retry-After`` in whole seconds, at least one; ``None`` for no such header."""
    if refusal.retry_after > 0:
        return str(max(1, round(refusal.retry_after)))
    return "5" if refusal.fault is Fault.UNAVAILABLE else None


def is_final(refusal: Refusal) -> bool:
    """Whether the same request would fail again, or should not be repeated, although its status is a 5xx.

    A request that crashed an engine was already tried on others: repeating it would crash more of them.
    """
    failed = refusal.fault is Fault.ENGINE and status_of(refusal) == 502
    return refusal.final or failed or refusal.fault is Fault.TOO_BIG
