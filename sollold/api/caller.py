"""Who asks: the request's id, the caller's identity for fairness, and how urgent it is."""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass

from aiohttp import web

from sollold.api.priority import priority_of
from sollold.serving.ask import Fault, Refusal
from sollold.units import parse_seconds

ID = web.RequestKey("request_id", str)
"""Where the request keeps its id."""

_ID = re.compile(r"[\w.:\-]{1,64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Caller:
    """What the headers say.

    Attributes:
        id: of the request, unique: it begins with the caller's own ``X-Request-Id`` when that is a sane one.
        client: digest of the key it shows, else its address: whose share of the turns it takes.
        priority: 1 to 10.
        deadline: seconds in which the answer must be whole (``X-Sollold-Deadline``, or the
            body's ``timeout``); 0: none.
        explain: it wants the router's scores (``X-Sollold-Explain: 1``).
    """

    id: str
    client: str
    priority: int
    deadline: float
    explain: bool


def request_id(request: web.Request) -> str:
    """The id of a request: the caller's when it is short and plain, else one made up."""
    given = request.headers.get("X-Request-Id", "")
    return given if _ID.fullmatch(given) else secrets.token_hex(8)


def client_of(request: web.Request) -> str:
    """Whom to be fair to. Keys are never kept or logged, only the beginning of their digest."""
    key = request.headers.get("Authorization") or request.headers.get("X-Api-Key") or ""
    # Every Ollama user of the openai package sends a dummy key: an address tells more.
    if key.lower() in ("", "bearer", "ollama", "bearer ollama", "bearer none", "bearer sk-no-key-required"):
        return request.remote or "local"
    return "key:" + hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def caller_of(request: web.Request, field: object = None, timeout: object = None) -> Caller:
    """What ``request`` says of its caller; ``field`` is the body's ``priority``, ``timeout`` its own.

    Raises:
        Refusal: BAD_REQUEST for a priority or deadline that is none.
    """
    headers = request.headers
    deadline = 0.0
    named = headers.get("X-Sollold-Deadline") or timeout
    if named is not None:
        try:
            deadline = parse_seconds(str(named))
        except ValueError as error:
            raise Refusal(Fault.BAD_REQUEST, f"the time-out is not right: {error}") from None
        if deadline <= 0:
            raise Refusal(Fault.BAD_REQUEST, "the time-out must be more than 0 seconds")
    return Caller(
        id=f"{request.get(ID) or request_id(request)}.{secrets.token_hex(3)}",
        client=client_of(request),
        priority=priority_of(headers.get("X-Sollold-Priority"), field, headers.get("X-Sollold-Role")),
        deadline=deadline,
        explain=headers.get("X-Sollold-Explain", "").lower() in ("1", "true", "yes"),
    )
