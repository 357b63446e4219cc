"""Reads a request's headers: its id, its caller (for fairness), its priority and deadline."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import msgspec
from aiohttp import web

from sollold.api.http.access import client_of
from sollold.api.http.exchange import exchange_of
from sollold.errors import bad_request
from sollold.priority import NAMES, NORMAL, ROLES
from sollold.serving.media import Media
from sollold.units import parse_seconds


class Caller(msgspec.Struct, frozen=True):
    """Properties of a request that its headers and body determine.

    Attributes:
        id: unique id of the request; begins with the caller's own ``X-Request-Id`` if that is valid.
        client: identity for fair queueing: the API key's id, else the address.
        priority: 1 to 10.
        deadline: seconds within which the answer must be complete (``X-Sollold-Deadline``, or the
            body's ``timeout``); 0 for none.
        explain: whether it wants the router's scores (``X-Sollold-Explain: 1``).
        media: what was cut out of the body; None if nothing was.
    """

    id: str
    client: str
    priority: int
    deadline: float
    explain: bool
    media: Media | None = None


def caller_of(request: web.Request, field: object, timeout: object) -> Caller:
    """Return the `Caller` of ``request``; ``field``, ``timeout``: its body's priority and timeout.

    Raises:
        Refusal: BAD_REQUEST for an invalid priority or timeout.
    """
    headers, exchange = request.headers, exchange_of(request)
    deadline = 0.0
    timeout_value = headers.get("X-Sollold-Deadline") or timeout
    if timeout_value is not None:
        try:
            deadline = parse_seconds(str(timeout_value))
        except ValueError as error:
            raise bad_request(f"invalid timeout: {error}") from None
        if deadline <= 0:
            raise bad_request("invalid timeout: it must be more than 0 seconds")
    return Caller(
        id=f"{exchange.id}.{os.urandom(3).hex()}",
        client=client_of(request).identity,
        priority=priority_of(headers.get("X-Sollold-Priority"), field, headers.get("X-Sollold-Role")),
        deadline=deadline,
        explain=headers.get("X-Sollold-Explain", "").lower() in ("1", "true", "yes"),
        media=exchange.media,
    )


def parse_priority(value: object) -> int:
    """Parse a priority: a number from 1 to 10, its digits, or a name such as ``HIGH``.

    Raises:
        Refusal: BAD_REQUEST, listing the names.
    """
    if isinstance(value, bool):
        number = None
    elif isinstance(value, int):
        number = value
    elif isinstance(value, str):
        text = value.strip()
        if text.isascii() and text.isdigit() and len(text) < 4:
            number = int(text)
        else:
            number = NAMES.get(text.upper().replace("-", "_").replace(" ", "_"))
    else:
        number = None
    if number is None or not 1 <= number <= 10:
        shown = str(value)[:40]
        raise bad_request(
            f"unknown priority {shown!r}; use a number from 1 to 10 or one of {', '.join(NAMES)}"
        )
    return number


def priority_of(header: str | None, field: object, role: str | None) -> int:
    """Return the priority of a request; the arguments are ``None`` where it has no such header or field.

    A role that is not in the table counts as `NORMAL`: callers choose their own names for roles.

    Raises:
        Refusal: BAD_REQUEST for an invalid priority.
    """
    if header is not None and header.strip():
        return parse_priority(header)
    if field is not None:
        return parse_priority(field)
    if role is not None:
        return ROLES.get(role.strip().lower(), NORMAL)
    return NORMAL


_MAX_CHARACTERS = 4096


def prefix_of(messages: object) -> str:
    """Return a digest of the messages up to the user's first, as 16 hex digits, for sticky routing, or ""."""
    if isinstance(messages, str):
        start: list[Any] = [messages[:_MAX_CHARACTERS]]
    elif isinstance(messages, list):
        start = []
        for message in messages[:8]:
            if not isinstance(message, dict):
                return ""
            start.append(_start_of(message.get("content")))
            if message.get("role") == "user":
                break
    else:
        return ""
    if not any(start):
        return ""
    return hashlib.blake2b(msgspec.json.encode(start)[: 4 * _MAX_CHARACTERS], digest_size=8).hexdigest()


def _start_of(content: Any) -> Any:
    """Return what identifies a message's content: its text without, say, a ``cache_control``, which agents
    move from message to message, and then make a list of a string.
    """
    if isinstance(content, list):
        parts = [part.get("text", part) if isinstance(part, dict) else part for part in content]
        content = parts[0] if len(parts) == 1 else parts
    return content[:_MAX_CHARACTERS] if isinstance(content, str) else content
