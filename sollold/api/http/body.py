"""Reads request bodies as JSON, with any Content-Type (curl by default declares a form)."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

import msgspec
from aiohttp import HttpVersion11, web

from sollold.api.http.decompress import decompressed
from sollold.api.http.exchange import Exchange, exchange_of
from sollold.api.http.invalid import explain, wrong_field
from sollold.api.http.json_bounds import JsonBounds, TooManyValues
from sollold.api.http.json_repair import TooMuchToRepair, repaired
from sollold.api.http.media_cut import SHORTEST_CUT, cut_media, restore_texts
from sollold.errors import Fault, Refusal, bad_request

T = TypeVar("T")

LONGEST_BODY = 128 << 20
"""Maximum bytes of a JSON body, including images. Blobs are streamed and not limited by it."""
_RETRY_SECONDS = 5.0

_BODY_TIMEOUT = 120.0
"""Timeout for receiving a whole body, in seconds."""

_DEFAULT_MAX_BYTES = 8 << 20
_WITH_MEDIA = (
    *("/api/chat", "/api/generate", "/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens"),
)
_WITH_TEXTS = (
    *("/api/embed", "/v1/embeddings", "/api/batch/embed", "/v1/responses", "/v1/responses/input_tokens"),
)
_MAX_BYTES = {
    **dict.fromkeys(_WITH_MEDIA, LONGEST_BODY),
    **dict.fromkeys(_WITH_TEXTS, 24 << 20),
}
"""Route → maximum bytes of its bodies, if more than usual: images, many texts."""

_MAX_ITEMS = {"messages": 4096, "input": 4096, "tools": 512, "functions": 512}
"""Maximum objects in a field, in every dialect: checking and rewriting each takes up to 0.1 ms."""
_SMALL = 64 * 1024
_LARGE = 128 * 1024
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""Programs on Windows write it at the start of text files; RFC 8259 allows receivers to ignore it."""
_MAX_BLANK_BYTES = 4096
"""Maximum whitespace that counts as a missing body; for more, the decoder reports the missing value."""


async def parse_object(raw: bytes | bytearray) -> dict[str, Any]:
    """Decode the JSON object in ``raw``.

    Raises:
        Refusal: BAD_REQUEST if it is empty, not JSON, not an object, or has too many items.
    """
    if len(raw) <= _MAX_BLANK_BYTES and not raw.strip():
        raise bad_request("missing request body")
    try:
        try:
            value = msgspec.json.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError):
            value = msgspec.json.decode(await repaired(raw))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad_request(f"the body is not JSON: {error}") from None
    except TooMuchToRepair:
        raise bad_request("the body is not JSON in UTF-8") from None
    except RecursionError:
        raise bad_request("the body is JSON nested too deeply") from None
    if len(raw) >= _LARGE:
        # Processing it takes time as well.
        await asyncio.sleep(0)
    if not isinstance(value, dict):
        raise bad_request(f"the body must be a JSON object, it is {_kind(value)}")
    for name, limit in _MAX_ITEMS.items():
        items = value.get(name)
        if (
            isinstance(items, list)
            and len(items) > limit
            and sum(isinstance(item, dict) for item in items) > limit
        ):
            raise bad_request(f"{name} has more than {limit} items", field=name)
    return value


