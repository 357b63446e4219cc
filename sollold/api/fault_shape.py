"""How a refusal looks in each dialect: its status, its type, its body."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec

from sollold.serving.ask import Fault, Refusal
from sollold.serving.too_long import longest_input


class Dialect(StrEnum):
    """Whose manner of speaking a route keeps."""

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

_OF_ENGINES = (400, 401, 403, 404, 413, 429, 501, 503)
"""What an engine says in these numbers clients know how to take."""

_OPENAI_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}

_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}

_CODES = {
    Fault.NOT_FOUND: "model_not_found",
    Fault.TOO_BIG: "insufficient_memory",
    Fault.UNAVAILABLE: "unavailable",
    Fault.TIMEOUT: "timeout",
    Fault.INTERRUPTED: "interrupted",
}


def status_of(refusal: Refusal) -> int:
    """The HTTP status. An engine's refusal keeps its own where it is a usual one; its failure is a 502."""
    if refusal.fault is Fault.ENGINE:
        if refusal.status in _OF_ENGINES:
            return refusal.status
        return 400 if 400 <= refusal.status < 500 else 502
    if refusal.fault is Fault.BAD_REQUEST and 400 <= refusal.status < 600:
        return refusal.status
    return _STATUS[refusal.fault]


def error_object(dialect: Dialect, status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """The body of an error as ``dialect`` has it."""
    if dialect is Dialect.OLLAMA:
        return {"error": message}
    if dialect is Dialect.ANTHROPIC:
        kind = _ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": message}}
    kind = _OPENAI_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def refusal_object(dialect: Dialect, refusal: Refusal) -> dict[str, Any]:
    """The body of a refusal as ``dialect`` has it.

    A prompt that is too long has the words by which agents know it and shorten their conversation.
    """
    message, code = refusal.message, _CODES.get(refusal.fault)
    if refusal.fault is Fault.ENGINE and longest_input(message) is not None:
        code = "context_length_exceeded"
        if dialect is Dialect.ANTHROPIC:
            message = f"prompt is too long: {message}"
    return error_object(dialect, status_of(refusal), message, code)


def refusal_bytes(dialect: Dialect, refusal: Refusal) -> bytes:
    """`refusal_object` as JSON."""
    return msgspec.json.encode(refusal_object(dialect, refusal))


def retry_after(refusal: Refusal) -> str | None:
    """The value of ``Retry-After``: whole seconds, at least one; ``None`` when there is no sense in it."""
    if refusal.retry_after > 0:
        return str(max(1, round(refusal.retry_after)))
    return "5" if refusal.fault is Fault.UNAVAILABLE else None


def is_final(refusal: Refusal) -> bool:
    """Whether the same request, sent again by itself, would only fail again, though its status is a server's.

    What an engine died of was tried on others already: a client that repeats it takes down more of them.
    """
    failed = refusal.fault is Fault.ENGINE and status_of(refusal) == 502
    return failed or refusal.fault is Fault.TOO_BIG
