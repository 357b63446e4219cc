"""Reading what a caller sent: JSON, whatever its Content-Type says, since bare curl says a form."""

from __future__ import annotations

import asyncio
import re
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from sollold.serving.ask import Fault, Refusal
from sollold.serving.held import Held

T = TypeVar("T")

HELD = web.AppKey("held", Held)
"""Where the application keeps count of the bodies under way."""
_TAKEN = web.RequestKey("taken", int)
_RAW = web.RequestKey("raw", bytes)
_RETRY = 5.0

_PATIENCE = 120.0
"""Seconds for a body to arrive whole."""

_SURROGATES = re.compile(
    rb"(?<!\\)((?:\\\\)*+)"
    rb"\\u[dD](?:[89abAB][0-9a-fA-F]{2}(\\u[dD][c-fC-F][0-9a-fA-F]{2})?|[c-fC-F][0-9a-fA-F]{2})"
)
"""In JSON, the escape of half a character; with its other half, when that follows, as the second group."""
_MOST_ESCAPES = 100_000
"""In a body that is mended: more would hold up the node."""


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in ``raw``.

    Raises:
        Refusal: BAD_REQUEST when it is empty, no JSON, or no object.
    """
    if not raw.strip():
        raise Refusal(Fault.BAD_REQUEST, "the body is empty; send a JSON object")
    try:
        value = _decoded(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refusal(Fault.BAD_REQUEST, f"the body is not JSON: {error}") from None
    except RecursionError:
        raise Refusal(Fault.BAD_REQUEST, "the body is JSON nested too deeply") from None
    if not isinstance(value, dict):
        raise Refusal(Fault.BAD_REQUEST, f"the body must be a JSON object, it is {_kind(value)}")
    return value


def _decoded(raw: bytes) -> Any:
    """The value in ``raw``; U+FFFD stands for half a character, as in Go, and so in Ollama.

    A program that cuts a text by UTF-16 units cuts an emoji in two, and its JSON says so (``"\\ud83d"``).
    """
    try:
        return msgspec.json.decode(raw)
    except msgspec.DecodeError:
        if raw.count(b"\\u") > _MOST_ESCAPES:
            raise
        whole = _SURROGATES.sub(lambda met: met[0] if met[2] else met[1] + rb"\ufffd", raw)
        if whole == raw:
            raise
        return msgspec.json.decode(whole)


def _kind(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def as_type(value: dict[str, Any], type_: type[T]) -> T:
    """``value`` checked against ``type_``; fields it does not know are left out.

    Raises:
        Refusal: BAD_REQUEST, naming the field and what was expected.
    """
    try:
        return msgspec.convert(value, type=type_)
    except msgspec.ValidationError as error:
        raise Refusal(Fault.BAD_REQUEST, f"the request is not right: {error}") from None
    except RecursionError:
        raise Refusal(Fault.BAD_REQUEST, "the body is JSON nested too deeply") from None


async def read_object(request: web.Request) -> dict[str, Any]:
    """The request's body as a JSON object.

    Raises:
        Refusal: BAD_REQUEST, with status 413 when it is too long, 408 when it comes too slowly; UNAVAILABLE
            when the bodies under way take too much memory already.
    """
    return parse_object(await read_bytes(request))


async def read_bytes(request: web.Request) -> bytes:
    """The request's body; it may be asked for again.

    Raises:
        Refusal: as `read_object`.
    """
    raw: bytes | None = request.get(_RAW)
    if raw is not None:
        return raw
    _hold(request, request.content_length or 0)
    parts = bytearray()
    try:
        async with asyncio.timeout(_PATIENCE):
            # Bit by bit: one that does not say how long it is, or is packed, counts while it comes.
            while piece := await request.content.readany():
                parts += piece
                _hold(request, len(parts))
    except TimeoutError:
        raise Refusal(
            Fault.BAD_REQUEST, f"the body did not come whole within {_PATIENCE:.0f} s", status=408
        ) from None
    except web.RequestPayloadError as error:
        raise Refusal(Fault.BAD_REQUEST, f"the body can't be read: {_one_line(error)}") from None
    raw = request[_RAW] = bytes(parts)
    return raw


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _bound(request: web.Request, size: int) -> None:
    most = request.client_max_size
    if size > most:
        raise Refusal(Fault.BAD_REQUEST, f"the body is too long: {most} bytes are the most", status=413)


def _hold(request: web.Request, size: int) -> None:
    """Count ``size`` bytes for the request, until `let_go`.

    Raises:
        Refusal: as `read_object`.
    """
    _bound(request, size)
    held, taken = request.app.get(HELD), request.get(_TAKEN, 0)
    if held is None or size <= taken:
        return
    if not held.take(size - taken, taken):
        message = "the requests that this node is working on hold too much memory already; try again later"
        raise Refusal(Fault.UNAVAILABLE, message, retry_after=_RETRY)
    request[_TAKEN] = size


def let_go(request: web.Request) -> None:
    """The request is over, and its body with it."""
    held = request.app.get(HELD)
    if held is not None:
        held.give_back(request.pop(_TAKEN, 0))
