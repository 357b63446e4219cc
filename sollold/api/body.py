"""Reading what a caller sent: JSON, whatever its Content-Type says, since bare curl says a form."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from sollold.serving.ask import Fault, Refusal

T = TypeVar("T")

_PATIENCE = 120.0
"""Seconds for a body to arrive whole."""


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in ``raw``.

    Raises:
        Refusal: BAD_REQUEST when it is empty, no JSON, or no object.
    """
    if not raw.strip():
        raise Refusal(Fault.BAD_REQUEST, "the body is empty; send a JSON object")
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refusal(Fault.BAD_REQUEST, f"the body is not JSON: {error}") from None
    except RecursionError:
        raise Refusal(Fault.BAD_REQUEST, "the body is JSON nested too deeply") from None
    if not isinstance(value, dict):
        raise Refusal(Fault.BAD_REQUEST, f"the body must be a JSON object, it is {_kind(value)}")
    return value


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
        Refusal: BAD_REQUEST, with status 413 when it is too long, 408 when it comes too slowly.
    """
    try:
        async with asyncio.timeout(_PATIENCE):
            raw = await request.read()
    except TimeoutError:
        raise Refusal(
            Fault.BAD_REQUEST, f"the body did not come whole within {_PATIENCE:.0f} s", status=408
        ) from None
    except web.HTTPRequestEntityTooLarge as error:
        raise Refusal(Fault.BAD_REQUEST, f"the body is too long: {error.text}", status=413) from None
    return parse_object(raw)