def _kind(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def as_type(value: dict[str, Any], type_: type[T]) -> T:
    """Convert ``value`` to ``type_``; unknown fields are left out, null means "not given".

    Raises:
        Refusal: BAD_REQUEST, naming the field and what was expected.
    """
    try:
        given = value
        if None in value.values():
            given = {key: field for key, field in value.items() if field is not None}
        # Not strict: clients send numbers as "5" and 5.0, which the official servers accept.
        return msgspec.convert(given, type=type_, strict=False)
    except msgspec.ValidationError as error:
        message = f"invalid request: {explain(error, type_)}"
        raise bad_request(message, field=wrong_field(error)) from None
    except RecursionError:
        raise bad_request("the body is JSON nested too deeply") from None


async def read_object(request: web.Request) -> dict[str, Any]:
    """Read the request's body as a JSON object; large images and audio are cut out of it (`Exchange.media`).

    Raises:
        Refusal: BAD_REQUEST, with status 413 if it is too long, 408 if it arrives too slowly; UNAVAILABLE
            if the bodies in progress already take too much memory.
    """
    raw = await read_bytes(request)
    if len(raw) < SHORTEST_CUT or (exchange := exchange_of(request)).route not in _WITH_MEDIA:
        return await parse_object(raw)
    text, media = await cut_media(raw)
    value = await parse_object(text)
    if media is not None:
        await restore_texts(value, media)
        exchange.media = media
    return value


async def read_bytes(request: web.Request) -> bytearray:
    """Read the request's body; further calls return it again.

    Raises:
        Refusal: as `read_object`.
    """
    exchange = exchange_of(request)
    if exchange.body is not None:
        return exchange.body
    limit = min(_MAX_BYTES.get(exchange.route, _DEFAULT_MAX_BYTES), request.client_max_size)
    # An announced length takes no memory yet, so it is not counted against the budget.
    length = request.content_length or 0
    _check_size(length, limit)
    accept_body(request, exchange)
    parts, bounds = bytearray(), JsonBounds()
    try:
        if 0 < length <= _SMALL and request.content.is_eof() and "Content-Encoding" not in request.headers:
            # The usual case: it has arrived as a whole with its headers.
            piece = request.content.read_nowait()
            parts += piece
            bounds.feed(piece)
            _count(exchange, len(parts) + bounds.cost)
        else:
            await _gather(request, exchange, parts, bounds, limit)
    except TooManyValues as error:
        raise bad_request(str(error)) from None
    except TimeoutError:
        raise bad_request(f"the body was not received within {_BODY_TIMEOUT:.0f} s", status=408) from None
    except web.RequestPayloadError as error:
        raise bad_request(f"the body can't be read: {_one_line(error)}") from None
    if parts.startswith(_BYTE_ORDER_MARK):
        del parts[: len(_BYTE_ORDER_MARK)]
    # Not copied, which would take long for a large body.
    exchange.body = parts
    return parts


async def note_expectation(request: web.Request) -> None:
    """Remember that the client waits with the body until its request is accepted (RFC 9110, 10.1.1).

    Other expectations are ignored.
    """
    expected = request.headers["Expect"].lower()
    exchange_of(request).waits = request.version >= HttpVersion11 and expected == "100-continue"


def accept_body(request: web.Request, exchange: Exchange) -> None:
    """Let a client that waits send the body, which is about to be read."""
    waits, exchange.waits = exchange.waits, False
    if waits and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


async def _gather(
    request: web.Request, exchange: Exchange, parts: bytearray, bounds: JsonBounds, limit: int
) -> None:
    """Read piece by piece; a body of unknown or compressed length is counted as it arrives."""
    async with asyncio.timeout(_BODY_TIMEOUT):
        async for piece in decompressed(request):
            parts += piece
            bounds.feed(piece)
            _check_size(len(parts), limit)
            _count(exchange, len(parts) + bounds.cost)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _check_size(size: int, limit: int) -> None:
    """Refuse a body that is longer than its route allows.

    Raises:
        Refusal: BAD_REQUEST with status 413.
    """
    if size > limit:
        raise bad_request(f"body too large: the limit is {limit} bytes", status=413)


def _count(exchange: Exchange, size: int) -> None:
    """Count ``size`` bytes against the budget, until `release_body`.

    Raises:
        Refusal: as `read_object`.
    """
    budget, counted = exchange.budget, exchange.counted
    if budget is None or size <= counted:
        return
    if not budget.reserve(size - counted, counted, exchange.holder):
        message = "the bodies of running requests already use too much memory; try again later"
        raise Refusal(Fault.UNAVAILABLE, message, retry_after=_RETRY_SECONDS)
    exchange.counted = size


def release_body(exchange: Exchange) -> None:
    """Return the body's bytes to the budget when the request has ended."""
    if exchange.budget is not None and exchange.counted:
        exchange.budget.release(exchange.counted, exchange.holder)
        exchange.counted = 0
