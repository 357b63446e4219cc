"""Reads the body of an HTTP response up to a limit."""

from __future__ import annotations

import aiohttp


async def read_at_most(answer: aiohttp.ClientResponse, most: int) -> bytes:
    """Return the first ``most`` bytes of the body, or all of it.

    Raises:
        aiohttp.ClientError: the connection broke off.
    """
    raw = bytearray()
    while piece := await answer.content.read(most - len(raw)):
        raw += piece
    return bytes(raw)


async def read_whole(answer: aiohttp.ClientResponse, most: int) -> bytes | None:
    """Return the body, or None if it is longer than ``most`` bytes.

    Raises:
        aiohttp.ClientError: the connection broke off.
    """
    raw = await read_at_most(answer, most + 1)
    return raw if len(raw) <= most else None
