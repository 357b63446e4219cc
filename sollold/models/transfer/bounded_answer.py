"""Reads the body of an HTTP response up to a limit."""

from __future__ import annotations

import aiohttp


async def read_at_most(answer: aiohttp.ClientResponse, limit: int) -> bytes:
    """Return the first ``limit`` bytes of the body, or all of it.

    Raises:
        aiohttp.ClientError: the connection broke off.
    """
    raw = bytearray()
    while piece := await answer.content.read(limit - len(raw)):
        raw += piece
    return bytes(raw)


async def read_whole(answer: aiohttp.ClientResponse, limit: int) -> bytes | None:
    """Return the body, or None if it is longer than ``limit`` bytes.

    Raises:
        aiohttp.ClientError: the connection broke off.
    """
    raw = await read_at_most(answer, limit + 1)
    return raw if len(raw) <= limit else None
